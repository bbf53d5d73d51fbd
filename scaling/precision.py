"""Low precision: simulated formats in the layers' matmuls, and parameters stored in bfloat16.

Simulated: a value is scaled, rounded to its format and held in the compute dtype, which holds every
code of every format exactly (bfloat16's 8 significant bits are enough); products are summed in
float32. What is not simulated: the width of a real accumulator, and speed. Only the layers' weight
matmuls are touched. Embedding, head, norms, rotary positions and the attention products stay in the
compute dtype, as in DeepSeek-V3 (2024, section 3.3.1), and so do the optimizer and the parameters that it
updates (Micikevicius et al. 2022, section 3.1: a copy in high precision).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from scaling.formats import FORMATS, OPERANDS


@dataclasses.dataclass(frozen=True)
class Rule:
    """How one operand is rounded.

    Attributes:
      format: a key of ``FORMATS``.
      scaling: what shares a scale. ``tensor``: the whole operand, amax / largest (Micikevicius et al. 2022,
        the current tensor's own amax; of ternary values the mean absolute value). ``channel``: one row of the
        left or column of the right operand, that is all that is summed into one output (Dettmers et al. 2022,
        vector-wise). ``block``: ``block``
        neighbours along the summed axis, a power of two (OCP MX 1.0, section 6.3; Rouhani et al. 2023).
      block: elements in a block.
    """

    format: str
    scaling: str = "tensor"
    block: int = 32


def quantize(x, rule: Rule | None, axis: int):
    """Rounds a matrix to a format.

    Args:
      x: floats [M, K], the summed axis being ``axis``.
      rule: None leaves ``x`` as it is.

    Returns:
      (values, scale): float32 values of the format (for blocks times their scale), and the float32 scale that
      broadcasts against them, None where there is none to apply. A scale group with a value that is not
      finite is NaN.
    """
    if rule is None:
        return x, None
    x = x.astype(jnp.float32)
    if rule.scaling == "block":
        return _in_blocks(x, rule, axis), None
    fmt, shared = FORMATS[rule.format], axis if rule.scaling == "channel" else None
    size = (jnp.mean if fmt.by_mean else jnp.max)(jnp.abs(x), axis=shared, keepdims=True)
    # times the reciprocal, as compilers write a division by a constant: the same bits jitted or not
    scale = jnp.where(size == 0, 1.0, size * (1 / fmt.largest))
    scale = jnp.where(jnp.isfinite(size), scale, jnp.nan)
    return round_to(x / scale, rule.format), scale


def _in_blocks(x, rule: Rule, axis: int):
    x = jnp.moveaxis(x, axis, -1)
    length = x.shape[-1]
    x = jnp.pad(x, ((0, 0), (0, -length % rule.block)))
    x = x.reshape(x.shape[0], -1, rule.block)
    amax = jnp.max(jnp.abs(x), axis=-1, keepdims=True)
    # biased exponents from the bits of a float32: exact, unlike log2 and exp2
    biased = jax.lax.bitcast_convert_type(amax, jnp.int32) >> 23
    biased = jnp.clip(biased - FORMATS[rule.format].exponent, 1, 254)
    scale = jnp.where(jnp.isfinite(amax), jax.lax.bitcast_convert_type(biased << 23, jnp.float32), jnp.nan)
    rounded = round_to(x / scale, rule.format) * scale
    return jnp.moveaxis(rounded.reshape(x.shape[0], -1)[:, :length], -1, axis)


def round_to(x, name: str):
    """float32 values to the nearest of a format, ties to even, saturating; float32."""
    fmt = FORMATS[name]
    x = jnp.clip(x, -fmt.largest, fmt.largest)
    if fmt.dtype is None:
        return jnp.round(x)
    return x.astype(fmt.dtype).astype(jnp.float32)


def product(left, left_rule, right, right_rule):
    """left [M, K] @ right [K, N], both rounded along K; in the dtype of ``left``, summed in float32."""
    dtype = left.dtype
    (left, left_scale), (right, right_scale) = quantize(left, left_rule, 1), quantize(right, right_rule, 0)
    out = jnp.matmul(left.astype(dtype), right.astype(dtype), preferred_element_type=jnp.float32)
    for scale in (left_scale, right_scale):
        out = out if scale is None else out * scale  # after the sum: scaled codes would be rounded again
    return out.astype(dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _matmul(x_MK, w_KN, rules):
    return product(x_MK, rules.activations, w_KN, rules.weights)


def _forward(x_MK, w_KN, rules):
    return _matmul(x_MK, w_KN, rules), (x_MK, w_KN)


def _backward(rules, saved, dy_MN):
    x_MK, w_KN = saved
    if rules.gradients is None:
        x_MK, w_KN = dequantized(x_MK, rules.activations, 1), dequantized(w_KN, rules.weights, 0)
        return product(dy_MN, None, w_KN.T, None), product(x_MK.T, None, dy_MN, None)
    # every operand is rounded along the axis that this product sums, from the unrounded copy
    dx_MK = product(dy_MN, rules.gradients, w_KN.T, rules.weights)
    dw_KN = product(x_MK.T, rules.activations, dy_MN, rules.gradients)
    return dx_MK, dw_KN


_matmul.defvjp(_forward, _backward)


def dequantized(x, rule, axis: int):
    """``x`` rounded by a rule, in its own dtype."""
    values, scale = quantize(x, rule, axis)
    return (values if scale is None else values * scale).astype(x.dtype)


@dataclasses.dataclass(frozen=True)
class Matmul:
    """x [..., K] @ w [K, N] with simulated low precision, the gradient straight through the rounding.

    The three products of a layer, each with both operands rounded along the axis that it sums:
    y = A(x) W(w), dx = G(dy) W(w)^T, dw = A(x)^T G(dy) (Rouhani et al. 2023, section 5: transposed copies are
    rounded anew, from high precision). Without a rule for gradients the backward products are plain and
    use what the forward pass used, which is the straight-through estimator (Bengio et al. 2013).
    """

    weights: Rule | None = None
    activations: Rule | None = None
    gradients: Rule | None = None

    def __call__(self, x, w):
        y_MN = _matmul(x.reshape(-1, x.shape[-1]), w, self)
        return y_MN.reshape(*x.shape[:-1], w.shape[-1])


def matmul_of(precision: Mapping):
    """The layers' matmul of a cell: ``jnp.matmul`` where nothing is simulated, else a ``Matmul``.

    Args:
      precision: the "precision" section of a validated cell config.
    """
    rules = {
        operand: Rule(precision[operand], precision[f"{operand}_scaling"], precision["block"])
        for operand in OPERANDS
        if precision[operand] is not None
    }
    return Matmul(**rules) if rules else jnp.matmul


def cast(tree, dtype: str):
    """Floating arrays in another dtype; others as they are."""
    return jax.tree.map(lambda x: x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x, tree)


def store(tree, like, key):
    """A float32 tree in the dtypes of ``like``: what a step writes back.

    Args:
      key: random key of this step; every leaf takes its own two words of it. None: round to the nearest.
    """
    leaves, structure = jax.tree.flatten(tree)
    kinds = [x.dtype for x in jax.tree.leaves(like)]
    words = [None] * len(leaves) if key is None else jax.random.bits(key, (len(leaves), 2))
    stored = [
        x.astype(kind) if own is None or x.dtype == kind else stochastic_round(x, own)
        for x, kind, own in zip(leaves, kinds, words, strict=True)
    ]
    return jax.tree.unflatten(structure, stored)


def rounding_key(seed, step):
    """The random key of a step's rounding: by the cell's seed and the step's number alone."""
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), 0x5EED), step)


