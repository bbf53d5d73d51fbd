"""Scaled dot-product attention, full and block-sparse: the public functions and their one gradient."""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels import attention_checks as checks
from pallas_kernels import dispatch
from pallas_kernels.cost import attention as cost
from pallas_kernels.gpu import attention as gpu
from pallas_kernels.gpu import cudnn
from pallas_kernels.tpu import attention as tpu
from pallas_kernels.xla import attention as xla
from pallas_kernels.xla import attention_chunked as chunked

# forward(q, k, v, bias, mask, q_segments, kv_segments, block_mask, *, options) -> out, lse
# backward(the same, out, lse, dout, dlse, *, options) -> dq, dk, dv, dbias
# refuses(as forward) -> a reason or None
# Without a backward, JAX differentiates: forward(the same, with_lse=) -> (out, lse) or (out,)
IMPLEMENTATIONS = {
    "xla": dispatch.Implementation(xla.forward),
    "xla_chunked": dispatch.Implementation(chunked.forward, chunked.backward),
    "pallas_tpu": dispatch.Implementation(tpu.forward, tpu.backward, tpu.refuses),
    "pallas_gpu": gpu.IMPLEMENTATION,
    "cudnn": cudnn.IMPLEMENTATION,
}


class Options(NamedTuple):
    """What is known when the program is traced."""

    scale: float
    is_causal: bool
    window: tuple[int, int] | None
    logits_soft_cap: float | None
    block_sizes: tuple[int, int] | None
    most_active: int | None = None  # of a block mask: active blocks that no head exceeds, if known


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
    block_sizes: int | tuple[int, int] | None = None,
    return_lse: bool = False,
):
    """softmax(cap(scale q k^T) + bias) v, in BTNH, with grouped heads.

    The meaning of ``jax.nn.dot_product_attention`` with segments and a soft-cap besides; one
    difference: a query that may look at no key at all gives zeros (``jax.nn`` gives the mean of
    all values, masked ones included). Letters: B batch, T queries, S keys, N query heads,
    K key-value heads, H head size. Source: Vaswani et al. 2017, eq. 1; grouped heads: Ainslie et
    al. 2023; soft-cap: Gemma 2 (2024), section 2; without logits in memory: Dao et al. 2022.

    Args:
      q: float [B, T, N, H], N a multiple of K.
      k, v: float [B, S, K, H], the dtype of ``q``.
      bias: float, broadcastable to [B, N, T, S], four axes; added to the capped logits.
      mask: bool, broadcastable to [B, N, T, S], four axes; True takes part.
      scale: factor of q k^T, a number; 1/sqrt(H) where None.
      is_causal: query t looks at keys s <= t only, both counted from 0.
      local_window_size: (left, right): query t looks at t - left <= s <= t + right only. One int
        w stands for (w, w), so a causal window of w tokens, itself included, is (w - 1, 0).
      q_segment_ids: int [B, T]; a query looks at keys of its own segment only.
      kv_segment_ids: int [B, S]; ``q_segment_ids`` where None and T == S.
      logits_soft_cap: c > 0: logits become c tanh(logits / c), before bias and masks.
      implementation: None, ``"xla"`` (logits in full, the only one with forward-mode derivatives),
        ``"xla_chunked"``, ``"pallas_tpu"``, ``"pallas_gpu"`` (Hopper), ``"cudnn"``, or names in order of
        preference; a single name is taken or refused, never replaced. None is the kernel of the
        platform; on a CPU ``"xla_chunked"``, or ``"xla"`` for rows of up to 256 tokens.
      block_sizes: (of queries, of keys) at a time, for implementations that work by blocks; one
        int for both; chosen where None.
      return_lse: whether to return the log-sum-exp as well.

    Returns:
      [B, T, N, H] in the dtype of ``q``. Logits and softmax are computed in float32 (float64 for
      float64 inputs). With ``return_lse`` a pair of it and the natural log of the sum of exp of the
      logits allowed, float32 [B, T, N], -inf where there are none; both have gradients.

    Raises:
      ValueError: an argument of the wrong shape, dtype or range, by name; an implementation
        that is unknown or not available.
    """
    q, k, v = jnp.asarray(q), jnp.asarray(k), jnp.asarray(v)
    bias, mask = (None if x is None else jnp.asarray(x) for x in (bias, mask))
    segments = _checked(q, k, v, q_segment_ids, kv_segment_ids, logits_soft_cap)
    checks.check_logits_shaped("bias", bias, q, k)
    checks.check_logits_shaped("mask", mask, q, k)
    if bias is not None and not jnp.issubdtype(bias.dtype, jnp.floating):
        raise ValueError(f"bias has dtype {bias.dtype}; it must be a floating dtype")
    if mask is not None and mask.dtype != jnp.bool_:
        raise ValueError(f"mask has dtype {mask.dtype}; it must be bool (an additive mask goes to bias)")
    options = Options(
        checks.scale_number(scale, q.shape[-1]),
        bool(is_causal),
        checks.window_pair(local_window_size),
        None if logits_soft_cap is None else float(logits_soft_cap),
        checks.positive_pair("block_sizes", block_sizes),
    )
    arrays = (q, k, v, bias, mask, *segments, None)
    return _run("dot_product_attention", implementation, options, arrays, return_lse)


