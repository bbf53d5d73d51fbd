"""Mixture of depths: which tokens of a row a layer takes; the others pass on the residual stream."""

import jax
import jax.numpy as jnp
from flax import nnx

from scaling import layers
from scaling.models import init
from scaling.models.gather import take, the_chosen_first

PREDICTOR_LOSS = 0.01
"""Weight of the predictor's loss. It moves the predictor alone, and Adam is blind to its scale; small, so
that the clipping of the gradient does not see it."""


class DepthRouter(nnx.Module):
    """Expert choice along depth: x_i + r_i f(X)_i for tokens that are chosen, x_i for the others.

    Source: Raposo et al. 2024, section 3. r = x w is a number a token (their eq. 1, where f is the layer
    without its residual path); f sees the chosen alone, in their order, each at its own position and in its
    own document; a local window counts them.

    Training takes the ``depth_capacity`` share of a row's tokens (rounded up) whose r is largest. That choice
    looks at later tokens, and documents of one row compete for it. So that a likelihood can be causal, a
    second router, x w' + b on a stopped gradient, learns by binary cross-entropy whether a token is among
    them (their section 3.5; theirs is a small MLP, but a threshold on x w needs no more than a line). In
    evaluation a token is taken where it says yes, however many there are: its path depends on nothing
    after it, nor on other documents. A share of 1 takes all of them in both.

    Called: [B, T, D] to the places of the tokens taken, int [B, C], ascending; their weights, float32 [B, C];
    and what training adds to the loss, float32 [B]. In evaluation C is T, the chosen stand first, and the
    others have weight 0.
    """

    def __init__(self, cfg, rngs: nnx.Rngs):
        self.router = init.matrix(rngs, cfg["d_model"], 1, axes=("d_model", None))
        self.predictor = init.matrix(rngs, cfg["d_model"], 1, axes=("d_model", None))
        self.predictor_bias = init.zeros(1, None)
        self.share = cfg["depth_capacity"]

    def __call__(self, x_BTD, training: bool):
        x_BTD = x_BTD.astype(jnp.float32)
        weights_BT = (x_BTD @ self.router[...])[..., 0]
        logits_BT = (jax.lax.stop_gradient(x_BTD) @ self.predictor[...] + self.predictor_bias[...])[..., 0]
        if training:
            places_BC, weights_BC, missed_B = choose(weights_BT, logits_BT, self.share)
            return places_BC, weights_BC, PREDICTOR_LOSS * missed_B
        chosen_BT = (logits_BT > 0) | (self.share == 1)
        places_BT = the_chosen_first(chosen_BT)
        weights_BT = take(jnp.where(chosen_BT, weights_BT, 0), places_BT)
        return places_BT, weights_BT, jnp.zeros(len(x_BTD), jnp.float32)


def choose(weights_BT, logits_BT, share: float):
    """The share of each row with the largest weights, and how badly the logits foresaw it.

    Returns:
      Their places, int [B, C], ascending; their weights [B, C]; the mean binary cross-entropy, nats [B].
    """
    T = weights_BT.shape[1]
    places_BC = jnp.sort(jax.lax.top_k(weights_BT, layers.depth_places(share, T))[1], axis=-1)
    chosen_BT = jax.vmap(lambda at: jnp.zeros(T).at[at].set(1))(places_BC)
    missed_B = jnp.mean(jax.nn.softplus(logits_BT) - chosen_BT * logits_BT, axis=-1)
    return places_BC, take(weights_BT, places_BC), missed_B
