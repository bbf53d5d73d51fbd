"""Differential attention: the difference of two softmaxes over the same values."""

import jax.numpy as jnp
from flax import nnx

from scaling.models import init
from scaling.models.attention import Attention
from scaling.models.norm import RMSNorm


class DifferentialAttention(Attention):
    """out((1 - l0) norm((softmax(q1 k1^T) - l softmax(q2 k2^T)) v)) (Ye et al. 2024, eqs. 1-3).

    Key-value heads go in pairs, and so do the query heads that read them: a pair's two maps see the values of
    both, 2 x ``head_dim`` channels, and one is taken from the other. l = exp(lambda_q1 . lambda_k1) -
    exp(lambda_q2 . lambda_k2) + l0, one for all heads; l0 = 0.8 - 0.6 exp(-0.3 i) in layer i, from 0.
    ``norm`` is an RMSNorm over a pair's channels. Parameters are those of ``Attention`` and these few.
    """

    def __init__(self, cfg, rngs: nnx.Rngs, window: int | None):
        super().__init__(cfg, rngs, window)
        self.lambda_q1, self.lambda_k1, self.lambda_q2, self.lambda_k2 = (
            init.normal(rngs, self.head_dim, 0.1) for _ in range(4)
        )
        self.norm = RMSNorm(2 * self.head_dim, cfg["norm_eps"])

    def __call__(self, x_BTD, rope, segment_ids_BT, depth):
        """[B, T, D] to [B, T, D]; ``depth``: the layer's number, from 0."""
        q_BTNH, k_BTKH, v_BTKH = self.heads_of(x_BTD, rope)
        B, T, K, H = v_BTKH.shape
        # both maps of a pair read both its values, one after the other: values are no wider than keys
        halves = (jnp.repeat(v_BTKH.reshape(B, T, K // 2, 2, H)[..., i, :], 2, axis=2) for i in range(2))
        mixed = [self.mix(q_BTNH, k_BTKH, v, segment_ids_BT).reshape(B, T, K // 2, 2, -1, H) for v in halves]
        first, second = jnp.moveaxis(jnp.concatenate(mixed, -1).astype(jnp.float32), 3, 0)
        l0 = 0.8 - 0.6 * jnp.exp(-0.3 * depth.astype(jnp.float32))
        by = jnp.exp(self.lambda_q1 @ self.lambda_k1) - jnp.exp(self.lambda_q2 @ self.lambda_k2) + l0
        read = (1 - l0) * self.norm(first - by * second)
        return self.matmul(read.astype(self.dtype).reshape(B, T, -1), self.out[...].astype(self.dtype))
