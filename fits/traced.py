"""The objective of one lane for JAX to trace: by autodiff for any law, written out for sums of powers.

A lane function is called as ``lane(p_K, weights_R, data, target_R, space, row_loss)`` and returns value,
gradient, Hessian and majoriser. Equal lane functions share a compilation, whatever the table.
"""

from __future__ import annotations

import dataclasses
import functools

import numpy as np

from fits.laws import Law
from fits.rowloss import Evaluation, RowLoss

ROWS = 64  # rows are padded to a power of two, at least this, by rows of no weight


def coordinates(law: Law, plain: bool):
    """``to_solver`` and ``from_solver``: the law's own, or plain ones with one parameter in each."""
    if plain:
        return functools.partial(Law.to_solver, law), functools.partial(Law.from_solver, law)
    return law.to_solver, law.from_solver


@dataclasses.dataclass(frozen=True)
class LawLane:
    """Any law, by autodiff. Data: log of each variable [R], and their means."""

    law: Law
    plain: bool

    def __call__(self, p_K, weights_R, data, target_R, space: str, row_loss: RowLoss):
        import jax
        import jax.numpy as jnp

        log_x, centre = data

        def fitted(q_K):
            params = coordinates(self.law, self.plain)[1](list(q_K), centre, jnp)
            predicted = self.law.predict(params, {v: jnp.exp(z) for v, z in log_x.items()}, jnp)
            predicted = jnp.broadcast_to(predicted, target_R.shape)
            return jnp.log(predicted) if space == "log" else predicted

        J_RxK = jax.jacfwd(fitted)(p_K)
        residual = fitted(p_K) - target_R
        first, second, robust = (weights_R * d for d in row_loss.derivatives(residual, jnp))
        curvature = jax.hessian(lambda q_K: first @ fitted(q_K))(p_K)
        value = (weights_R * row_loss.value(residual, jnp)).sum()
        hessian = (J_RxK * second[:, None]).T @ J_RxK + curvature
        return value, first @ J_RxK, hessian, (J_RxK * robust[:, None]).T @ J_RxK


@dataclasses.dataclass(frozen=True)
class PowersLane:
    """Every sum of power terms. Data: minus the slope of each term's log in each exponent, [T, E, R]."""

    def __call__(self, p_K, weights_R, data, target_R, space: str, row_loss: RowLoss):
        import jax.numpy as jnp

        T = len(data)
        powers_TxR = jnp.exp(-jnp.einsum("e,ter->tr", p_K[T:], data))
        value_TxR = p_K[:T, None] * powers_TxR
        predicted = value_TxR.sum(0)
        J_KxR = jnp.concatenate([powers_TxR, -(data * value_TxR[:, None]).sum(0)])
        residual = (jnp.log(predicted) if space == "log" else predicted) - target_R
        value = (weights_R * row_loss.value(residual, jnp)).sum()
        first, second, robust = (weights_R * d for d in row_loss.derivatives(residual, jnp))
        if space == "log":
            inverse = 1.0 / predicted
            first = first * inverse
            robust = robust * inverse * inverse
            second = (second * inverse - first) * inverse
        slope_TxR = first * powers_TxR
        cross_TxE = -(slope_TxR[:, None] * data).sum(2)
        bend_TxExE = (slope_TxR[:, None, None] * data[:, :, None] * data[:, None]).sum(3)
        bend_ExE = (p_K[:T, None, None] * bend_TxExE).sum(0)
        curvature = jnp.block([[jnp.zeros((T, T)), cross_TxE], [cross_TxE.T, bend_ExE]])
        hessian = (J_KxR * second) @ J_KxR.T + curvature
        return value, J_KxR @ first, hessian, (J_KxR * robust) @ J_KxR.T


def padded(problem, p_BxK, weights_BxR, lanes: int):
    """Starts, row weights, data and targets; lanes padded to ``lanes`` by repeats of the last.

    Returns:
      (lane function, p, weights, data, target_R).
    """
    B, R = len(p_BxK), len(problem.y_R)
    lanes = np.minimum(np.arange(lanes), B - 1)
    rows = np.minimum(np.arange(max(ROWS, 1 << (R - 1).bit_length())), R - 1)
    weights = np.where(np.arange(len(rows)) < R, np.asarray(weights_BxR, float)[lanes][:, rows], 0.0)
    lane, data = problem.traced(rows)
    return lane, np.asarray(p_BxK, float)[lanes], weights, data, problem.target_R[rows]


def evaluate(problem, p_BxK, weights_BxR, row_loss: RowLoss) -> Evaluation:
    """One evaluation of every lane, in float64 (locally: the rest of the process stays as it was)."""
    import jax

    few_shapes = max(8, 1 << (len(p_BxK) - 1).bit_length())  # so few compilations as lanes finish
    lane, p, weights, data, target_R = padded(problem, p_BxK, weights_BxR, few_shapes)
    compiled = _compiled(lane, problem.space, row_loss.name)
    with jax.enable_x64(True), jax.default_device(jax.devices("cpu")[0]):
        out = compiled(p, weights, data, target_R, float(row_loss.delta), float(row_loss.tau))
        value, gradient, hessian, majoriser = (np.array(a, np.float64)[: len(p_BxK)] for a in out)
    good = np.isfinite(value) & np.isfinite(gradient).all(1) & np.isfinite(hessian).all((1, 2))
    return Evaluation(np.where(good, value, np.inf), gradient, hessian, majoriser)


@functools.lru_cache(maxsize=64)
def _compiled(lane, space: str, loss: str):
    import jax

    def lanes(p_BxK, weights_BxR, data, target_R, delta, tau):
        row_loss = RowLoss(loss, delta, tau)
        return jax.vmap(lambda p, w: lane(p, w, data, target_R, space, row_loss))(p_BxK, weights_BxR)

    return jax.jit(lanes)
