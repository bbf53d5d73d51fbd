"""The causal convolution one token at a time: the oracle that every implementation is held against."""

import jax
import jax.numpy as jnp


def causal_conv1d(x, w, bias=None, *, activation=None, initial_state=None, segment_ids=None):
    """Same meaning as :func:`pallas_kernels.causal_conv1d`, arguments already checked; JAX differentiates it.

    In float32, or float64 for such an ``x``. Returns y [B, T, C] and the last W - 1 tokens, in that dtype.
    """
    (B, _, C), W = x.shape, w.shape[0]
    dtype = jnp.promote_types(x.dtype, jnp.float32)
    w, bias = w.astype(dtype), jnp.zeros(C, dtype) if bias is None else bias.astype(dtype)
    before = jnp.zeros((B, W - 1, C), dtype) if initial_state is None else initial_state.astype(dtype)
    ids = jnp.zeros(x.shape[:2], jnp.int32) if segment_ids is None else segment_ids

    def step(carry, token):
        before_BKC, id_before = carry
        x_BC, id_now = token
        before_BKC = jnp.where((id_now == id_before)[:, None, None], before_BKC, 0)
        taps_BWC = jnp.concatenate([before_BKC, x_BC[:, None]], axis=1)
        z_BC = bias + jnp.sum(taps_BWC * w, axis=1)
        return (taps_BWC[:, 1:], id_now), jax.nn.silu(z_BC) if activation == "silu" else z_BC

    tokens = x.astype(dtype).swapaxes(0, 1), ids.T
    _, y = jax.lax.scan(step, (before, ids[:, 0]), tokens)
    # the last tokens of whatever segment, and not the carry, which holds zeros for those of others
    last = jnp.concatenate([before, x.astype(dtype)], axis=1)[:, x.shape[1] :]
    return y.swapaxes(0, 1), last
