"""One chunk of the gated delta rule for one head, as matrix products: shared by XLA and the TPU kernels.

With G the running sum of log decays in the chunk, S the state before it and
u_t = beta_t (v_t - exp(g_t) S_{t-1}^T k_t), the rule says S_t = exp(g_t) S_{t-1} + k_t u_t^T, hence

    (I + L) U = beta (V - exp(G) K S),   L_tj = beta_t exp(G_t - G_j) k_t.k_j for j < t,
    O = exp(G) Q S + (exp(G_t - G_j) q_t.k_j for j <= t) U,
    S' = exp(G_C) S + K^T exp(G_C - G) U

(Yang et al. 2024, "Parallelizing linear transformers with the delta rule", section 3, with the decay of
"Gated delta networks", section 3.3). No exponent is positive where no log decay is. I + L is inverted by
joining: the inverses of two diagonal blocks and what is between them give the inverse of both, from blocks
of 1 to the whole chunk. Every intermediate is the inverse of a part of I + L, so nothing grows that the
answer does not have (a product of powers of L grows like binomials where keys repeat); and it is matrix
products alone (LAPACK's triangular solve, one small matrix at a time, took most of the time on a CPU).
Everything is broadcast, select, reduce and 2-D products, so that the same lines run inside a kernel, and so
does their derivative.
"""

import jax
import jax.numpy as jnp
from jax import lax

LOWEST_LOG_DECAY = -50.0  # exp of it is 2e-22, nothing beside any number; running sums stay exact enough


def chunk(S_DE, q_CD, k_CD, v_CE, beta_1C, log_decay_1C, reset_1C, *, scale):
    """``(o [C, E], S' [D, E])`` in the dtype of S; products on operands of the dtype of q.

    Args:
      reset_1C: 1.0 where the state before the token counts as zero, else 0.0.
    """
    C, dtype = q_CD.shape[0], S_DE.dtype
    row, col = (lax.broadcasted_iota(jnp.int32, (C, C), axis) for axis in (0, 1))
    last = row == C - 1

    def product(a, b, contract):
        a, b = a.astype(q_CD.dtype), b.astype(q_CD.dtype)
        return lax.dot_general(a, b, (contract, ((), ())), preferred_element_type=dtype)

    def upright(x_1C):
        return jnp.sum(jnp.where(row == col, x_1C, 0), axis=1, keepdims=True)

    def running(x_1C):
        """Running sum, upright and flat."""
        upright = jnp.sum(jnp.where(col <= row, x_1C, 0), axis=1, keepdims=True)
        return upright, jnp.sum(jnp.where(row == col, upright, 0), axis=0, keepdims=True)

    (G, G_flat), (run, run_flat) = running(jnp.maximum(log_decay_1C, LOWEST_LOG_DECAY)), running(reset_1C)
    seen = (col <= row) & (run == run_flat)
    decay = jnp.where(seen, jnp.exp(jnp.where(seen, G - G_flat, 0)), 0)
    from_start = jnp.where(run == 0, jnp.exp(G), 0)
    to_end = upright(jnp.sum(jnp.where(last, decay, 0), axis=0, keepdims=True))
    through = jnp.sum(jnp.where(last[:, :1], from_start, 0), axis=0, keepdims=True)
    beta = upright(beta_1C)

    L = jnp.where(col < row, beta * decay * product(k_CD, k_CD, ((1,), (1,))), 0)
    U = solve(L, beta * (v_CE.astype(dtype) - from_start * product(k_CD, S_DE, ((1,), (0,)))))
    scores = decay * product(q_CD, k_CD, ((1,), (1,)))
    o = from_start * product(q_CD, S_DE, ((1,), (0,))) + product(scores, U, ((1,), (0,)))
    return scale * o, through * S_DE + product(k_CD.astype(dtype) * to_end, U, ((0,), (0,)))


@jax.custom_vjp
def solve(L, R):
    """U of (I + L) U = R, L strictly lower."""
    return _solve_forward(L, R)[0]


def _solve_forward(L, R):
    T = inverse(L)
    U = _matmul(T, R, ((1,), (0,)))
    return U, (T, U)


def _solve_backward(kept, dU):
    T, U = kept
    dR = _matmul(T, dU, ((0,), (0,)))
    return -_matmul(dR, U, ((1,), (1,))), dR


solve.defvjp(_solve_forward, _solve_backward)


def inverse(L):
    """(I + L)^-1 for L [C, C] strictly lower, by blocks of 1, 2, 4 ... joined in pairs."""
    C = L.shape[0]
    row, col = (lax.broadcasted_iota(jnp.int32, (C, C), axis) for axis in (0, 1))
    T = jnp.where(row == col, 1.0, 0.0).astype(L.dtype)
    level = 0
    while 1 << level < C:
        pair = (row >> (level + 1) == col >> (level + 1)) & (row >> level != col >> level)
        between = jnp.where(pair, L, 0)
        T = T - (_matmul(T, _matmul(between, T, ((1,), (0,))), ((1,), (0,))) if level else between)
        level += 1
    return T


def _matmul(a, b, contract):
    return lax.dot_general(
        a, b, (contract, ((), ())), precision=lax.Precision.HIGHEST, preferred_element_type=a.dtype
    )
