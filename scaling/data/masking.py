"""Masked diffusion: which tokens of a row are hidden and what each weighs, by (seed, step, row) alone.

The bound of masked diffusion with a linear schedule (Sahoo et al. 2024, eq. 11; Shi et al. 2024, eq. 5) is
the integral over t in (0, 1) of E[(1 / t) sum over hidden tokens of -log p(token | tokens in sight)], each of
n tokens hidden with probability t. Given how many are hidden, k, t decides nothing more, and

    int_0^1 (1/t) Binomial(k; n, t) dt = 1/k,

so that the bound is the mean over k uniform in 1 .. n, and over the sets of k tokens, of n/k times that sum
(Ou et al. 2024). That is what is drawn here: the same bound, with no 1/t that grows without limit.

k is floor(t n) + 1 with times t that lie evenly over the rows of a batch (Kingma et al. 2021, appendix I.1).
The first token of a row, and of a document in it, is always in sight and never counted: a document's first
token is not predicted (``stream``), here as there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from scaling.data.random_bits import bits, uniforms
from scaling.data.stream import Stream


def masked(batch: Mapping[str, np.ndarray], times_B, noise_BT, mask_token: int) -> dict[str, np.ndarray]:
    """A batch of ``pack`` with tokens hidden.

    Args:
      batch: [B, T]; rows of padding have positions 0.
      times_B: float64 [B] in [0, 1): how much of a row is hidden.
      noise_BT: uint64 [B, T]: the tokens with the smallest, but for the lowest bit, are hidden.
      mask_token: the id that stands in a hidden token's place.

    Returns:
      ``inputs`` with the hidden tokens replaced, ``targets`` the tokens themselves (not moved by one),
      ``loss_mask`` float32, 1 for every token that is counted, hidden or not, ``weights`` float32, n / k
      where hidden and 0 elsewhere; ``segment_ids`` and ``positions`` as they were.
    """
    counted_BT = batch["positions"] > 0
    n_B = counted_BT.sum(axis=1)
    k_B = np.minimum(np.floor(times_B * n_B).astype(np.int64) + 1, n_B)
    order_BT = np.argsort(
        np.where(counted_BT, noise_BT >> np.uint64(1), np.uint64(2**63)), axis=1, kind="stable"
    )
    rank_BT = np.empty_like(order_BT)
    np.put_along_axis(rank_BT, order_BT, np.arange(order_BT.shape[1])[None], axis=1)
    hidden_BT = rank_BT < k_B[:, None]
    weight_B = n_B / np.maximum(k_B, 1)
    return {
        **batch,
        "inputs": np.where(hidden_BT, np.int32(mask_token), batch["inputs"]),
        "targets": batch["inputs"],
        "loss_mask": counted_BT.astype(np.float32),
        "weights": np.where(hidden_BT, weight_B[:, None], 0).astype(np.float32),
    }


class MaskedStream(Stream):
    """The batches of ``Stream`` with tokens hidden: a function of (tokens, seq, batch, seed, step) too."""

    def __init__(self, *of, mask_token: int, **options):
        super().__init__(*of, **options)
        self.mask_token = mask_token

    def batch_at(self, step: int, rows: slice = slice(None)) -> dict[str, np.ndarray]:
        """As ``Stream.batch_at``, of ``masked``; a row's masks do not depend on which rows are asked for."""
        start, stop, _ = rows.indices(self.batch)
        first = (step * self.batch + start) * self.seq
        noise = bits(self.seed, "masks", (stop - start) * self.seq, first)
        times_B = (uniforms(self.seed, "times", 1, step) + np.arange(start, stop) / self.batch) % 1
        return masked(super().batch_at(step, rows), times_B, noise.reshape(-1, self.seq), self.mask_token)


def masked_draws(
    batches: Sequence[Mapping[str, np.ndarray]], draws: int, mask_token: int, seed: int = 0
) -> list[dict[str, np.ndarray]]:
    """Every batch ``draws`` times, hidden anew each time: first all of them once, then all again.

    The times of one row lie 1 / draws apart; those of all rows together are spread evenly.
    """
    B, T = batches[0]["inputs"].shape
    rows = B * len(batches)
    first = uniforms(seed, "held-out times", 1)
    noise = bits(seed, "held-out masks", draws * rows * T).reshape(draws, len(batches), B, T)
    out = []
    for draw in range(draws):
        for i, batch in enumerate(batches):
            number_B = np.arange(i * B, (i + 1) * B)
            times_B = (first + number_B / (rows * draws) + draw / draws) % 1
            out.append(masked(batch, times_B, noise[draw, i], mask_token))
    return out
