"""What recurrent mixers share: where documents begin, decays, and norms over heads."""

import jax
import jax.numpy as jnp
from flax import nnx

from pallas_kernels import causal_conv1d
from scaling.models import init


def starts(segment_ids_BT, shape):
    """bool [B, T]: the first token of a row, and every token whose segment is not that of the one before."""
    first = jnp.broadcast_to(jnp.arange(shape[1]) == 0, shape)
    if segment_ids_BT is None:
        return first
    return first | jnp.pad(segment_ids_BT[:, 1:] != segment_ids_BT[:, :-1], ((0, 0), (1, 0)))


def log_decay(raw_BTN, a_log_N, dt_bias_N):
    """``(dt, -exp(a_log) dt)``, dt = softplus(raw + dt_bias), float32 [B, T, N] (Gu and Dao 2023, alg. 2)."""
    dt_BTN = jax.nn.softplus(raw_BTN.astype(jnp.float32) + dt_bias_N)
    return dt_BTN, -jnp.exp(a_log_N) * dt_BTN


class Convolution(nnx.Module):
    """``activation`` (None: none) of a depthwise causal convolution with a bias, inside documents."""

    def __init__(
        self,
        rngs: nnx.Rngs,
        width: int,
        channels: int,
        axis: str | None,
        bias: bool = True,
        activation: str | None = "silu",
    ):
        self.conv = init.convolution(rngs, width, channels, axis)
        self.conv_bias = init.zeros(channels, axis) if bias else None
        self.activation = activation

    def __call__(self, x_BTC, segment_ids_BT):
        bias = None if self.conv_bias is None else self.conv_bias[...]
        return causal_conv1d(
            x_BTC, self.conv[...], bias, activation=self.activation, segment_ids=segment_ids_BT
        )


class HeadNorm(nnx.Module):
    """Normalises each head's channels of [B, T, N, H], with a gain for every channel, in float32 inside.

    ``centred``: the mean is taken away first (Ba et al. 2016), else RMSNorm.
    """

    def __init__(self, heads: int, head_dim: int, eps: float, *, centred: bool = False):
        self.scale = nnx.Param(jnp.ones((heads, head_dim), jnp.float32), axes=("heads", None))
        self.eps, self.centred = eps, centred

    def __call__(self, x_BTNH):
        x32 = x_BTNH.astype(jnp.float32)
        if self.centred:
            x32 = x32 - jnp.mean(x32, axis=-1, keepdims=True)
        inverse = jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + self.eps)
        return (x32 * inverse * self.scale[...]).astype(x_BTNH.dtype)
