"""minGRU: a gated recurrence whose gates do not see the state."""

import jax
import jax.numpy as jnp
from flax import nnx

from pallas_kernels import linear_scan
from scaling import layers, parametrization
from scaling.models import init
from scaling.models.recurrence import Convolution


class MinGRU(nnx.Module):
    """out(h) with h_t = f_t h_{t-1} + (1 - f_t) g(u_t W_x) (Feng et al. 2024, section 3.1 and appendix B.2).

    f = sigmoid(u W_f + f_bias), one minus their update gate; g(x) = x + 1/2 above zero and sigmoid(x) below,
    positive. u is a short convolution of the stream (their appendix C.1). The state is ``expand`` x d_model
    wide; forget gates start at time scales of 1 to 128 tokens (``init.time_scales``).
    """

    def __init__(self, cfg, rngs: nnx.Rngs):
        D, R = cfg["d_model"], layers.inner_width(cfg)
        gain = init.residual_gain(parametrization.residual_branches(cfg))
        self.conv = Convolution(rngs, cfg["conv_width"], D, "d_model", activation=None)
        self.x = init.matrix(rngs, D, R, axes=("d_model", "heads"))
        self.f_gate = init.matrix(rngs, D, R, axes=("d_model", "heads"))
        self.f_bias = init.time_scales(rngs, R, "heads")
        self.out = init.matrix(rngs, R, D, gain, axes=("heads", "d_model"))
        self.dtype = jnp.dtype(cfg["dtype"])
        self.matmul = cfg.get("matmul", jnp.matmul)

    def __call__(self, x_BTD, rope, segment_ids_BT):
        """[B, T, D] to [B, T, D], in the compute dtype; segments None: one document a row."""
        w_x, w_f, w_out = (w[...].astype(self.dtype) for w in (self.x, self.f_gate, self.out))
        u_BTD = self.conv(x_BTD, segment_ids_BT)
        x_BTR = self.matmul(u_BTD, w_x).astype(jnp.float32)
        raw_BTR = self.matmul(u_BTD, w_f).astype(jnp.float32) + self.f_bias[...]
        candidate_BTR = jnp.where(x_BTR > 0, x_BTR + 0.5, jax.nn.sigmoid(x_BTR))
        # 1 - sigmoid without cancellation
        written_BTR = jax.nn.sigmoid(-raw_BTR) * candidate_BTR
        h_BTR, _ = linear_scan(jax.nn.sigmoid(raw_BTR), written_BTR, segment_ids=segment_ids_BT)
        return self.matmul(h_BTR.astype(self.dtype), w_out)
