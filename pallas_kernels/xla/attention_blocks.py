"""Which key blocks a block of queries visits, and the arrays in the layout that blocks are cut from."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Arrays(NamedTuple):
    """Attention's operands, tokens padded to whole blocks, query heads grouped over K heads of keys.

    q [B, K, T, G, H]; k, v [B, K, S, H]; bias, mask [B or 1, K or 1, T or 1, G or 1, S or 1] or None;
    segments [B, 1, T] and [B, 1, S] or None. T and S are the sizes before padding, dtype that of logits.
    """

    q: jax.Array
    k: jax.Array
    v: jax.Array
    bias: jax.Array | None
    mask: jax.Array | None
    q_segments: jax.Array | None
    kv_segments: jax.Array | None
    T: int
    S: int
    block_q: int
    block_kv: int
    dtype: jnp.dtype

    @classmethod
    def of(cls, q, k, v, bias, mask, q_segments, kv_segments, sizes, K):
        T, S, block_q, block_kv = sizes
        T_padded, S_padded = -(-T // block_q) * block_q, -(-S // block_kv) * block_kv

        def logits_shaped(a):
            if a is None:
                return None
            B, N, rows, columns = a.shape
            a = a.reshape((B, 1, 1, *a.shape[2:]) if N == 1 else (B, K, N // K, *a.shape[2:])).swapaxes(2, 3)
            a = a if rows == 1 else pad(a, 2, T_padded)
            return a if columns == 1 else pad(a, 4, S_padded)

        return cls(
            pad(group(q, K), 2, T_padded),
            pad(k.swapaxes(1, 2), 2, S_padded),
            pad(v.swapaxes(1, 2), 2, S_padded),
            logits_shaped(bias),
            logits_shaped(mask),
            None if q_segments is None else pad(q_segments, 1, T_padded)[:, None],
            None if kv_segments is None else pad(kv_segments, 1, S_padded)[:, None],
            T, S, block_q, block_kv,
            jnp.promote_types(q.dtype, jnp.float32),
        )  # fmt: skip


class Row(NamedTuple):
    """A block of queries: its index, its visits [low, high); where listed, key blocks and their number."""

    i: jax.Array
    low: jax.Array
    high: jax.Array
    blocks: jax.Array | None = None
    count: jax.Array | None = None


class InOrder:
    """Every key block between two bounds, visit c being block c."""

    def __init__(self, ranges, block_kv):
        low, high = (jnp.array(edge, jnp.int32) for edge in zip(*ranges, strict=True))
        self.rows = Row(jnp.arange(len(ranges), dtype=jnp.int32), low, high)
        self.block_kv = block_kv

    def first_key(self, at, c):
        return c * self.block_kv

    def keys(self, x, at, c):
        return jax.lax.dynamic_slice_in_dim(x, c * self.block_kv, self.block_kv, 2)

    def add(self, total, part, at, c):
        now = self.keys(total, at, c)
        return jax.lax.dynamic_update_slice_in_dim(total, now + part, c * self.block_kv, 2)

    def rules(self, at, c):
        return []


class Listed:
    """The active key blocks of each batch row and head, visit c being the c-th of the list."""

    def __init__(self, block_mask, ranges, block_kv, B, N):
        n_kv = block_mask.shape[3]
        j = jnp.arange(n_kv)
        possible = jnp.array([[low, high] for low, high in ranges], jnp.int32)
        active = block_mask & (j >= possible[:, :1]) & (j < possible[:, 1:])
        active = jnp.broadcast_to(active, (B, N, *active.shape[2:]))
        listed = jnp.argsort(~active, axis=-1, stable=True).astype(jnp.int32)
        count = jnp.sum(active, axis=-1, dtype=jnp.int32)
        listed, count = jnp.moveaxis(listed, 2, 0), jnp.moveaxis(count, 2, 0)
        i = jnp.arange(len(ranges), dtype=jnp.int32)
        self.rows = Row(i, jnp.zeros_like(i), jnp.max(count, axis=(1, 2)), listed, count)
        self.block_kv = block_kv

    def _block(self, at, c):
        return jax.lax.dynamic_index_in_dim(at.blocks, c, 2, keepdims=False)

    def first_key(self, at, c):
        return (self._block(at, c) * self.block_kv)[:, :, None, None, None]

    def keys(self, x, at, c):
        block = self._block(at, c)
        x = jnp.broadcast_to(x, (*block.shape, *x.shape[2:]))
        cut = lambda x, j: jax.lax.dynamic_slice_in_dim(x, j * self.block_kv, self.block_kv, 0)  # noqa: E731
        return jax.vmap(jax.vmap(cut))(x, block)

    def add(self, total, part, at, c):
        def one(total, part, j):
            first = j * self.block_kv
            now = jax.lax.dynamic_slice_in_dim(total, first, self.block_kv, 0)
            return jax.lax.dynamic_update_slice_in_dim(total, now + part, first, 0)

        return jax.vmap(jax.vmap(one))(total, part, self._block(at, c))

    def rules(self, at, c):
        return [(c < at.count)[:, :, None, None, None]]


def cut_logits(x, first_q, rows, first_kv, columns):
    """A block of a bias or a mask; axes of one stay."""
    x = x if x.shape[2] == 1 else jax.lax.dynamic_slice_in_dim(x, first_q, rows, 2)
    return x if x.shape[4] == 1 else jax.lax.dynamic_slice_in_dim(x, first_kv, columns, 4)


def pad(x, axis, size, value=0):
    """``x`` with ``axis`` filled up to ``size``."""
    if x.shape[axis] == size:
        return x
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, size - x.shape[axis])
    return jnp.pad(x, widths, constant_values=value)


def group(x, K):
    """[B, T, N, ...] to [B, K, T, G, ...]."""
    B, T, N = x.shape[:3]
    return x.reshape(B, T, K, N // K, *x.shape[3:]).swapaxes(1, 2)


def ungroup(x):
    """[B, K, T, G, ...] to [B, T, N, ...]."""
    B, K, T, G = x.shape[:4]
    return x.swapaxes(1, 2).reshape(B, T, K * G, *x.shape[4:])


def joined(x):
    """[blocks, B, K, rows, G, ...] to [B, K, T, G, ...]."""
    x = jnp.moveaxis(x, 0, 2)
    return x.reshape(*x.shape[:2], -1, *x.shape[4:])


def ungroup_logits(x, shape):
    """Back from the layout of a bias in ``Arrays`` to [B, N, T, S], padding cut off."""
    _, _, T, S = shape
    x = x[:, :, :T, :, :S].swapaxes(2, 3)
    return x.reshape(shape)
