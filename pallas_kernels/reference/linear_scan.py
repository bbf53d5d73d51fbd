"""The diagonal recurrence one token at a time: the oracle that every implementation is held against."""

import jax.numpy as jnp
from jax import lax


def linear_scan(a, b, h0=None, *, reverse=False, segment_ids=None):
    """Same meaning as :func:`pallas_kernels.linear_scan`, arguments already checked; JAX differentiates it.

    In float32 or complex64 (float64, complex128 for such inputs). Returns h and h_last, in that dtype.
    """
    dtype = jnp.promote_types(a.dtype, jnp.float32)
    a, b = (jnp.moveaxis(x.astype(dtype), 1, 0) for x in (a, b))
    h0 = jnp.zeros_like(b[0]) if h0 is None else h0.astype(dtype)
    ids = jnp.zeros(a.shape[:2], jnp.int32) if segment_ids is None else segment_ids.T
    first = ids[-1] if reverse else ids[0]

    def step(carry, token):
        h, id_before = carry
        a_t, b_t, id_t = token
        same = (id_t == id_before).reshape(-1, *[1] * (h.ndim - 1))
        h = a_t * jnp.where(same, h, 0) + b_t
        return (h, id_t), h

    (h_last, _), h = lax.scan(step, (h0, first), (a, b, ids), reverse=reverse)
    return jnp.moveaxis(h, 0, 1), h_last
