"""A checksum of arrays that does not depend on how they are split over devices and processes."""

from __future__ import annotations

import zlib

import jax
import numpy as np

from scaling import hosts

BLOCK = 1 << 20
"""Elements summed at a time: what is held beside the arrays."""


def digest(tree) -> str:
    """64 bits over the names, dtypes, shapes and bytes of a tree's arrays.

    The sum, modulo 2^64, of every element's bits times an odd weight by its name and place: a sum over parts
    in any order. Every process of a job must call it; all get the same.
    """
    total = 0
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        name = f"{jax.tree_util.keystr(path)}:{leaf.dtype}:{leaf.shape}"
        seed = np.uint64(zlib.crc32(name.encode()))
        if hosts.is_main():
            total += int(_mix(np.atleast_1d(seed))[0])
        for start, block in _parts(leaf):
            total += _weighted_sum(block, start, leaf.shape, seed)
    return f"{_over_processes(total % 2**64):016x}"


def _parts(leaf):
    """(first index along each axis, values) of every part that this process counts: each once in the job."""
    if not isinstance(leaf, jax.Array):
        yield (0,) * np.ndim(leaf), np.asarray(leaf)
        return
    for shard in leaf.addressable_shards:
        if shard.replica_id == 0:
            yield tuple(s.start or 0 for s in shard.index), np.asarray(shard.data)


def _weighted_sum(block: np.ndarray, start, shape, seed: np.uint64) -> int:
    total = 0
    strides = np.cumprod([1, *shape[:0:-1]], dtype=np.uint64)[::-1] if shape else ()
    block = block.reshape(1) if not shape else block
    rows = max(1, BLOCK // max(1, block[:1].size))
    for first in range(0, len(block), rows):
        part = np.ascontiguousarray(block[first : first + rows])
        bits = part.view(f"u{part.dtype.itemsize}").astype(np.uint64)
        place = np.zeros((1,) * part.ndim, np.uint64)
        for axis, stride in enumerate(strides):
            begin = start[axis] + (first if axis == 0 else 0)
            along = np.arange(begin, begin + part.shape[axis], dtype=np.uint64) * stride
            place = place + along.reshape(-1, *(1,) * (part.ndim - axis - 1))
        weights = _mix(place * np.uint64(2) + (seed << np.uint64(32))) | np.uint64(1)
        total += int(np.sum(bits * weights, dtype=np.uint64))
    return total


def _mix(x: np.ndarray) -> np.ndarray:
    """The finaliser of SplitMix64 (Steele et al. 2014): every bit of the result depends on all of x."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _over_processes(total: int) -> int:
    halves = np.array([total % 2**32, total >> 32], np.uint32)
    return sum(low + (high << 32) for low, high in hosts.of_all(halves).tolist()) % 2**64
