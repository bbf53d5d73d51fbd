"""The gated delta rule by chunks, for XLA to compile: O(T) memory, forward and backward.

Forward keeps the state before every chunk; backward goes over the chunks in reverse and differentiates each
from its own state again.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels import delta_chunk


def forward(q, k, v, beta, log_decay, reset, state0, *, scale, chunk, keep=True):
    """``(o, state)``, and with ``keep`` the state before every chunk [B, chunks, N, D, E]."""
    T = q.shape[1]
    step = _over_heads(scale)

    def body(S, tokens):
        o, after = step(S, *tokens)
        return after, (o.astype(v.dtype), S if keep else None)

    arrays = (q, k, v, beta, log_decay, _per_head(reset, q))
    state, (o, starts) = lax.scan(body, state0, tuple(_split(x, chunk) for x in arrays))
    out = _join(o, T), state
    return (*out, jnp.moveaxis(starts, 0, 1)) if keep else out


def backward(q, k, v, beta, log_decay, reset, starts, do, dstate, *, scale, chunk):
    """Gradients of q, k, v, beta, log_decay and state0."""
    T = q.shape[1]
    step = _over_heads(scale)

    def body(dS, tokens):
        S, do, reset, *arrays = tokens
        _, pull = jax.vjp(lambda S, *xs: step(S, *xs, reset), S, *arrays)
        dS, *gradients = pull((do.astype(S.dtype), dS))
        return dS, tuple(gradients)

    arrays = (do, _per_head(reset, q), q, k, v, beta, log_decay)
    tokens = (jnp.moveaxis(starts, 1, 0), *(_split(x, chunk) for x in arrays))
    dstate0, gradients = lax.scan(body, dstate, tokens, reverse=True)
    return *(_join(g, T) for g in gradients), dstate0


def _over_heads(scale):
    """``delta_chunk.chunk`` over batch and heads; numbers of a token are [B, N, C]."""
    one = functools.partial(delta_chunk.chunk, scale=scale)

    def flat(S, q, k, v, beta, log_decay, reset):
        return one(S, q, k, v, beta[None], log_decay[None], reset[None])

    return jax.vmap(jax.vmap(flat))


def _per_head(reset_BT, q):
    dtype = jnp.promote_types(q.dtype, jnp.float32)
    return jnp.broadcast_to(reset_BT[:, :, None], q.shape[:3]).astype(dtype)


def _split(x, C):
    """[B, T, N, ...] to [chunks, B, N, C, ...]; zeros after the last token leave the state as it is."""
    B, T, N, *rest = x.shape
    x = jnp.pad(x, [(0, 0), (0, -T % C), (0, 0)] + [(0, 0)] * len(rest))
    x = x.reshape(B, -1, C, N, *rest)
    return jnp.moveaxis(jnp.moveaxis(x, 1, 0), 2, 3)


def _join(x, T):
    """Undoes ``_split``."""
    n, B, N, C, *rest = x.shape
    return jnp.moveaxis(jnp.moveaxis(x, 3, 2), 0, 1).reshape(B, n * C, N, *rest)[:, :T]
