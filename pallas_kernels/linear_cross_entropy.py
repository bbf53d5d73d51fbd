"""Cross-entropy of a linear head, logits never held in full: the public function and its argument checks."""

import functools
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jax.sharding import AxisType

from pallas_kernels import dispatch, sharding
from pallas_kernels.tpu import linear_cross_entropy as tpu
from pallas_kernels.xla import linear_cross_entropy as xla

REDUCTIONS = ("mean", "sum", "none")
IMPLEMENTATIONS = {
    "xla": dispatch.Implementation(xla.forward, xla.backward),
    "xla_chunked": dispatch.Implementation(xla.chunked_forward, xla.chunked_backward),
    "pallas_tpu": dispatch.Implementation(tpu.forward, tpu.backward, tpu.refuses),
}
# Where the loss is one number the gradients are known in the forward pass, up to a factor.
WITH_GRADIENTS = {
    "xla": xla.forward_and_gradients,
    "xla_chunked": xla.chunked_forward_and_gradients,
    "pallas_tpu": tpu.forward_and_gradients,
}
# Which of block_sizes an implementation reads.
BLOCKS = {"xla": (), "xla_chunked": ("tokens",), "pallas_tpu": ("tokens", "vocab")}


def linear_cross_entropy(
    x,
    w,
    labels,
    *,
    weights=None,
    z_loss: float | jax.Array = 0.0,
    soft_cap: float | None = None,
    ignore_index: int | None = None,
    reduction: str = "mean",
    return_lse: bool = False,
    implementation: str | Sequence[str] | None = None,
    block_sizes: Mapping[str, int] | None = None,
):
    """lse - logits[label] + z_loss lse^2, where logits = cap(x w) and lse = log sum exp(logits).

    Letters: D features, V vocabulary. ``xla_chunked`` and ``pallas_tpu`` never hold [tokens, V].
    With reduction mean or sum the gradients are computed along with the loss, where it is differentiated
    at all, and only scaled in the backward pass: in ``xla_chunked`` the logits are then computed once.
    Under sharding each device takes its own tokens and all of w, but for ``xla``, which XLA splits as it
    likes on a mesh of automatic axes (use it where the vocabulary is split over devices). Sources: z-loss,
    PaLM (Chowdhery et al. 2022, section 5); soft-cap, Gemma 2 (2024, section 2); online log-sum-exp, Milakov
    and Gimelshein 2018; logits by blocks, Wijmans et al. 2024, "Cut your losses".

    Args:
      x: float [..., D], at least one token.
      w: float [D, V]. Cast to the dtype of ``x`` for the product; its gradient is accumulated in float32
        and has its own dtype.
      labels: int [...], the leading axes of ``x``. A label outside 0 <= label < V that is not
        ``ignore_index`` makes the token's loss NaN, the gradient of its ``x`` and all of that of ``w`` too.
      weights: None, or float [...] as the labels: the factor of each token's loss, of its z-loss too. No
        gradient goes to them. "mean" divides by the number of tokens all the same.
      z_loss: coefficient of lse^2, a number or a scalar array (which may be traced, and differentiated).
      soft_cap: c > 0: logits become c tanh(logits / c).
      ignore_index: tokens with this label have loss 0, no gradient and no part in the mean.
      reduction: "mean" over the tokens not ignored (0 where all are), "sum", or "none".
      return_lse: whether the log-sum-exp is returned too; it is differentiable. With mean and sum its
        gradient costs the logits again, unless none flows through it (``lax.stop_gradient``, metrics).
      implementation: None, ``"xla"`` (all logits held), ``"xla_chunked"``, ``"pallas_tpu"``, or names in
        order of preference; a single name is taken or refused, never replaced.
      block_sizes: ``tokens``: rows of logits at a time; ``vocab``: columns, for ``pallas_tpu`` alone,
        whose two are multiples of 128. Those left out are chosen.

    Returns:
      The loss, float32 (float64 for float64 inputs): a scalar, or [...] with reduction "none". With
      ``return_lse`` the pair (loss, lse), lse [...] of every token, ignored ones included.

    Raises:
      ValueError: an argument of the wrong shape, dtype or range, by name; an implementation that is unknown
        or does not take these arguments.
    """
    x, w, labels = jnp.asarray(x), jnp.asarray(w), jnp.asarray(labels)
    _check(x, w, labels, z_loss, soft_cap, ignore_index, reduction)
    given = None if weights is None else _checked_weights(weights, labels)
    block_sizes = tuple(sorted((block_sizes or {}).items()))
    choice = dispatch.choose(
        "linear_cross_entropy", implementation, IMPLEMENTATIONS, x, w, labels, block_sizes=dict(block_sizes)
    )
    _check_blocks(choice, dict(block_sizes))
    options = (soft_cap, block_sizes)
    lead, V = labels.shape, w.shape[1]
    if not lead:
        x, labels = x[None], labels[None]
        given = None if given is None else given[None]
    inside = (labels >= 0) & (labels < V)
    ignored = jnp.zeros(labels.shape, bool) if ignore_index is None else labels == ignore_index
    dtype = jnp.promote_types(x.dtype, jnp.float32)
    # NaN where the label is none of ours: it goes into the loss and every gradient as a factor
    weights = jnp.where(ignored, 0, jnp.where(inside, 1, jnp.nan)).astype(dtype)
    if given is not None:
        weights = weights * jax.lax.stop_gradient(given.astype(dtype))
    squares = weights * jnp.asarray(z_loss, dtype)
    labels = jnp.where(inside & ~ignored, labels, -1).astype(jnp.int32)
    if reduction == "none":
        lse, picked = _each(choice, options, x, w, labels)
        loss = _of_tokens(lse, picked, weights, squares).reshape(lead)
    else:
        loss, lse = _total(choice, options, x, w, labels, weights, squares)
        if reduction == "mean":
            loss = loss / jnp.maximum(jnp.sum(~ignored), 1).astype(dtype)
    return (loss, lse.reshape(lead)) if return_lse else loss


