"""The gated delta rule one token at a time: the oracle of every implementation."""

import jax
import jax.numpy as jnp


def gated_delta_rule(q_BTND, k_BTND, v_BTNE, beta_BTN, log_decay_BTN, reset_BT, state_BNDE, *, scale):
    """``(o, state)``; same meaning as :func:`pallas_kernels.gated_delta_rule`, arguments already checked.

    Computes in float32, or in float64 where the inputs are, at the highest matmul precision. ``reset_BT`` is
    True where the state before the token counts as zero. Returns o [B, T, N, E] and the state [B, N, D, E].
    """
    dtype = jnp.promote_types(v_BTNE.dtype, jnp.float32)

    def step(S, token):
        q, k, v, beta, log_decay, reset = token
        S = jnp.where(reset[:, None, None, None], 0, jnp.exp(log_decay)[..., None, None] * S)
        found = jnp.einsum("bnde,bnd->bne", S, k, precision="highest")
        S = S + jnp.einsum("bnd,bne->bnde", k, beta[..., None] * (v - found), precision="highest")
        return S, scale * jnp.einsum("bnde,bnd->bne", S, q, precision="highest")

    arrays = [x.astype(dtype) for x in (q_BTND, k_BTND, v_BTNE, beta_BTN, log_decay_BTN)]
    by_token = [jnp.moveaxis(x, 1, 0) for x in (*arrays, reset_BT)]
    state, o = jax.lax.scan(step, state_BNDE.astype(dtype), tuple(by_token))
    return jnp.moveaxis(o, 0, 1).astype(v_BTNE.dtype), state
