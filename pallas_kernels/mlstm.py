"""The matrix memory of xLSTM: exponential gates with their stabiliser, on top of ``ssd``."""

import math
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp

from pallas_kernels.ssd import begins, check_float, check_qkv, check_segments, check_state, ssd

LOWEST_GATE = -1e30  # finite, so that no difference of gates is NaN
LARGEST = 80.0  # exp of it is finite in float32, and a numerator over it is 0 beside anything


def mlstm(
    q,
    k,
    v,
    i_gate,
    f_gate,
    *,
    scale: float | None = None,
    state0=None,
    segment_ids=None,
    chunk: int | None = None,
    implementation: str | Sequence[str] | None = None,
    block_sizes: Mapping[str, int] | None = None,
):
    """mLSTM (Beck et al. 2024, eqs. 19-27 and the stabiliser of eqs. 15-17), with grouped heads.

        m_t = max(log f_t + m_{t-1}, i_t),  f'_t = exp(log f_t + m_{t-1} - m_t),  i'_t = exp(i_t - m_t)
        C_t = f'_t C_{t-1} + i'_t scale k_t v_t^T,  n_t = f'_t n_{t-1} + i'_t scale k_t
        h_t = q_t C_t / max(|q_t . n_t|, exp(-m_t)),  log f_t = log sigmoid(f_gate_t),  i_t = i_gate_t

    This is ``ssd`` of decays f' <= 1 and of values scale i' (v, 1), i' <= 1, whose last column is the
    normaliser; m is a scan of scalars. h does not depend on m but for rounding.

    Letters: B batch, T tokens, N value heads, K query-key heads, D key size, E value size.

    Args:
      q, k: float [B, T, K, D], N a multiple of K: value head n reads query-key head n // (N / K).
      v: float [B, T, N, E], the dtype of ``q``.
      i_gate, f_gate: float [B, T, N], before the exponential and the sigmoid.
      scale: factor of k; 1/sqrt(D) where None.
      state0: None or (C [B, N, D, E], n [B, N, D], m [B, N]); zeros where None.
      segment_ids: None or int [B, T]: where the id differs from the token before, C, n and m are zero
        again before the token.
      chunk, implementation, block_sizes: as for ``ssd``.

    Returns:
      (h [B, T, N, E] in the dtype of ``v``, (C, n, m) in float32, or float64 for float64).

    Raises:
      ValueError: an argument of the wrong shape, dtype or range, by name; an implementation that is
        unknown or does not take these arguments.
    """
    q, k, v, i_gate, f_gate = (jnp.asarray(x) for x in (q, k, v, i_gate, f_gate))
    segment_ids = None if segment_ids is None else jnp.asarray(segment_ids)
    check_qkv(q, k, v)
    (B, T, _, D), (N, E) = q.shape, v.shape[2:]
    for name, x in (("i_gate", i_gate), ("f_gate", f_gate)):
        if x.shape != (B, T, N):
            raise ValueError(f"{name} has shape {x.shape}; it must be {(B, T, N)}")
        check_float(name, x)
    check_segments(segment_ids, (B, T))
    dtype = jnp.promote_types(q.dtype, jnp.float32)
    C0, n0, m0 = _state(state0, (B, N, D, E), dtype)
    i = i_gate.astype(dtype)
    i = jnp.where(i < LOWEST_GATE, LOWEST_GATE, i)
    log_f = jax.nn.log_sigmoid(f_gate.astype(dtype))
    log_f = jnp.where(log_f < LOWEST_GATE, LOWEST_GATE, log_f)
    resets = jnp.zeros((B, T), bool) if segment_ids is None else begins(segment_ids)
    m, before = stabiliser(i, log_f, m0, resets)
    scale = 1 / math.sqrt(D) if scale is None else scale
    weight = scale * jnp.exp(i - m)[..., None]
    o, state = ssd(
        q, k, jnp.concatenate([weight * v, weight], -1).astype(v.dtype), log_f + before - m,
        state0=jnp.concatenate([C0, n0[..., None]], -1), segment_ids=segment_ids,
        chunk=chunk, implementation=implementation, block_sizes=block_sizes,
    )  # fmt: skip
    o = o.astype(dtype)
    normaliser = jnp.maximum(jnp.abs(o[..., E:]), jnp.exp(jnp.minimum(-m, LARGEST))[..., None])
    return (o[..., :E] / normaliser).astype(v.dtype), (state[..., :E], state[..., E], m[:, -1])


def stabiliser(i, log_f, m0, resets):
    """m_t = max(log_f_t + m_{t-1}, i_t) for all t, and m_{t-1}, which is 0 where ``resets``.

    A product in the algebra of max and plus, so associative: (log_f, m) then (log_f', m') is
    (log_f + log_f', max(m + log_f', m')).
    """
    is_first = (jnp.arange(i.shape[1]) == 0)[:, None]
    fresh = resets[..., None] | is_first
    begun = jnp.where(fresh, jnp.maximum(log_f + jnp.where(is_first, m0[:, None], 0), i), i)

    def then(a, b):
        return a[0] + b[0], jnp.maximum(a[1] + b[0], b[1])

    # a token that begins anew takes nothing over, whatever was before
    _, m = jax.lax.associative_scan(then, (jnp.where(fresh, -jnp.inf, log_f), begun), axis=1)
    before = jnp.concatenate([m0[:, None], m[:, :-1]], 1)
    return m, jnp.where(resets[..., None], 0, before)


def _state(state0, shape, dtype):
    shapes = {"C": shape, "n": shape[:3], "m": shape[:2]}
    if state0 is None:
        return [jnp.zeros(s, dtype) for s in shapes.values()]
    if not isinstance(state0, (tuple, list)) or len(state0) != 3:
        raise ValueError(f"state0 is a {type(state0).__name__}; it must be None or three arrays (C, n, m)")
    state0 = [jnp.asarray(x) for x in state0]
    for (name, s), x in zip(shapes.items(), state0, strict=True):
        check_state(f"state0's {name}", x, s)
    return [x.astype(dtype) for x in state0]
