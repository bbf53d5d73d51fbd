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
import functools
import itertools
from typing import NamedTuple

import numpy as np

from fits.errors import FitError
from fits.laws import EXPONENT_BOUNDS, Law
from fits.newton import Solution, cholesky_solve, newton, nonlinear
from fits.objective import NARROWED, PowerSumProblem, Problem, RowLoss, make_problem
from fits.rowweights import check_loss, check_weights, excess_scatter, weighted_median

LAD_WIDTHS = tuple(10.0**-k for k in range(2, 11))  # |r| is smoothed over ever narrower widths
# Two starts agree when their objectives differ by less than this share and no exponent by more.
SAME_OBJECTIVE, SAME_COORDINATE = 1e-6, 1e-4
# Newton is exact to far less than this, so equal objectives this far apart mean a flat valley.
SAME_MINIMUM, DIFFERENT = 1e-9, 1e-2
BACKENDS = ("numpy", "jax")
RANK_FLOOR = 1e-11  # eigenvalue of the correlation matrix of J; float64 squares lose the rest


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


def _is_coefficient(problem: Problem) -> np.ndarray:
    linear = np.ones(len(problem.law.parameters), bool)
    linear[nonlinear(problem)] = False
    return linear


def minimise(
    problem: Problem, p_BxK, weights_BxR, loss: str, delta: float, tau: float = 0.5, backend: str = "numpy"
) -> Solution:
    """Newton for the named loss; lad and quantile are reached through Huber losses of vanishing width."""
    newton = _newton_of(backend)
    if loss not in NARROWED:
        return newton(problem, p_BxK, weights_BxR, RowLoss(loss, delta, tau))
    for width in LAD_WIDTHS:
        solution = newton(problem, p_BxK, weights_BxR, RowLoss(loss, width, tau))
        p_BxK = solution.p_BxK
    residual = problem.residuals(p_BxK)
    exact = RowLoss(loss, width, tau).exact(residual)
    return dataclasses.replace(solution, value_B=(weights_BxR * exact).sum(1))


def _newton_of(backend: str):
    if backend not in BACKENDS:
        raise FitError(f"backend is {backend!r}; it must be one of {', '.join(BACKENDS)}")
    if backend == "numpy":
        return newton
    from fits import compiled  # JAX takes a second to import

    return compiled.newton


def exponent_grid(problem: PowerSumProblem, per_axis: int) -> np.ndarray:
    """All combinations of exponents to profile, [G, exponents]; a fixed exponent has its one value."""
    axes = []
    for name in problem.exponents:
        low, high = problem.bounds[name]
        span = (low,)
        if low < 1.5:
            span = (max(low, 0.04), min(high, 1.5), per_axis)
        axes.append((problem.fixed[name],) if name in problem.fixed else span)
    return _combinations(tuple(axes))


@functools.lru_cache(maxsize=64)
def _combinations(axes) -> np.ndarray:
    """Every choice of one value an axis; an axis is one value, or (low, high, count) evenly in the log."""
    values = [np.geomspace(*axis) if len(axis) == 3 else np.array(axis, float) for axis in axes]
    out = np.array(list(itertools.product(*values)))
    out.flags.writeable = False  # shared by all who ask
    return out


def profile(problem: PowerSumProblem, weights_BxR, grid_GxE, robust_R=None) -> tuple[np.ndarray, np.ndarray]:
    """Best coefficients at each grid point by weighted least squares, in closed form, for every lane.

    Residuals are relative to the observed loss where the fit is in log space.

    Returns:
      rss_BxG (inf where no coefficients within bounds exist) and p_BxGxK.
    """
    law = problem.law
    B, G, T = len(weights_BxR), len(grid_GxE), len(law.terms)
    p_GxK = np.concatenate([np.ones((G, T)), grid_GxE], 1)
    weights = weights_BxR if robust_R is None else weights_BxR * robust_R
    gram = _grid_gram(problem, grid_GxE, weights)
    loose = [i for i, t in enumerate(law.terms) if t.coefficient not in problem.fixed]
    n = len(loose)
    if n < T:  # what the terms with a fixed coefficient leave of the loss is to be fitted
        to_rest = np.zeros((n + 1, T + 1))
        to_rest[range(n), loose], to_rest[n, T] = 1.0, 1.0
        for i in set(range(T)) - set(loose):
            to_rest[n, i] = -problem.fixed[law.terms[i].coefficient]
        gram = to_rest @ gram @ to_rest.T
    lower = problem.lower_K[loose]
    with np.errstate(all="ignore"):  # a system without a solution has no finite one, and loses
        best, rss = _bounded_least_squares(gram, n, lower, [law.terms[i].powers == {} for i in loose])
    p = np.broadcast_to(p_GxK, (B, G, p_GxK.shape[1])).copy()
    for i in set(range(T)) - set(loose):
        p[..., i] = problem.fixed[law.terms[i].coefficient]
    p[..., loose] = best
    return rss, p


