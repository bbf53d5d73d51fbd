"""The gated delta rule with short convolutions."""

import jax
import jax.numpy as jnp
from flax import nnx

from pallas_kernels import gated_delta_rule
from scaling import parametrization
from scaling.models import init
from scaling.models.norm import RMSNorm
from scaling.models.recurrence import Convolution, log_decay

KEY_EPS = 1e-6


class GatedDeltaNet(nnx.Module):
    """out(norm(o) * silu(x W_z)) with o of the gated delta rule (Yang et al. 2024, eq. 10), as in Qwen3-Next.

        S_t = exp(g_t) (I - beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T,  o_t = S_t^T q_t / sqrt(H)

    q, k and v are silu of a convolution of x's projections, q and k of length one; beta = sigmoid(x W_beta),
    g = -exp(a_log) softplus(x W_dt + dt_bias). ``heads`` query-key heads, ``expand`` value heads for each,
    all of ``head_dim`` channels.
    """

    def __init__(self, cfg, rngs: nnx.Rngs):
        D, K, H, W = cfg["d_model"], cfg["heads"], cfg["head_dim"], cfg["conv_width"]
        N = cfg["expand"] * K
        gain = init.residual_gain(parametrization.residual_branches(cfg))
        self.q = init.matrix(rngs, D, K * H, axes=("d_model", "heads"))
        self.k = init.matrix(rngs, D, K * H, axes=("d_model", "heads"))
        self.v = init.matrix(rngs, D, N * H, axes=("d_model", "heads"))
        self.z = init.matrix(rngs, D, N * H, axes=("d_model", "heads"))
        self.beta = init.matrix(rngs, D, N, axes=("d_model", "heads"))
        self.dt = init.matrix(rngs, D, N, axes=("d_model", "heads"))
        self.conv = nnx.Dict(
            {
                name: Convolution(rngs, W, heads * H, "heads", bias=False)
                for name, heads in (("q", K), ("k", K), ("v", N))
            }
        )
        self.a_log, self.dt_bias = init.time_steps(rngs, N, "heads")
        self.norm = RMSNorm(H, cfg["norm_eps"])
        self.out = init.matrix(rngs, N * H, D, gain, axes=("heads", "d_model"))
        self.head_dim, self.scale = H, parametrization.attention_scale(cfg)
        self.dtype = jnp.dtype(cfg["dtype"])
        self.matmul = cfg.get("matmul", jnp.matmul)

    def __call__(self, x_BTD, rope, segment_ids_BT):
        """[B, T, D] to [B, T, D], in the compute dtype; segments None: one document a row."""
        B, T, _ = x_BTD.shape

        def product(name):
            return self.matmul(x_BTD, getattr(self, name)[...].astype(self.dtype))

        q_BTKH, k_BTKH, v_BTNH = (
            self.conv[name](product(name), segment_ids_BT).reshape(B, T, -1, self.head_dim) for name in "qkv"
        )
        _, decay_BTN = log_decay(product("dt"), self.a_log[...], self.dt_bias[...])
        beta_BTN = jax.nn.sigmoid(product("beta").astype(jnp.float32))
        o_BTNH, _ = gated_delta_rule(
            of_length_one(q_BTKH), of_length_one(k_BTKH), v_BTNH, beta_BTN, decay_BTN,
            scale=self.scale, segment_ids=segment_ids_BT,
        )  # fmt: skip
        gate = jax.nn.silu(product("z")).reshape(o_BTNH.shape)
        return self.matmul((self.norm(o_BTNH) * gate).reshape(B, T, -1), self.out[...].astype(self.dtype))


def of_length_one(x_BTKH):
    """x / |x| over the last axis, in float32 inside."""
    x32 = x_BTKH.astype(jnp.float32)
    return (x32 * jax.lax.rsqrt(jnp.sum(x32 * x32, axis=-1, keepdims=True) + KEY_EPS)).astype(x_BTKH.dtype)
