"""The gated delta rule: the public function and its argument checks."""

import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from pallas_kernels import dispatch, sharding
from pallas_kernels.cost.gated_delta_rule import chunk_for
from pallas_kernels.tpu import gated_delta_rule as tpu
from pallas_kernels.xla import gated_delta_rule as xla

IMPLEMENTATIONS = {
    "xla_chunked": dispatch.Implementation(xla.forward, xla.backward),
    "pallas_tpu": dispatch.Implementation(tpu.forward, tpu.backward, tpu.refuses),
}
INPUTS = "b t n d, b t n d, b t n e, b t n, b t n, b t"
FORWARD = f"{INPUTS}, b n d e -> b t n e, b n d e"
BACKWARD = f"{INPUTS}, b c n d e, b t n e, b n d e -> b t n d, b t n d, b t n e, b t n, b t n, b n d e"


def gated_delta_rule(
    q,
    k,
    v,
    beta,
    log_decay=None,
    *,
    scale: float | None = None,
    state0=None,
    segment_ids=None,
    chunk: int | None = None,
    implementation: str | Sequence[str] | None = None,
):
    """S_t = exp(g_t) (I - beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T, and o_t = scale S_t^T q_t.

    A memory of D keys by E values a head that writes over what it holds under a key: with g the log decay of
    "Gated delta networks" (Yang et al. 2024, eq. 10), without it DeltaNet (Schlag et al. 2021; Yang et al.
    2024). Computed by chunks of tokens as matrix products, in O(T) memory. Letters: B batch, T tokens,
    N heads, K key heads, D key size, E value size. Normalising q and k is the caller's; where |k| = 1 the
    rule is stable for 0 <= beta <= 2.

    Args:
      q, k: float [B, T, K, D], N a multiple of K: head n reads key head n // (N / K).
      v: float [B, T, N, E], the dtype of ``q``.
      beta: float [B, T, N]: how much of the old value under the key is replaced.
      log_decay: float [B, T, N], at most 0; None for no decay. Below -50 it counts as -50 (a factor of 2e-22)
        and its gradient is 0.
      scale: factor of o; 1/sqrt(D) where None.
      state0: float [B, N, D, E], the state before the first token; zeros where None.
      segment_ids: int [B, T]: where the id differs from that of the token before, the state before counts as
        zero. The first token takes ``state0``.
      chunk: tokens of a chunk, for ``pallas_tpu`` a multiple of 16; where None 64, and fewer where T or both
        D and E are smaller. The backward pass keeps a state for every chunk.
      implementation: None, ``"xla_chunked"``, ``"pallas_tpu"``, or names in order of preference; a single
        name is taken or refused, never replaced.

    Returns:
      (o, state): o [B, T, N, E] in the dtype of ``v``, the state after the last token [B, N, D, E] in float32
      (float64 for float64 inputs). States and the triangular solves are computed in that dtype; the other
      products take operands of the dtype of ``q``.

    Raises:
      ValueError: an argument of the wrong shape, dtype or range, by name; an implementation that is unknown
        or does not take these arguments.
    """
    q, k, v, beta = (jnp.asarray(x) for x in (q, k, v, beta))
    log_decay, state0, segment_ids = (
        None if x is None else jnp.asarray(x) for x in (log_decay, state0, segment_ids)
    )
    _check(q, k, v, beta, log_decay, state0, segment_ids, chunk)
    (B, T, N, E), D, dtype = v.shape, q.shape[3], jnp.promote_types(v.dtype, jnp.float32)
    q, k = (jnp.repeat(x, N // x.shape[2], axis=2) if x.shape[2] != N else x for x in (q, k))
    chunk = chunk_for(T, D, E) if chunk is None else chunk
    choice = dispatch.choose("gated_delta_rule", implementation, IMPLEMENTATIONS, q, k, v, chunk=chunk)
    beta = beta.astype(dtype)
    log_decay = jnp.zeros_like(beta) if log_decay is None else log_decay.astype(dtype)
    state0 = jnp.zeros((B, N, D, E), dtype) if state0 is None else state0.astype(dtype)
    if segment_ids is None:
        reset = jnp.zeros((B, T), jnp.int32)
    else:
        reset = (jnp.diff(segment_ids, axis=1, prepend=segment_ids[:, :1]) != 0).astype(jnp.int32)
    options = (1 / math.sqrt(D) if scale is None else float(scale), chunk)
    return _rule(choice, options, q, k, v, beta, log_decay, reset, state0)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _rule(choice, options, *arrays):
    return dispatch.run(choice, _bound("forward", FORWARD, options, keep=False), *arrays)


def _rule_forward(choice, options, *arrays):
    functions = _bound("forward", FORWARD + ", b c n d e", options, keep=True)
    o, state, starts = dispatch.run(choice, functions, *arrays)
    *inputs, state0 = arrays
    return (o, state), (*inputs, starts, state0)


def _rule_backward(choice, options, kept, cotangents):
    *kept, state0 = kept
    functions = _bound("backward", BACKWARD, options)
    *gradients, dstate0 = dispatch.run(choice, functions, *kept, *cotangents)
    primals = (*kept[:5], state0)
    gradients = [_like(p, g) for p, g in zip(primals, (*gradients, dstate0), strict=True)]
    return *gradients[:5], None, gradients[5]


_rule.defvjp(_rule_forward, _rule_backward)


def _bound(which, rule, options, **more):
    """name -> function with its options, each device computing its own batch rows and heads."""
    scale, chunk = options
    bound = {}
    for name, implementation in IMPLEMENTATIONS.items():
        function = functools.partial(getattr(implementation, which), scale=scale, chunk=chunk, **more)
        bound[name] = sharding.per_shard(function, rule, whole=("t", "d", "e", "c"))
    return bound


def _like(primal, gradient):
    """In the primal's dtype and, under explicit axes, its sharding: both are part of a type."""
    return sharding.placed_like(gradient.astype(primal.dtype), primal)


def _check(q, k, v, beta, log_decay, state0, segment_ids, chunk):
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.ndim != 4:
            raise ValueError(f"{name} has shape {x.shape}; it must have four axes, batch-token-head-channel")
        if 0 in x.shape:
            raise ValueError(f"{name} has shape {x.shape}; no axis may be empty")
        if x.dtype != q.dtype:
            raise ValueError(f"{name} has dtype {x.dtype}; it must be that of q, {q.dtype}")
    if k.shape != q.shape:
        raise ValueError(f"k has shape {k.shape}; it must be that of q, {q.shape}")
    B, T, N, E = v.shape
    if q.shape[:2] != (B, T):
        hint = ""
        if q.shape[2] == N:
            hint = " (q, k and v look like batch-head-token-channel: swap axes 1 and 2)"
        raise ValueError(
            f"v has shape {v.shape}; its batch and tokens must be those of q, {q.shape[:2]}{hint}"
        )
    if N % q.shape[2]:
        raise ValueError(f"v has {N} heads; they must be a multiple of q's {q.shape[2]}")
    for name, x, shape in (
        ("beta", beta, (B, T, N)),
        ("log_decay", log_decay, (B, T, N)),
        ("state0", state0, (B, N, q.shape[3], E)),
        ("segment_ids", segment_ids, (B, T)),
    ):
        if x is None:
            continue
        if x.shape != shape:
            hint = ""
            if name in ("beta", "log_decay") and x.shape == (B, N, T) != shape:
                hint = " (it looks like batch-head-token, or q, k and v like batch-head-token-channel)"
            raise ValueError(f"{name} has shape {x.shape}; it must be {shape}{hint}")
    for name, x in (("q", q), ("beta", beta), ("log_decay", log_decay), ("state0", state0)):
        if x is not None and not jnp.issubdtype(x.dtype, jnp.floating):
            raise ValueError(f"{name} has dtype {x.dtype}; it must be a floating dtype")
    if segment_ids is not None and not jnp.issubdtype(segment_ids.dtype, jnp.integer):
        raise ValueError(f"segment_ids has dtype {segment_ids.dtype}; it must be an integer dtype")
    if chunk is not None and (not isinstance(chunk, int) or isinstance(chunk, bool) or chunk < 1):
        raise ValueError(f"chunk is {chunk!r}; it must be an int of at least 1 or None")
