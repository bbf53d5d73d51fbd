"""``ssd`` for XLA to compile: a loop over chunks, in each of them matrix products.

With b the running sum of log_decay within a chunk (inclusive) and S the state before it (Dao and Gu
2024, section 6; Yang et al. 2023, section 4):

    o_t = scale sum_{s <= t} (q_t . exp(b_t - b_s) k_s) v_s + scale (q_t exp(b_t)) S
    S'  = exp(b_C) S + sum_s (exp(b_C - b_s) k_s) v_s^T

The forward pass keeps its arguments alone. The backward pass computes the state before each chunk again
and then walks the chunks from the last to the first, differentiating one at a time.
"""

import functools
import math

import jax
import jax.numpy as jnp

from pallas_kernels import decay_sums

CHUNK = 64  # of 32, 64, 128 and 256 the quickest gradient on a loaded two-core CPU, T 4096, 8 heads of 64


def forward(q_BTKD, k_BTKD, v_BTNE, g, state0_BNDE, *, options):
    """(o [B, T, N, E], state [B, N, D, E]); g is log_decay, at least ``decay_sums.LOWEST``."""
    chunks, (T, _) = _chunks(q_BTKD, k_BTKD, v_BTNE, g, options)
    step = functools.partial(_chunk, scale=options.scale)
    state, o_cBKGCE = jax.lax.scan(step, _grouped_state(state0_BNDE, q_BTKD), chunks)
    return _join(o_cBKGCE, T, (2, 3)), state.reshape(state0_BNDE.shape)


def backward(q_BTKD, k_BTKD, v_BTNE, g, state0_BNDE, do_BTNE, dstate_BNDE, *, options):
    """Gradients of q, k, v, g and state0."""
    chunks, (T, C) = _chunks(q_BTKD, k_BTKD, v_BTNE, g, options)
    _, starts = jax.lax.scan(
        lambda S, chunk: (_next_state(S, *chunk[1:]), S), _grouped_state(state0_BNDE, q_BTKD), chunks
    )
    do_cBKGCE = _split(do_BTNE, q_BTKD.shape[2], C)

    def step(dS, now):
        S, chunk, do = now
        _, pull = jax.vjp(lambda S, chunk: _chunk(S, chunk, scale=options.scale), S, chunk)
        return pull((dS, do))

    dS, grads = jax.lax.scan(
        step, _grouped_state(dstate_BNDE, q_BTKD), (starts, chunks, do_cBKGCE), reverse=True
    )
    heads = (2,), (2,), (2, 3), (2, 3)
    dq, dk, dv, dg = (_join(x, T, axes) for x, axes in zip(grads, heads, strict=True))
    return dq, dk, dv, dg, dS.reshape(state0_BNDE.shape)


def _chunk(S_BKGDE, chunk, *, scale):
    """One chunk: (the state after it, its outputs)."""
    q_BKCD, k_BKCD, v_BKGCE, g = chunk
    S = S_BKGDE.astype(q_BKCD.dtype)
    if g.ndim == 4:
        weight_BKGCC, to_t, _, _ = _scalar_weights(g)
        qk = _dot("bktd,bksd->bkts", q_BKCD, k_BKCD)
        A = qk[:, :, None] * weight_BKGCC
        carried = to_t[..., None] * _dot("bktd,bkgde->bkgte", q_BKCD, S)
    else:
        A, c, _ = decay_sums.weighted_products(q_BKCD[:, :, None], k_BKCD[:, :, None], g)
        qc = (q_BKCD[:, :, None] * jnp.exp(c)).astype(S.dtype)
        carried = _dot("bkgtd,bkgde->bkgte", qc, S)
    o = _dot("bkgts,bkgse->bkgte", A.astype(v_BKGCE.dtype), v_BKGCE) + carried
    return _next_state(S_BKGDE, k_BKCD, v_BKGCE, g), (scale * o).astype(v_BKGCE.dtype)


def _next_state(S_BKGDE, k_BKCD, v_BKGCE, g):
    """The state after a chunk."""
    if g.ndim == 4:
        _, _, to_end, whole = _scalar_weights(g)
        v = (to_end[..., None] * v_BKGCE).astype(v_BKGCE.dtype)
        return jnp.exp(whole)[..., None, None] * S_BKGDE + _dot("bksd,bkgse->bkgde", k_BKCD, v)
    c, r = decay_sums.within(g)
    k = (k_BKCD[:, :, None] * jnp.exp(r)).astype(k_BKCD.dtype)
    return jnp.exp(c[..., -1, :, None]) * S_BKGDE + _dot("bkgsd,bkgse->bkgde", k, v_BKGCE)


def _scalar_weights(g_BKGC):
    """exp(b_t - b_s) where s <= t else 0; exp(b_t); exp(b_C - b_s); b_C."""
    b = jnp.stack(decay_sums.exact_cumsum(g_BKGC))
    between = (b[..., :, None] - b[..., None, :]).sum(0)
    causal = jnp.tril(jnp.ones(between.shape[-2:], bool))
    return (
        jnp.exp(jnp.where(causal, between, -jnp.inf)),
        jnp.exp(b.sum(0)),
        jnp.exp((b[..., -1:] - b).sum(0)),
        b[..., -1].sum(0),
    )


def _dot(rule, x, y):
    """A matrix product that float32 operands do not lose bits in, with a float32 result at least."""
    dtype = jnp.promote_types(x.dtype, jnp.float32)
    precision = None if x.dtype in (jnp.bfloat16, jnp.float16) else jax.lax.Precision.HIGHEST
    return jnp.einsum(rule, x, y, preferred_element_type=dtype, precision=precision)


def _chunks(q, k, v, g, options):
    T, K = q.shape[1:3]
    C = decay_sums.chunk_for(T, options.chunk or CHUNK)
    return (_split(q, None, C), _split(k, None, C), _split(v, K, C), _split(g, K, C)), (T, C)


def _split(x, K, C):
    """[B, T, N, ...] to [chunks, B, K, G, C, ...], or [chunks, B, N, C, ...] where K is None.

    What is added at the end has key, value and log_decay 0: it leaves the state as it is.
    """
    (B, T, N), rest = x.shape[:3], x.shape[3:]
    n = math.ceil(T / C)
    x = jnp.pad(x, [(0, 0), (0, n * C - T)] + [(0, 0)] * (x.ndim - 2))
    heads = (N,) if K is None else (K, N // K)
    x = x.reshape(B, n, C, *heads, *rest)
    return jnp.moveaxis(jnp.moveaxis(x, 2, 2 + len(heads)), 1, 0)


def _join(x, T, heads):
    """The inverse of ``_split``; ``heads`` are the axes of heads."""
    x = jnp.moveaxis(jnp.moveaxis(x, 0, 1), 2 + len(heads), 2)  # [B, chunks, C, heads, ...]
    B, n, C = x.shape[:3]
    N = math.prod(x.shape[3 : 3 + len(heads)])
    return x.reshape(B, n * C, N, *x.shape[3 + len(heads) :])[:, :T]


def _grouped_state(state_BNDE, q_BTKD):
    B, N, D, E = state_BNDE.shape
    K = q_BTKD.shape[2]
    return state_BNDE.reshape(B, K, N // K, D, E)
