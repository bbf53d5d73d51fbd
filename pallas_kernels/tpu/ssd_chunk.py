"""The algebra of one chunk and one head of ``ssd`` inside a TPU kernel: matrices in registers and VMEM.

States are held transposed, [E, D]: the key's channels are lanes, so that a decay for each of them is a
row, and values of 64 channels waste no lanes. Two kinds of decay offer the same three functions:

    next_state(k, v, decay, S) -> S'
    outputs(q, k, v, decay, S, qk, scale) -> o
    gradients(q, k, v, do, decay, S, dS, qk, scale) -> HeadGradients
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

TILE = 8  # rows of a tile of float32


class HeadGradients(NamedTuple):
    """Of one value head, float32. ``dq`` and ``dk`` lack the part through ``dqk``."""

    dq: jax.Array
    dk: jax.Array
    dv: jax.Array
    dS: jax.Array  # of the state before the chunk
    dqk: jax.Array | None  # of q k^T, where heads share it
    ddecay: tuple[jax.Array, ...]


def dot(x, y, x_axis, y_axis, dtype):
    """x y over one axis of each, in factors of ``dtype`` and sums in float32."""
    precision = lax.Precision.HIGHEST if dtype == jnp.float32 else lax.Precision.DEFAULT
    return lax.dot_general(
        x.astype(dtype), y.astype(dtype), (((x_axis,), (y_axis,)), ((), ())),
        precision=precision, preferred_element_type=jnp.float32,
    )  # fmt: skip


def _tokens(C):
    """Token t down and token s across, [C, C]."""
    return lax.broadcasted_iota(jnp.int32, (C, C), 0), lax.broadcasted_iota(jnp.int32, (C, C), 1)


# One decay a head: ``decay`` is its sums from the first token, exact ones and rests (see
# ``decay_sums.split``), once as two columns [C, 1] and once as two rows [1, C].


def scalar_sums(rows):
    """Exact sums of H heads, then their rests, [2H, C]: two arrays [C, H], and the two as they are."""
    H = rows.shape[0] // 2
    columns = _transposed(rows)
    return (columns[:, :H], columns[:, H:]), (rows[:H], rows[H:])


def _transposed(x):
    """By whole tiles."""
    rows, columns = x.shape
    return jnp.pad(x, ((0, -rows % TILE), (0, -columns % TILE))).T[:columns, :rows]


def scalar_decay(columns, rows, h):
    """Of head h."""
    return tuple(x[:, h : h + 1] for x in columns), tuple(x[h : h + 1] for x in rows)


def scalar_decay_gradient(columns_CH, rows_HC):
    """Of the sums [H, C], whose gradient as a column and as a row are two parts of it."""
    return rows_HC + _transposed(columns_CH)


def _ends(decay):
    """Factors from each token to the last [C, 1] and over the whole chunk [1, 1]."""
    columns, rows = decay
    C = rows[0].shape[1]
    ends = [r[:, C - 1 :] for r in rows]
    return jnp.exp((ends[0] - columns[0]) + (ends[1] - columns[1])), jnp.exp(ends[0] + ends[1])


def scalar_next_state(k, v, decay, S):
    to_end, whole = _ends(decay)
    return whole * S + dot(to_end * v, k, 0, 0, k.dtype)


def _scalar_weights(decay, scale):
    columns, rows = decay
    t, s = _tokens(rows[0].shape[1])
    between = (columns[0] - rows[0]) + (columns[1] - rows[1])
    # masked before the exponential: above the diagonal it may overflow
    return scale * jnp.exp(jnp.where(s <= t, between, -jnp.inf)), scale * jnp.exp(columns[0] + columns[1])


def scalar_outputs(q, k, v, decay, S, qk, scale):
    weights, from_start = _scalar_weights(decay, scale)
    return dot(qk * weights, v, 1, 0, q.dtype) + from_start * dot(q, S, 1, 1, q.dtype)


def scalar_gradients(q, k, v, do, decay, S, dS, qk, scale):
    C, dtype = q.shape[0], q.dtype
    weights, from_start = _scalar_weights(decay, scale)
    to_end, whole = _ends(decay)
    dqk = dot(do, v, 1, 1, dtype) * weights
    through = dqk * qk  # the gradient of the sum of log_decay between t and s
    dq = from_start * dot(do, S, 1, 0, dtype)
    dk = to_end * dot(v, dS, 1, 0, dtype)
    dv = dot(qk * weights, do, 0, 0, dtype) + to_end * dot(k, dS, 1, 1, dtype)
    dS_before = whole * dS + dot(from_start * do, q, 0, 0, dtype)
    last = lax.broadcasted_iota(jnp.int32, (C, 1), 0) == C - 1
    of_key = jnp.sum(dk * k, 1, keepdims=True)
    at_end = jnp.sum(of_key, keepdims=True) + whole * jnp.sum(S * dS, keepdims=True)
    column = jnp.sum(through, 1, keepdims=True) + jnp.sum(dq * q, 1, keepdims=True) - of_key
    column += jnp.where(last, at_end, 0)
    return HeadGradients(dq, dk, dv, dS_before, dqk, (column, -jnp.sum(through, 0, keepdims=True)))


# One decay a channel: ``decay`` is log_decay itself, [C, D]; see ``decay_sums.weighted_products``.


def channel_next_state(k, v, decay, S):
    g = decay
    c, r, _ = _levels(g)[-1]
    return jnp.exp(c[-1:]) * S + dot(v, k * jnp.exp(r), 0, 0, k.dtype)


def channel_outputs(q, k, v, decay, S, qk, scale):
    del qk
    levels = _levels(decay)
    A = _diagonal(q, k)
    for h, factors in _factors(levels):
        qh, kh = _halves(q, k, factors)
        A = jnp.where(_block(decay.shape[0]) < 2 * h, A + dot(qh, kh, 1, 1, q.dtype), A)
    return scale * (dot(A, v, 1, 0, q.dtype) + dot(q * jnp.exp(levels[-1][0]), S, 1, 1, q.dtype))


def channel_gradients(q, k, v, do, decay, S, dS, qk, scale):
    del qk
    C, dtype = q.shape[0], q.dtype
    levels = _levels(decay)
    c, r, _ = levels[-1]
    t, s = _tokens(C)
    dA = scale * dot(do, v, 1, 1, dtype)
    A = _diagonal(q, k)
    dq = scale * jnp.exp(c) * dot(do, S, 1, 0, dtype)
    dk_end = jnp.exp(r) * dot(v, dS, 1, 0, dtype)
    dk = dk_end
    for h, factors in _factors(levels):
        qh, kh = _halves(q, k, factors)
        inside = _block(C) < 2 * h
        A = jnp.where(inside, A + dot(qh, kh, 1, 1, dtype), A)
        dA_h = jnp.where(inside, dA, 0)
        second, factor = factors
        dq += jnp.where(second, factor * dot(dA_h, kh, 1, 0, dtype), 0)
        dk += jnp.where(second, 0, factor * dot(dA_h, qh, 0, 0, dtype))
    db = q * dq - k * dk
    end = jnp.sum(k * dk_end, 0, keepdims=True) + jnp.exp(c[-1:]) * jnp.sum(S * dS, 0, keepdims=True)
    # log_decay of a token takes part in every sum from it on
    dg = end + dot(jnp.where(s >= t, 1.0, 0.0), db, 1, 0, jnp.float32)
    same = jnp.sum(jnp.where(s == t, dA, 0), 1, keepdims=True)
    dv = scale * dot(A, do, 0, 0, dtype) + dot(k * jnp.exp(r), dS, 1, 1, dtype)
    dS_before = jnp.exp(c[-1:]) * dS + scale * dot(do, q * jnp.exp(c), 0, 0, dtype)
    return HeadGradients(dq + same * k, dk + same * q, dv, dS_before, None, (dg,))


def _diagonal(q, k):
    """q_t . k_t on the diagonal of [C, C]."""
    own = jnp.sum(q.astype(jnp.float32) * k.astype(jnp.float32), 1, keepdims=True)
    return jnp.where(_block(q.shape[0]) == 0, own, 0)


def _block(C):
    """Below n, a power of two, where t and s lie in the same block of n tokens."""
    t, s = _tokens(C)
    return t ^ s


def _levels(g):
    """(c, r, h) for blocks of h = 1, 2, ..., C tokens: sums of g from the block's first token to t
    inclusive, and from t exclusive to the block's last."""
    C = g.shape[0]
    levels = [(g, jnp.zeros_like(g), 1)]
    while levels[-1][2] < C:
        c, r, h = levels[-1]
        second = _second(C, h)
        c, r = (
            jnp.where(second, c + _pick(c, h, h - 1), c),
            jnp.where(second, r, r + _pick(c, h, 2 * h - 1)),
        )
        levels.append((c, r, 2 * h))
    return levels


