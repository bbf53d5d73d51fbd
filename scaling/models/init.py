"""The initialisation rule of every matrix.

Weights are drawn from a normal truncated at two standard deviations, rescaled to standard
deviation ``gain / sqrt(fan_in)`` after truncation (LeCun et al. 1998; the truncation as in
``jax.nn.initializers.lecun_normal``), so that a matrix keeps the variance of its input. The two
matrices that write to the residual stream (mixer output, feed-forward output) have gain
1/sqrt(branches), so that the branches, 2 x layers where every layer has a feed-forward, add up to unit
variance (Radford et al. 2019, section 2.3). Norm scales start at one.

The token table has the head's standard deviation, 1/sqrt(d_model), tied or not, and its rows are
not multiplied by sqrt(d_model) on the way in: a tied head then starts at logits of unit variance,
the first norm brings the rows to unit size, and the weights fit Llama's and Qwen's layout as they are.
"""

import math

import jax
import jax.numpy as jnp
from flax import nnx

# Standard deviation of a unit normal truncated to [-2, 2].
_TRUNCATED_STD = 0.87962566103423978


def matrix(
    rngs: nnx.Rngs,
    fan_in: int,
    fan_out: int,
    gain: float = 1.0,
    axes: tuple[str, str] | None = None,
    *,
    count: int | None = None,
    lead: str | None = None,
) -> nnx.Param:
    """A float32 [fan_in, fan_out] parameter, by the rule above; ``axes``: see ``scaling.mesh.AXES``.

    With ``count`` so many of them, [count, fan_in, fan_out]; ``lead`` is the name of that axis.
    """
    shape = (fan_in, fan_out)
    if count is not None:
        shape, axes = (count, *shape), (lead, *axes)
    return nnx.Param(_normal(rngs, shape, gain / math.sqrt(fan_in)), axes=axes)


def block_diagonal(rngs: nnx.Rngs, blocks: int, size: int, axis: str) -> nnx.Param:
    """Float32 [blocks, size, size]: each block by the rule above; ``axis`` names the blocks."""
    return nnx.Param(_normal(rngs, (blocks, size, size), 1 / math.sqrt(size)), axes=(axis, None, None))


def convolution(rngs: nnx.Rngs, width: int, channels: int, axis: str | None) -> nnx.Param:
    """Taps of a depthwise convolution, float32 [width, channels]: uniform in +-1/sqrt(width), as Mamba's."""
    bound = 1 / math.sqrt(width)
    values = jax.random.uniform(rngs.params(), (width, channels), jnp.float32, -bound, bound)
    return nnx.Param(values, axes=(None, axis))


def time_steps(rngs: nnx.Rngs, heads: int, axis: str) -> tuple[nnx.Param, nnx.Param]:
    """``(a_log, dt_bias)``, float32 [heads]: exp(a_log) uniform in [1, 16], softplus(dt_bias) uniform in the
    logarithm from 0.001 to 0.1 (Dao and Gu 2024, their code; Gu and Dao 2023, section 3.6)."""
    a = jax.random.uniform(rngs.params(), (heads,), jnp.float32, 1, 16)
    low, high = math.log(0.001), math.log(0.1)
    dt = jnp.exp(jax.random.uniform(rngs.params(), (heads,), jnp.float32, low, high))
    return nnx.Param(jnp.log(a), axes=(axis,)), nnx.Param(dt + jnp.log(-jnp.expm1(-dt)), axes=(axis,))


def time_scales(rngs: nnx.Rngs, channels: int, axis: str) -> nnx.Param:
    """A forget gate's bias, float32 [channels]: its sigmoid is 1 - 1/t, t uniform in [2, 128] (Tallec and
    Ollivier 2018, eq. 14)."""
    t = jax.random.uniform(rngs.params(), (channels,), jnp.float32, 2, 128)
    return nnx.Param(jnp.log(t - 1), axes=(axis,))


def normal(rngs: nnx.Rngs, size: int, std: float) -> nnx.Param:
    """Float32 [size], normal of that standard deviation."""
    return nnx.Param(std * jax.random.normal(rngs.params(), (size,), jnp.float32), axes=(None,))


def table(rngs: nnx.Rngs, rows: int, width: int, axis: str | None, lead: tuple[int, ...] = ()) -> nnx.Param:
    """Rows to be looked up, float32 [*lead, rows, width], about of unit length (Lample et al. 2019)."""
    values = _normal(rngs, (*lead, rows, width), 1 / math.sqrt(width))
    return nnx.Param(values, axes=(None,) * (1 + len(lead)) + (axis,))


def zeros(size: int, axis: str | None) -> nnx.Param:
    """A bias, float32 [size]."""
    return nnx.Param(jnp.zeros(size, jnp.float32), axes=(axis,))


def _normal(rngs, shape, std):
    std = std / _TRUNCATED_STD
    return std * jax.random.truncated_normal(rngs.params(), -2, 2, shape, jnp.float32)


def residual_gain(branches: int) -> float:
    """Gain of a matrix whose output is added to the residual stream, one of ``branches``."""
    return 1 / math.sqrt(branches)
