"""Selective state spaces one token at a time: the oracle."""

import jax.numpy as jnp
from jax import lax


def selective_scan(u, dt, key, query, rate=None, *, h0=None, segment_ids=None):
    """Same meaning as :func:`pallas_kernels.selective_scan`, arguments already checked.

    In float32, or float64 for float64. Returns y and h_last, in that dtype.
    """
    dtype = jnp.promote_types(u.dtype, jnp.float32)
    tokens = [jnp.moveaxis(x.astype(dtype), 1, 0) for x in (u, dt, key, query)]
    h0 = jnp.zeros((*u.shape[::2], key.shape[-1]), dtype) if h0 is None else h0.astype(dtype)
    ids = jnp.zeros(u.shape[:2], jnp.int32) if segment_ids is None else segment_ids

    def step(carry, token):
        h, id_before = carry
        u_t, dt_t, key_t, query_t, id_t = token
        same = (id_t == id_before)[:, None, None]
        dt_t, key_t = dt_t[:, :, None], key_t[:, None]
        decay = 1 - dt_t * key_t**2 if rate is None else jnp.exp(dt_t * rate)
        h = decay * jnp.where(same, h, 0) + dt_t * u_t[:, :, None] * key_t
        return (h, id_t), jnp.sum(h * query_t[:, None], axis=-1)

    (h_last, _), y = lax.scan(step, (h0, ids[:, 0]), (*tokens, ids.T))
    return jnp.moveaxis(y, 0, 1), h_last
