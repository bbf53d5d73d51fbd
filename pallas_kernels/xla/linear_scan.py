"""The diagonal recurrence for XLA to compile: a parallel form, and one that goes token by token in place."""

import jax.numpy as jnp
from jax import lax


def associative(a_BTF, b_BTF, h0_BF, resets_BT, *, reverse, block_sizes):
    """By ``lax.associative_scan``: O(log T) dependent steps, each a pass over memory."""
    dtype = h0_BF.dtype
    h_BTF = _associative(a_BTF.astype(dtype), b_BTF.astype(dtype), h0_BF, resets_BT, reverse)
    return h_BTF.astype(b_BTF.dtype), h_BTF[:, 0 if reverse else -1]


def associative_backward(a_BTF, h_BTF, h0_BF, resets_BT, dh_BTF, dh_last_BF, *, reverse, block_sizes):
    """The same scan in the other direction, on the decay of the token after; returns da, db, dh0."""
    # JAX's cotangents of complex arrays are those of the linear map as it stands: nothing is conjugated.
    dtype = a_BTF.dtype
    a_BTF, h_BTF, dh_BTF = (x.astype(h0_BF.dtype) for x in (a_BTF, h_BTF, dh_BTF))
    a_after = _shift(a_BTF, jnp.ones_like(h0_BF), not reverse)
    no = jnp.zeros_like(a_BTF[:, 0, 0], bool)
    resets_after = None if resets_BT is None else _shift(resets_BT, no, not reverse)
    db_BTF = _associative(a_after, dh_BTF, dh_last_BF, resets_after, not reverse)
    before = _shift(h_BTF, h0_BF, reverse)
    if resets_BT is not None:
        before = jnp.where(resets_BT[..., None], 0, before)
    first = -1 if reverse else 0
    return (db_BTF * before).astype(dtype), db_BTF.astype(dtype), a_BTF[:, first] * db_BTF[:, first]


def in_place(a_BTF, b_BTF, h0_BF, resets_BT, *, reverse, block_sizes):
    """One token after another, written where it belongs: each array is passed over once.

    On a CPU ``lax.scan`` would first copy the arrays to have the tokens in front.
    """
    T = a_BTF.shape[1]

    def step(i, carry):
        x_BF, h_BTF = carry
        t = T - 1 - i if reverse else i
        a_BF, b_BF = (_token(x, t).astype(x_BF.dtype) for x in (a_BTF, b_BTF))
        x_BF = a_BF * _keep(x_BF, resets_BT, t) + b_BF
        return x_BF, _with_token(h_BTF, x_BF, t)

    h_last_BF, h_BTF = lax.fori_loop(0, T, step, (h0_BF, jnp.zeros_like(b_BTF)))
    return h_BTF, h_last_BF


def in_place_backward(a_BTF, h_BTF, h0_BF, resets_BT, dh_BTF, dh_last_BF, *, reverse, block_sizes):
    """The tokens in the other order; returns da, db, dh0."""
    T = a_BTF.shape[1]

    def step(i, carry):
        x_BF, da_BTF, db_BTF = carry  # x: cotangent of the state after this token, from later tokens
        t = i if reverse else T - 1 - i
        before = jnp.where(i == T - 1, h0_BF, _token(h_BTF, t + 1 if reverse else t - 1).astype(x_BF.dtype))
        db_BF = _token(dh_BTF, t).astype(x_BF.dtype) + x_BF
        da_BF = db_BF * _keep(before, resets_BT, t)
        x_BF = _keep(_token(a_BTF, t).astype(x_BF.dtype) * db_BF, resets_BT, t)
        return x_BF, _with_token(da_BTF, da_BF, t), _with_token(db_BTF, db_BF, t)

    init = dh_last_BF, jnp.zeros_like(a_BTF), jnp.zeros_like(a_BTF)
    dh0_BF, da_BTF, db_BTF = lax.fori_loop(0, T, step, init)
    return da_BTF, db_BTF, dh0_BF


def _associative(a_BTF, b_BTF, h0_BF, resets_BT, reverse):
    first = -1 if reverse else 0
    b_BTF = b_BTF.at[:, first].add(a_BTF[:, first] * h0_BF)
    if resets_BT is None:

        def combine(early, late):
            return early[0] * late[0], late[0] * early[1] + late[1]

        return lax.associative_scan(combine, (a_BTF, b_BTF), reverse=reverse, axis=1)[1]

    def combine_segments(early, late):
        # chosen, not multiplied by zero: a NaN stays in its segment
        a, b = early[0] * late[0], jnp.where(late[2], 0, late[0] * early[1]) + late[1]
        return a, b, early[2] | late[2]

    parts = a_BTF, b_BTF, resets_BT[..., None]
    return lax.associative_scan(combine_segments, parts, reverse=reverse, axis=1)[1]


def _shift(x_BTF, before_BF, reverse):
    """Every token has its predecessor's value in the direction of the scan, the first one ``before``."""
    parts = (x_BTF[:, 1:], before_BF[:, None]) if reverse else (before_BF[:, None], x_BTF[:, :-1])
    return jnp.concatenate(parts, axis=1)


def _keep(x_BF, resets_BT, t):
    return x_BF if resets_BT is None else jnp.where(_token(resets_BT, t)[:, None], 0, x_BF)


def _token(x, t):
    return lax.dynamic_index_in_dim(x, t, axis=1, keepdims=False)


def _with_token(x, value, t):
    return lax.dynamic_update_index_in_dim(x, value.astype(x.dtype), t, axis=1)
