"""Depthwise causal convolution along tokens: the public function, its checks and its derivative rule."""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from pallas_kernels import dispatch
from pallas_kernels.xla import causal_conv1d as xla

IMPLEMENTATIONS = {"xla": dispatch.Implementation(xla.forward, xla.backward)}


def causal_conv1d(
    x,
    w,
    bias=None,
    *,
    activation: str | None = None,
    initial_state=None,
    segment_ids=None,
    return_state: bool = False,
    implementation: str | Sequence[str] | None = None,
):
    """y_t = activation(bias + sum_i w_i x_{t - (W - 1) + i}), each channel by itself, as in Mamba.

    Source: Gu and Dao 2023, section 3.4. One implementation, XLA's, on every platform: a few shifted
    products. There is no Pallas kernel. Letters: B batch, T tokens, C channels, W width.

    Args:
      x: float [B, T, C].
      w: float [W, C]; the last row is the tap of the token itself.
      bias: float [C], or None for zero.
      activation: None or ``"silu"``.
      initial_state: float [B, W - 1, C], the tokens before the first, oldest first; zeros where None.
      segment_ids: int [B, T] in contiguous runs; taps stay inside their segment. ``initial_state`` belongs
        to the first token's.
      return_state: whether to return the last W - 1 tokens too, the next call's ``initial_state``.
      implementation: None, ``"xla"``, or names in order of preference.

    Returns:
      y [B, T, C] in the dtype of ``x``, computed in float32 (float64 for float64); with ``return_state``
      the pair (y, state [B, W - 1, C]). The backward pass keeps nothing but the arguments.

    Raises:
      ValueError: an argument of the wrong shape, dtype or value, by name; an unknown implementation.
    """
    x, w = jnp.asarray(x), jnp.asarray(w)
    bias, state, ids = (None if a is None else jnp.asarray(a) for a in (bias, initial_state, segment_ids))
    _check(x, w, bias, state, ids)
    if activation not in (None, "silu"):
        raise ValueError(f"activation is {activation!r}; it must be None or 'silu'")
    (B, T, C), W = x.shape, w.shape[0]
    bias = jnp.zeros(C, w.dtype) if bias is None else bias
    state = jnp.zeros((B, W - 1, C), x.dtype) if state is None else state
    choice = dispatch.choose("causal_conv1d", implementation, IMPLEMENTATIONS, x, w, bias, state, ids)
    y = _causal_conv1d(x, w, bias, state, ids, choice, activation)
    if not return_state:
        return y
    return y, jnp.concatenate([state.astype(x.dtype), x], axis=1)[:, T:]


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def _causal_conv1d(x, w, bias, state, ids, choice, activation):
    functions = {n: functools.partial(i.forward, activation=activation) for n, i in IMPLEMENTATIONS.items()}
    return dispatch.run(choice, functions, x, w, bias, state, ids)


def _forward_rule(x, w, bias, state, ids, choice, activation):
    return _causal_conv1d(x, w, bias, state, ids, choice, activation), (x, w, bias, state, ids)


def _backward_rule(choice, activation, residuals, dy):
    functions = {n: functools.partial(i.backward, activation=activation) for n, i in IMPLEMENTATIONS.items()}
    return *dispatch.run(choice, functions, *residuals, dy), None


_causal_conv1d.defvjp(_forward_rule, _backward_rule)


def _check(x, w, bias, state, ids):
    if x.ndim != 3 or 0 in x.shape:
        raise ValueError(f"x has shape {x.shape}; it must be [batch, token, channel], no axis empty")
    if w.ndim != 2 or w.shape[0] < 1 or w.shape[1] != x.shape[2]:
        raise ValueError(f"w has shape {w.shape}; it must be [width, {x.shape[2]}]")
    wanted = {"bias": (x.shape[2],), "initial_state": (x.shape[0], w.shape[0] - 1, x.shape[2])}
    for name, array in (("x", x), ("w", w), ("bias", bias), ("initial_state", state)):
        if array is None:
            continue
        if array.shape != wanted.get(name, array.shape):
            raise ValueError(f"{name} has shape {array.shape}; it must be {wanted[name]}")
        if not jnp.issubdtype(array.dtype, jnp.floating):
            raise ValueError(f"{name} has dtype {array.dtype}; it must be a floating dtype")
    if ids is not None and (ids.shape != x.shape[:2] or not jnp.issubdtype(ids.dtype, jnp.integer)):
        raise ValueError(f"segment_ids is {ids.dtype} of shape {ids.shape}; it must be int {x.shape[:2]}")
