"""Selective attention: a gate picks the tokens that attend and are attended to; the others pass."""

import statistics

import jax
import jax.numpy as jnp
from flax import nnx

from scaling import layers
from scaling.models import init
from scaling.models.attention import Attention
from scaling.models.gather import put_back, take, the_chosen_first


class SelectiveAttention(Attention):
    """x_i + m_i a_i attention(X)_i with m_i 0 or 1: Taipan's selective layer (Nguyen et al. 2024, section 3).

    The gate is s = x w + b on the layer's normalised input: m = [s > 0], straight through with the gradient
    of a = sigmoid(s). The chosen attend to the chosen, each at its own position and in its own document; a
    local window counts them, so that it reaches about 1 / ``attention_budget`` times as far.

    Two things differ. Theirs mixes (1 - a) h + a attention(h) on the stream; of attention with its residual
    path that is x + a attention(x). Theirs adds Gumbel noise to s in training; without it training and
    evaluation choose alike, and no step draws. b begins where the budget's share of s is above zero.

    The choice is a token's own, so that no token depends on a later one. In training a row has places for
    ``capacity_factor`` times the budget, given out in the order of the tokens; who finds none passes. In
    evaluation all find one. A budget of 1 takes every token.

    Called: [B, T, D] to the same, and what training adds to the loss, float32 [B]: ``budget_loss`` x
    (budget - mean m)^2, row by row.
    """

    def __init__(self, cfg, rngs: nnx.Rngs, window: int | None):
        super().__init__(cfg, rngs, window)
        self.budget, self.budget_loss = cfg["attention_budget"], cfg["budget_loss"]
        self.capacity_factor = cfg["capacity_factor"]
        self.router = init.matrix(rngs, cfg["d_model"], 1, axes=("d_model", None))
        # s begins with unit variance; a budget of 1 has no such quantile
        start = statistics.NormalDist().inv_cdf(min(self.budget, 0.99))
        self.router_bias = nnx.Param(jnp.full(1, start, jnp.float32), axes=(None,))

    def __call__(self, x_BTD, rope, segment_ids_BT, training: bool):
        B, T, _ = x_BTD.shape
        scores_BT = (x_BTD.astype(jnp.float32) @ self.router[...])[..., 0] + self.router_bias[...]
        chosen_BT = (scores_BT > 0) | (self.budget == 1)
        soft_BT = jax.nn.sigmoid(scores_BT)
        taken_BT = chosen_BT + soft_BT - jax.lax.stop_gradient(soft_BT)
        C = layers.capacity(1, self.budget, self.capacity_factor, T) if training else T
        places_BC = the_chosen_first(chosen_BT)[:, :C]
        weights_BC = take(jnp.where(chosen_BT, soft_BT * taken_BT, 0), places_BC)
        some = jax.tree.map(lambda a: take(a, places_BC), (x_BTD, rope, segment_ids_BT))
        mixed_BTD = put_back(super().__call__(*some), places_BC, weights_BC, T)
        if not training:
            return mixed_BTD, jnp.zeros(B, jnp.float32)
        return mixed_BTD, self.budget_loss * jnp.square(self.budget - jnp.mean(taken_BT, axis=-1))
