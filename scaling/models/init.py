"""The initialisation rule of every matrix.

Weights are drawn from a normal truncated at two standard deviations, rescaled to standard
deviation ``gain / sqrt(fan_in)`` after truncation (LeCun et al. 1998; the truncation as in
``jax.nn.initializers.lecun_normal``), so that a matrix keeps the variance of its input. The two
matrices that write to the residual stream (attention output, feed-forward output) have gain
1/sqrt(2 layers), so that the 2 x layers branches add up to unit variance (Radford et al. 2019,
section 2.3). Norm scales start at one.

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
    rngs: nnx.Rngs, fan_in: int, fan_out: int, gain: float = 1.0, axes: tuple[str, str] | None = None
) -> nnx.Param:
    """A float32 [fan_in, fan_out] parameter, by the rule above; ``axes``: see ``scaling.mesh.AXES``."""
    std = gain / math.sqrt(fan_in) / _TRUNCATED_STD
    values = std * jax.random.truncated_normal(rngs.params(), -2, 2, (fan_in, fan_out), jnp.float32)
    return nnx.Param(values, axes=axes)


def residual_gain(layers: int) -> float:
    """Gain of a matrix whose output is added to the residual stream."""
    return 1 / math.sqrt(2 * layers)
