"""The solver: closed-form profiles over an exponent grid, then damped Newton, for many row weights at once.

For given exponents a sum of power terms is linear, so its best coefficients have a closed form
(variable projection, Golub and Pereyra 1973). Profiles over a grid of exponents give starts that
no bad guess can starve; Newton with the exact Hessian finishes them. The damping matrix is the
positive majoriser of the objective (iteratively reweighted least squares), so that large damping
is a robust majorise-minimise step and small damping is Newton. A solver's own success is never
the verdict: ``judge`` looks at the scaled gradient, the other starts, the bounds and the rank.
"""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np

from fits.errors import FitError
from fits.laws import EXPONENT_BOUNDS, Law
from fits.objective import NARROWED, Evaluation, PowerSumProblem, Problem, RowLoss, make_problem
from fits.rowweights import check_loss, check_weights, excess_scatter, weighted_median

MAX_ITERATIONS = 200
# The Newton decrement (the decrease that the quadratic model still promises) over the objective.
# Sums of a few hundred terms are exact to about 1e-15, so 1e-13 is as small as can be verified.
DECREMENT = 1e-13
LAD_WIDTHS = tuple(10.0**-k for k in range(2, 11))  # |r| is smoothed over ever narrower widths
# Two starts agree when their objectives differ by less than this share and no exponent by more.
SAME_OBJECTIVE, SAME_COORDINATE = 1e-6, 1e-4
# Newton is exact to far less than this, so equal objectives this far apart mean a flat valley.
SAME_MINIMUM, DIFFERENT = 1e-9, 1e-2
RANK_FLOOR = 1e-11  # eigenvalue of the correlation matrix of J; float64 squares lose the rest


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


@dataclasses.dataclass
class PointFit:
    """One fit and the verdict on it. ``p_K`` are solver coordinates, ``params`` the law's own.

    ``delta`` is the Huber width used, in the unit of the residual; ``weights_R`` the row weights used, and
    ``excess`` the scatter (a standard deviation) that was added to the rows' standard errors.
    """

    params: dict[str, float]
    p_K: np.ndarray
    objective: float
    status: str
    reasons: list[str]
    starts: int
    agreeing: int
    scaled_gradient: float
    condition: float
    at_bound: list[str]
    iterations: int
    delta: float | None = None
    excess: float | None = None
    weights_R: np.ndarray | None = None


