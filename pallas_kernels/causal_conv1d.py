"""Depthwise causal convolution along tokens: the public function, its checks and its derivative rule."""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from pallas_kernels import dispatch, sharding
from pallas_kernels.tpu import causal_conv1d as tpu
from pallas_kernels.xla import causal_conv1d as xla

IMPLEMENTATIONS = {
    "xla": dispatch.Implementation(xla.forward, xla.backward),
    "pallas_tpu": dispatch.Implementation(tpu.forward, tpu.backward, tpu.refuses),
}


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
    block_sizes: tuple[int, int] | None = None,
):
    """y_t = activation(bias + sum_i w_i x_{t - (W - 1) + i}), each channel by itself, as in Mamba.

    Source: Gu and Dao 2023, section 3.4. The TPU kernel reads x and writes y once; its backward pass reads x
    and dy and writes dx once. Letters: B batch, T tokens, C channels, W width.

    Args:
      x: float [B, T, C].
      w: float [W, C]; the last row is the tap of the token itself.
      bias: float [C], or None for zero.
      activation: None or ``"silu"``.
      initial_state: float [B, W - 1, C], the tokens before the first, oldest first; zeros where None.
      segment_ids: int [B, T]; a segment begins where the id differs from the token before, and taps stay
        inside theirs. ``initial_state`` belongs to the first token's.
      return_state: whether to return the last W - 1 tokens too, the next call's ``initial_state``.
      implementation: None, ``"xla"`` (shifted products), ``"pallas_tpu"`` (float32 and bfloat16, up to 16
        taps), or names in order of preference; a single name is taken or refused, never replaced.
      block_sizes: (tokens, channels) of one step of the Pallas kernel, multiples of 16 and of 128; a default
        where None. The other implementation has no blocks.

    Returns:
      y [B, T, C] in the dtype of ``x``, computed in float32 (float64 for float64); with ``return_state``
      the pair (y, state [B, W - 1, C]). The backward pass keeps nothing but the arguments; gradients of w
      and bias are summed in float32.

    Raises:
      ValueError: an argument of the wrong shape, dtype or value, by name; an implementation that is
        unknown, not available or does not take these arguments.
    """
    x, w = jnp.asarray(x), jnp.asarray(w)
    bias, state, ids = (None if a is None else jnp.asarray(a) for a in (bias, initial_state, segment_ids))
    _check(x, w, bias, state, ids)
    if activation not in (None, "silu"):
        raise ValueError(f"activation is {activation!r}; it must be None or 'silu'")
    (B, T, C), W = x.shape, w.shape[0]
    bias = jnp.zeros(C, w.dtype) if bias is None else bias
    state = jnp.zeros((B, W - 1, C), x.dtype) if state is None else state
    arrays = x, w, bias, state, None if ids is None else _reach(ids, W)
    options = {"activation": activation, "block_sizes": _block_sizes(block_sizes)}
    choice = dispatch.choose("causal_conv1d", implementation, IMPLEMENTATIONS, *arrays, **options)
    y = _causal_conv1d(*arrays, choice, tuple(options.items()))
    if not return_state:
        return y
    return y, jnp.concatenate([state.astype(x.dtype), x], axis=1)[:, T:]


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def _causal_conv1d(x_BTC, w_WC, bias_C, state_BKC, reach_BT, choice, options):
    (y_BTC,) = _run("forward", FORWARD, choice, options, x_BTC, w_WC, bias_C, state_BKC, reach_BT)
    return y_BTC


def _forward_rule(x_BTC, w_WC, bias_C, state_BKC, reach_BT, choice, options):
    arrays = x_BTC, w_WC, bias_C, state_BKC, reach_BT
    return _causal_conv1d(*arrays, choice, options), arrays


def _backward_rule(choice, options, arrays, dy_BTC):
    gradients = _run("backward", BACKWARD, choice, options, *arrays, dy_BTC)
    return *(sharding.placed_like(g, a) for g, a in zip(gradients, arrays, strict=False)), None


# channels are split as heads are; reach may be left out
FORWARD = "b t k, w k, k, b s k, b t -> b t k"
BACKWARD = "b t k, w k, k, b s k, b t, b t k -> b t k, w k, k, b s k"


def _run(which, rule, choice, options, *arrays):
    """The implementation on each device's rows and channels; gradients of the taps are added up over rows."""
    functions = {}
    for name, implementation in IMPLEMENTATIONS.items():
        function = functools.partial(getattr(implementation, which), **dict(options))
        function = _as_tuple(function) if which == "forward" else function
        functions[name] = sharding.per_shard_but_none(
            function, rule, arrays, whole=("t", "w", "s"), sums=("b",)
        )
    return dispatch.run(choice, functions, *(x for x in arrays if x is not None))


def _as_tuple(function):
    return lambda *arrays: (function(*arrays),)


_causal_conv1d.defvjp(_forward_rule, _backward_rule)


def _reach(ids_BT, W):
    """int32 [B, T]: how many tokens back are of the token's segment, W - 1 at the most.

    The state counts as the first token's segment.
    """
    same = jnp.pad(ids_BT[:, 1:] == ids_BT[:, :-1], ((0, 0), (1, 0)), constant_values=True)
    reach, sees = jnp.zeros(ids_BT.shape, jnp.int32), jnp.ones(ids_BT.shape, bool)
    for _ in range(W - 1):
        # a token sees one further back than the token before it does, where both are of one segment
        sees = same & jnp.pad(sees[:, :-1], ((0, 0), (1, 0)), constant_values=True)
        reach += sees.astype(jnp.int32)
    return reach


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


def _block_sizes(block_sizes):
    if block_sizes is None:
        return None
    pair = tuple(block_sizes) if isinstance(block_sizes, (tuple, list)) else (block_sizes,)
    whole = len(pair) == 2 and all(isinstance(n, int) and n > 0 for n in pair)
    if not whole or pair[0] % 16 or pair[1] % 128:
        raise ValueError(
            f"block_sizes is {block_sizes!r}; it must be (tokens, channels), multiples of 16 and of 128"
        )
    return pair
