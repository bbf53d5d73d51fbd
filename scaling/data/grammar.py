"""A random hierarchical grammar whose strings have a known entropy.

Every document is one derivation of ``depth`` levels. At each level a symbol (one of V) is replaced by
``branching`` symbols of the level below, by one of its ``rules`` productions; the symbols of the lowest level
are the tokens, so a document has branching^depth of them. With equal probabilities this is the random
hierarchy model of Cagnetta et al. 2024.

The grammar is unambiguous. Within a level the right-hand sides of all V x rules productions differ, so a
tuple of ``branching`` symbols tells which production made it. All derivations have one shape, so the tuples
of a string are known: bottom-up, each level follows from the one below, and a string has one derivation. The
map from derivations to strings is thus a bijection onto its image, and the entropy of the string is that of
the derivation: that of the root, plus for each level the expected number of nodes of each symbol times the
entropy of its choice of a production.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from scaling.config import ConfigError
from scaling.data.permutation import permute
from scaling.data.random_bits import Rows, bits, gammas, plogp

_MOST_TUPLES = 2**24
_MOST_LEAVES = 2**20


@dataclasses.dataclass(frozen=True, eq=False)
class Grammar:
    """Productions of every level, from the root's down.

    Attributes:
      vocab: V symbols at each level; the root is uniform over them.
      right_lVMs: one int64 [V, rules, branching] a level, the right-hand sides.
      choices: one ``Rows`` a level, V rows of ``rules`` entries.
    """

    vocab: int
    right_lVMs: list[np.ndarray]
    choices: list[Rows]

    @property
    def length(self) -> int:
        """Tokens in a document."""
        return self.right_lVMs[0].shape[2] ** len(self.right_lVMs)

    def entropy(self) -> float:
        """Entropy of a document, in nats."""
        total, nodes_V = np.log(self.vocab), np.full(self.vocab, 1 / self.vocab)
        for right_VMs, choice in zip(self.right_lVMs, self.choices, strict=True):
            total += nodes_V @ choice.entropies()
            nodes_V = self._children(nodes_V, right_VMs, choice)
        return float(total)

    def first_token_entropy(self) -> float:
        """Entropy of a document's first token, in nats: no row predicts that token."""
        p_V = np.full(self.vocab, 1 / self.vocab)
        for right_VMs, choice in zip(self.right_lVMs, self.choices, strict=True):
            p_V = self._children(p_V, right_VMs[:, :, :1], choice)
        return float(-plogp(p_V).sum())

    def _children(self, nodes_V: np.ndarray, right_VMs: np.ndarray, choice: Rows) -> np.ndarray:
        """Expected number of children of each symbol, from that of their parents."""
        used_VM = nodes_V[:, None] * choice.prob_E.reshape(self.vocab, -1)
        weights = np.broadcast_to(used_VM[:, :, None], right_VMs.shape)
        return np.bincount(right_VMs.reshape(-1), weights.reshape(-1), self.vocab)

    def sample(self, documents: int, seed: int, purpose: str) -> np.ndarray:
        """int64 [documents, length]: independent documents."""
        root = bits(seed, f"{purpose} root", documents) % np.uint64(self.vocab)
        symbols_NL = root.astype(np.int64)[:, None]
        for level, (right_VMs, choice) in enumerate(zip(self.right_lVMs, self.choices, strict=True)):
            random = bits(seed, f"{purpose} level {level}", symbols_NL.size).reshape(symbols_NL.shape)
            entry = choice.draw(symbols_NL, random)
            symbols_NL = right_VMs.reshape(-1, right_VMs.shape[2])[entry].reshape(documents, -1)
        return symbols_NL

    def log_prob(self, tokens_NL: np.ndarray) -> np.ndarray:
        """float64 [N]: log-probability of each document, from its one derivation; -inf where it has none."""
        symbols_NL = np.asarray(tokens_NL, np.int64)
        total_N = np.full(len(symbols_NL), -np.log(self.vocab))
        for right_VMs, choice in zip(self.right_lVMs[::-1], self.choices[::-1], strict=True):
            _, rules, branching = right_VMs.shape
            digits = self.vocab ** np.arange(branching)[::-1]
            entry_of = np.full(self.vocab**branching, -1, np.int64)
            entry_of[(right_VMs @ digits).reshape(-1)] = np.arange(self.vocab * rules)
            entry = entry_of[symbols_NL.reshape(len(symbols_NL), -1, branching) @ digits]
            with np.errstate(divide="ignore"):
                total_N += np.where(entry >= 0, np.log(choice.prob_E)[entry], -np.inf).sum(1)
            symbols_NL = np.maximum(entry, 0) // rules
        return total_N


def grammar(
    vocab: int, depth: int, branching: int, rules: int, concentration: float | None, seed: int
) -> Grammar:
    """A grammar drawn from a seed; each symbol's production probabilities are Dirichlet, or equal (None).

    Raises:
      ConfigError: more productions than there are right-hand sides, or documents that are too long.
    """
    tuples, leaves = vocab**branching, branching**depth
    if branching < 2 or tuples > _MOST_TUPLES:
        raise ConfigError(
            f"data.branching is {branching} with data.vocab = {vocab}; it must be 2 or above, and "
            f"vocab^branching at most {_MOST_TUPLES}"
        )
    if vocab * rules > tuples:
        raise ConfigError(
            f"data.rules is {rules}; vocab x rules = {vocab * rules} right-hand sides must differ, and there "
            f"are vocab^branching = {tuples}: it must be at most {tuples // vocab}"
        )
    if leaves > _MOST_LEAVES:
        raise ConfigError(
            f"data.depth is {depth}; a document has branching^depth = {leaves} tokens, "
            f"and may have {_MOST_LEAVES} at most"
        )
    digits = vocab ** np.arange(branching)[::-1]
    right, choices = [], []
    for level in range(depth):
        number = np.arange(vocab * rules)
        code = permute(number, tuples, seed, np.full(number.shape, level))  # a bijection: all differ
        right.append((code[:, None] // digits % vocab).reshape(vocab, rules, branching))
        weight_E = np.maximum(gammas(concentration, seed, f"rules {level}", vocab * rules), 1e-300)
        choices.append(Rows(np.arange(vocab + 1, dtype=np.int64) * rules, weight_E))
    return Grammar(vocab, right, choices)
