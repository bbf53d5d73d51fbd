"""The matrix memory of xLSTM."""

import jax
import jax.numpy as jnp
from flax import nnx

from pallas_kernels import mlstm
from scaling import layers, parametrization
from scaling.models import init
from scaling.models.recurrence import HeadNorm

GATE_CAP = 15.0  # Beck et al. 2025, section 3.2


class MLSTM(nnx.Module):
    """out(sigmoid(x W_o) * norm(h)) with h of the mLSTM (Beck et al. 2024, eqs. 19-27), as in xLSTM 7B.

    Values have ``head_dim`` channels a head, queries and keys ``key_fraction`` of that; input and forget
    gates, one a head, are soft-capped at 15 (Beck et al. 2025, sections 3.1 and 3.2). At the start input
    gates are almost shut (bias -10) and forget gates open (3 to 6, over the heads).
    """

    def __init__(self, cfg, rngs: nnx.Rngs):
        D, N, H, K = cfg["d_model"], cfg["heads"], cfg["head_dim"], layers.key_dim(cfg)
        gain = init.residual_gain(parametrization.residual_branches(cfg))
        self.q = init.matrix(rngs, D, N * K, axes=("d_model", "heads"))
        self.k = init.matrix(rngs, D, N * K, axes=("d_model", "heads"))
        self.v = init.matrix(rngs, D, N * H, axes=("d_model", "heads"))
        self.i_gate = init.matrix(rngs, D, N, axes=("d_model", "heads"))
        self.f_gate = init.matrix(rngs, D, N, axes=("d_model", "heads"))
        self.o_gate = init.matrix(rngs, D, N * H, axes=("d_model", "heads"))
        self.i_bias = nnx.Param(jnp.full(N, -10.0, jnp.float32), axes=("heads",))
        self.f_bias = nnx.Param(jnp.linspace(3.0, 6.0, N, dtype=jnp.float32), axes=("heads",))
        self.norm = HeadNorm(N, H, cfg["norm_eps"], centred=True)
        self.out = init.matrix(rngs, N * H, D, gain, axes=("heads", "d_model"))
        self.heads = N
        head = parametrization.Ratios.of(cfg).head
        self.scale = None if head == 1 else (K * head) ** -0.5
        self.dtype = jnp.dtype(cfg["dtype"])
        self.matmul = cfg.get("matmul", jnp.matmul)

    def __call__(self, x_BTD, rope, segment_ids_BT):
        """[B, T, D] to [B, T, D], in the compute dtype; segments None: one document a row."""
        B, T, _ = x_BTD.shape

        def product(name):
            return self.matmul(x_BTD, getattr(self, name)[...].astype(self.dtype))

        q_BTNK, k_BTNK, v_BTNH = (product(name).reshape(B, T, self.heads, -1) for name in "qkv")
        i_BTN, f_BTN = (
            GATE_CAP * jnp.tanh((product(gate).astype(jnp.float32) + bias[...]) / GATE_CAP)
            for gate, bias in (("i_gate", self.i_bias), ("f_gate", self.f_bias))
        )
        h_BTNH, _ = mlstm(q_BTNK, k_BTNK, v_BTNH, i_BTN, f_BTN, scale=self.scale, segment_ids=segment_ids_BT)
        gated = jax.nn.sigmoid(product("o_gate")) * self.norm(h_BTNH).reshape(B, T, -1)
        return self.matmul(gated, self.out[...].astype(self.dtype))