def _grid_gram(problem: PowerSumProblem, grid_GxE, weights_BxR) -> np.ndarray:
    """Weighted products of all terms and the loss, summed over rows, at each grid point: [B, G, T+1, T+1].

    A term takes few distinct exponents over the grid, so most products are shared by many grid points.
    """
    y, T = problem.y_R, len(problem.law.terms)
    row_scale = 1.0 / y if problem.space == "log" else np.full(len(y), 1.0 / y.mean())
    powers = tuple(tuple(e - T for e in z) for z in problem.z_term_exp_R)
    plan = _grid_plan(grid_GxE.tobytes(), grid_GxE.shape, powers)
    columns = []
    for values, z in zip(plan.values, problem.z_term_exp_R, strict=True):
        log_power = -(values @ np.stack(list(z.values()))) if z else np.zeros((1, len(y)))
        columns.append(np.exp(log_power) * row_scale)
    column_UxR = np.concatenate([*columns, (y * row_scale)[None]])
    sums_BxU = weights_BxR @ (column_UxR[plan.left] * column_UxR[plan.right]).T
    gram = np.empty((len(weights_BxR), len(grid_GxE), T + 1, T + 1))
    for (i, j), which_G in zip(plan.pairs, plan.which_PxG, strict=True):
        gram[..., i, j] = gram[..., j, i] = sums_BxU[:, which_G]
    return gram


class _GridPlan(NamedTuple):
    """Which products of which columns a grid needs. A column is a term at one choice of its exponents."""

    values: list[np.ndarray]  # per term: the distinct choices of its exponents over the grid
    left: np.ndarray  # of each distinct product, its two columns, counted over all terms; the loss is last
    right: np.ndarray
    pairs: list[tuple[int, int]]
    which_PxG: np.ndarray  # the product of each pair of terms at each grid point


@functools.lru_cache(maxsize=64)
def _grid_plan(grid: bytes, shape: tuple[int, int], powers: tuple[tuple[int, ...], ...]) -> _GridPlan:
    grid_GxE, T = np.frombuffer(grid).reshape(shape), len(powers)
    values, at_GxC, count = [], np.zeros((shape[0], T + 1), int), 0
    for i, exponents in enumerate(powers):
        distinct, which = np.unique(grid_GxE[:, list(exponents)], axis=0, return_inverse=True)
        values.append(distinct)
        at_GxC[:, i] = count + which.reshape(-1)
        count += len(distinct)
    at_GxC[:, T] = count
    pairs = [(i, j) for i in range(T + 1) for j in range(i, T + 1)]
    codes = np.stack([at_GxC[:, i] * (count + 1) + at_GxC[:, j] for i, j in pairs])
    products, which = np.unique(codes, return_inverse=True)
    left, right = np.divmod(products, count + 1)
    return _GridPlan(values, left, right, pairs, which.reshape(codes.shape))


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
    stderr=None, fixed=None, bounds=None, starts=12, backend="numpy",
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
      backend: "numpy", with nothing to compile, or "jax": seconds of compilation for the first table, then
        a third of the time, for thousands of point fits. They agree to 1e-10.

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
        rough = _search(problem, weights_R, "lad", 1.0, 0.5, starts, backend)
        excess = excess_scatter(problem.residuals(rough.p_K[None])[0], s_R, free)
        width_R = np.hypot(s_R, excess)
        inverse = (width_R.min() / width_R) ** 2  # over its largest, so that none overflows
        weights_R = weights_R * inverse / inverse.mean()
    if loss == "huber" and delta_unit == "scale":
        rough = _search(problem, weights_R, "lad", 1.0, 0.5, starts, backend)
        scale = 1.4826 * weighted_median(np.abs(problem.residuals(rough.p_K[None])[0]), weights_R)
        delta = delta * max(scale, rounding_unit(problem))  # a perfect fit has no scale
    point = _search(problem, weights_R, loss, float(delta), float(tau), starts, backend)
    point.delta = float(delta) if loss == "huber" else None
    point.excess, point.weights_R = excess, weights_R
    return problem, point


def _search(
    problem: Problem, weights_R, loss: str, delta: float, tau: float, starts: int, backend: str
) -> PointFit:
    """The judged best of independent starts."""
    for count in (starts, 3 * starts):  # a lowest point that one start alone has found wants a second look
        p_SxK = point_starts(problem, weights_R, count)
        weights_SxR = np.broadcast_to(weights_R, (len(p_SxK), len(weights_R)))
        solution = minimise(problem, p_SxK, weights_SxR, loss, delta, tau, backend)
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
