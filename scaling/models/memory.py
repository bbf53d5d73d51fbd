"""A memory of keys and values in the feed-forward's place, its keys products of two halves."""

import jax
import jax.numpy as jnp
from flax import nnx

from scaling import parametrization
from scaling.models import init
from scaling.models.norm import RMSNorm


class Memory(nnx.Module):
    """out(m * silu(x W_gate)), m a weighted sum of values found by their keys (Berges et al. 2024, eqs. 1-4).

    n = ``memory_keys`` sub-keys for each half of a query make n^2 keys, the key (i, j) scoring the sum of the
    scores of i and j. Each of ``memory_heads`` queries of ``head_dim`` channels takes the ``memory_top`` best
    of all n^2, found exactly among the best of each half (Lample et al. 2019, section 3.2), with softmax
    weights; one table of values [n^2, d_model] serves all heads. Queries are normalised, half by half.
    """

    def __init__(self, cfg, rngs: nnx.Rngs):
        D, n, N, H = cfg["d_model"], cfg["memory_keys"], cfg["memory_heads"], cfg["head_dim"]
        gain = init.residual_gain(parametrization.residual_branches(cfg))
        self.q = init.matrix(rngs, D, N * H, axes=("d_model", None))
        self.q_norm = RMSNorm(H // 2, cfg["norm_eps"])
        self.keys = init.table(rngs, n, H // 2, None, lead=(2, N))
        self.values = init.table(rngs, n * n, D, "d_model")
        self.gate = init.matrix(rngs, D, D, axes=("d_model", None))
        self.out = init.matrix(rngs, D, D, gain, axes=(None, "d_model"))
        self.heads, self.top = N, cfg["memory_top"]
        self.dtype = jnp.dtype(cfg["dtype"])
        self.matmul = cfg.get("matmul", jnp.matmul)

    def __call__(self, x_BTD):
        """[B, T, D] to [B, T, D], in the compute dtype."""
        q, gate, out = (w[...].astype(self.dtype) for w in (self.q, self.gate, self.out))
        q_BTN2H = self.q_norm(self.matmul(x_BTD, q).reshape(*x_BTD.shape[:2], self.heads, 2, -1))
        found_BTNk, weights_BTNk = self.find(q_BTN2H)

        @jax.checkpoint
        def head(sum_BTD, taken):
            found_BTk, weights_BTk = taken
            values_BTkD = jnp.take(self.values[...], found_BTk, axis=0)
            return sum_BTD + jnp.sum(weights_BTk[..., None] * values_BTkD, axis=2), None

        by_head = jax.tree.map(lambda a: jnp.moveaxis(a, 2, 0), (found_BTNk, weights_BTNk))
        # a head at a time: the values of all of them are not held together
        sum_BTD, _ = jax.lax.scan(head, jnp.zeros(x_BTD.shape, jnp.float32), by_head)
        return self.matmul(sum_BTD.astype(self.dtype) * jax.nn.silu(self.matmul(x_BTD, gate)), out)

    def find(self, q_BTN2H):
        """Rows of the table, int [B, T, N, k], and their weights, float32."""
        n, k = self.keys.shape[-2], self.top
        scores_BTN2n = jnp.einsum("btnph,pnsh->btnps", q_BTN2H.astype(jnp.float32), self.keys[...])
        best, where = jax.lax.top_k(scores_BTN2n, k)
        sums = best[..., 0, :, None] + best[..., 1, None, :]
        scores_BTNk, pair = jax.lax.top_k(sums.reshape(*sums.shape[:-2], k * k), k)
        first, second = (
            jnp.take_along_axis(where[..., i, :], at, -1) for i, at in ((0, pair // k), (1, pair % k))
        )
        return first * n + second, jax.nn.softmax(scores_BTNk)
