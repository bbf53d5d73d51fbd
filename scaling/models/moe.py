"""A mixture of experts in the feed-forward's place."""

import jax
import jax.numpy as jnp
from flax import nnx

from scaling import layers, parametrization
from scaling.models import init
from scaling.models.swiglu import SwiGLU


class MoE(nnx.Module):
    """The sum over a token's experts of weight x SwiGLU (Shazeer et al. 2017, eqs. 1-3), and shared experts.

    A token takes the ``active_experts`` of ``experts`` whose logits x W_router are largest. Weights are the
    softmax over the chosen (``router`` 'chosen', as Mixtral: Jiang et al. 2024, section 2.1) or over all
    ('all', as Switch and OLMoE: Fedus et al. 2022, eq. 1). Experts are ``expert_fraction`` x ``ffn_dim`` wide
    (Dai et al. 2024, eq. 4: fine granularity); ``shared_experts`` of them see every token (their eq. 9).

    An expert has places for ``capacity_factor`` times its even share of a row's tokens; they are given out in
    the order of the tokens, so that no token depends on a later one, and a token without a place there
    goes without that expert (Fedus et al. 2022, eq. 3). A factor of experts / active_experts drops none.

    Called: [B, T, D] to ([B, T, D], float32 [B]), the second what training adds to the loss, row by row:
    ``balance_loss`` x the load-balancing loss (Fedus et al. 2022, eqs. 4-6) and ``router_z_loss`` x the mean
    squared log-sum-exp of the logits (Zoph et al. 2022, eq. 5). By rows, so that no number depends on how a
    batch is split.
    """

    def __init__(self, cfg, rngs: nnx.Rngs):
        D, E, F = cfg["d_model"], cfg["experts"], layers.expert_dim(cfg)
        gain = init.residual_gain(parametrization.residual_branches(cfg))
        self.router = init.matrix(rngs, D, E, axes=("d_model", None))
        self.gate = init.matrix(rngs, D, F, axes=("d_model", "ffn_dim"), count=E)
        self.up = init.matrix(rngs, D, F, axes=("d_model", "ffn_dim"), count=E)
        self.down = init.matrix(rngs, F, D, gain, axes=("ffn_dim", "d_model"), count=E)
        self.has_shared = cfg["shared_experts"] > 0
        if self.has_shared:
            self.shared = SwiGLU({**cfg, "ffn_dim": cfg["shared_experts"] * F}, rngs)
        self.experts, self.active, self.over_all = E, cfg["active_experts"], cfg["router"] == "all"
        self.capacity_factor = cfg["capacity_factor"]
        self.balance_loss, self.router_z_loss = cfg["balance_loss"], cfg["router_z_loss"]
        self.dtype = jnp.dtype(cfg["dtype"])
        self.matmul = cfg.get("matmul", jnp.matmul)

    def __call__(self, x_BTD):
        logits_BTE = x_BTD.astype(jnp.float32) @ self.router[...]
        probabilities_BTE = jax.nn.softmax(logits_BTE)
        weights_BTk, chosen_BTk = jax.lax.top_k(probabilities_BTE, self.active)
        if not self.over_all:
            weights_BTk = weights_BTk / jnp.sum(weights_BTk, axis=-1, keepdims=True)
        y_BTD = jax.vmap(self.take_back)(*self.through_experts(x_BTD, chosen_BTk), weights_BTk)
        if self.has_shared:
            y_BTD = y_BTD + self.shared(x_BTD)
        return y_BTD, self.added_loss(logits_BTE, probabilities_BTE, chosen_BTk)

    def through_experts(self, x_BTD, chosen_BTk):
        """What experts make of the tokens in their places, [B, E C, D], and a token's places, [B, T, k]."""
        B, T, D = x_BTD.shape
        C = layers.capacity(self.experts, self.active, self.capacity_factor, T)
        places_BTk = jax.vmap(lambda chosen: places(chosen, self.experts, C))(chosen_BTk)

        def sent(x_TD, places_Tk):
            tokens = jnp.broadcast_to(jnp.arange(T)[:, None], places_Tk.shape)
            taken = jnp.full(self.experts * C, T).at[places_Tk].set(tokens, mode="drop")
            return x_TD.at[taken].get(mode="fill", fill_value=0)  # an empty place holds zeros

        x_BECD = jax.vmap(sent)(x_BTD, places_BTk).reshape(B, self.experts, C, D)
        each = jax.vmap(self.matmul, in_axes=(1, 0), out_axes=1)
        gate, up, down = (w[...].astype(self.dtype) for w in (self.gate, self.up, self.down))
        y_BECD = each(jax.nn.silu(each(x_BECD, gate)) * each(x_BECD, up), down)
        return y_BECD.reshape(B, self.experts * C, D), places_BTk

    @staticmethod
    def take_back(y_PD, places_Tk, weights_Tk):
        """The weighted sum of what a row's tokens have in their places, [T, D]."""
        y_TkD = y_PD.at[places_Tk].get(mode="fill", fill_value=0)
        return jnp.sum(weights_Tk[..., None] * y_TkD.astype(jnp.float32), axis=1).astype(y_PD.dtype)

    def added_loss(self, logits_BTE, probabilities_BTE, chosen_BTk):
        """Float32 [B]."""
        share_BE = jnp.mean(jax.nn.one_hot(chosen_BTk, self.experts), axis=(1, 2))
        balance_B = self.experts * jnp.sum(share_BE * jnp.mean(probabilities_BTE, axis=1), axis=-1)
        z_B = jnp.mean(jnp.square(jax.nn.logsumexp(logits_BTE, axis=-1)), axis=-1)
        return self.balance_loss * balance_B + self.router_z_loss * z_B


def places(chosen_Tk, experts: int, capacity: int):
    """Each choice's place, int [T, k]: expert x capacity + how many took that expert before.

    Beyond the end (experts x capacity) where the expert is full.
    """
    flat = chosen_Tk.reshape(-1)
    taken = jnp.cumsum(jax.nn.one_hot(flat, experts, dtype=jnp.int32), axis=0)
    before = jnp.take_along_axis(taken, flat[:, None], axis=1)[:, 0] - 1
    place = jnp.where(before < capacity, flat * capacity + before, experts * capacity)
    return place.reshape(chosen_Tk.shape)
