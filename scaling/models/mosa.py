"""Mixture of sparse attention: heads that each choose their own tokens of a row."""

import jax
import jax.numpy as jnp
from flax import nnx

from scaling import layers, parametrization
from scaling.models import init
from scaling.models.attention import Attention, rotate
from scaling.models.depth_router import PREDICTOR_LOSS, choose
from scaling.models.gather import take


class MoSA(Attention):
    """Sum over heads of sigmoid(x_i w) out(attention among its tokens) (Piekos et al. 2025, section 2).

    ``sparse_heads`` x ``heads`` heads, each with its own keys and values. Of each row a head takes the share
    ``head_capacity`` of tokens (rounded up) whose router weight is largest, and projects those alone. They
    attend to each other under the causal mask, each at its own position and in its own document.

    That choice looks at later tokens, as that of mixture of depths does, and evaluation has the same remedy:
    for every head a predictor learns who is taken, on a stopped gradient, and evaluation takes those, however
    many (``DepthRouter``). A share of 1 takes every token in both. The output begins with the size that it
    has in dense attention of as many heads as take a token on average.

    Called: [B, T, D] to the same, and what training adds to the loss, float32 [B].
    """

    def __init__(self, cfg, rngs: nnx.Rngs):
        D, H, E, self.share = cfg["d_model"], cfg["head_dim"], layers.sparse_heads(cfg), cfg["head_capacity"]
        self.configure(cfg, None)
        gain = init.residual_gain(parametrization.residual_branches(cfg)) / (E * self.share) ** 0.5
        self.q, self.k, self.v = (
            init.matrix(rngs, D, H, axes=("d_model", None), count=E, lead="heads") for _ in range(3)
        )
        self.out = init.matrix(rngs, H, D, gain, axes=(None, "d_model"), count=E, lead="heads")
        self.router = init.matrix(rngs, D, E, axes=("d_model", None))
        self.predictor = init.matrix(rngs, D, E, axes=("d_model", None))
        self.predictor_bias = init.zeros(E, None)

    def __call__(self, x_BTD, rope, segment_ids_BT, training: bool):
        B, T, _ = x_BTD.shape
        x32_BTD = x_BTD.astype(jnp.float32)
        weights_BTE = jax.nn.sigmoid(x32_BTD @ self.router[...])
        logits_BTE = jax.lax.stop_gradient(x32_BTD) @ self.predictor[...] + self.predictor_bias[...]
        if segment_ids_BT is None:
            segment_ids_BT = jnp.ones((B, T), jnp.int32)
        if training:
            heads = jax.vmap(lambda w, p: choose(w, p, self.share), in_axes=2, out_axes=1)
            places_BEC, weights_BEC, missed_BE = heads(weights_BTE, logits_BTE)
            some = jax.vmap(take, in_axes=(None, 1), out_axes=1)
            x, rope, segments_BEC = jax.tree.map(lambda a: some(a, places_BEC), (x_BTD, rope, segment_ids_BT))
            y_BECH = self.attend(x, rope, segments_BEC, 1) * weights_BEC[..., None].astype(self.dtype)
            y_BECD = self.each(1)(y_BECH, self.out[...].astype(self.dtype)).astype(jnp.float32)
            y_BTD = jax.vmap(lambda y, at: jnp.zeros((T, y.shape[-1])).at[at].add(y))(y_BECD, places_BEC)
            return y_BTD.astype(self.dtype), PREDICTOR_LOSS * jnp.mean(missed_BE, axis=-1)
        chosen_BET = jnp.moveaxis((logits_BTE > 0) | (self.share == 1), 2, 1)
        # whom a head does not take is in a document of his own kind, where no one taken looks
        segments_BET = jnp.where(chosen_BET, segment_ids_BT[:, None], -1)
        everywhere = jax.tree.map(
            lambda a: jnp.broadcast_to(a[:, None], (B, len(self.q), *a.shape[1:])), rope
        )
        y_BETH = self.attend(x_BTD, everywhere, segments_BET, None)
        y_BETH = y_BETH * (chosen_BET * jnp.moveaxis(weights_BTE, 2, 1))[..., None].astype(self.dtype)
        out_KD = self.out[...].astype(self.dtype).reshape(-1, x_BTD.shape[-1])
        return self.matmul(jnp.moveaxis(y_BETH, 1, 2).reshape(B, T, -1), out_KD), jnp.zeros(B, jnp.float32)

    def each(self, axis):
        """A product of every head: of what is its own along ``axis``, or of the same (None)."""
        return jax.vmap(self.matmul, in_axes=(axis, 0), out_axes=1)

    def attend(self, x, rope, segments_BEC, axis):
        """What every head reads of its own tokens, [B, E, C, H]; rope of them, [B, E, C, 1, H / 2]."""
        qkv = (self.each(axis)(x, w[...].astype(self.dtype)) for w in (self.q, self.k, self.v))
        B, E, C = segments_BEC.shape
        # heads are rows: each has other tokens
        q, k, v = (a.reshape(B * E, C, 1, -1) for a in qkv)
        rope = jax.tree.map(lambda a: a.reshape(B * E, *a.shape[2:]), rope)
        if self.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        mixed = self.mix(rotate(q, rope), rotate(k, rope), v, segments_BEC.reshape(B * E, C))
        return mixed.reshape(B, E, C, -1)
