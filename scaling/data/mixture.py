"""Mixtures of corpora in fixed proportions: a sample's number alone says which component it comes from.

Shares are whole numbers of ``BLOCK`` samples. In every block a component's samples stand at even distances
(sample k of q at the time (k + 1/2) / q), so that any run of samples, a batch as well as a study,
holds every component in its proportion to within a sample or so. Nothing is drawn and nothing is stored:
sample i is number j of component c, for a pair (c, j) that is computed from i alone.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from scaling.config import ConfigError
from scaling.data.tokens import Tokens

BLOCK = 10_000
"""Shares are rounded to 1/10,000."""


class Proportions:
    """The order in which components give samples.

    Attributes:
      shares_C: int64 [C], samples of each component in ``BLOCK``; they sum to it.
    """

    def __init__(self, weights: Sequence[float]):
        """Rounds the weights' proportions to shares, by largest remainder.

        Raises:
          ConfigError: a weight too small for a share of 1 in ``BLOCK``.
        """
        exact_C = np.asarray(weights, np.float64) / sum(weights) * BLOCK
        shares_C = np.floor(exact_C).astype(np.int64)
        missing = BLOCK - int(shares_C.sum())
        shares_C[np.argsort(shares_C - exact_C, kind="stable")[:missing]] += 1
        if (shares_C < 1).any():
            c = int(np.argmin(shares_C))
            raise ConfigError(
                f"data.components[{c}].weight is {weights[c]:g} of {sum(weights):g} together; "
                f"its share must be at least 1 in {BLOCK} samples"
            )
        self.shares_C = shares_C
        component_Q = np.repeat(np.arange(shares_C.size), shares_C)
        rank_Q = np.arange(BLOCK) - np.repeat(np.cumsum(shares_C) - shares_C, shares_C)
        order_Q = np.lexsort((component_Q, (rank_Q + 0.5) / shares_C[component_Q]))
        self._component_Q, self._rank_Q = component_Q[order_Q], rank_Q[order_Q]
        self._slots = [np.flatnonzero(self._component_Q == c) for c in range(shares_C.size)]

    def place(self, sample: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(component, number within the component), int64, of samples numbered from 0."""
        block, slot = np.divmod(sample, BLOCK)
        component = self._component_Q[slot]
        return component, block * self.shares_C[component] + self._rank_Q[slot]

    def sample_of(self, component: int, number: int) -> int:
        """The inverse of ``place``."""
        block, rank = divmod(number, int(self.shares_C[component]))
        return block * BLOCK + int(self._slots[component][rank])

    def counts(self, samples: int) -> np.ndarray:
        """int64 [C]: how many of the first ``samples`` samples each component gives."""
        block, slot = divmod(samples, BLOCK)
        within = np.bincount(self._component_Q[:slot], minlength=self.shares_C.size)
        return block * self.shares_C + within


class Mixture:
    """The documents of several corpora, and the proportions in which a stream takes rows of them.

    Attributes:
      parts: the components' documents.
      proportions: their ``Proportions``.
    """

    def __init__(self, parts: Sequence[Tokens], proportions: Proportions):
        self.parts, self.proportions = tuple(parts), proportions
        sizes = np.array([len(part) for part in self.parts], np.int64)
        self.begin_C = np.cumsum(sizes) - sizes  # int64 [C], where each part begins when laid end to end

    def __len__(self) -> int:
        return sum(len(part) for part in self.parts)

    @property
    def documents(self) -> int:
        """How many documents there are."""
        return sum(part.documents for part in self.parts)

    def rows(self, begin_B: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
        """As ``Tokens.rows`` of the parts laid end to end; every row must lie in one part."""
        part_B = np.searchsorted(self.begin_C, begin_B, side="right") - 1
        tokens_BL = np.empty((begin_B.size, length), np.int32)
        new_document_BL = np.empty((begin_B.size, length), bool)
        for c in np.unique(part_B):
            here = part_B == c
            tokens_BL[here], new_document_BL[here] = self.parts[c].rows(
                begin_B[here] - self.begin_C[c], length
            )
        return tokens_BL, new_document_BL