def _second(C, h):
    """Whether t is in the second half of its block of 2 h tokens, [C, 1]."""
    return (lax.broadcasted_iota(jnp.int32, (C, 1), 0) & h) != 0


def _pick(x, h, at):
    """Row ``at`` of each block of 2 h rows, on every row of the block."""
    C, D = x.shape
    rows = max(2 * h, 8)  # in whole tiles of 8 rows
    x = x.reshape(C // rows, rows, D)
    out = jnp.broadcast_to(x[:, at : at + 1], x.shape)
    place = lax.broadcasted_iota(jnp.int32, x.shape, 1)
    for first in range(2 * h, rows, 2 * h):
        out = jnp.where(place >= first, x[:, first + at : first + at + 1], out)
    return out.reshape(C, D)


def _factors(levels):
    """(h, (second, factor)) for each level but the whole: factors from the middle of the block of 2 h
    tokens to t in its second half, and from s in its first half to the middle."""
    for c, r, h in levels[:-1]:
        second = _second(c.shape[0], h)
        yield h, (second, jnp.exp(jnp.where(second, c, r)))


def _halves(q, k, factors):
    """q in the second halves, k in the first, each times its factor; zeros elsewhere."""
    second, factor = factors
    return jnp.where(second, q * factor, 0), jnp.where(second, 0, k * factor)
