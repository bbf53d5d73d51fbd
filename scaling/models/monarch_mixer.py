"""The Monarch mixer's mixing of tokens: a gated convolution as long as the row, by Monarch matrices."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from scaling import layers, parametrization
from scaling.models import init
from scaling.models.recurrence import Convolution

TIME_SCALES = 2.0, 2048.0
"""Tokens after which the first and the last channel's filter has decayed by e."""


@functools.lru_cache(maxsize=8)
def factors(seq: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The Fourier transform of rows of ``seq`` real numbers, filled up with zeros, as a Monarch matrix.

    With n = p q >= 2 ``seq`` (``layers.monarch_lengths``), token j = i q + l and frequency k = m + p f:

        exp(-2 pi i jk / n) = exp(-2 pi i im / p) exp(-2 pi i (lm / n + lf / q))

    one block-diagonal factor over i for each l, one over l for each m, permutations between them (Cooley and
    Tukey 1965; Fu et al. 2023, section 3). Rows i >= p / 2 are zeros and not there; of real
    numbers the frequencies m <= p / 2 are all.

    Returns:
      float64, complex numbers as pairs (real, imaginary), the last axis but for L's: R [p/2, p/2 + 1, 2];
      L [p/2 + 1, q, 2, q, 2], pairs of l to pairs of f; and how often a frequency counts, over n, [p/2 + 1].
    """
    p, q = layers.monarch_lengths(seq)
    i, m = np.arange(p // 2), np.arange(p // 2 + 1)
    l, f = np.arange(q), np.arange(q)
    first = 2 * np.pi * (i[:, None] * m % p) / p
    second = 2 * np.pi * (l[:, None] * (m[:, None, None] + p * f) % (p * q)) / (p * q)
    right = np.stack([np.cos(first), -np.sin(first)], axis=-1)
    cos, sin = np.cos(second), np.sin(second)
    left = np.stack([np.stack([cos, -sin], -1), np.stack([sin, cos], -1)], axis=2)
    counts = np.where((m == 0) | (m == p // 2), 1, 2) / (p * q)
    return right, left, counts


def transform(x_BTR):
    """Frequencies of rows filled up with zeros, [B, T, R] to [B, p/2 + 1, q, 2, R] (``factors``)."""
    right, left, _ = factors(x_BTR.shape[1])
    B, T, R = x_BTR.shape
    q, rows = left.shape[1], len(right)
    x = jnp.pad(x_BTR, ((0, 0), (0, rows * q - T), (0, 0))).reshape(B, rows, q, R)
    x = product("bilr,imc->bmlcr", x, right)
    return product("bmlcr,mlcfd->bmfdr", x, left)


def back(y, seq: int):
    """The real rows that have these frequencies, of them the first ``seq`` numbers, [B, T, R]."""
    right, left, counts = factors(seq)
    y = product("bmfdr,mlcfd->bmlcr", y * counts.astype(y.dtype)[:, None, None, None], left)
    x = product("bmlcr,imc->bilr", y, right)
    return x.reshape(len(x), -1, x.shape[-1])[:, :seq]


def product(axes: str, a, b):
    # a rounded transform would leak between all tokens of a row
    return jnp.einsum(axes, a, b.astype(a.dtype), precision=jax.lax.Precision.HIGHEST)


def causal_convolution(x_BTR, filter_TR):
    """y_t = sum over s <= t of filter_{t - s} x_s, channel by channel (Fu et al. 2023, section 4).

    Both, [B, T, R] and [T, R] of one dtype, are transformed with as many zeros behind them as they have
    tokens, so that nothing comes round. What is after a token reaches it by the transforms' rounding alone,
    some 1e-7 of the row's size in float32.
    """
    ours, theirs = transform(x_BTR), transform(filter_TR[None])
    real = ours[..., 0, :] * theirs[..., 0, :] - ours[..., 1, :] * theirs[..., 1, :]
    imaginary = ours[..., 0, :] * theirs[..., 1, :] + ours[..., 1, :] * theirs[..., 0, :]
    return back(jnp.stack([real, imaginary], axis=-2), x_BTR.shape[1])


class MonarchMixer(nnx.Module):
    """out(q * (h conv (k * v) + skip * k * v)), as Hyena of order 2 (Poli et al. 2023) in Fu et al. 2023.

    q, k and v are short convolutions of x's projections. The filter h_t is a function of the distance t:
    waves of ``layers.MONARCH_OCTAVES`` periods through a hidden layer of ``filter_dim`` sines, times
    exp(-t / scale), with scales from ``TIME_SCALES`` over the channels; a channel's squares begin with sum
    one. So it is as long as any row, and no parameter depends on that. The convolution cannot stop at a
    document's border: rows are one stream (``cross_document``).
    """

    def __init__(self, cfg, rngs: nnx.Rngs):
        D, W, F = cfg["d_model"], cfg["conv_width"], cfg["filter_dim"]
        gain = init.residual_gain(parametrization.residual_branches(cfg))
        self.q, self.k, self.v = (init.matrix(rngs, D, D, axes=("d_model", "heads")) for _ in "qkv")
        self.conv = nnx.Dict({n: Convolution(rngs, W, D, "heads", activation=None) for n in "qkv"})
        self.filter_in = init.matrix(rngs, 2 * layers.MONARCH_OCTAVES, F, 2.0, axes=(None, None))
        self.filter_bias = init.normal(rngs, F, 1.0)
        # sines of spread arguments have a mean square of one half
        self.filter_out = init.matrix(rngs, F, D, math.sqrt(2), axes=(None, "heads"))
        self.skip = nnx.Param(jnp.ones(D, jnp.float32), axes=("heads",))
        self.out = init.matrix(rngs, D, D, gain, axes=("heads", "d_model"))
        self.dtype = jnp.dtype(cfg["dtype"])
        self.matmul = cfg.get("matmul", jnp.matmul)

    def __call__(self, x_BTD, rope, segment_ids_BT):
        """[B, T, D] to [B, T, D], in the compute dtype; segments are None."""
        q_BTR, k_BTR, v_BTR = (
            self.conv[name](self.matmul(x_BTD, getattr(self, name)[...].astype(self.dtype)), segment_ids_BT)
            for name in "qkv"
        )
        u_BTR = (k_BTR * v_BTR).astype(jnp.float32)
        y_BTR = causal_convolution(u_BTR, self.filter(x_BTD.shape[1])) + self.skip[...] * u_BTR
        return self.matmul(q_BTR * y_BTR.astype(self.dtype), self.out[...].astype(self.dtype))

    def filter(self, seq: int):
        """h, float32 [seq, R]."""
        t, R = jnp.arange(seq, dtype=jnp.float32)[:, None], self.filter_out.shape[-1]
        angles = 2 * jnp.pi * t / 2.0 ** jnp.arange(1, layers.MONARCH_OCTAVES + 1)
        waves = jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)
        hidden = jnp.sin(waves @ self.filter_in[...] + self.filter_bias[...])
        low, high = map(math.log, TIME_SCALES)
        decay = jnp.exp(-jnp.linspace(low, high, R))
        # the squares of exp(-t decay) sum to 1 / (1 - exp(-2 decay))
        return (hidden @ self.filter_out[...]) * jnp.exp(-t * decay) * jnp.sqrt(-jnp.expm1(-2 * decay))