def _of_tokens(lse, picked, weights, squares):
    return jnp.where(weights == 0, 0, weights * (lse - picked) + squares * jnp.square(lse))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _each(choice, options, x, w, labels):
    """lse and picked logit of every token."""
    functions = {name: _forward(name, options, labels.ndim) for name in IMPLEMENTATIONS}
    return dispatch.run(choice, functions, x, w, labels)


def _each_forward(choice, options, x, w, labels):
    lse, picked = _each(choice, options, x, w, labels)
    return (lse, picked), (x, w, labels, lse)


def _each_backward(choice, options, kept, cotangents):
    functions = {name: _backward(name, options, kept[3].ndim) for name in IMPLEMENTATIONS}
    gradients = dispatch.run(choice, functions, *kept, *cotangents)
    return *(sharding.placed_like(g, p) for p, g in zip(kept, gradients, strict=False)), None


_each.defvjp(_each_forward, _each_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _total(choice, options, x, w, labels, weights, squares):
    """Weighted sum of the losses, and lse of every token."""
    lse, picked = _each(choice, options, x, w, labels)
    return jnp.sum(_of_tokens(lse, picked, weights, squares)), lse


def _total_forward(choice, options, x, w, labels, weights, squares):
    arrays = tuple(a.value for a in (x, w, labels, weights, squares))
    functions = {name: _with_gradients(name, options, labels.value.ndim) for name in IMPLEMENTATIONS}
    lse, picked, dx, dw = dispatch.run(choice, functions, *arrays)
    total = jnp.sum(_of_tokens(lse, picked, *arrays[3:]))
    return (total, lse), (*arrays[:4], lse, dx, dw)


def _total_backward(choice, options, kept, cotangents):
    x, w, labels, weights, lse, dx, dw = kept
    dtotal, dlse = cotangents
    if isinstance(dtotal, SymbolicZero):
        dtotal = jnp.zeros((), lse.dtype)
    dx, dw = (sharding.placed_like((dtotal * g).astype(g.dtype), p) for p, g in ((x, dx), (w, dw)))
    if not isinstance(dlse, SymbolicZero):
        more = _each_backward(choice, options, (x, w, labels, lse), (dlse, jnp.zeros_like(dlse)))
        dx, dw = dx + more[0], dw + more[1]
    dsquares = jnp.where(weights == 0, 0, dtotal * jnp.square(lse))
    return dx, dw, None, jnp.zeros_like(weights), dsquares  # weights are made of labels, nobody's argument


_total.defvjp(_total_forward, _total_backward, symbolic_zeros=True)


def _forward(name, options, axes):
    t = _letters(axes)
    return _bound(IMPLEMENTATIONS[name].forward, name, options, f"{t} d, d v, {t} -> {t}, {t}", t)


def _backward(name, options, axes):
    t = _letters(axes)
    rule = f"{t} d, d v, {t}, {t}, {t}, {t} -> {t} d, d v"
    return _bound(IMPLEMENTATIONS[name].backward, name, options, rule, t)


def _with_gradients(name, options, axes):
    t = _letters(axes)
    rule = f"{t} d, d v, {t}, {t}, {t} -> {t}, {t}, {t} d, d v"
    return _bound(WITH_GRADIENTS[name], name, options, rule, t)


def _letters(axes):
    return " ".join(["b", *(f"t{i}" for i in range(1, axes))])


def _bound(function, name, options, rule, tokens):
    """The function with its options, each device computing its own tokens; ``xla`` is left to XLA.

    Under explicit axes nothing is: there the sum over tokens of dw has no sharding that could be inferred.
    """
    soft_cap, block_sizes = options
    blocks = {k: v for k, v in block_sizes if k in BLOCKS[name]}
    function = functools.partial(function, soft_cap=soft_cap, **blocks)
    if name == "xla" and AxisType.Explicit not in jax.sharding.get_abstract_mesh().axis_types:
        return function
    return sharding.per_shard(function, rule, whole=("d", "v"), sums=tuple(tokens.split()))


def _check(x, w, labels, z_loss, soft_cap, ignore_index, reduction):
    for name, a in (("x", x), ("w", w)):
        if not jnp.issubdtype(a.dtype, jnp.floating):
            raise ValueError(f"{name} has dtype {a.dtype}; it must be a floating dtype")
    if not jnp.issubdtype(labels.dtype, jnp.integer):
        raise ValueError(f"labels has dtype {labels.dtype}; it must be an integer dtype")
    if x.ndim < 1 or 0 in x.shape:
        raise ValueError(f"x has shape {x.shape}; it must be [..., features] with no empty axis")
    if w.ndim != 2 or w.shape[0] != x.shape[-1] or w.shape[1] == 0:
        hint = " (it looks like [vocabulary, features]: transpose it)" if w.shape[1:] == x.shape[-1:] else ""
        raise ValueError(f"w has shape {w.shape}; it must be ({x.shape[-1]}, vocabulary){hint}")
    if labels.shape != x.shape[:-1]:
        raise ValueError(
            f"labels has shape {labels.shape}; it must be that of x but the last, {x.shape[:-1]}"
        )
    if not isinstance(z_loss, (int, float)) and getattr(z_loss, "shape", None) != ():
        raise ValueError(f"z_loss is {z_loss!r}; it must be a number or a scalar array")
    if not isinstance(z_loss, jax.core.Tracer) and not z_loss >= 0:
        raise ValueError(f"z_loss is {z_loss!r}; it must be at least 0")
    if soft_cap is not None and not soft_cap > 0:
        raise ValueError(f"soft_cap is {soft_cap!r}; it must be a positive number or None")
    if ignore_index is not None and (not isinstance(ignore_index, int) or isinstance(ignore_index, bool)):
        raise ValueError(f"ignore_index is {ignore_index!r}; it must be an int or None")
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction is {reduction!r}; it must be one of {', '.join(REDUCTIONS)}")


def _checked_weights(weights, labels):
    weights = jnp.asarray(weights)
    if weights.shape != labels.shape or not jnp.issubdtype(weights.dtype, jnp.floating):
        raise ValueError(
            f"weights has shape {weights.shape} and dtype {weights.dtype}; it must be None or floats of the "
            f"labels' shape, {labels.shape}"
        )
    return weights


def _check_blocks(choice, block_sizes):
    readers = dict.fromkeys(block for _, name in choice for block in BLOCKS[name])
    for name, size in block_sizes.items():
        if name not in readers:
            raise ValueError(f"block_sizes has {name!r}; it takes {', '.join(readers) or 'none'} here")
        if not isinstance(size, int) or isinstance(size, bool) or size < 1:
            raise ValueError(f"block_sizes has {name} {size!r}; it must be an int of at least 1")
