"""Argument checks of attention: errors that name the argument, its value and what would be valid."""

import math
import numbers

import jax
import jax.numpy as jnp


def check_qkv(q, k, v):
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.ndim != 4:
            raise ValueError(f"{name} has shape {x.shape}; it must have four axes, batch-token-head-channel")
        if not jnp.issubdtype(x.dtype, jnp.floating):
            raise ValueError(f"{name} has dtype {x.dtype}; it must be a floating dtype")
        if x.dtype != q.dtype:
            raise ValueError(f"{name} has dtype {x.dtype}; it must be that of q, {q.dtype}")
        if 0 in x.shape:
            raise ValueError(f"{name} has shape {x.shape}; no axis may be empty")
    if v.shape != k.shape:
        raise ValueError(f"v has shape {v.shape}; it must be that of k, {k.shape}")
    for axis, word in ((0, "batch"), (3, "head size")):
        if k.shape[axis] != q.shape[axis]:
            raise ValueError(f"k has {word} {k.shape[axis]}; it must be that of q, {q.shape[axis]}")
    if q.shape[2] % k.shape[2]:
        hint = _bhtd_hint(q, k, q.shape[1] % k.shape[1] == 0)
        raise ValueError(f"q has {q.shape[2]} heads; they must be a multiple of k's {k.shape[2]}{hint}")


def check_segments(q, k, q_segment_ids, kv_segment_ids):
    for name, ids, x in (("q_segment_ids", q_segment_ids, q), ("kv_segment_ids", kv_segment_ids, k)):
        if ids is None:
            if (q_segment_ids is None) != (kv_segment_ids is None):
                raise ValueError(f"{name} is None while the other side's segments are given")
            continue
        if tuple(ids.shape) != x.shape[:2]:
            hint = _bhtd_hint(q, k, tuple(ids.shape) == (x.shape[0], x.shape[2]))
            raise ValueError(f"{name} has shape {tuple(ids.shape)}; it must be {x.shape[:2]}{hint}")
        if not jnp.issubdtype(ids.dtype, jnp.integer):
            raise ValueError(f"{name} has dtype {ids.dtype}; it must be an integer dtype")


def check_logits_shaped(name, x, q, k):
    if x is None:
        return
    (B, T, N, _), S = q.shape, k.shape[1]
    if not _broadcasts(x.shape, (B, N, T, S)):
        hint = _bhtd_hint(q, k, _broadcasts(x.shape, (B, T, N, k.shape[2])))
        raise ValueError(f"{name} has shape {x.shape}; it must broadcast to {(B, N, T, S)}, four axes{hint}")


def _broadcasts(shape, to):
    return len(shape) == 4 and all(have in (1, want) for have, want in zip(shape, to, strict=True))


def _bhtd_hint(q, k, fits_when_swapped):
    if not fits_when_swapped:
        return ""
    return f" (q {q.shape} and k {k.shape} look like batch-head-token-channel: swap axes 1 and 2)"


def window_pair(local_window_size):
    if local_window_size is None:
        return None
    pair = local_window_size if isinstance(local_window_size, (tuple, list)) else (local_window_size,) * 2
    if len(pair) != 2 or not all(isinstance(w, int) and not isinstance(w, bool) and w >= 0 for w in pair):
        raise ValueError(
            f"local_window_size is {local_window_size!r}; it must be an int of at least 0 or a pair of them"
        )
    return tuple(pair)


def scale_number(scale, head_size):
    """The factor of q k^T as a Python float."""
    if scale is None:
        return 1 / math.sqrt(head_size)
    if isinstance(scale, jax.core.Tracer) or not isinstance(scale, (numbers.Real, jax.Array)):
        raise ValueError(f"scale is {scale!r}; it must be a number (one that is computed: multiply q by it)")
    return float(scale)


def positive_pair(name, value):
    """One positive int, or two of them, as a pair; None stays."""
    if value is None:
        return None
    pair = tuple(value) if isinstance(value, (tuple, list)) else (value, value)
    if len(pair) != 2 or not all(isinstance(n, int) and not isinstance(n, bool) and n > 0 for n in pair):
        raise ValueError(f"{name} is {value!r}; it must be a positive int or (of queries, of keys)")
    return pair


def check_block_mask(block_mask, q, k, sizes):
    """``block_mask`` with four axes: [B or 1, N or 1, blocks of queries, blocks of keys]."""
    (B, T, N, _), S = q.shape, k.shape[1]
    block_mask = jnp.asarray(block_mask)
    if block_mask.dtype != jnp.bool_:
        raise ValueError(f"block_mask has dtype {block_mask.dtype}; it must be bool")
    blocks = (math.ceil(T / sizes[0]), math.ceil(S / sizes[1]))
    full = block_mask[None] if block_mask.ndim == 3 else block_mask
    fits = full.ndim == 4 and full.shape[2:] == blocks and _broadcasts(full.shape, (B, N, *blocks))
    if not fits:
        raise ValueError(
            f"block_mask has shape {block_mask.shape}; at {T} queries and {S} keys in blocks of {sizes} it "
            f"must be [heads, {blocks[0]}, {blocks[1]}] or [batch, heads, {blocks[0]}, {blocks[1]}], "
            f"with heads {N} or 1 and batch {B} or 1"
        )
    return full


def most_active(block_mask):
    """Active blocks of the head that has most, or None where the mask is computed in this program."""
    unknown = isinstance(block_mask, jax.core.Tracer) or not getattr(block_mask, "is_fully_addressable", True)
    if unknown or jnp.ndim(block_mask) < 3:
        return None
    with jax.ensure_compile_time_eval():
        return int(jnp.max(jnp.sum(jnp.asarray(block_mask), axis=(-2, -1))))
