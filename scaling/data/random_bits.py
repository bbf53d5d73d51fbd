"""Random numbers that are a function of (seed, purpose, counter), alike on every platform."""

from __future__ import annotations

import numpy as np

from scaling.data.permutation import mix
from scaling.data.split import name_hashes

CDF_BITS = 40
"""Probabilities are drawn to 2^-40: errors in the entropy are far below any sampling error."""
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def bits(seed: int, purpose: str, count: int, first: int = 0) -> np.ndarray:
    """uint64 [count]: numbers ``first`` and on of the SplitMix64 stream of a seed and a purpose."""
    counter = np.arange(first, first + count, dtype=np.uint64)
    return mix(name_hashes([""], seed, purpose)[0] + (counter + np.uint64(1)) * _GOLDEN)


def uniforms(seed: int, purpose: str, count: int, first: int = 0) -> np.ndarray:
    """float64 [count], strictly between 0 and 1."""
    return ((bits(seed, purpose, count, first) >> np.uint64(12)).astype(np.float64) + 0.5) * 2.0**-52


def gammas(concentration: float | None, seed: int, purpose: str, count: int) -> np.ndarray:
    """float64 [count]: gamma variates of that shape; their shares are Dirichlet. Ones where it is None."""
    if concentration is None:
        return np.ones(count)
    from scipy.special import gammaincinv

    return gammaincinv(concentration, uniforms(seed, purpose, count))


class Rows:
    """Many distributions at once, drawn from by inverse transform.

    Attributes:
      begin_S: int64 [rows + 1]; row s has the entries ``begin_S[s] : begin_S[s + 1]``, one at least.
      prob_E: float64 [entries], each row's summing to 1.
    """

    def __init__(self, begin_S: np.ndarray, weight_E: np.ndarray):
        """Scales the weights (zero or above) of every row to probabilities."""
        sizes_S = np.diff(begin_S)
        row_E = np.repeat(np.arange(sizes_S.size), sizes_S)
        total_S = np.add.reduceat(weight_E, begin_S[:-1])
        self.begin_S, self.prob_E = begin_S, weight_E / total_S[row_E]
        count_E = np.round(self.prob_E * 2**CDF_BITS).astype(np.int64)
        sum_E = np.cumsum(count_E)  # of integers: exact, however many rows stand before
        top_E = np.minimum(sum_E - (sum_E - count_E)[begin_S[:-1]][row_E], 2**CDF_BITS)
        top_E[begin_S[1:] - 1] = 2**CDF_BITS
        self._upper_E = (row_E << CDF_BITS) + top_E

    def draw(self, row: np.ndarray, random: np.ndarray) -> np.ndarray:
        """int64: an entry for each of ``row`` (int64), decided by ``random`` (uint64, the same shape)."""
        key = (row << CDF_BITS) + (random >> np.uint64(64 - CDF_BITS)).astype(np.int64)
        return np.searchsorted(self._upper_E, key, side="right")

    def entropies(self) -> np.ndarray:
        """float64 [rows], in nats."""
        return np.add.reduceat(-plogp(self.prob_E), self.begin_S[:-1])


def plogp(p: np.ndarray) -> np.ndarray:
    """p log p, zero where p is."""
    return p * np.log(np.where(p > 0, p, 1.0))
