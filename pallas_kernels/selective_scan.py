"""Selective state spaces, a small state a channel: Mamba's recurrence and Longhorn's."""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from pallas_kernels import dispatch
from pallas_kernels.cost.selective_scan import CHUNK
from pallas_kernels.ssd import begins, check_float, check_segments
from pallas_kernels.xla import selective_scan as xla

IMPLEMENTATIONS = {
    "xla_chunked": dispatch.Implementation(xla.in_place, xla.in_place_backward),
    **{
        name: dispatch.Implementation(
            functools.partial(xla.by_chunks, implementation=name),
            functools.partial(xla.by_chunks_backward, implementation=name),
        )
        for name in ("xla", "pallas_tpu", "pallas_gpu")
    },
}

# token by token is quickest on a CPU and slowest where steps are cheap beside their start
PREFERRED = {"tpu": ("pallas_tpu",), "cuda": ("xla",), "cpu": ("xla_chunked",)}


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
      implementation: None, ``"xla_chunked"`` (token by token: fastest on a CPU), ``"xla"``, ``"pallas_tpu"``,
        ``"pallas_gpu"`` (the states of a chunk by ``linear_scan`` of that name), or names in order of
        preference; a single name is taken or refused, never replaced.

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
    h0 = jnp.zeros((B, E, S), dtype) if h0 is None else jnp.asarray(h0).astype(dtype)
    rate = None if rate is None else jnp.asarray(rate).astype(dtype).T
    chunk = min(chunk, T)
    # the first token continues whatever h0 is of
    fresh = None if segment_ids is None else begins(segment_ids) > 0
    # tokens of no effect fill up the last chunk: dt = 0 keeps the state as it is
    tokens = jax.tree.map(lambda x: _in_chunks(x, chunk), (u, dt, key, query, fresh))
    choice = dispatch.choose("selective_scan", implementation, IMPLEMENTATIONS, preferred=PREFERRED)
    y, h_last = _selective_scan(rate, h0.swapaxes(1, 2), tokens, choice)
    y = jnp.moveaxis(y, 2, 0).reshape(B, -1, E)[:, :T]
    return y.astype(u.dtype), h_last.swapaxes(1, 2)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _selective_scan(rate_SE, h0_BSE, tokens, choice):
    return _forward_rule(rate_SE, h0_BSE, tokens, choice)[0]


def _forward_rule(rate_SE, h0_BSE, tokens, choice):
    functions = {name: way.forward for name, way in IMPLEMENTATIONS.items()}
    y, h_last, states = dispatch.run(choice, functions, rate_SE, h0_BSE, tokens)
    return (y, h_last), (rate_SE, states, tokens)


def _backward_rule(choice, residuals, cotangents):
    functions = {name: way.backward for name, way in IMPLEMENTATIONS.items()}
    rate, h0, *gradients = dispatch.run(choice, functions, *residuals, *cotangents)
    return rate, h0, (*gradients, None)


_selective_scan.defvjp(_forward_rule, _backward_rule)


def _in_chunks(x, chunk: int):
    """[B, T, ...] to [n, chunk, B, ...], zeros at the end."""
    x = jnp.pad(x, ((0, 0), (0, -x.shape[1] % chunk)) + ((0, 0),) * (x.ndim - 2))
    return jnp.moveaxis(x.reshape(x.shape[0], -1, chunk, *x.shape[2:]), 0, 2)


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
