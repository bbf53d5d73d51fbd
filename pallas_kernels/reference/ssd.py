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
    return jnp.concatenate([jnp.ones((B, 1), bool), segment_ids[:, 1:] == segment_ids[:, :-1]], axis=1)


def mlstm(q_BTKD, k_BTKD, v_BTNE, i_gate_BTN, f_gate_BTN, *, scale, state0, segment_ids):
    """The equations of :func:`pallas_kernels.mlstm` one after the other.

    Returns (h [B, T, N, E], (C, n, m)).
    """
    (B, T, K, D), (N, E) = q_BTKD.shape, v_BTNE.shape[2:]
    dtype = jnp.promote_types(v_BTNE.dtype, jnp.float32)
    q, k = (jnp.repeat(x.astype(dtype), N // K, axis=2) for x in (q_BTKD, k_BTKD))
    keep = continues(segment_ids, B, T)
    if state0 is None:
        state0 = jnp.zeros((B, N, D, E)), jnp.zeros((B, N, D)), jnp.zeros((B, N))
    state0 = tuple(x.astype(dtype) for x in state0)

    def step(state, now):
        q, k, v, i, f, keep = now
        C, n, m_before = (jnp.where(jnp.expand_dims(keep, range(1, x.ndim)), x, 0) for x in state)
        log_f = jax.nn.log_sigmoid(f)
        m = jnp.maximum(log_f + m_before, i)
        f, i = jnp.exp(log_f + m_before - m)[..., None], jnp.exp(i - m)[..., None]
        C = f[..., None] * C + (i * scale * k)[..., None] * v[..., None, :]
        n = f * n + i * scale * k
        along = jnp.sum(n * q, -1)
        h = jnp.sum(q[..., None] * C, -2) / jnp.maximum(jnp.abs(along), jnp.exp(-m))[..., None]
        return (C, n, m), h

    tokens = [q, k, *(x.astype(dtype) for x in (v_BTNE, i_gate_BTN, f_gate_BTN)), keep]
    state, h_TBNE = jax.lax.scan(step, state0, tuple(x.swapaxes(0, 1) for x in tokens))
    return h_TBNE.swapaxes(0, 1).astype(v_BTNE.dtype), state
