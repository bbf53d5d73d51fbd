"""Intervals that hold with few clusters: a linearised, leverage-corrected variance with its own freedom.

A bootstrap of six to fourteen sizes knows its own width badly, and worst for a quantity that one or two
of the sizes decide, such as the loss at the top of the grid. There the percentile interval covers too
little. The interval here is that of Bell and McCaffrey (2002): a cluster-robust variance, unbiased for
independent rows, and Student's t with degrees of freedom counted from each cluster's weight in the very
quantity. It is for least squares: Huber residuals far above their width are no sum of rows' errors.
benchmarks/coverage.py measures both.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from fits.errors import FitError
from fits.objective import Problem
from fits.uncertainty import intraclass

STEP = 1e-6  # of central differences, relative
LEAST_CLUSTERS = 3


def few_cluster_interval(
    problem: Problem, p_K: np.ndarray, cluster_R: np.ndarray, quantity: Callable[[Mapping], np.ndarray]
) -> dict:
    """Standard error and t intervals of a quantity of an unweighted least-squares fit.

    Args:
      p_K: the fit, in solver coordinates. cluster_R: cluster number of each row, int [R].
      quantity: from the law's parameters, arrays [B], to values [B]; choose a scale on which it is about
        linear in the parameters, such as log N*.

    Returns:
      {"estimate", "sd", "freedom", "80", "95"}.

    Raises:
      FitError: two-way clusters, under three clusters, a fit at a bound, or rows that do not determine it.
    """
    from scipy import stats

    if np.ndim(cluster_R) != 1:
        raise FitError("cluster is crossed two ways; this interval needs one kind of cluster")
    cluster_R = np.unique(cluster_R, return_inverse=True)[1]
    groups = int(cluster_R.max()) + 1
    if groups < LEAST_CLUSTERS:
        raise FitError(f"the rows form {groups} clusters; an interval needs at least {LEAST_CLUSTERS}")
    free = problem.free_K
    J_RxK, points, step = row_slopes(problem, p_K)
    if ((p_K - problem.lower_K)[free] <= step).any() or ((problem.upper_K - p_K)[free] <= step).any():
        raise FitError("the fit ended at a bound, where no interval can be read off its slopes")
    K = len(step)
    values = np.asarray(quantity(problem.to_params(points)), float)
    slope_K = (values[:K] - values[K:]) / (2 * step)
    scale = np.linalg.norm(J_RxK, axis=0)
    if not (np.isfinite(J_RxK).all() and np.isfinite(slope_K).all() and (scale > 0).all()):
        raise FitError("the law or the quantity has no finite slope at the fit")
    Q_RxK, T = np.linalg.qr(J_RxK / scale)
    if np.abs(np.diag(T)).min() < 1e-10:
        raise FitError("the rows do not determine every parameter of the law")
    load_R = Q_RxK @ np.linalg.solve(
        T.T, slope_K / scale
    )  # minus the effect of a row's error on the quantity
    adjusted_RxG = np.zeros((len(cluster_R), groups))
    for g in range(groups):
        at = cluster_R == g
        size, turn = np.linalg.eigh(np.eye(at.sum()) - Q_RxK[at] @ Q_RxK[at].T)
        # a direction that the cluster alone decides leaves no residual to learn from
        inverse = np.where(size > 1e-8, 1 / np.sqrt(np.maximum(size, 1e-8)), 0.0)
        adjusted_RxG[at, g] = turn @ (inverse * (turn.T @ load_R[at]))
    own_R = problem.residuals(p_K[None])[0]
    sd = float(np.sqrt(((adjusted_RxG.T @ own_R) ** 2).sum()))
    # freedom: the variance estimate is a sum of squares of errors correlated as the residuals are
    seen_RxG = adjusted_RxG - Q_RxK @ (Q_RxK.T @ adjusted_RxG)
    icc = intraclass(own_R, cluster_R)["icc"]
    totals = np.stack([np.bincount(cluster_R, column, groups) for column in seen_RxG.T])
    spread = (1 - icc) * seen_RxG.T @ seen_RxG + icc * totals @ totals.T
    freedom = float(max(np.trace(spread) ** 2 / (spread**2).sum(), 1.0))
    estimate = float(np.squeeze(quantity(problem.to_params(p_K[None]))))
    out = {"estimate": estimate, "sd": sd, "freedom": freedom}
    for level in ("80", "95"):
        reach = float(stats.t.ppf(0.5 + int(level) / 200, freedom)) * sd
        out[level] = [estimate - reach, estimate + reach]
    return out


def row_slopes(problem: Problem, p_K: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Slopes of the residuals over the K free coordinates by central differences.

    Returns:
      The slopes [R, K], the points at which they were taken [2 K, coordinates], and the steps [K].
    """
    free = np.flatnonzero(problem.free_K)
    step = STEP * np.maximum(np.abs(p_K[free]), 1e-3)
    moves = np.zeros((len(free), len(p_K)))
    moves[np.arange(len(free)), free] = step
    points = np.concatenate([p_K + moves, p_K - moves])
    residual = problem.residuals(points)
    return ((residual[: len(free)] - residual[len(free) :]) / (2 * step[:, None])).T, points, step
