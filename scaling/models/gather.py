"""Some tokens of each row, taken out and put back."""

import jax
import jax.numpy as jnp


def the_chosen_first(chosen_BT):
    """bool [B, T] to places, int [B, T]: the chosen in their order, then the others in theirs.

    What comes after the chosen is seen by none of them, in any causal layer.
    """
    return jnp.argsort(~chosen_BT, axis=-1, stable=True)


def take(x, places_BC):
    """[B, T, ...] to [B, C, ...]."""
    return jax.vmap(lambda row, at: row[at])(x, places_BC)


def put_back(y_BCD, places_BC, weights_BC, seq: int):
    """weights x y at the places that it came from, zeros elsewhere, [B, seq, D]."""
    y_BCD = (weights_BC[..., None] * y_BCD.astype(jnp.float32)).astype(y_BCD.dtype)
    empty_TD = jnp.zeros((seq, y_BCD.shape[-1]), y_BCD.dtype)
    return jax.vmap(lambda y, at: empty_TD.at[at].set(y, unique_indices=True))(y_BCD, places_BC)
