"""State-space duality and gated linear attention: the public function and its argument checks."""

import functools
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels import decay_sums, dispatch, sharding
from pallas_kernels.gpu import ssd as gpu
from pallas_kernels.tpu import ssd as tpu
from pallas_kernels.tpu.ssd_plan import default_span
from pallas_kernels.xla import ssd as xla

IMPLEMENTATIONS = {
    "xla_chunked": dispatch.Implementation(xla.forward, xla.backward),
    "pallas_tpu": dispatch.Implementation(tpu.forward, tpu.backward, tpu.refuses),
    "pallas_gpu": gpu.IMPLEMENTATION,
}


class Options(NamedTuple):
    """Static arguments of every implementation."""

    scale: float
    chunk: int | None
    heads: int | None
    span: int  # tokens at most between two states that a differentiated call keeps, a power of two


def ssd(
    q,
    k,
    v,
    log_decay,
    *,
    scale: float = 1.0,
    state0=None,
    segment_ids=None,
    chunk: int | None = None,
    implementation: str | Sequence[str] | None = None,
    block_sizes: Mapping[str, int] | None = None,
):
    """Linear attention with decay: S_t = exp(log_decay_t) S_{t-1} + k_t v_t^T, o_t = scale q_t S_t.

    With one decay a head this is Mamba-2's state-space duality (Dao and Gu 2024, eq. 16 and section 6; q
    is its C, k its B, v its dt x, log_decay its dt A); with one decay a channel of the key, gated linear
    attention (Yang et al. 2023, eq. 3). Letters: B batch, T tokens, N value heads, K query-key heads, D
    key size, E value size.

    Args:
      q, k: float [B, T, K, D], N a multiple of K: value head n reads query-key head n // (N / K).
      v: float [B, T, N, E], the dtype of ``q``.
      log_decay: float [B, T, N] or [B, T, N, D], at most 0. Below -100, -inf included, it is taken to be
        -100, beside which nothing of the state is left in float32. (Above 0 the state grows, and
        overflows where its exponential does.)
      scale: factor of q.
      state0: None (zeros) or float [B, N, D, E], the state before the first token.
      segment_ids: None or int [B, T]: where the id differs from the token before, the state begins at
        zero again. The first token carries on from ``state0``.
      chunk: tokens that are computed at once, a power of two from 16 to 512; None: the implementation's.
      implementation: None, ``"xla_chunked"``, ``"pallas_tpu"``, ``"pallas_gpu"`` (Hopper; 16 bits, one
        decay a head, D and E of 64 or 128; its backward pass is xla_chunked's), or names in order of
        preference; a single name is taken or refused, never replaced.
      block_sizes: {"heads": for ``pallas_tpu`` the value heads of one query-key head that are computed in
        one grid step, which divides N / K; "span": tokens between the states that are kept where the call
        is differentiated, a power of two, not below ``chunk``}; either may be left out.

    Returns:
      (o [B, T, N, E] in the dtype of ``v``, state [B, N, D, E] in float32, or float64 for float64).
      Sums are float32. Of float32 inputs every product is float32, and errors are some 1e-6 of the sums of
      absolute values; of bfloat16 inputs the factors of each matrix product are rounded to bfloat16, the
      state as it is read included.

    Raises:
      ValueError: an argument of the wrong shape, dtype or range, by name; an implementation that is
        unknown or does not take these arguments.
    """
    q, k, v, log_decay = (jnp.asarray(x) for x in (q, k, v, log_decay))
    state0, segment_ids = (None if x is None else jnp.asarray(x) for x in (state0, segment_ids))
    check_qkv(q, k, v)
    (B, T, K, D), (N, E) = q.shape, v.shape[2:]
    if log_decay.shape not in ((B, T, N), (B, T, N, D)):
        raise ValueError(
            f"log_decay has shape {log_decay.shape}; it must be {(B, T, N)}, one a head, or {(B, T, N, D)}, "
            "one a channel of k"
        )
    check_float("log_decay", log_decay)
    check_state("state0", state0, (B, N, D, E))
    check_segments(segment_ids, (B, T))
    blocks = _check_block_sizes(block_sizes, N // K, check_chunk(chunk))
    if blocks["span"] is None:
        per_channel = log_decay.ndim == 4
        span = default_span(K=K, N=N, D=D, E=E, channel=per_channel, itemsize=q.dtype.itemsize)
        blocks["span"] = max(span, chunk or 0)
    options = Options(float(scale), chunk, **blocks)
    dtype = jnp.promote_types(q.dtype, jnp.float32)
    g = log_decay.astype(dtype)
    g = jnp.where(g < decay_sums.LOWEST, decay_sums.LOWEST, g)
    if segment_ids is not None:
        resets = begins(segment_ids).reshape(B, T, *(1,) * (g.ndim - 2))
        g = jnp.where(resets, decay_sums.LOWEST, g)
    state0 = jnp.zeros((B, N, D, E), dtype) if state0 is None else state0.astype(dtype)
    choice = dispatch.choose("ssd", implementation, IMPLEMENTATIONS, q, k, v, g, state0, options=options)
    return _ssd(choice, options, q, k, v, g, state0)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _ssd(choice, options, *arrays):
    return dispatch.run(choice, _bound("forward", FORWARD, options, arrays, keep=False), *arrays)


def _forward(choice, options, *arrays):
    functions = _bound("forward", FORWARD + ", {kept}", options, arrays, keep=True)
    o, state, kept = dispatch.run(choice, functions, *arrays)
    # the first of the states kept is state0, which is here for its type alone
    return (o, state), (arrays, kept)


def _backward(choice, options, residuals, cotangents):
    arrays, kept = residuals
    functions = _bound("backward", BACKWARD, options, arrays)
    gradients = dispatch.run(choice, functions, *arrays[:4], kept, *cotangents)
    return tuple(sharding.placed_like(d, x) for d, x in zip(gradients, arrays, strict=True))


_ssd.defvjp(_forward, _backward)

FORWARD = "{q}, {q}, {v}, {g}, {S} -> {v}, {S}"
BACKWARD = "{q}, {q}, {v}, {g}, {kept}, {v}, {S} -> {q}, {q}, {v}, {g}, {S}"


def _bound(which, rule, options, arrays, **more):
    """name -> function with its options. Each device computes its batch rows and its heads; the tokens and
    the states are whole."""
    q, _, v, g, _ = arrays
    K, N = q.shape[2], v.shape[2]
    # where one query-key head serves all, it is kept whole and its value heads are split
    n, sums, sizes = ("n", ("n",), {}) if K == 1 else ("(k g)", (), {"k": K, "g": N // K})
    decay = f"b t {n}" if g.ndim == 3 else f"b t {n} d"
    rule = rule.format(q="b t k d", v=f"b t {n} e", g=decay, S=f"b {n} d e", kept=f"b c {n} d e")
    bound = {}
    for name, implementation in IMPLEMENTATIONS.items():
        function = functools.partial(getattr(implementation, which), options=options, **more)
        bound[name] = sharding.per_shard(function, rule, whole=("t", "c", "d", "e"), sums=sums, **sizes)
    return bound


def begins(segment_ids):
    """bool [B, T]: the token has another id than the one before; False for the first."""
    changed = segment_ids[:, 1:] != segment_ids[:, :-1]
    return jnp.pad(changed, ((0, 0), (1, 0)))


def check_qkv(q, k, v):
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.ndim != 4:
            raise ValueError(f"{name} has shape {x.shape}; it must have four axes, batch-token-head-channel")
        check_float(name, x)
        if x.dtype != q.dtype:
            raise ValueError(f"{name} has dtype {x.dtype}; it must be that of q, {q.dtype}")
        if 0 in x.shape:
            raise ValueError(f"{name} has shape {x.shape}; no axis may be empty")
    if k.shape != q.shape:
        raise ValueError(f"k has shape {k.shape}; it must be that of q, {q.shape}")
    if v.shape[:2] != q.shape[:2]:
        hint = ""
        if v.shape[0] == q.shape[0] and v.shape[2] == q.shape[2]:
            hint = f" (q {q.shape} and v {v.shape} look like batch-head-token-channel: swap axes 1 and 2)"
        raise ValueError(f"v has shape {v.shape}; its batch and tokens must be q's {q.shape[:2]}{hint}")
    if v.shape[2] % q.shape[2]:
        raise ValueError(f"v has {v.shape[2]} heads; they must be a multiple of q's {q.shape[2]}")


def check_float(name, x):
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"{name} has dtype {x.dtype}; it must be a floating dtype")


def check_state(name, x, shape):
    if x is not None and x.shape != shape:
        raise ValueError(f"{name} has shape {x.shape}; it must be {shape}")
    if x is not None:
        check_float(name, x)


def check_segments(segment_ids, shape):
    if segment_ids is None:
        return
    if segment_ids.shape != shape:
        raise ValueError(f"segment_ids has shape {segment_ids.shape}; it must be {shape}")
    if not jnp.issubdtype(segment_ids.dtype, jnp.integer):
        raise ValueError(f"segment_ids has dtype {segment_ids.dtype}; it must be an integer dtype")


def check_chunk(chunk):
    powers = [2**i for i in range(4, 10)]
    if chunk is not None and (isinstance(chunk, bool) or chunk not in powers):
        raise ValueError(f"chunk is {chunk!r}; it must be None or one of {', '.join(map(str, powers))}")
    return chunk


def _check_block_sizes(block_sizes, G, chunk):
    """{"heads": ..., "span": ...}, None where not given."""
    blocks = {"heads": None, "span": None} | dict(block_sizes or {})
    if len(blocks) != 2:
        raise ValueError(f"block_sizes is {dict(block_sizes)!r}; its keys are 'heads' and 'span'")
    heads, span = blocks["heads"], blocks["span"]
    if heads is not None and (not _is_positive(heads) or G % heads):
        raise ValueError(f"block_sizes has heads {heads!r}; it must divide the {G} value heads a query head")
    if span is not None and (not _is_positive(span) or span & (span - 1) or span < (chunk or 16)):
        raise ValueError(
            f"block_sizes has span {span!r}; it must be a power of two of at least {chunk or 16}, a chunk"
        )
    return blocks


def _is_positive(x):
    return isinstance(x, int) and not isinstance(x, bool) and x > 0
