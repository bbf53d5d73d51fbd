"""``ssd`` for XLA to compile: a loop over chunks, in each of them matrix products.

With b the running sum of log_decay within a chunk (inclusive) and S the state before it (Dao and Gu
2024, section 6; Yang et al. 2023, section 4):

    o_t = scale sum_{s <= t} (q_t . exp(b_t - b_s) k_s) v_s + scale (q_t exp(b_t)) S
    S'  = exp(b_C) S + sum_s (exp(b_C - b_s) k_s) v_s^T

A forward pass that will be differentiated keeps its arguments and the state once each some hundred tokens.
The backward pass takes the runs of chunks between two of those from the last to the first; in each it
computes the state before every chunk again and then walks the chunks back, differentiating one at a time.
"""

import functools
import math

import jax
import jax.numpy as jnp

from pallas_kernels import decay_sums
from pallas_kernels.cost.ssd import XLA_CHUNK


def forward(q_BTKD, k_BTKD, v_BTNE, g, state0_BNDE, *, options, keep):
    """(o [B, T, N, E], state [B, N, D, E]), and with ``keep`` states [B, spans, N, D, E], one before each
    span of tokens; g is log_decay, at least ``decay_sums.LOWEST``."""
    runs, T = _runs(q_BTKD, k_BTKD, v_BTNE, g, options)
    step = functools.partial(_chunk, scale=options.scale)

    def run(S, chunks):
        last, o = jax.lax.scan(step, S, chunks)
        return last, (o, S if keep else None)

    state, (o, kept) = jax.lax.scan(run, _grouped_state(state0_BNDE, q_BTKD), runs)
    out = _join(o, T, (2, 3)), state.reshape(state0_BNDE.shape)
    return (*out, _kept_back(kept, state0_BNDE)) if keep else out


def backward(q_BTKD, k_BTKD, v_BTNE, g, kept, do_BTNE, dstate_BNDE, *, options):
    """Gradients of q, k, v, g and state0."""
    runs, T = _runs(q_BTKD, k_BTKD, v_BTNE, g, options)
    do = _split(do_BTNE, q_BTKD.shape[2], *runs[0].shape[:2], runs[0].shape[4])
    kept = jnp.moveaxis(_grouped_state(kept, q_BTKD), 1, 0)

    def step(dS, now):
        S, chunk, do = now
        _, pull = jax.vjp(lambda S, chunk: _chunk(S, chunk, scale=options.scale), S, chunk)
        return pull((dS, do))

    def run(dS, now):
        S, chunks, do = now
        _, starts = jax.lax.scan(lambda S, chunk: (_next_state(S, *chunk[1:]), S), S, chunks)
        return jax.lax.scan(step, dS, (starts, chunks, do), reverse=True)

    dS, grads = jax.lax.scan(run, _grouped_state(dstate_BNDE, q_BTKD), (kept, runs, do), reverse=True)
    heads = (2,), (2,), (2, 3), (2, 3)
    dq, dk, dv, dg = (_join(x, T, axes) for x, axes in zip(grads, heads, strict=True))
    return dq, dk, dv, dg, dS.reshape(dstate_BNDE.shape)


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


def _runs(q, k, v, g, options):
    """Arrays as runs of chunks (see ``_split``), and the tokens."""
    T, K = q.shape[1:3]
    C, _, count, per = decay_sums.chunks_for(T, options.chunk or XLA_CHUNK, options.span)
    heads = (None, None, K, K)
    return tuple(_split(x, h, count, per, C) for x, h in zip((q, k, v, g), heads, strict=True)), T


def _split(x, K, count, per, C):
    """[B, T, N, ...] to [count, per, B, K, G, C, ...], or [count, per, B, N, C, ...] where K is None.

    What is added at the end has key, value and log_decay 0: it leaves the state as it is.
    """
    (B, T, N), rest = x.shape[:3], x.shape[3:]
    x = jnp.pad(x, [(0, 0), (0, count * per * C - T)] + [(0, 0)] * (x.ndim - 2))
    heads = (N,) if K is None else (K, N // K)
    x = x.reshape(B, count, per, C, *heads, *rest)
    return jnp.moveaxis(jnp.moveaxis(x, 3, 3 + len(heads)), 0, 2)


def _join(x, T, heads):
    """The inverse of ``_split``; ``heads`` are the axes of heads in [chunks, B, heads, C, ...]."""
    x = x.reshape(-1, *x.shape[2:])
    x = jnp.moveaxis(jnp.moveaxis(x, 0, 1), 2 + len(heads), 2)  # [B, chunks, C, heads, ...]
    B, n, C = x.shape[:3]
    N = math.prod(x.shape[3 : 3 + len(heads)])
    return x.reshape(B, n * C, N, *x.shape[3 + len(heads) :])[:, :T]


def _grouped_state(state, q_BTKD):
    """[..., N, D, E] to [..., K, G, D, E]."""
    *lead, N, D, E = state.shape
    K = q_BTKD.shape[2]
    return state.reshape(*lead, K, N // K, D, E)


def _kept_back(kept, state_BNDE):
    """[count, B, K, G, D, E] to [B, count, N, D, E]."""
    B, *rest = state_BNDE.shape
    return jnp.moveaxis(kept, 0, 1).reshape(B, -1, *rest)
