"""Mamba-2: a short convolution and state-space duality, whole by itself."""

import jax
import jax.numpy as jnp
from flax import nnx

from pallas_kernels import ssd
from scaling import parametrization
from scaling.models import init
from scaling.models.norm import RMSNorm
from scaling.models.recurrence import Convolution, log_decay


class Mamba2(nnx.Module):
    """out(norm(y * silu(x W_z))) with y the state-space sequence (Dao and Gu 2024, section 7.1 and eq. 16).

        S_t = exp(-exp(a_log) dt_t) S_{t-1} + b_t (dt_t u_t)^T,  y_t = S_t^T c_t + skip u_t

    u, b and c are silu of a convolution of x's projections, dt = softplus(x W_dt + dt_bias) one a head. The
    inner width is ``expand`` x d_model, in heads of ``head_dim`` channels; b and c, of ``state_dim``, are one
    for all heads.
    """

    def __init__(self, cfg, rngs: nnx.Rngs):
        D, N, H, S = cfg["d_model"], cfg["expand"] * cfg["heads"], cfg["head_dim"], cfg["state_dim"]
        gain = init.residual_gain(parametrization.residual_branches(cfg))
        self.z = init.matrix(rngs, D, N * H, axes=("d_model", "heads"))
        self.x = init.matrix(rngs, D, N * H, axes=("d_model", "heads"))
        self.b = init.matrix(rngs, D, S, axes=("d_model", None))
        self.c = init.matrix(rngs, D, S, axes=("d_model", None))
        self.dt = init.matrix(rngs, D, N, axes=("d_model", "heads"))
        self.conv = nnx.Dict(
            {
                name: Convolution(rngs, cfg["conv_width"], size, axis)
                for name, size, axis in (("x", N * H, "heads"), ("b", S, None), ("c", S, None))
            }
        )
        self.a_log, self.dt_bias = init.time_steps(rngs, N, "heads")
        self.skip = nnx.Param(jnp.ones(N, jnp.float32), axes=("heads",))
        self.norm = RMSNorm(N * H, cfg["norm_eps"])
        self.out = init.matrix(rngs, N * H, D, gain, axes=("heads", "d_model"))
        self.head_dim = H
        self.dtype = jnp.dtype(cfg["dtype"])
        self.matmul = cfg.get("matmul", jnp.matmul)

    def __call__(self, x_BTD, rope, segment_ids_BT):
        """[B, T, D] to [B, T, D], in the compute dtype; segments None: one document a row."""
        B, T, _ = x_BTD.shape

        def product(name):
            return self.matmul(x_BTD, getattr(self, name)[...].astype(self.dtype))

        u_BTNH, b_BTKS, c_BTKS = (
            self.conv[name](product(name), segment_ids_BT).reshape(B, T, -1, size)
            for name, size in (("x", self.head_dim), ("b", self.b.shape[1]), ("c", self.c.shape[1]))
        )
        dt_BTN, decay_BTN = log_decay(product("dt"), self.a_log[...], self.dt_bias[...])
        fed_BTNH = (dt_BTN[..., None] * u_BTNH).astype(self.dtype)
        y_BTNH, _ = ssd(c_BTKS, b_BTKS, fed_BTNH, decay_BTN, segment_ids=segment_ids_BT)
        y_BTNH = y_BTNH + self.skip[...].astype(self.dtype)[:, None] * u_BTNH
        gated = y_BTNH.reshape(B, T, -1) * jax.nn.silu(product("z"))
        return self.matmul(self.norm(gated), self.out[...].astype(self.dtype))
