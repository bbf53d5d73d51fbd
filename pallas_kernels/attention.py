"""Scaled dot-product attention: the public function and its argument checks."""

import functools
import math
from collections.abc import Sequence

import jax.numpy as jnp

from pallas_kernels import dispatch
from pallas_kernels.xla import attention as xla

IMPLEMENTATIONS = {"xla": dispatch.Implementation(xla.dot_product_attention)}


def dot_product_attention(
    q,
    k,
    v,
    *,
    bias=None,
    mask=None,
    scale: float | None = None,
    is_causal: bool = False,
    local_window_size: int | tuple[int, int] | None = None,
    q_segment_ids=None,
    kv_segment_ids=None,
    logits_soft_cap: float | None = None,
    implementation: str | Sequence[str] | None = None,
):
    """softmax(cap(scale q k^T) + bias) v, in BTNH, with grouped heads.

    The meaning of ``jax.nn.dot_product_attention`` with segments and a soft-cap besides; one
    difference: a query that may look at no key at all gives zeros (``jax.nn`` gives the mean of
    all values, masked ones included). Letters: B batch, T queries, S keys, N query heads,
    K key-value heads, H head size. Source: Vaswani et al. 2017, eq. 1; grouped heads: Ainslie et
    al. 2023; soft-cap: Gemma 2 (2024), section 2.

    Args:
      q: float [B, T, N, H], N a multiple of K.
      k, v: float [B, S, K, H], the dtype of ``q``.
      bias: float, broadcastable to [B, N, T, S], four axes; added to the capped logits.
      mask: bool, broadcastable to [B, N, T, S], four axes; True takes part.
      scale: factor of q k^T; 1/sqrt(H) where None.
      is_causal: query t looks at keys s <= t only, both counted from 0.
      local_window_size: (left, right): query t looks at t - left <= s <= t + right only. One int
        w stands for (w, w), so a causal window of w tokens, itself included, is (w - 1, 0).
      q_segment_ids: int [B, T]; a query looks at keys of its own segment only.
      kv_segment_ids: int [B, S]; ``q_segment_ids`` where None and T == S.
      logits_soft_cap: c > 0: logits become c tanh(logits / c), before bias and masks.
      implementation: None, ``"xla"``, or names in order of preference; a single name is taken or
        refused, never replaced.

    Returns:
      [B, T, N, H] in the dtype of ``q``. Logits and softmax are computed in float32 (float64 for
      float64 inputs).

    Raises:
      ValueError: an argument of the wrong shape, dtype or range, by name; an implementation
        that is unknown or not available.
    """
    q, k, v = jnp.asarray(q), jnp.asarray(k), jnp.asarray(v)
    bias, mask, q_segment_ids, kv_segment_ids = (
        None if x is None else jnp.asarray(x) for x in (bias, mask, q_segment_ids, kv_segment_ids)
    )
    if q_segment_ids is not None and kv_segment_ids is None and q.ndim == k.ndim == 4:
        if q.shape[1] != k.shape[1]:
            raise ValueError(
                f"kv_segment_ids is None; it is needed where q has {q.shape[1]} tokens and k {k.shape[1]}"
            )
        kv_segment_ids = q_segment_ids
    _check_qkv(q, k, v)
    _check_segments(q, k, q_segment_ids, kv_segment_ids)
    _check_logits_shaped("bias", bias, q, k)
    _check_logits_shaped("mask", mask, q, k)
    if mask is not None and mask.dtype != jnp.bool_:
        raise ValueError(f"mask has dtype {mask.dtype}; it must be bool (an additive mask goes to bias)")
    if logits_soft_cap is not None and not logits_soft_cap > 0:
        raise ValueError(f"logits_soft_cap is {logits_soft_cap!r}; it must be a positive number or None")
    options = {
        "bias": bias,
        "mask": mask,
        "scale": 1 / math.sqrt(q.shape[-1]) if scale is None else scale,
        "is_causal": is_causal,
        "window": _window(local_window_size),
        "q_segment_ids": q_segment_ids,
        "kv_segment_ids": kv_segment_ids,
        "logits_soft_cap": logits_soft_cap,
    }
    choice = dispatch.choose("dot_product_attention", implementation, IMPLEMENTATIONS, q, k, v, **options)
    functions = {name: functools.partial(x.forward, **options) for name, x in IMPLEMENTATIONS.items()}
    return dispatch.run(choice, functions, q, k, v)


def _check_qkv(q, k, v):
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


def _check_segments(q, k, q_segment_ids, kv_segment_ids):
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


def _check_logits_shaped(name, x, q, k):
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


def _window(local_window_size):
    if local_window_size is None:
        return None
    pair = local_window_size if isinstance(local_window_size, (tuple, list)) else (local_window_size,) * 2
    if len(pair) != 2 or not all(isinstance(w, int) and not isinstance(w, bool) and w >= 0 for w in pair):
        raise ValueError(
            f"local_window_size is {local_window_size!r}; it must be an int of at least 0 or a pair of them"
        )
    return tuple(pair)
