"""Griffin's recurrent block: a short convolution and the RG-LRU, gated."""

import jax
import jax.numpy as jnp
from flax import nnx

from pallas_kernels import causal_conv1d, linear_scan
from scaling import parametrization
from scaling.models import init
from scaling.models.recurrence import starts

SHARPNESS = 8.0  # c of De et al. 2024, section 2.4


@jax.custom_jvp
def gentle_sqrt(x):
    """The square root, its derivative at most 1000, as in the published code: it is infinite at 0."""
    return jnp.sqrt(x)


@gentle_sqrt.defjvp
def _gentle_sqrt_jvp(primals, tangents):
    root = jnp.sqrt(primals[0])
    return root, tangents[0] / jnp.maximum(2 * root, 1e-3)


class RGLRU(nnx.Module):
    """out(gelu(x W_z) * RG-LRU(conv(x W_x))) (De et al. 2024, figure 2c and eqs. 1-4).

        r_t = sigmoid(W_r u_t + b_r),  i_t = sigmoid(W_i u_t + b_i),  log a_t = -c softplus(decay) r_t
        h_t = a_t h_{t-1} + sqrt(1 - a_t^2) (i_t u_t)

    The state is as wide as the stream. W_r and W_i are block-diagonal, one block a head, as in the published
    model. The first token of a document enters whole, not times sqrt(1 - a^2). At the start a^c is uniform
    in [0.9, 0.999] on the circle's radius, as in the paper's section 2.4.
    """

    def __init__(self, cfg, rngs: nnx.Rngs):
        D, N, H = cfg["d_model"], cfg["heads"], cfg["head_dim"]
        gain = init.residual_gain(parametrization.residual_branches(cfg))
        self.x = init.matrix(rngs, D, N * H, axes=("d_model", "heads"))
        self.z = init.matrix(rngs, D, N * H, axes=("d_model", "heads"))
        self.conv = init.convolution(rngs, cfg["conv_width"], N * H, "heads")
        self.conv_bias = init.zeros(N * H, "heads")
        self.input_gate = init.block_diagonal(rngs, N, H, "heads")
        self.input_bias = init.zeros(N * H, "heads")
        self.recurrence_gate = init.block_diagonal(rngs, N, H, "heads")
        self.recurrence_bias = init.zeros(N * H, "heads")
        radius = jnp.sqrt(jax.random.uniform(rngs.params(), (N * H,), jnp.float32, 0.9**2, 0.999**2))
        # softplus(decay) = -log(radius) / c
        self.decay = nnx.Param(jnp.log(jnp.expm1(-jnp.log(radius) / SHARPNESS)), axes=("heads",))
        self.out = init.matrix(rngs, N * H, D, gain, axes=("heads", "d_model"))
        self.dtype = jnp.dtype(cfg["dtype"])
        self.matmul = cfg.get("matmul", jnp.matmul)

    def __call__(self, x_BTD, rope, segment_ids_BT):
        """[B, T, D] to [B, T, D], in the compute dtype; segments None: one document a row."""
        w_x, w_z, w_out = (w[...].astype(self.dtype) for w in (self.x, self.z, self.out))
        u_BTR = causal_conv1d(
            self.matmul(x_BTD, w_x), self.conv[...], self.conv_bias[...], segment_ids=segment_ids_BT
        )
        a_BTR, b_BTR = self.gated(u_BTR, starts(segment_ids_BT, x_BTD.shape[:2]))
        h_BTR, _ = linear_scan(a_BTR, b_BTR, segment_ids=segment_ids_BT)
        return self.matmul(jax.nn.gelu(self.matmul(x_BTD, w_z)) * h_BTR.astype(self.dtype), w_out)

    def gated(self, u_BTR, starts_BT):
        """a and b of h_t = a_t h_{t-1} + b_t, float32 [B, T, R]: bfloat16 has nothing from 0.996 to 1."""
        i_BTR = jax.nn.sigmoid(self.per_head(u_BTR, self.input_gate) + self.input_bias[...])
        r_BTR = jax.nn.sigmoid(self.per_head(u_BTR, self.recurrence_gate) + self.recurrence_bias[...])
        log_a_BTR = -SHARPNESS * jax.nn.softplus(self.decay[...]) * r_BTR
        kept_BTR = gentle_sqrt(-jnp.expm1(2 * log_a_BTR))  # 1 - a^2 without cancellation near a = 1
        kept_BTR = jnp.where(starts_BT[..., None], 1.0, kept_BTR)
        return jnp.exp(log_a_BTR), kept_BTR * i_BTR * u_BTR.astype(jnp.float32)

    def per_head(self, u_BTR, gate_NHH):
        """u times a block-diagonal matrix, float32 [B, T, R]."""
        u_BTNH = u_BTR.reshape(*u_BTR.shape[:2], *gate_NHH.shape[:2])
        gate_NHH = gate_NHH[...].astype(self.dtype)
        # XLA:CPU has no batched product of bfloat16 to float32
        return jnp.einsum("btnh,nhk->btnk", u_BTNH, gate_NHH).reshape(u_BTR.shape).astype(jnp.float32)
