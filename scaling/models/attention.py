"""Grouped-query attention with rotary positions and query-key normalisation."""

import jax.numpy as jnp
from flax import nnx

from pallas_kernels import dot_product_attention
from scaling import layers, parametrization
from scaling.models import init
from scaling.models.norm import RMSNorm


def rope_table(positions_BT, head_dim: int, theta: float):
    """Cosines and sines of the rotary angles, float32 [B, T, 1, head_dim / 2] each.

    Pair i turns by position x theta^(-2i / head_dim) (Su et al. 2021, section 3.2.2).
    """
    exponents = jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim
    angles = positions_BT[:, :, None].astype(jnp.float32) * theta**-exponents
    return jnp.cos(angles)[:, :, None], jnp.sin(angles)[:, :, None]


def rotate(x_BTNH, rope):
    """Turns the pairs (x[i], x[i + R/2]) by the angles of ``rope_table``, in float32 inside.

    Halves, not neighbours, are paired, as in Llama's and Qwen's published weights. Where the table has
    R < H channels the rest is left as it is (Black et al. 2022, section 2.1.1).

    Args:
      x_BTNH: [B, T, N, H].
      rope: the table; None where positions are not used (Kazemnejad et al. 2023).
    """
    if rope is None:
        return x_BTNH
    cos, sin = rope
    turning = 2 * cos.shape[-1]
    if turning < x_BTNH.shape[-1]:
        turned, rest = jnp.split(x_BTNH, [turning], axis=-1)
        return jnp.concatenate([rotate(turned, rope), rest], axis=-1)
    first, second = jnp.split(x_BTNH.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x_BTNH.dtype)


class Attention(nnx.Module):
    """Causal attention: N query heads share K key-value heads (Ainslie et al. 2023).

    ``window``: keys that a query sees, itself included; None for all before it. Under masked diffusion
    (``layers.causal``) a query sees as many after it too.

    Query-key normalisation is an RMSNorm over each head's channels, before the rotation, with one
    scale for all heads (Dehghani et al. 2023, in the form of Qwen3). A local window of w tokens
    includes the token itself.
    """

    def __init__(self, cfg, rngs: nnx.Rngs, window: int | None):
        D, N, K, H = cfg["d_model"], cfg["heads"], cfg["kv_heads"], cfg["head_dim"]
        gain = init.residual_gain(parametrization.residual_branches(cfg))
        self.q = init.matrix(rngs, D, N * H, axes=("d_model", "heads"))
        self.k = init.matrix(rngs, D, K * H, axes=("d_model", "kv_heads"))
        self.v = init.matrix(rngs, D, K * H, axes=("d_model", "kv_heads"))
        self.out = init.matrix(rngs, N * H, D, gain, axes=("heads", "d_model"))
        self.configure(cfg, window)

    def configure(self, cfg, window: int | None):
        """All but the projections."""
        self.head_dim, self.scale = cfg["head_dim"], parametrization.attention_scale(cfg)
        if cfg["qk_norm"]:
            self.q_norm = RMSNorm(self.head_dim, cfg["norm_eps"])
            self.k_norm = RMSNorm(self.head_dim, cfg["norm_eps"])
        self.qk_norm = cfg["qk_norm"]
        self.soft_cap = cfg["attention_soft_cap"]
        self.causal = layers.causal(cfg)
        self.window = None if window is None else (window - 1, 0 if self.causal else window - 1)
        self.blocks = cfg.get("blocks")
        self.dtype = jnp.dtype(cfg["dtype"])
        self.matmul = cfg.get("matmul", jnp.matmul)

    def __call__(self, x_BTD, rope, segment_ids_BT):
        """[B, T, D] to [B, T, D], in the compute dtype; segments None: one document a row."""
        mixed_BTNH = self.mix(*self.heads_of(x_BTD, rope), segment_ids_BT)
        return self.matmul(mixed_BTNH.reshape(*x_BTD.shape[:2], -1), self.out[...].astype(self.dtype))

    def heads_of(self, x_BTD, rope):
        """Queries [B, T, N, H], keys and values [B, T, K, H], normalised and turned."""
        shape = (*x_BTD.shape[:2], -1, self.head_dim)
        q_BTNH, k_BTKH, v_BTKH = (
            self.matmul(x_BTD, w[...].astype(self.dtype)).reshape(shape) for w in (self.q, self.k, self.v)
        )
        if self.qk_norm:
            q_BTNH, k_BTKH = self.q_norm(q_BTNH), self.k_norm(k_BTKH)
        return rotate(q_BTNH, rope), rotate(k_BTKH, rope), v_BTKH

    def mix(self, q_BTNH, k_BTKH, v_BTKH, segment_ids_BT):
        """Values mixed over the tokens that each query sees, [B, T, N, H]."""
        if self.blocks is not None:
            window = None if self.window is None else self.window[0] + 1
            return self.blocks.attention(
                q_BTNH,
                k_BTKH,
                v_BTKH,
                segment_ids_BT,
                scale=self.scale,
                window=window,
                soft_cap=self.soft_cap,
            )
        return dot_product_attention(
            q_BTNH,
            k_BTKH,
            v_BTKH,
            scale=self.scale,
            is_causal=self.causal,
            local_window_size=self.window,
            q_segment_ids=segment_ids_BT,
            logits_soft_cap=self.soft_cap,
        )
