"""A permutation of 0 .. n-1 that is computed one element at a time, for any n, seed and epoch.

An epoch of a large corpus has too many samples to shuffle a list of them, and a list would be state to
save. Here the place of a sample is a function: a keyed bijection of k-bit words (k the least with
2^k >= n), applied again while its value is n or above ("cycle walking", Black and Rogaway 2002,
section 3), which makes it a bijection of 0 .. n-1. Integer arithmetic alone, so every NumPy version and
platform gives the same order.
"""

from __future__ import annotations

import numpy as np

_U64 = np.uint64
_GOLDEN = _U64(0x9E3779B97F4A7C15)
# Chi-square tests of the order (of pairs of samples, and of distances between neighbours) fail at 4 rounds
# and pass at 6; two more are spare.
_ROUNDS = 8
# Words of 4 bits still fail those tests at 6 rounds; words of 6 bits pass.
_LEAST_BITS = 6


def mix(x: np.ndarray) -> np.ndarray:
    """The 64-bit finaliser of SplitMix64 (Steele, Lea and Flood 2014), a bijection of uint64 arrays."""
    x = (x ^ (x >> _U64(30))) * _U64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> _U64(27))) * _U64(0x94D049BB133111EB)
    return x ^ (x >> _U64(31))


def permute(index: np.ndarray, n: int, seed: int, epoch: np.ndarray) -> np.ndarray:
    """Where each sample of an epoch stands in that epoch's own order.

    Args:
      index: int64 [...], values in 0 .. n-1.
      n: how many samples an epoch has, from 1 to 2^62.
      seed: from 0 to 2^64 - 1.
      epoch: int64, the shape of ``index``, zero or above.

    Returns:
      int64, the shape of ``index``; for each (seed, epoch) a bijection of 0 .. n-1.
    """
    if not 1 <= n <= 2**62:
        raise ValueError(f"n is {n}; it must be from 1 to 2^62")
    if not 0 <= seed < 2**64:
        raise ValueError(f"seed is {seed}; it must be from 0 to 2^64 - 1")
    if n == 1:
        return np.zeros(np.shape(index), np.int64)
    bits = max(_LEAST_BITS, (n - 1).bit_length())
    mask, shift = _U64((1 << bits) - 1), _U64((bits + 1) // 2)
    # The seed is mixed before the epoch is added: seed s in epoch 1 must not equal seed s + 1 in epoch 0.
    key = mix(mix(np.full(np.shape(index), seed, _U64) + _GOLDEN) + epoch.astype(_U64) * _GOLDEN)
    keys = [(mix(key + _U64(2 * r + 1)), mix(key + _U64(2 * r + 2)) | _U64(1)) for r in range(_ROUNDS)]

    def word(x, keys):
        for add, odd in keys:
            x = ((x + add) * odd) & mask
            x = x ^ (x >> shift)
        return x

    out = word(index.astype(_U64), keys)
    outside = np.flatnonzero(out >= n)
    while outside.size:
        at = [(add.reshape(-1)[outside], odd.reshape(-1)[outside]) for add, odd in keys]
        values = word(out.reshape(-1)[outside], at)
        out.reshape(-1)[outside] = values
        outside = outside[values >= n]
    return out.astype(np.int64)