def cholesky_solve(A_BxKxK: np.ndarray, b_BxK: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Solves small symmetric systems lane by lane; returns x_BxK and whether A was positive definite.

    Elimination without pivoting (the LDL' form of Cholesky), with lanes last so that each step is a few
    operations on contiguous rows of all lanes. A is positive definite where all pivots are positive.
    """
    K, shape = A_BxKxK.shape[-1], b_BxK.shape
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


def _newton_step(problem: Problem, p_BxK, at: Evaluation, damping_B):
    """A damped step inside the bounds: (step, promised decrease, system was positive, held at a bound)."""
    lower, upper = problem.lower_K, problem.upper_K
    held = (
        ((p_BxK <= lower) & (at.gradient_BxK > 0))
        | ((p_BxK >= upper) & (at.gradient_BxK < 0))
        | ~problem.free_K
    )
    gradient = np.where(held, 0.0, at.gradient_BxK)
    system = at.hessian_BxKxK + damping_B[:, None, None] * at.majoriser_BxKxK
    every = np.arange(p_BxK.shape[1])
    diagonal = at.majoriser_BxKxK[:, every, every]
    scale = np.sqrt(np.where((diagonal > 0) & ~held, diagonal, 1.0))
    system /= scale[:, :, None] * scale[:, None, :]
    if held.any():
        system = np.where(held[:, :, None] | held[:, None, :], 0.0, system)
    system[:, every, every] += np.where(held, 1.0, 1e-13 + 1e-3 * damping_B[:, None])
    with np.errstate(all="ignore"):  # where the system is singular the step is thrown away
        step, good = cholesky_solve(system, -gradient / scale)
        step = np.where(held, 0.0, step / scale)
        return step, -0.5 * (gradient * step).sum(1), good, held


def newton(problem: Problem, p_BxK: np.ndarray, weights_BxR: np.ndarray, row_loss: RowLoss) -> Solution:
    """Minimises every lane by damped Newton inside the bounds; finished lanes stop costing.

    Args:
      p_BxK: starts. weights_BxR: row weights, one row of them a lane.
    """
    p = np.clip(np.array(p_BxK, float), problem.lower_K, problem.upper_K)
    B, K = p.shape
    at = problem.evaluate(p, weights_BxR, row_loss)
    out = Solution(p, at.value_B, np.full(B, np.inf), np.zeros(B, bool), np.zeros((B, K), bool), at, 0)
    # the objective that rounding alone leaves on a perfect fit
    unit = 4.0 * np.finfo(float).eps * max(1.0, float(np.abs(problem.target_R).max()))
    floor = weights_BxR.sum(1) * row_loss.value(np.array(unit))
    nonlinear = _nonlinear(problem)
    # what follows is held for the live lanes only
    live = np.flatnonzero(np.isfinite(at.value_B))
    p, at, weights, floor = p[live], at.take(live), weights_BxR[live], floor[live]
    damping, small_count = np.full(len(live), 0.3), np.zeros(len(live), int)
    while len(live):
        out.iterations += 1
        step, promised, good, held = _newton_step(problem, p, at, damping)
        # exponents move at most 0.5 a step: the quadratic model knows nothing further away
        step = np.where(good[:, None] & np.isfinite(step), step, 0.0)
        limit = np.abs(step[:, nonlinear]).max(1, initial=0.0)
        step = step * np.minimum(1.0, 0.5 / np.maximum(limit, 1e-300))[:, None]
        trial_p = np.clip(p + step, problem.lower_K, problem.upper_K)
        trial = problem.evaluate(trial_p, weights, row_loss)
        # below this much the objective cannot tell a better point from rounding
        noise = DECREMENT * at.value_B + floor
        small = good & (promised <= noise)
        better = good & (trial.value_B <= at.value_B + np.where(small, noise, 0.0))
        with np.errstate(all="ignore"):  # an infinite trial is no gain, and a lane at zero has none to make
            gain = (at.value_B - trial.value_B) / np.maximum(promised, 1e-300)
        p = np.where(better[:, None], trial_p, p)
        at = trial.where(better, at)
        converged = small & (damping == 0.0)
        small_count += small
        # slowly while the model is poor, then at once to Newton
        calmer = np.where(gain > 0.5, np.where(damping < 3e-2, 0.05, 0.35), 1.0) * damping
        wilder = np.maximum(damping, 1e-2) * 8.0
        # a small promise under damping says nothing: ask the undamped system
        damping = np.where(small, 0.0, np.where(better, calmer, wilder))
        damping = np.where(damping < 1e-6, 0.0, damping)
        going = ~converged & (damping < 1e12) & (small_count < 5)
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


def _is_coefficient(problem: Problem) -> np.ndarray:
    linear = np.ones(len(problem.law.parameters), bool)
    linear[_nonlinear(problem)] = False
    return linear


def _nonlinear(problem: Problem) -> np.ndarray:
    K = len(problem.law.parameters)
    if not isinstance(problem, PowerSumProblem):
        return np.arange(K)
    return np.arange(len(problem.law.terms), K)


def minimise(problem: Problem, p_BxK, weights_BxR, loss: str, delta: float, tau: float = 0.5) -> Solution:
    """``newton`` for the named loss; lad and quantile are reached through Huber losses of vanishing width."""
    if loss not in NARROWED:
        return newton(problem, p_BxK, weights_BxR, RowLoss(loss, delta, tau))
    for width in LAD_WIDTHS:
        solution = newton(problem, p_BxK, weights_BxR, RowLoss(loss, width, tau))
        p_BxK = solution.p_BxK
    residual = problem.residuals(p_BxK)
    exact = RowLoss(loss, width, tau).exact(residual)
    return dataclasses.replace(solution, value_B=(weights_BxR * exact).sum(1))


def exponent_grid(problem: PowerSumProblem, per_axis: int) -> np.ndarray:
    """All combinations of exponents to profile, [G, exponents]; a fixed exponent has its one value."""
    axes = []
    for name in problem.exponents:
        low, high = problem.bounds[name]
        span = np.geomspace(max(low, 0.04), min(high, 1.5), per_axis) if low < 1.5 else np.array([low])
        axes.append(np.array([problem.fixed[name]]) if name in problem.fixed else span)
    return np.array(list(itertools.product(*axes)))


def profile(problem: PowerSumProblem, weights_BxR, grid_GxE, robust_R=None) -> tuple[np.ndarray, np.ndarray]:
    """Best coefficients at each grid point by weighted least squares, in closed form, for every lane.

    Residuals are relative to the observed loss where the fit is in log space.

    Returns:
      rss_BxG (inf where no coefficients within bounds exist) and p_BxGxK.
    """
    law, y = problem.law, problem.y_R
    B, G, R, T = len(weights_BxR), len(grid_GxE), len(y), len(law.terms)
    p_GxK = np.concatenate([np.ones((G, T)), grid_GxE], 1)
    row_scale = 1.0 / y if problem.space == "log" else np.full(R, 1.0 / y.mean())
    features = np.stack([np.ones((G, R)) if f is None else f for f in problem._terms(p_GxK)], 1) * row_scale
    rest = np.broadcast_to(y * row_scale, (G, R)).copy()
    loose = [i for i, t in enumerate(law.terms) if t.coefficient not in problem.fixed]
    for i in set(range(T)) - set(loose):
        rest -= problem.fixed[law.terms[i].coefficient] * features[:, i]
    columns = np.concatenate([features[:, loose], rest[:, None]], 1)
    n = len(loose)
    weights = weights_BxR if robust_R is None else weights_BxR * robust_R
    gram = np.zeros((B, G, n + 1, n + 1))
    if B == 1:
        gram[0] = (columns * weights[0]) @ columns.transpose(0, 2, 1)
    else:
        pairs = [(i, j) for i in range(n + 1) for j in range(i, n + 1)]
        products = np.stack([columns[:, i] * columns[:, j] for i, j in pairs], 1).reshape(G * len(pairs), R)
        sums = (weights @ products.T).reshape(B, G, len(pairs))
        for k, (i, j) in enumerate(pairs):
            gram[..., i, j] = gram[..., j, i] = sums[..., k]
    lower = problem.lower_K[loose]
    with np.errstate(all="ignore"):  # a system without a solution has no finite one, and loses
        best, rss = _bounded_least_squares(gram, n, lower, [law.terms[i].powers == {} for i in loose])
    p = np.broadcast_to(p_GxK, (B, G, p_GxK.shape[1])).copy()
    for i in set(range(T)) - set(loose):
        p[..., i] = problem.fixed[law.terms[i].coefficient]
    p[..., loose] = best
    return rss, p


def _bounded_least_squares(gram, n, lower_n, constant_n):
    """All coefficients free where that respects the bounds, else the constant term at its bound."""
    A, b, yy = gram[..., :n, :n], gram[..., :n, n], gram[..., n, n]
    best, good = cholesky_solve(A + 1e-13 * np.einsum("...kk->...k", A)[..., None] * np.eye(n), b)
    good = good & (best >= lower_n).all(-1)
    rss = np.where(good, yy - (b * best).sum(-1), np.inf)
    for i in np.flatnonzero(constant_n):
        others = [j for j in range(n) if j != i]
        if not others or not np.isfinite(lower_n[i]):
            continue
        without = A[..., others, :][..., others]
        rhs = b[..., others] - lower_n[i] * A[..., others, i]
        x, fine = cholesky_solve(without, rhs)
        fine = fine & (x >= lower_n[others]).all(-1)
        full = np.zeros_like(best)
        full[..., others], full[..., i] = x, lower_n[i]
        fit = yy - 2 * (b * full).sum(-1) + np.einsum("...i,...ij,...j->...", full, A, full)
        take = fine & ~np.isfinite(rss) & np.isfinite(fit)
        rss, best = np.where(take, fit, rss), np.where(take[..., None], full, best)
    typical = np.sqrt(np.maximum(yy, 0) / np.maximum(np.einsum("...kk->...", A), 1e-300))[..., None]
    return np.where(np.isfinite(rss)[..., None], best, np.maximum(best, 0.1 * typical)), np.maximum(rss, 0.0)


def point_starts(problem: Problem, weights_R: np.ndarray, count: int, per_axis: int = 12) -> np.ndarray:
    """Independent starts [S, K]: the best point of the profile, then good ones far from those taken."""
    if not isinstance(problem, PowerSumProblem):
        x = {v: np.exp(z) for v, z in problem.log_x.items()}
        starts = problem.law.starts(x, problem.y_R)
        with np.errstate(divide="ignore"):  # a parameter fixed at 0 has no logarithm; its bounds do
            p = np.concatenate([problem.from_params({**s, **problem.fixed}) for s in starts])
        p = np.clip(p, problem.lower_K, problem.upper_K)
        with np.errstate(all="ignore"):
            cost = np.nan_to_num((weights_R * np.abs(problem.residuals(p))).sum(1), nan=np.inf)
        return p[np.argsort(cost, kind="stable")[:count]]
    grid = exponent_grid(problem, per_axis if len(problem.exponents) < 3 else 7)
    rss, p = profile(problem, weights_R[None], grid)
    rss, p = rss[0], p[0]
    order = np.argsort(rss, kind="stable")
    order = order[np.isfinite(rss[order])] if np.isfinite(rss).any() else order
    return p[_far_apart(np.log(grid[order]), order, count)]


def _far_apart(log_grid, order, count: int) -> list[int]:
    """The first of ``order``, then the next ones that lie far from all taken, ever less far till enough."""
    chosen: list[int] = []
    nearest = np.full(len(order), np.inf)
    spread = 0.25 * np.ptp(log_grid, axis=0).max()
    for least in (spread, spread / 2, spread / 4, 0.0):
        while len(chosen) < min(count, len(order)):
            far = (nearest >= least) & (nearest >= 0)
            if not far.any():
                break
            k = int(np.argmax(far))
            chosen.append(int(order[k]))
            nearest = np.minimum(nearest, np.abs(log_grid - log_grid[k]).max(1))
            nearest[k] = -1.0
    return chosen


def solve(
    law: Law, x, y, *, loss="huber", delta=1e-3, delta_unit="absolute", tau=0.5, space="log", weights=None,
    stderr=None, fixed=None, bounds=None, starts=12,
) -> tuple[Problem, PointFit]:  # fmt: skip
    """Fits a law to rows and judges the result.

    Args:
      x: natural log of each variable of the law, float64 [R] each. y: loss, [R].
      loss: "huber", "lad", "least_squares", "quantile" or "expectile"; always summed over rows.
      delta: Huber's width, in the unit of the residual, or (``delta_unit="scale"``) in robust standard
        deviations: 1.4826 times the median absolute residual of one lad fit of the same rows.
      tau: for quantile and expectile: near 1 the surface runs above most losses, near 0 below them.
      space: residuals of "log" or "raw" loss.
      weights: a weight per row, default 1; two is the same as the row twice.
      stderr: standard error of each loss, [R], in the unit of the loss. Rows are weighted by
        1 / (s^2 + excess^2), scaled to mean 1, with s in the unit of the residual and the excess from
        ``rowweights.excess_scatter``, so that evaluation error alone never decides. The weights
        multiply any ``weights``; a Huber width keeps its meaning, since residuals are not divided by s.

    Raises:
      FitError: an unknown loss, unit or space, a bad delta, tau, weight or standard error, or fewer rows
        than free parameters.
    """
    check_loss(loss, delta, delta_unit, tau)
    problem = make_problem(law, x, y, space, fixed, bounds)
    free = int(problem.free_K.sum())
    weights_R = check_weights(weights, len(problem.y_R), "weights")
    if (weights_R > 0).sum() < free:
        usable = "usable rows" if weights is None else "usable rows of positive weight"
        raise FitError(
            f"the table has {(weights_R > 0).sum()} {usable}; {law.name} has {free} free parameters "
            "and needs at least as many rows"
        )
    excess = None
    if stderr is not None:
        s_R = check_weights(stderr, len(problem.y_R), "stderr") / (problem.y_R if space == "log" else 1.0)
        rough = _search(problem, weights_R, "lad", 1.0, 0.5, starts)
        excess = excess_scatter(problem.residuals(rough.p_K[None])[0], s_R, free)
        width_R = np.hypot(s_R, excess)
        inverse = (width_R.min() / width_R) ** 2  # over its largest, so that none overflows
        weights_R = weights_R * inverse / inverse.mean()
    if loss == "huber" and delta_unit == "scale":
        rough = _search(problem, weights_R, "lad", 1.0, 0.5, starts)
        scale = 1.4826 * weighted_median(np.abs(problem.residuals(rough.p_K[None])[0]), weights_R)
        delta = delta * max(scale, rounding_unit(problem))  # a perfect fit has no scale
    point = _search(problem, weights_R, loss, float(delta), float(tau), starts)
    point.delta = float(delta) if loss == "huber" else None
    point.excess, point.weights_R = excess, weights_R
    return problem, point


def _search(problem: Problem, weights_R, loss: str, delta: float, tau: float, starts: int) -> PointFit:
    """The judged best of independent starts."""
    for count in (starts, 3 * starts):  # a lowest point that one start alone has found wants a second look
        p_SxK = point_starts(problem, weights_R, count)
        weights_SxR = np.broadcast_to(weights_R, (len(p_SxK), len(weights_R)))
        solution = minimise(problem, p_SxK, weights_SxR, loss, delta, tau)
        point = judge(problem, solution, RowLoss(loss, delta, tau), weights_R)
        if point.agreeing > 1 or point.starts < count:
            break
    return point


def judge(problem: Problem, solution: Solution, row_loss: RowLoss, weights_R) -> PointFit:
    """The best start and its status: converged, boundary, not identified or unconverged, with reasons."""
    value = np.where(np.isnan(solution.value_B), np.inf, solution.value_B)
    best = int(np.argmin(value))
    names, p = problem.law.parameters, solution.p_BxK[best]
    params = {k: float(v[0]) for k, v in problem.to_params(p[None]).items()}
    same = (value <= value[best] * (1 + SAME_OBJECTIVE) + _rounding(problem, row_loss, weights_R)) & (
        np.abs(solution.p_BxK - p).max(1) <= SAME_COORDINATE * np.maximum(1.0, np.abs(p).max())
    )
    free = problem.free_K
    near = 1e-9 * np.where(_is_coefficient(problem), problem.y_R.mean(), 1.0)
    bound = free & ((p <= problem.lower_K + near) | (p >= problem.upper_K - near))
    # over parameters at a bound too: a bound must not hide that the rows cannot tell
    condition, weakest = _conditioning(problem, p, weights_R, free)
    twin = _twin(problem, solution, best)
    scaled_gradient = float(np.sqrt(max(solution.decrement_B[best], 0.0) / max(value[best], 1e-300)))
    reasons, status = [], "converged"
    at_bound = [names[i] for i in np.flatnonzero(bound)]
    if not np.isfinite(value[best]) or not solution.converged_B[best]:
        status = "unconverged"
        reasons.append(f"Newton stopped after {solution.iterations} steps without reaching a minimum")
    elif condition > 1 / RANK_FLOOR:
        status = "not identified"
        reasons.append(f"the rows do not tell {' and '.join(weakest)} apart")
    elif twin is not None:
        status = "not identified"
        reasons.append(f"different parameters fit equally well: {twin}")
    elif at_bound:
        status = "boundary"
        for i in np.flatnonzero(bound):
            end = problem.bounds[names[i]][int(p[i] - problem.lower_K[i] > problem.upper_K[i] - p[i])]
            reasons.append(f"{names[i]} ended at its bound, {end:g}")
    agreeing = int(same.sum())
    if status in ("converged", "boundary") and agreeing < 2 <= len(value) // 2:
        status = "unconverged"
        reasons.append(f"only one of {len(value)} independent starts reaches the lowest objective")
    elif status != "unconverged":
        reasons.append(f"{agreeing} of {len(value)} independent starts reach this optimum; none goes lower")
    return PointFit(
        params, p, float(value[best]), status, reasons, len(value), agreeing, scaled_gradient, condition,
        at_bound, solution.iterations,
    )  # fmt: skip


def _twin(problem: Problem, solution: Solution, best: int) -> str | None:
    """Where another start converged to the very same objective at other parameters, the widest such range."""
    value, p = solution.value_B, solution.p_BxK
    equal = solution.converged_B & (value <= value[best] * (1 + SAME_MINIMUM))
    # coordinates of other laws are logs, whose differences are relative already
    scale = 1.0
    if isinstance(
        problem, PowerSumProblem
    ):  # a coefficient far below every loss is zero, whatever its digits
        least = np.where(_is_coefficient(problem), 1e-6 * problem.y_R.mean(), 1e-300)
        scale = np.maximum(least, np.abs(p[best]))
    apart = np.ptp(p[equal], axis=0) / scale if equal.any() else np.zeros(1)
    if not apart.max() > DIFFERENT:
        return None
    at = int(np.argmax(apart))
    found = problem.to_params(p[equal])[problem.law.parameters[at]]
    return f"{problem.law.parameters[at]} from {found.min():.4g} to {found.max():.4g}"


def rounding_unit(problem: Problem) -> float:
    """A residual of a few units in the last place."""
    return 64.0 * np.finfo(float).eps * max(1.0, float(np.abs(problem.target_R).max()))


def _rounding(problem: Problem, row_loss: RowLoss, weights_R) -> float:
    """The objective of residuals of a few units in the last place: below it all fits are perfect."""
    return float(weights_R.sum() * row_loss.exact(np.array(rounding_unit(problem))))


def _conditioning(problem: Problem, p_K, weights_R, free_K) -> tuple[float, list[str]]:
    """Condition number of the column-scaled J'J over free parameters, and those in its weakest direction."""
    at = problem.evaluate(p_K[None], weights_R[None], RowLoss("least_squares", 1.0))
    matrix = at.majoriser_BxKxK[0][np.ix_(free_K, free_K)]
    names = [n for n, f in zip(problem.law.parameters, free_K, strict=True) if f]
    if not len(names):
        return 1.0, []
    diagonal = np.sqrt(np.diag(matrix))
    if not np.isfinite(matrix).all() or not (diagonal > 0).all():
        return np.inf, [n for n, d in zip(names, diagonal, strict=True) if not d > 0] or names
    values, vectors = np.linalg.eigh(matrix / np.outer(diagonal, diagonal))
    weak = np.abs(vectors[:, 0])
    named = [n for n, w in zip(names, weak, strict=True) if w > 0.3 * weak.max()]
    return (np.inf if values[0] <= 0 else float(values[-1] / values[0])), named


__all__ = [
    "EXPONENT_BOUNDS",
    "PointFit",
    "Solution",
    "minimise",
    "newton",
    "point_starts",
    "profile",
    "solve",
]
