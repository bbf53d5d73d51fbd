"""Intervals that hold with few clusters: a linearised, leverage-corrected variance with its own freedom.

A bootstrap of six to fourteen sizes knows its own width badly, and worst for a quantity that one or two
of the sizes decide, such as the loss at the top of the grid. There the percentile interval covers too
little, and with six sizes it is several times too wide for the exponents. The interval here is that of Bell
and McCaffrey (2002): a cluster-robust variance, unbiased for independent rows, and Student's t with degrees
of freedom counted from each cluster's weight in the very quantity.

For least squares its errors are the residuals. For a robust loss they are pseudo-residuals, psi(r) over the
mean of psi' (Huber 1981, section 7.6), whose mean is taken over a width that enough rows lie in; or the
residuals cut at three robust standard deviations where those give the larger variance, since few rows know
the mean of psi' badly. benchmarks/coverage.py measures all of it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from fits.errors import FitError
from fits.objective import Problem
from fits.rowloss import ASYMMETRIC, RowLoss
from fits.rowweights import weighted_median
from fits.uncertainty import LEVELS, intraclass

STEP = 1e-6  # of central differences, relative
LEAST_CLUSTERS = 3
WIDTH = 0.7  # robust standard deviations: half of normal residuals lie within, and the density is flat there
CUT = 3.0


class FewClusters:
    """A fit's few-cluster intervals, of any quantity of its parameters.

    Args:
      p_K: the fit, in solver coordinates. cluster_R: cluster number of each row, int [R].
      row_loss: the loss that was summed; least squares where None. weights_R: row weights, default 1.

    Raises:
      FitError: an asymmetric loss, two-way clusters, under three clusters, a fit at a bound, or rows that do
        not determine it.
    """

    def __init__(
        self, problem: Problem, p_K: np.ndarray, cluster_R: np.ndarray,
        row_loss: RowLoss | None = None, weights_R: np.ndarray | None = None,
    ):  # fmt: skip
        self.problem, self.p_K = problem, p_K
        if row_loss is not None and row_loss.name in ASYMMETRIC:
            raise FitError(f"the loss {row_loss.name} has no interval by its residuals' variance")
        if np.ndim(cluster_R) != 1:
            raise FitError("cluster is crossed two ways; this interval needs one kind of cluster")
        weights_R = np.ones(len(cluster_R)) if weights_R is None else weights_R
        live = weights_R > 0
        cluster_R = np.unique(np.asarray(cluster_R)[live], return_inverse=True)[1]
        self.groups = int(cluster_R.max()) + 1
        if self.groups < LEAST_CLUSTERS:
            raise FitError(
                f"the rows form {self.groups} clusters; an interval needs at least {LEAST_CLUSTERS}"
            )
        free = problem.free_K
        J_RxK, _, step = row_slopes(problem, p_K)
        near = ((p_K - problem.lower_K)[free] <= step) | ((problem.upper_K - p_K)[free] <= step)
        if near.any():
            raise FitError("the fit ended at a bound, where no interval can be read off its slopes")
        root_R = np.sqrt(weights_R[live])
        J_RxK = J_RxK[live] * root_R[:, None]
        self.scale = np.linalg.norm(J_RxK, axis=0)
        if not (np.isfinite(J_RxK).all() and (self.scale > 0).all()):
            raise FitError("the law has no finite slope at the fit")
        self.Q_RxK, self.T = np.linalg.qr(J_RxK / self.scale)
        if np.abs(np.diag(self.T)).min() < 1e-10:
            raise FitError("the rows do not determine every parameter of the law")
        residual_R = problem.residuals(p_K[None])[0][live]
        self.errors = [e * root_R for e in _errors(residual_R, row_loss, weights_R[live])]
        self.icc = intraclass(residual_R, cluster_R)["icc"]
        self.members = [np.flatnonzero(cluster_R == g) for g in range(self.groups)]
        self.roots = []
        for rows in self.members:
            size, turn = np.linalg.eigh(np.eye(len(rows)) - self.Q_RxK[rows] @ self.Q_RxK[rows].T)
            # a direction that the cluster alone decides leaves no residual to learn from
            inverse = np.where(size > 1e-8, 1 / np.sqrt(np.maximum(size, 1e-8)), 0.0)
            self.roots.append((turn * inverse) @ turn.T)

    def interval(self, quantity: Callable[[Mapping], np.ndarray], step: float | None = None) -> dict:
        """Standard error, degrees of freedom and t intervals of one quantity.

        Args:
          quantity: from the law's parameters, arrays [B], to values [B]; choose a scale on which it is about
            linear in the parameters, such as log N*.
          step: relative step of its differences; a wide one where it comes from a search, which is rough.

        Returns:
          {"estimate", "sd", "freedom", "80", "95"}.

        Raises:
          FitError: the quantity has no finite slope at the fit.
        """
        from scipy import stats

        points, step_K = _moved(self.problem, self.p_K, step or STEP)
        K = len(step_K)
        values = np.asarray(quantity(self.problem.to_params(points)), float)
        slope_K = (values[:K] - values[K:]) / (2 * step_K)
        if not np.isfinite(slope_K).all():
            raise FitError("the quantity has no finite slope at the fit")
        # minus the effect of a row's error on the quantity
        load_R = self.Q_RxK @ np.linalg.solve(self.T.T, slope_K / self.scale)
        adjusted_RxG = np.zeros((len(load_R), self.groups))
        for g, (rows, root) in enumerate(zip(self.members, self.roots, strict=True)):
            adjusted_RxG[rows, g] = root @ load_R[rows]
        sd = max(float(np.sqrt(((adjusted_RxG.T @ own_R) ** 2).sum())) for own_R in self.errors)
        # freedom: the variance estimate is a sum of squares of errors correlated as the residuals are
        seen_RxG = adjusted_RxG - self.Q_RxK @ (self.Q_RxK.T @ adjusted_RxG)
        totals = np.stack([seen_RxG[rows].sum(0) for rows in self.members], 1)
        spread = (1 - self.icc) * seen_RxG.T @ seen_RxG + self.icc * totals @ totals.T
        freedom = float(max(np.trace(spread) ** 2 / max((spread**2).sum(), 1e-300), 1.0))
        estimate = float(np.squeeze(quantity(self.problem.to_params(self.p_K[None]))))
        out = {"estimate": estimate, "sd": sd, "freedom": freedom}
        for level in LEVELS:
            reach = float(stats.t.ppf(0.5 + int(level) / 200, freedom)) * sd
            out[level] = [estimate - reach, estimate + reach]
        return out


def few_cluster_interval(
    problem: Problem, p_K: np.ndarray, cluster_R: np.ndarray, quantity: Callable[[Mapping], np.ndarray],
    row_loss: RowLoss | None = None, weights_R: np.ndarray | None = None,
) -> dict:  # fmt: skip
    """``FewClusters(...).interval(quantity)``, for one quantity."""
    return FewClusters(problem, p_K, cluster_R, row_loss, weights_R).interval(quantity)


def _errors(residual_R, row_loss: RowLoss | None, weights_R) -> list[np.ndarray]:
    """What the rows' errors were, by each account of them."""
    if row_loss is None or row_loss.name == "least_squares":
        return [residual_R]
    spread = 1.4826 * weighted_median(np.abs(residual_R), weights_R)
    if not spread > 0:  # most rows are met exactly: nothing robust to tell outliers by
        return [residual_R]
    delta = row_loss.delta if row_loss.name == "huber" else 0.0
    width = max(delta, WIDTH * spread)
    inside = float(weights_R @ (np.abs(residual_R) <= width) / weights_R.sum())
    # psi(r) / mean psi', both over delta: the sign of r over the density in the limit of lad
    psi_R = np.clip(residual_R / delta, -1, 1) if delta > 1e-9 * spread else np.sign(residual_R)
    return [psi_R * width / inside, np.clip(residual_R, -CUT * spread, CUT * spread)]


def row_slopes(problem: Problem, p_K: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Slopes of the residuals over the K free coordinates by central differences.

    Returns:
      The slopes [R, K], the points at which they were taken [2 K, coordinates], and the steps [K].
    """
    points, step = _moved(problem, p_K, STEP)
    residual = problem.residuals(points)
    return ((residual[: len(step)] - residual[len(step) :]) / (2 * step[:, None])).T, points, step


def _moved(problem: Problem, p_K: np.ndarray, relative: float) -> tuple[np.ndarray, np.ndarray]:
    """Each free coordinate moved up, then each down, [2 K, coordinates], and the steps [K]."""
    free = np.flatnonzero(problem.free_K)
    step = relative * np.maximum(np.abs(p_K[free]), 1e-3)
    moves = np.zeros((len(free), len(p_K)))
    moves[np.arange(len(free)), free] = step
    return np.concatenate([p_K + moves, p_K - moves]), step
