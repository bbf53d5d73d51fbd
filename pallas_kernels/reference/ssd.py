"""The recurrences of linear attention token by token: the oracle of ``ssd`` and ``mlstm``."""

import jax
import jax.numpy as jnp


def ssd(q_BTKD, k_BTKD, v_BTNE, log_decay, *, scale, state0, segment_ids):
    """S_t = exp(log_decay_t) S_{t-1} + k_t v_t^T and o_t = scale q_t S_t, as :func:`pallas_kernels.ssd`.

    Keeps every state, in float32 or float64. Returns (o [B, T, N, E], state [B, N, D, E]).
    """
    (B, T, K, D), (N, E) = q_BTKD.shape, v_BTNE.shape[2:]
    dtype = jnp.promote_types(v_BTNE.dtype, jnp.float32)
    q, k = (jnp.repeat(x.astype(dtype), N // K, axis=2) for x in (q_BTKD, k_BTKD))
    decay = jnp.exp(log_decay.astype(dtype))
    decay = decay[..., None] if decay.ndim == 3 else decay
    keep = continues(segment_ids, B, T).astype(dtype)
    state = jnp.zeros((B, N, D, E), dtype) if state0 is None else state0.astype(dtype)

    def step(S_BNDE, now):
        q, k, v, decay, keep = now
        S = S_BNDE * (decay * keep[:, None, None])[..., None] + k[..., :, None] * v[..., None, :]
        return S, scale * jnp.einsum("bnd,bnde->bne", q, S, precision="highest")

    tokens = [x.swapaxes(0, 1) for x in (q, k, v_BTNE.astype(dtype), decay, keep)]
    state, o_TBNE = jax.lax.scan(step, state, tuple(tokens))
    return o_TBNE.swapaxes(0, 1).astype(v_BTNE.dtype), state


def continues(segment_ids, B, T):
    """bool [B, T]: the token carries on from the one before; the first carries on from ``state0``."""
    if segment_ids is None:
        return jnp.ones((B, T), bool)
    return jnp.concatenate(
        [jnp.ones((B, 1), bool), segment_ids[:, 1:] == segment_ids[:, :-1]], axis=1
    )
