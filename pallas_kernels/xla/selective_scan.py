"""The selective scan for XLA to compile: token by token, or chunk by chunk through ``linear_scan``.

Letters: n chunks, c tokens of a chunk, B batch, E channels, S state. The state lies as [B, S, E]: sums over
its few entries then add whole vectors, and the channels fill the lanes. Both forms keep the state before each
chunk and nothing else, and going back make those of a chunk again.
"""

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.linear_scan import linear_scan


def in_place(rate_SE, h0_BSE, tokens):
    """One token after another, as is quickest on a CPU.

    Args:
      rate_SE: or None for Longhorn.
      h0_BSE: its dtype is that of all sums.
      tokens: (u, dt [n, c, B, E], key, query [n, c, B, S], fresh: bool [n, c, B] or None), any floats.

    Returns:
      (y [n, c, B, E], h_last [B, S, E], the state before each chunk [n, B, S, E]).
    """

    def token(h_BSE, x):
        h_BSE, _, _ = _step(rate_SE, h_BSE, x)
        return h_BSE, jnp.sum(h_BSE * x[3][:, :, None], axis=1)

    def chunk(h_BSE, xs):
        after, y = lax.scan(token, h_BSE, _cast(xs, h_BSE.dtype))
        return after, (y, h_BSE)

    h_last, (y, states) = lax.scan(chunk, h0_BSE, tokens)
    return y, h_last, states


def in_place_backward(rate_SE, states, tokens, dy, dh_last_BSE):
    """Gradients of (rate, h0, u, dt, key, query), of the shapes of ``in_place``'s arguments."""

    def again(h_BSE, x):
        after, decay, kept = _step(rate_SE, h_BSE, x)
        return after, (after, kept, decay)

    def token(carry, xs):
        dh_BSE, drate_BSE = carry
        dt, query, fresh, dy, before, decay = xs
        dh_BSE = dh_BSE + query[:, :, None] * dy[:, None]
        dbefore, ddt = dh_BSE * decay, None
        if rate_SE is not None:
            dlog = dbefore * before
            ddt = jnp.sum(dlog * rate_SE, axis=1)
            drate_BSE = drate_BSE + dlog * dt[:, None]
        if fresh is not None:
            dbefore = jnp.where(fresh[:, None, None], 0, dbefore)
        return (dbefore, drate_BSE), (dh_BSE, ddt)

    def chunk(carry, xs):
        h_BSE, xs, dy = xs
        u, dt, key, query, fresh = _cast(xs, h_BSE.dtype)
        _, (after, before, decay) = lax.scan(again, h_BSE, (u, dt, key, query, fresh))
        carry, (dh, ddt) = lax.scan(token, carry, (dt, query, fresh, dy, before, decay), reverse=True)
        # sums that no later token needs are the chunk's at once
        dwritten, dkey, dquery = _over_state(dh, key), _over_channels(dh, dt * u), _over_channels(after, dy)
        if rate_SE is None:
            ddecay = dh * before
            ddt = -_over_state(ddecay, key * key)
            dkey = dkey - 2 * key * _over_channels(ddecay, dt)
        gradients = dwritten * dt, ddt + dwritten * u, dkey, dquery
        return carry, tuple(g.astype(x.dtype) for g, x in zip(gradients, xs[:4], strict=True))

    carry = dh_last_BSE, None if rate_SE is None else jnp.zeros_like(dh_last_BSE)
    (dh0, drate), gradients = lax.scan(chunk, carry, (states, tokens, dy), reverse=True)
    return None if drate is None else jnp.sum(drate, axis=0), dh0, *gradients


# vector arithmetic on purpose: one row a token is too little for a matrix unit
def _over_state(x_cBSE, y_cBS):
    return jnp.sum(x_cBSE * y_cBS[..., None], axis=2)


def _over_channels(x_cBSE, y_cBE):
    return jnp.sum(x_cBSE * y_cBE[:, :, None], axis=3)


def _step(rate_SE, h_BSE, x):
    """The state after a token, its decay, and what of the state before was kept (none where fresh)."""
    u, dt, key, _, fresh = x
    dt_1, key_1 = dt[:, None], key[:, :, None]
    decay = _decay(rate_SE, dt_1, key_1)
    kept = h_BSE if fresh is None else jnp.where(fresh[:, None, None], 0, h_BSE)
    return decay * kept + (dt * u)[:, None] * key_1, decay, kept


def _decay(rate_SE, dt_1E, key_S1):
    """[..., S, E]: Mamba's, or Longhorn's where there is no rate."""
    return 1 - dt_1E * (key_S1 * key_S1) if rate_SE is None else jnp.exp(dt_1E * rate_SE)


def _cast(xs, dtype):
    *arrays, fresh = xs
    return *(x.astype(dtype) for x in arrays), fresh


def _chunk(implementation, rate_SE, h_BSE, xs):
    """(state after the chunk, y) of one chunk, its states by ``linear_scan``."""
    u, dt, key, query, fresh = jax.tree.map(lambda x: x.swapaxes(0, 1), _cast(xs, h_BSE.dtype))
    dt, key = dt[:, :, None], key[..., None]
    decay = _decay(rate_SE, dt, key)
    if fresh is not None:
        decay = jnp.where(fresh[..., None, None], 0, decay)
    h_BcSE, last_BSE = linear_scan(decay, dt * u[:, :, None] * key, h_BSE, implementation=implementation)
    # a sum of products of few terms: not worth a matrix unit's time
    return last_BSE, jnp.sum(h_BcSE * query[..., None], axis=2).swapaxes(0, 1)


def by_chunks(rate_SE, h0_BSE, tokens, *, implementation=None):
    """As ``in_place``, the states of a chunk at once."""

    def chunk(h_BSE, xs):
        after, y = _chunk(implementation, rate_SE, h_BSE, xs)
        return after, (y, h_BSE)

    h_last, (y, states) = lax.scan(chunk, h0_BSE, tokens)
    return y, h_last, states


def by_chunks_backward(rate_SE, states, tokens, dy, dh_last_BSE, *, implementation=None):
    """As ``in_place_backward``."""

    def chunk(carry, xs):
        dh_BSE, drate = carry
        h_BSE, (*arrays, fresh), dy = xs

        def forward(rate_SE, h_BSE, *arrays):
            return _chunk(implementation, rate_SE, h_BSE, (*arrays, fresh))

        _, pull = jax.vjp(forward, rate_SE, h_BSE, *arrays)
        more, dh_BSE, *gradients = pull((dh_BSE, dy))
        return (dh_BSE, None if rate_SE is None else drate + more), tuple(gradients)

    none = None if rate_SE is None else jnp.zeros_like(rate_SE)
    (dh0, drate), gradients = lax.scan(chunk, (dh_last_BSE, none), (states, tokens, dy), reverse=True)
    return drate, dh0, *gradients
