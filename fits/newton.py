"""Damped Newton inside bounds, for many row weights at once: the rule of a step, and the loop in NumPy.

The damping matrix is the positive majoriser of the objective (iteratively reweighted least squares), so
that large damping is a robust majorise-minimise step and small damping is Newton. ``compiled`` runs the
same rule as one XLA program, for laws that are fitted again and again.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from fits.objective import Evaluation, PowerSumProblem, Problem, RowLoss

MAX_ITERATIONS = 200
# The Newton decrement (the decrease that the quadratic model still promises) over the objective.
# Sums of a few hundred terms are exact to about 1e-15, so 1e-13 is as small as can be verified.
DECREMENT = 1e-13
FIRST_DAMPING, MOST_DAMPING = 0.3, 1e12
LONGEST_MOVE = 0.5  # of an exponent in a step: the quadratic model knows nothing further away
FEW_VALUES = 128  # of right-hand sides: up to here LAPACK's calls cost less than elimination over lanes
SMALL_STEPS = 5  # a lane whose promises stay below rounding has nowhere to go


@dataclasses.dataclass
class Solution:
    """Where Newton ended, per lane: p_BxK, value_B, converged_B, at_bound_BxK and the last evaluation."""

    p_BxK: np.ndarray
    value_B: np.ndarray
    decrement_B: np.ndarray
    converged_B: np.ndarray
    at_bound_BxK: np.ndarray
    evaluation: Evaluation
    iterations: int


def cholesky_solve(A_BxKxK: np.ndarray, b_BxK: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Solves small symmetric systems lane by lane; returns x_BxK and whether A was positive definite.

    Elimination without pivoting (the LDL' form of Cholesky), with lanes last so that each step is a few
    operations on contiguous rows of all lanes. A is positive definite where all pivots are positive.
    """
    K, shape = A_BxKxK.shape[-1], b_BxK.shape
    if K > 1 and b_BxK.size <= FEW_VALUES:
        try:  # quicker for a few lanes; it refuses all where one is not positive definite
            np.linalg.cholesky(A_BxKxK)
            x = np.linalg.solve(A_BxKxK, b_BxK[..., None])[..., 0]
            return x, np.isfinite(x).all(-1)
        except np.linalg.LinAlgError:
            pass
    both = np.concatenate([A_BxKxK, b_BxK[..., None]], -1).reshape(-1, K, K + 1)
    rest = np.ascontiguousarray(both.transpose(1, 2, 0))
    every = np.arange(K)
    floor = 1e-14 * np.abs(rest[every, every])
    x = np.empty((K, rest.shape[2]))
    with np.errstate(all="ignore"):
        for j in range(K - 1):
            rest[j + 1 :, j + 1 :] -= (rest[j + 1 :, j] / rest[j, j])[:, None] * rest[j, j + 1 :]
        for i in reversed(range(K)):
            known = (rest[i, i + 1 : K] * x[i + 1 :]).sum(0) if i + 1 < K else 0.0
            x[i] = (rest[i, K] - known) / rest[i, i]
    good = (rest[every, every] > floor).all(0) & np.isfinite(x).all(0)
    return np.ascontiguousarray(x.T).reshape(shape), good.reshape(shape[:-1])


def newton_step(p_BxK, at: Evaluation, damping_B, bounds, linear=cholesky_solve, xp=np):
    """A damped step inside the bounds: (step, promised decrease, system was positive, held at a bound).

    Args:
      bounds: lower_K, upper_K, free_K and nonlinear_K, the coordinates whose moves are limited.
      linear: ``linear(A_BxKxK, b_BxK)`` gives the solution and whether A was positive definite.
    """
    lower, upper, free_K, nonlinear_K = bounds
    held = ((p_BxK <= lower) & (at.gradient_BxK > 0)) | ((p_BxK >= upper) & (at.gradient_BxK < 0)) | ~free_K
    gradient = xp.where(held, 0.0, at.gradient_BxK)
    system = at.hessian_BxKxK + damping_B[:, None, None] * at.majoriser_BxKxK
    diagonal = xp.einsum("bkk->bk", at.majoriser_BxKxK)
    scale = xp.sqrt(xp.where((diagonal > 0) & ~held, diagonal, 1.0))
    system = system / (scale[:, :, None] * scale[:, None, :])
    system = xp.where(held[:, :, None] | held[:, None, :], 0.0, system)
    ridge = xp.where(held, 1.0, 1e-13 + 1e-3 * damping_B[:, None])
    step, good = linear(system + ridge[:, :, None] * xp.eye(p_BxK.shape[1]), -gradient / scale)
    step = xp.where(held, 0.0, step / scale)
    promised = -0.5 * (gradient * step).sum(1)
    step = xp.where(good[:, None] & xp.isfinite(step), step, 0.0)
    longest = xp.where(nonlinear_K, xp.abs(step), 0.0).max(1)
    return step * xp.minimum(1.0, LONGEST_MOVE / xp.maximum(longest, 1e-300))[:, None], promised, good, held


