"""A mixture of experts in the feed-forward's place."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from scaling import layers, parametrization
from scaling.models import init
from scaling.models.places import HERE
from scaling.models.swiglu import SwiGLU


class Density(NamedTuple):
    """How dense the gates of ReLU routers are, row by row."""

    l1: jax.Array  # float32 [B]: what the coefficient of training's state multiplies
    share: jax.Array  # float32 [B]: of the experts, those whose gate is open
    other: jax.Array  # float32 [B]: what routers of another kind add to the loss


def sum_of(*added):
    """What several routers add to the loss, each float32 [B], a ``Density`` or None, as one of these."""
    there = [x for x in added if x is not None]
    plain = [x for x in there if not isinstance(x, Density)]
    for x in there:
        if isinstance(x, Density):  # one a layer
            return x._replace(other=sum(plain, x.other))
    return sum(plain) if plain else None


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

    ``router`` 'relu' (Wang et al. 2024, "ReMoE", eq. 4): the gates are relu(x W_router), each expert's for
    itself; a token goes to every expert whose gate is open, as many as ``active_experts`` in the mean once
    training has made them so sparse. Places are as above. The second result is a ``Density``: ``l1`` is their
    eqs. 5 and 9 for one layer, sum over experts of f_e x the mean gate, f_e the share of tokens that an
    expert has over ``active_experts`` / ``experts``, no gradient through it.
    """

    def __init__(self, cfg, rngs: nnx.Rngs):
        D, E, F = cfg["d_model"], cfg["experts"], layers.expert_dim(cfg)
        gain = init.residual_gain(parametrization.residual_branches(cfg))
        self.router = init.matrix(rngs, D, E, axes=("d_model", None))
        self.gate = init.matrix(rngs, D, F, axes=("d_model", "ffn_dim"), count=E, lead="experts")
        self.up = init.matrix(rngs, D, F, axes=("d_model", "ffn_dim"), count=E, lead="experts")
        self.down = init.matrix(rngs, F, D, gain, axes=("ffn_dim", "d_model"), count=E, lead="experts")
        self.has_shared = cfg["shared_experts"] > 0
        if self.has_shared:
            self.shared = SwiGLU({**cfg, "ffn_dim": cfg["shared_experts"] * F}, rngs)
        self.experts, self.active, self.over_all = E, cfg["active_experts"], cfg["router"] == "all"
        self.relu = cfg["router"] == "relu"
        self.capacity_factor = cfg["capacity_factor"]
        self.balance_loss, self.router_z_loss = cfg["balance_loss"], cfg["router_z_loss"]
        self.dtype = jnp.dtype(cfg["dtype"])
        self.matmul, self.places = cfg.get("matmul", jnp.matmul), cfg.get("places", HERE)

    def __call__(self, x_BTD):
        logits_BTE = x_BTD.astype(jnp.float32) @ self.router[...]
        if self.relu:
            return self.by_open_gates(x_BTD, jax.nn.relu(logits_BTE))
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
        C = layers.capacity(self.experts, self.active, self.capacity_factor, x_BTD.shape[1])
        places_BTk = jax.vmap(lambda chosen: places(chosen, self.experts, C))(chosen_BTk)
        return self.feed(x_BTD, self.tokens_of(places_BTk)), places_BTk

    def by_open_gates(self, x_BTD, gates_BTE):
        """The output and the ``Density`` of ReLU gates."""
        T = x_BTD.shape[1]
        open_BTE = gates_BTE > 0
        C = layers.capacity(self.experts, self.active, self.capacity_factor, T)
        taken_BP = self.tokens_of(jax.vmap(lambda gate: open_places(gate, C))(open_BTE))
        y_BPD = self.feed(x_BTD, taken_BP)

        def back(y_PD, taken_P, gates_TE):
            gates_P = gates_TE.at[taken_P, jnp.arange(len(taken_P)) // C].get(mode="fill", fill_value=0)
            weighted_PD = gates_P[:, None] * y_PD.astype(jnp.float32)
            return jnp.zeros((T, y_PD.shape[-1]), jnp.float32).at[taken_P].add(weighted_PD, mode="drop")

        y_BTD = jax.vmap(back)(y_BPD, taken_BP, gates_BTE).astype(x_BTD.dtype)
        if self.has_shared:
            y_BTD = y_BTD + self.shared(x_BTD)
        share_BE = jnp.mean(open_BTE, axis=1, dtype=jnp.float32)
        load_BE = share_BE * self.experts / self.active
        return y_BTD, Density(
            jnp.sum(load_BE * jnp.mean(gates_BTE, axis=1), axis=-1),
            jnp.mean(share_BE, axis=-1),
            jnp.zeros(len(x_BTD), jnp.float32),
        )

    def tokens_of(self, places_BTk):
        """Which token every place of a row holds, int [B, E C]; T where it is empty."""
        T, k = places_BTk.shape[1:]
        C = layers.capacity(self.experts, self.active, self.capacity_factor, T)

        def taken(places_Tk):
            tokens = jnp.broadcast_to(jnp.arange(T)[:, None], (T, k))
            return jnp.full(self.experts * C, T).at[places_Tk].set(tokens, mode="drop")

        return jax.vmap(taken)(places_BTk)

    def feed(self, x_BTD, taken_BP):
        """What experts make of the tokens in their places, [B, E C, D]."""
        B, _, D = x_BTD.shape
        sent = lambda x_TD, taken_P: x_TD.at[taken_P].get(mode="fill", fill_value=0)  # noqa: E731
        x_BECD = jax.vmap(sent)(x_BTD, taken_BP).reshape(B, self.experts, -1, D)  # an empty place holds zeros
        x_BECD = self.places.to_experts(x_BECD)
        each = jax.vmap(self.matmul, in_axes=(1, 0), out_axes=1)
        gate, up, down = (w[...].astype(self.dtype) for w in (self.gate, self.up, self.down))
        y_BECD = each(jax.nn.silu(each(x_BECD, gate)) * each(x_BECD, up), down)
        return self.places.from_experts(y_BECD).reshape(B, -1, D)

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


def open_places(open_TE, capacity: int):
    """Each token's place at each expert, int [T, E], as ``places``; beyond the end where the gate is shut."""
    before = jnp.cumsum(open_TE, axis=0, dtype=jnp.int32) - 1
    experts = open_TE.shape[1]
    place = jnp.arange(experts) * capacity + before
    return jnp.where(open_TE & (before < capacity), place, experts * capacity)