def block_sparse_attention(
    q,
    k,
    v,
    block_mask,
    *,
    block_size: int | tuple[int, int],
    scale: float | None = None,
    is_causal: bool = False,
    local_window_size: int | tuple[int, int] | None = None,
    q_segment_ids=None,
    kv_segment_ids=None,
    logits_soft_cap: float | None = None,
    implementation: str | Sequence[str] | None = None,
    return_lse: bool = False,
):
    """Attention over the blocks of the logits that a mask names, skipping the others.

    As ``dot_product_attention`` with ``mask`` the block mask blown up to tokens. The mask may differ by
    head and batch row and may be computed in the same program (top blocks by a score, say); it has no
    gradient. Source: Child et al. 2019, section 5; Dao et al. 2022, section 3.3.

    Args:
      q, k, v, scale, is_causal, local_window_size, q_segment_ids, kv_segment_ids, logits_soft_cap,
      return_lse: as in ``dot_product_attention``; a pair counts where every one of these rules keeps it.
      block_mask: bool [N or 1, ceil(T / block of queries), ceil(S / block of keys)], or with a batch
        axis of B or 1 before; True is computed.
      block_size: (of queries, of keys), or one int for both; also the block sizes of the kernel, which
        on TPU must be multiples of 128 (512 and more are best).
      implementation: None or names, as in ``dot_product_attention``; ``"xla"`` computes all logits.

    Returns:
      As ``dot_product_attention``; zeros and a log-sum-exp of -inf for a query without keys.

    Raises:
      ValueError: an argument of the wrong shape, dtype or range, by name; an implementation
        that is unknown or does not take these arguments.
    """
    q, k, v = jnp.asarray(q), jnp.asarray(k), jnp.asarray(v)
    segments = _checked(q, k, v, q_segment_ids, kv_segment_ids, logits_soft_cap)
    sizes = checks.positive_pair("block_size", block_size)
    if sizes is None:
        raise ValueError("block_size is None; it must be a positive int or (of queries, of keys)")
    most = checks.most_active(block_mask)
    block_mask = checks.check_block_mask(block_mask, q, k, sizes)
    options = Options(
        checks.scale_number(scale, q.shape[-1]),
        bool(is_causal),
        checks.window_pair(local_window_size),
        None if logits_soft_cap is None else float(logits_soft_cap),
        sizes,
        most,
    )
    arrays = (q, k, v, None, None, *segments, block_mask)
    return _run("block_sparse_attention", implementation, options, arrays, return_lse)


def _checked(q, k, v, q_segment_ids, kv_segment_ids, logits_soft_cap):
    """Raises on what both functions refuse; returns the segments of both sides."""
    q_segment_ids, kv_segment_ids = (
        None if x is None else jnp.asarray(x) for x in (q_segment_ids, kv_segment_ids)
    )
    if q_segment_ids is not None and kv_segment_ids is None and q.ndim == k.ndim == 4:
        if q.shape[1] != k.shape[1]:
            raise ValueError(
                f"kv_segment_ids is None; it is needed where q has {q.shape[1]} tokens and k {k.shape[1]}"
            )
        kv_segment_ids = q_segment_ids
    checks.check_qkv(q, k, v)
    checks.check_segments(q, k, q_segment_ids, kv_segment_ids)
    if logits_soft_cap is not None and not logits_soft_cap > 0:
        raise ValueError(f"logits_soft_cap is {logits_soft_cap!r}; it must be a positive number or None")
    return q_segment_ids, kv_segment_ids


def _run(name, implementation, options, arrays, return_lse):
    choice = dispatch.choose(name, implementation, IMPLEMENTATIONS, *arrays, options=options)
    T, S = arrays[0].shape[1], arrays[1].shape[1]
    here = dispatch.current_target()
    if (
        implementation is None
        and T * S <= cost.FULL_LOGITS_ON_CPU
        and (here is None or here.platform == "cpu")
    ):
        choice = _with_full_logits_on_cpu(choice, here)
    if all(IMPLEMENTATIONS[chosen].backward for _, chosen in choice):
        out, lse = _attend(choice, options, *arrays)
        return (out, lse) if return_lse else out

    # XLA's own derivative keeps the probabilities, which the gradient shared by the others has no room for.
    def alone(name, *arrays):
        if not IMPLEMENTATIONS[name].backward:
            return IMPLEMENTATIONS[name].forward(*arrays, options=options, with_lse=return_lse)
        out, lse = _attend((("any", name),), options, *arrays)
        return (out, lse) if return_lse else (out,)

    functions = {name: functools.partial(alone, name) for name in IMPLEMENTATIONS}
    results = dispatch.run(choice, functions, *arrays)
    return results if return_lse else results[0]


def _with_full_logits_on_cpu(choice, here):
    if here is not None:
        return (("any", "xla"),)
    picked = dict(choice)
    if "any" in picked:
        picked = dict.fromkeys(dispatch.PREFERRED, picked["any"])
    return tuple((picked | {"cpu": "xla"}).items())


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attend(choice, options, *arrays):
    """Output and log-sum-exp, for the implementations that keep these two for the backward pass."""
    return _forward(choice, options, *arrays)


def _attend_fwd(choice, options, *arrays):
    out, lse = _forward(choice, options, *arrays)
    return (out, lse), (arrays, out, lse)


def _attend_bwd(choice, options, residuals, cotangents):
    arrays, out, lse = residuals
    gradients = _backward(choice, options, *arrays, out, lse, *cotangents)
    return (*gradients, *[None] * 4)


_attend.defvjp(_attend_fwd, _attend_bwd)


# Under jit so that a model of many layers traces its kernels once.
@functools.partial(jax.jit, static_argnums=(0, 1))
def _forward(choice, options, *arrays):
    return dispatch.run(choice, _bound("forward", options), *arrays)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _backward(choice, options, *arrays):
    return dispatch.run(choice, _bound("backward", options), *arrays)


def _bound(direction, options):
    return {
        name: functools.partial(getattr(implementation, direction), options=options)
        for name, implementation in IMPLEMENTATIONS.items()
        if implementation.backward
    }