def judge_step(value_B, trial_B, promised_B, good_B, damping_B, floor_B, xp=np):
    """What becomes of a step: (taken, promise below rounding, converged, next damping), arrays [B]."""
    # below this much the objective cannot tell a better point from rounding
    noise = DECREMENT * value_B + floor_B
    small = good_B & (promised_B <= noise)
    better = good_B & (trial_B <= value_B + xp.where(small, noise, 0.0))
    gain = (value_B - trial_B) / xp.maximum(promised_B, 1e-300)
    # slowly while the model is poor, then at once to Newton
    calmer = xp.where(gain > 0.5, xp.where(damping_B < 3e-2, 0.05, 0.35), 1.0) * damping_B
    wilder = xp.maximum(damping_B, 1e-2) * 8.0
    # a small promise under damping says nothing: ask the undamped system
    damping = xp.where(small, 0.0, xp.where(better, calmer, wilder))
    return better, small, small & (damping_B == 0.0), xp.where(damping < 1e-6, 0.0, damping)


def rounding_floor(problem: Problem, weights_BxR, row_loss: RowLoss) -> np.ndarray:
    """The objective that rounding alone leaves on a perfect fit, [B]."""
    unit = 4.0 * np.finfo(float).eps * max(1.0, float(np.abs(problem.target_R).max()))
    return weights_BxR.sum(1) * row_loss.value(np.array(unit))


def bounds_of(problem: Problem):
    """What ``newton_step`` takes as bounds."""
    moving = np.zeros(len(problem.law.parameters), bool)
    moving[nonlinear(problem)] = True
    return problem.lower_K, problem.upper_K, problem.free_K, moving


def newton(problem: Problem, p_BxK: np.ndarray, weights_BxR: np.ndarray, row_loss: RowLoss) -> Solution:
    """Minimises every lane by damped Newton inside the bounds; finished lanes stop costing.

    Args:
      p_BxK: starts. weights_BxR: row weights, one row of them a lane.
    """
    p = np.clip(np.array(p_BxK, float), problem.lower_K, problem.upper_K)
    B, K = p.shape
    at = problem.evaluate(p, weights_BxR, row_loss)
    out = Solution(p, at.value_B, np.full(B, np.inf), np.zeros(B, bool), np.zeros((B, K), bool), at, 0)
    floor = rounding_floor(problem, weights_BxR, row_loss)
    bounds = bounds_of(problem)
    # what follows is held for the live lanes only
    live = np.flatnonzero(np.isfinite(at.value_B))
    p, at, weights, floor = p[live], at.take(live), weights_BxR[live], floor[live]
    damping, small_count = np.full(len(live), FIRST_DAMPING), np.zeros(len(live), int)
    while len(live):
        out.iterations += 1
        # where a system is singular its step is thrown away; an infinite trial is no gain
        with np.errstate(all="ignore"):
            step, promised, good, held = newton_step(p, at, damping, bounds)
            trial_p = np.clip(p + step, problem.lower_K, problem.upper_K)
            trial = problem.evaluate(trial_p, weights, row_loss)
            better, small, converged, damping = judge_step(
                at.value_B, trial.value_B, promised, good, damping, floor
            )
        p = np.where(better[:, None], trial_p, p)
        at = trial.where(better, at)
        small_count += small
        going = ~converged & (damping < MOST_DAMPING) & (small_count < SMALL_STEPS)
        going &= out.iterations < MAX_ITERATIONS
        if not going.all():
            done = ~going
            lanes = live[done]
            out.p_BxK[lanes], out.at_bound_BxK[lanes] = p[done], held[done]
            out.decrement_B[lanes] = np.where(good, promised, np.inf)[done]
            out.converged_B[lanes] = converged[done]
            out.evaluation.put(lanes, at.take(done))
            live, p, at, floor = live[going], p[going], at.take(going), floor[going]
            weights, damping, small_count = weights[going], damping[going], small_count[going]
    return out


def nonlinear(problem: Problem) -> np.ndarray:
    K = len(problem.law.parameters)
    if not isinstance(problem, PowerSumProblem):
        return np.arange(K)
    return np.arange(len(problem.law.terms), K)