def mixed(h):
    """uint32 to uint32, one to one, every bit of the result depending on all (lowbias32, Wellons 2018)."""
    h = (h ^ (h >> 16)) * jnp.uint32(0x7FEB352D)
    h = (h ^ (h >> 15)) * jnp.uint32(0x846CA68B)
    return h ^ (h >> 16)


def random_bits(words, shape):
    """uint32 of a shape: an element's number, mixed with one word of a key and then with the other.

    Drawn by ``jax.random.bits``, 20 rounds a leaf, they took five sixths of a tiny step's compile time on
    CPU. By the element's place alone, so that a mesh changes no bit.

    Args:
      words: random uint32 [2].
    """
    number = jnp.zeros(shape, jnp.uint32)
    for axis, length in enumerate(shape):
        number = number * jnp.uint32(length) + jax.lax.broadcasted_iota(jnp.uint32, shape, axis)
    return mixed(mixed(number + words[0]) ^ words[1])


def stochastic_round(x, words):
    """float32 to bfloat16, up or down with the probabilities that keep the mean (Gupta et al. 2015).

    Random bits are added below bfloat16's last and the sum is cut off: sign and magnitude, so that both
    signs are treated alike. Updates below half a unit in the last place, lost by the nearest value, are kept
    on average (Zamirai et al. 2020).

    Args:
      words: random uint32 [2], of this leaf and step alone.
    """
    noise = random_bits(words, x.shape) >> 16
    raised = (jax.lax.bitcast_convert_type(x, jnp.uint32) + noise) & jnp.uint32(0xFFFF0000)
    rounded = jax.lax.bitcast_convert_type(raised, jnp.float32)
    # infinities and NaN stay: their bits might carry into the sign
    return jnp.where(jnp.isfinite(x), rounded, x).astype(jnp.bfloat16)
