"""The quasi-recurrent LSTM: its gates see a short convolution of the input, not the state."""

import jax
import jax.numpy as jnp
from flax import nnx

from pallas_kernels import linear_scan
from scaling import layers, parametrization
from scaling.models import init
from scaling.models.recurrence import Convolution


class QLSTM(nnx.Module):
    """out(o * tanh(c)), c_t = f_t c_{t-1} + i_t tanh(u_t W_z): Bradbury et al. 2017, eqs. 1 and 5 ("ifo").

    f, i and o are sigmoids of projections of u, a short convolution of the stream; the tanh on c is the
    LSTM's (Hochreiter and Schmidhuber 1997). The state is ``expand`` x d_model wide. Forget gates start at
    time scales of 1 to 128 tokens and input gates at one minus them (``init.time_scales``).
    """

    def __init__(self, cfg, rngs: nnx.Rngs):
        D, R = cfg["d_model"], layers.inner_width(cfg)
        gain = init.residual_gain(parametrization.residual_branches(cfg))
        self.conv = Convolution(rngs, cfg["conv_width"], D, "d_model", activation=None)
        self.z = init.matrix(rngs, D, R, axes=("d_model", "heads"))
        self.i_gate = init.matrix(rngs, D, R, axes=("d_model", "heads"))
        self.f_gate = init.matrix(rngs, D, R, axes=("d_model", "heads"))
        self.o_gate = init.matrix(rngs, D, R, axes=("d_model", "heads"))
        self.f_bias = init.time_scales(rngs, R, "heads")
        self.i_bias = nnx.Param(-self.f_bias[...], axes=("heads",))
        self.out = init.matrix(rngs, R, D, gain, axes=("heads", "d_model"))
        self.dtype = jnp.dtype(cfg["dtype"])
        self.matmul = cfg.get("matmul", jnp.matmul)

    def __call__(self, x_BTD, rope, segment_ids_BT):
        """[B, T, D] to [B, T, D], in the compute dtype; segments None: one document a row."""
        u_BTD = self.conv(x_BTD, segment_ids_BT)

        def product(name):
            return self.matmul(u_BTD, getattr(self, name)[...].astype(self.dtype))

        i_BTR, f_BTR = (
            jax.nn.sigmoid(product(gate).astype(jnp.float32) + bias[...])
            for gate, bias in (("i_gate", self.i_bias), ("f_gate", self.f_bias))
        )
        written_BTR = i_BTR * jnp.tanh(product("z").astype(jnp.float32))
        c_BTR, _ = linear_scan(f_BTR, written_BTR, segment_ids=segment_ids_BT)
        read_BTR = jax.nn.sigmoid(product("o_gate")) * jnp.tanh(c_BTR).astype(self.dtype)
        return self.matmul(read_BTR, self.out[...].astype(self.dtype))
