"""The gated feed-forward networks."""

import jax
import jax.numpy as jnp
from flax import nnx

from scaling import parametrization
from scaling.models import init


class SwiGLU(nnx.Module):
    """(silu(x W_gate) * x W_up) W_down, without biases (Shazeer 2020, eq. 6)."""

    activation = staticmethod(jax.nn.silu)

    def __init__(self, cfg, rngs: nnx.Rngs):
        D, F = cfg["d_model"], cfg["ffn_dim"]
        gain = init.residual_gain(parametrization.residual_branches(cfg))
        self.gate = init.matrix(rngs, D, F, axes=("d_model", "ffn_dim"))
        self.up = init.matrix(rngs, D, F, axes=("d_model", "ffn_dim"))
        self.down = init.matrix(rngs, F, D, gain, axes=("ffn_dim", "d_model"))
        self.dtype = jnp.dtype(cfg["dtype"])
        self.matmul = cfg.get("matmul", jnp.matmul)

    def __call__(self, x_BTD):
        """[B, T, D] to [B, T, D], in the compute dtype."""
        gate, up, down = (w[...].astype(self.dtype) for w in (self.gate, self.up, self.down))
        gated = self.activation(self.matmul(x_BTD, gate)) * self.matmul(x_BTD, up)
        return self.matmul(gated, down)


class GeGLU(SwiGLU):
    """The same with gelu in silu's place (Shazeer 2020, eq. 6), in its tanh form, as in Gemma and Griffin."""

    activation = staticmethod(jax.nn.gelu)
