"""A gated feed-forward of Monarch matrices in the dense ones' place."""

import jax
import jax.numpy as jnp
from flax import nnx

from scaling import layers, parametrization
from scaling.models import init


def monarch_product(x, first_bKs, second_bsN, matmul=jnp.matmul):
    """x M with M = R P L P', a Monarch matrix (Dao et al. 2022, definition 3.1 and appendix C, rectangular).

    R and L are block-diagonal, b blocks each; P takes entry (block, i) of what R gives to entry i b + block,
    so that every block of L sees every block of R where s >= b; P' does the same to what L gives.

    Args:
      x: [..., b K]. first_bKs: the blocks of R, [b, K, s]. second_bsN: the blocks of L, [b, s, N].
      matmul: of one block, x [..., K] and w [K, N] to [..., N].

    Returns:
      [..., b N], for (K + N) / (b K N) x s of a dense product's FLOPs.
    """
    for blocks in (first_bKs, second_bsN):
        x = x.reshape(*x.shape[:-1], len(blocks), -1)
        x = jax.vmap(matmul, in_axes=(-2, 0), out_axes=-1)(x, blocks)  # blocks last: their transposition
        x = x.reshape(*x.shape[:-2], -1)
    return x


class Monarch(nnx.Module):
    """(silu(x M_gate) * x M_up) M_down, each M a ``monarch_product`` of ``monarch_blocks`` blocks.

    As the dimension mixer of the Monarch mixer (Fu et al. 2023, section 3), gated as SwiGLU is (Shazeer 2020,
    eq. 6). Between both factors a product is as wide as the stream. Each factor keeps its input's variance,
    so that the product does.
    """

    def __init__(self, cfg, rngs: nnx.Rngs):
        b, s = cfg["monarch_blocks"], layers.monarch_dim(cfg)
        D, F = cfg["d_model"] // b, cfg["ffn_dim"] // b
        gain = init.residual_gain(parametrization.residual_branches(cfg))
        self.gate_first = init.matrix(rngs, D, s, axes=("d_model", None), count=b)
        self.gate_second = init.matrix(rngs, s, F, axes=(None, "ffn_dim"), count=b)
        self.up_first = init.matrix(rngs, D, s, axes=("d_model", None), count=b)
        self.up_second = init.matrix(rngs, s, F, axes=(None, "ffn_dim"), count=b)
        self.down_first = init.matrix(rngs, F, s, axes=(None, "d_model"), count=b)
        self.down_second = init.matrix(rngs, s, D, gain, axes=(None, "d_model"), count=b)
        self.dtype = jnp.dtype(cfg["dtype"])
        self.matmul = cfg.get("matmul", jnp.matmul)

    def __call__(self, x_BTD):
        """[B, T, D] to [B, T, D], in the compute dtype."""

        def product(x, name):
            first, second = (getattr(self, f"{name}_{half}")[...] for half in ("first", "second"))
            return monarch_product(x, first.astype(self.dtype), second.astype(self.dtype), self.matmul)

        return product(jax.nn.silu(product(x_BTD, "gate")) * product(x_BTD, "up"), "down")
