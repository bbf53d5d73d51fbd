"""Selective state spaces, a small state a channel: Mamba's recurrence and Longhorn's, by ``linear_scan``."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from pallas_kernels.cost.selective_scan import CHUNK
from pallas_kernels.linear_scan import linear_scan
from pallas_kernels.ssd import begins, check_float, check_segments


def selective_scan(
    u,
    dt,
    key,
    query,
    rate=None,
    *,
    h0=None,
    segment_ids=None,
    chunk: int = CHUNK,
    implementation: str | Sequence[str] | None = None,
):
    """y_t = h_t query_t, a state [S] for each of E channels.

        h_t = exp(dt_t rate) h_{t-1} + (dt_t u_t) key_t^T            Mamba (Gu and Dao 2023, eqs. 2 and 4)
        h_t = (1 - dt_t (key_t^2)^T) h_{t-1} + (dt_t u_t) key_t^T    Longhorn (Liu et al. 2024, eq. 9)

    States are never in memory for more tokens than a chunk; the backward pass makes them again from those
    between chunks. Letters: B batch, T tokens, E channels, S state.

    Args:
      u: float [B, T, E].
      dt: float [B, T, E], the step; for Longhorn beta / (1 + beta |key|^2), so that no decay is negative.
      key, query: float [B, T, S], the same for all channels.
      rate: float [E, S], below zero; None for Longhorn.
      h0: [B, E, S], the state before the first token; zeros where None.
      segment_ids: int [B, T]; the state is zero again where the id differs from the token before.
      chunk: tokens at a time, at least 1.
      implementation: of ``linear_scan``.

    Returns:
      (y [B, T, E] in the dtype of ``u``, h_last [B, E, S] in float32, or float64 for float64).

    Raises:
      ValueError: an argument of the wrong shape, dtype or range, by name.
    """
    u, dt, key, query = (jnp.asarray(x) for x in (u, dt, key, query))
    segment_ids = None if segment_ids is None else jnp.asarray(segment_ids)
    _check(u, dt, key, query, rate, h0, chunk)
    check_segments(segment_ids, u.shape[:2])
    dtype = jnp.promote_types(u.dtype, jnp.float32)
    (B, T, E), S = u.shape, key.shape[-1]
    h = jnp.zeros((B, E, S), dtype) if h0 is None else jnp.asarray(h0).astype(dtype)
    rate = None if rate is None else jnp.asarray(rate).astype(dtype)
    chunk = min(chunk, T)
    short = -T % chunk
    # tokens of no effect: dt = 0 keeps the state as it is
    arrays = [jnp.pad(x, ((0, 0), (0, short), (0, 0))) for x in (u, dt, key, query)]
    if segment_ids is not None:
        # the first token continues whatever h0 is of
        arrays.append(jnp.pad(begins(segment_ids), ((0, 0), (0, short))))
    chunks = [x.reshape(B, -1, chunk, *x.shape[2:]).swapaxes(0, 1) for x in arrays]

    @jax.checkpoint
    def one(h_BES, tokens):
        u_BcE, dt_BcE, key_BcS, query_BcS, *fresh = (x.astype(dtype) for x in tokens)
        key_BcS = key_BcS[:, :, None]
        dt_BcE = dt_BcE[..., None]
        decay = jnp.exp(dt_BcE * rate) if rate is not None else 1 - dt_BcE * key_BcS**2
        if fresh:
            decay = jnp.where(fresh[0][..., None, None] > 0, 0, decay)
        written = (dt_BcE * u_BcE[..., None]) * key_BcS
        h_BcES, last_BES = linear_scan(decay, written, h_BES, implementation=implementation)
        # a sum of products of few terms: not worth a matrix unit's time
        return last_BES, jnp.sum(h_BcES * query_BcS[:, :, None], axis=-1).astype(u.dtype)

    h, y = jax.lax.scan(one, h, chunks)
    return y.swapaxes(0, 1).reshape(B, -1, E)[:, :T], h


def _check(u, dt, key, query, rate, h0, chunk):
    if u.ndim != 3 or 0 in u.shape:
        raise ValueError(f"u has shape {u.shape}; it must be [B, T, E], no axis empty")
    B, T, E = u.shape
    if key.ndim != 3 or key.shape[:2] != (B, T) or not key.shape[2]:
        raise ValueError(f"key has shape {key.shape}; it must be [{B}, {T}, S]")
    wanted = {"dt": (dt, (B, T, E)), "query": (query, key.shape)}
    wanted["rate"] = None if rate is None else (jnp.asarray(rate), (E, key.shape[2]))
    wanted["h0"] = None if h0 is None else (jnp.asarray(h0), (B, E, key.shape[2]))
    for name, pair in {"u": (u, u.shape), "key": (key, key.shape), **wanted}.items():
        if pair is None:
            continue
        if pair[0].shape != pair[1]:
            raise ValueError(f"{name} has shape {pair[0].shape}; it must be {pair[1]}")
        check_float(name, pair[0])
    if not isinstance(chunk, int) or chunk < 1:
        raise ValueError(f"chunk is {chunk!r}; it must be a positive integer")
