"""The order in which pairs of a query block and a key block are visited: a list in scalar memory.

An entry is an int32: the block that stays while others pass by (major), the one that passes (minor) and
whether the pair is computed. Every major block is in the list, so that its result is written; one without
pairs has an entry that computes nothing. Lists of masks known only at run time end in idle entries, which
repeat the last pair: nothing is copied for them.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.cost import attention as cost

MOST = 2**15  # blocks a side that an entry has room for


class Plan(NamedTuple):
    """Lists one after another; ``rows`` and ``heads`` of them are 1 where they serve all."""

    codes: jax.Array
    rows: int
    heads: int
    steps: int

    def start(self, b, h):
        """Where the list of a batch row and a head begins."""
        return ((b if self.rows > 1 else 0) * self.heads + (h if self.heads > 1 else 0)) * self.steps


def encode(major, minor, computed):
    return (major << 16) | (minor << 1) | computed


def decode(code):
    """(major, minor, whether computed)."""
    return code >> 16, (code >> 1) & (MOST - 1), (code & 1) == 1


def ranges(sizes, options):
    """For each query block the key blocks [low, high) that the causal mask and the window leave."""
    return cost.key_blocks(
        sizes.T, sizes.S, sizes.block_q, sizes.block_kv, is_causal=options.is_causal, window=options.window
    )


def possible(block_mask, ranges):
    """The block mask less what the causal mask and the window exclude."""
    low, high = (jnp.array(edge, jnp.int32)[:, None] for edge in zip(*ranges, strict=True))
    j = jnp.arange(block_mask.shape[3])
    return block_mask & (low <= j) & (j < high)


def fixed_by_queries(ranges) -> list[int]:
    """The list of a kernel that keeps a query block and passes over key blocks."""
    return _encoded([list(range(low, high)) for low, high in ranges])


def fixed_by_keys(ranges, n_kv, G) -> list[int]:
    """The same, a key block kept and query blocks passing, each of G heads: minor is i G + g."""
    visitors = [[i for i, (low, high) in enumerate(ranges) if low <= j < high] for j in range(n_kv)]
    return _encoded([[i * G + g for i in line for g in range(G)] for line in visitors])


def by_queries(active, most_active) -> Plan:
    """As ``fixed_by_queries``, from a mask bool [B or 1, N or 1, query blocks, key blocks]."""
    return _computed(active, None if most_active is None else most_active + active.shape[2])


def by_keys(active, G, most_active) -> Plan:
    """As ``fixed_by_keys``, from a mask bool [B or 1, N or 1, query blocks, key blocks]."""
    rows, heads, nq, nkv = active.shape
    active = active.reshape(rows, max(heads // G, 1), -1, nq, nkv)
    active = jnp.broadcast_to(active, (*active.shape[:2], G, nq, nkv))
    active = active.transpose(0, 1, 4, 3, 2).reshape(rows, -1, nkv, nq * G)
    return _computed(active, None if most_active is None else most_active * G + nkv)


def _encoded(lines: list[list[int]]) -> list[int]:
    codes = []
    for major, line in enumerate(lines):
        codes += [encode(major, minor, 1) for minor in line] or [encode(major, 0, 0)]
    return codes


def _computed(active, steps) -> Plan:
    """From bool [rows, heads, majors, minors]."""
    rows, heads, majors, minors = active.shape
    steps = min(majors * minors, steps or majors * minors)
    empty = ~jnp.any(active, axis=-1, keepdims=True) & (jnp.arange(minors) == 0)
    needed, active = (a.reshape(rows, heads, -1) for a in (active | empty, active))
    order = jnp.argsort(~needed, axis=-1, stable=True)
    count = jnp.sum(needed, axis=-1, keepdims=True)
    step = jnp.arange(steps)
    pair = jnp.take_along_axis(order, jnp.minimum(step, count - 1), axis=-1)
    computed = jnp.take_along_axis(active, pair, axis=-1) & (step < count)
    codes = encode(pair // minors, pair % minors, computed.astype(jnp.int32))
    return Plan(codes.astype(jnp.int32).reshape(-1), rows, heads, steps)
