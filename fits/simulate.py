"""Refits of simulated tables, every table a lane of one batched solve.

The planted surface is a fit's own; a table's errors are its residuals drawn anew, and an effect shared by the
runs of one size with the correlation that the fit found. Tables with and without further runs share their
random numbers, so that widths are compared with little Monte Carlo error.
"""

from __future__ import annotations

import math

import numpy as np

from fits.allocate import optimum
from fits.errors import FitError
from fits.objective import NARROWED, PowerSumProblem, Problem, RowLoss, make_problem
from fits.profile import rebuild
from fits.solve import LAD_WIDTHS, newton
from fits.table import group_close

BLOCK = 256  # lanes solved together
STACK = 8  # tables of a law by autodiff that are solved together
RESAMPLES = 400  # of lanes, for the Monte Carlo error of a width


class _Lanes(PowerSumProblem):
    """Every lane has outcomes of its own: its weights are row weights, then targets, [B, 2 R]."""

    def evaluate(self, p_BxK, weights_BxR, row_loss):
        rows = weights_BxR.shape[1] // 2
        self.target_R = weights_BxR[:, rows:]
        return super().evaluate(p_BxK, weights_BxR[:, :rows], row_loss)


def refit_outcomes(problem: Problem, p_K, weights_R, loss_BxR, row_loss: RowLoss):
    """Fits the problem's law to many outcomes of its rows, each from the one start.

    Args:
      problem: law, rows, space, bounds and pinned values; its own losses are not used.
      p_K: start, in solver coordinates. loss_BxR: losses, one table a lane.

    Returns:
      The law's parameters, arrays [B], and converged_B.
    """
    bounds = _given_bounds(problem)
    target = np.log(loss_BxR) if problem.space == "log" else np.asarray(loss_BxR, float)
    B, R = target.shape
    weights = np.broadcast_to(weights_R, (B, R))
    widths = LAD_WIDTHS if row_loss.name in NARROWED else (row_loss.delta,)
    p, good = np.repeat(np.asarray(p_K, float)[None], B, 0), np.zeros(B, bool)
    batched = isinstance(problem, PowerSumProblem)
    step = BLOCK if batched else STACK
    for begin in range(0, B, step):
        at = slice(begin, min(begin + step, B))
        count = at.stop - begin
        if batched:
            lanes = _Lanes(problem.law, problem.log_x, problem.y_R, problem.space, problem.fixed, bounds)
            packed = np.concatenate([weights[at], target[at]], 1)
        else:  # tables below each other, of which each lane weighs its own
            log_x, y = {v: np.tile(z, count) for v, z in problem.log_x.items()}, loss_BxR[at].ravel()
            lanes = make_problem(problem.law, log_x, y, problem.space, problem.fixed, bounds)
            packed = np.kron(np.eye(count), np.ones((1, R))) * np.tile(weights[at], count)
        for width in widths:
            solution = newton(lanes, p[at], packed, RowLoss(row_loss.name, width, row_loss.tau))
            p[at] = solution.p_BxK
        good[at] = solution.converged_B & np.isfinite(solution.value_B)
    return problem.to_params(p), good


def _given_bounds(problem: Problem) -> dict | None:
    """The bounds that are not the law's own."""
    own = problem.law.bounds
    changed = {k: v for k, v in problem.bounds.items() if tuple(v) != tuple(own.get(k, (-np.inf, np.inf)))}
    return {k: v for k, v in changed.items() if k not in problem.fixed} or None


class Simulation:
    """Simulated tables of a fit, with any further runs: what their refits say of one quantity.

    Args:
      quantity: "N*", "D*", "loss" (at ``budget``; their logs) or "a". flops: as in ``allocate``.
      tables: how many are simulated.
    """

    def __init__(self, fit, quantity: str, budget: float, flops, tables: int, seed: int = 0):
        self.fit, self.quantity, self.budget, self.flops = fit, quantity, budget, flops
        self.problem, self.weights_R, self.row_loss = rebuild(fit)
        used = [r for r in fit.rows if r["outcome"] == "used"]
        self.N, self.D = (np.array([r[c] for r in used], float) for c in ("params", "tokens"))
        residual = np.array([r["residual"] for r in used])
        left = max(fit.diagnostics["degrees_of_freedom"], 1)
        self.errors = (residual - residual.mean()) * math.sqrt(len(residual) / left)
        self.icc = float(fit.diagnostics["icc"])
        self.tables, self.seed = tables, seed

    def values(self, runs=()) -> np.ndarray:
        """The quantity by each table's refit, [tables], with further runs (N, D); NaN where it has none."""
        new = np.asarray(list(runs), float).reshape(-1, 2)
        N, D = np.concatenate([self.N, new[:, 0]]), np.concatenate([self.D, new[:, 1]])
        size, rows = group_close(N), len(self.N)
        # streams by row and by size in order of appearance: what is common to two sets of runs stays so
        order = {g: i for i, g in enumerate(dict.fromkeys(size.tolist()))}
        shared = np.stack([self._stream(1, i).standard_normal(self.tables) for i in range(len(order))], 1)
        own = self._stream(0, 0).choice(self.errors, (self.tables, rows))
        more = [self._stream(2, i).choice(self.errors, (self.tables, 1)) for i in range(len(new))]
        error = math.sqrt(1 - self.icc) * np.concatenate([own, *more], 1)
        effect = math.sqrt(self.icc) * self.errors.std() * shared
        error = error + effect[:, [order[g] for g in size.tolist()]]
        law, fit = self.problem.law, self.fit
        clean = law.predict(fit.params, {"N": N, "D": D})
        log_x = {"N": np.log(N), "D": np.log(D)}
        problem = make_problem(law, log_x, clean, self.problem.space, fit.fixed, _given_bounds(self.problem))
        weights = np.concatenate([self.weights_R, np.full(len(new), self.weights_R.mean())])
        start = problem.from_params(fit.params)[0]
        params, good = refit_outcomes(problem, start, weights, clean * np.exp(error), self.row_loss)
        with np.errstate(all="ignore"):
            return np.where(good, self._quantity(params), np.nan)

    def _stream(self, kind: int, index: int) -> np.random.Generator:
        return np.random.default_rng([self.seed, kind, index])

    def _quantity(self, params) -> np.ndarray:
        if self.quantity == "a":
            a = self.problem.law.compute_exponents(params).get("a")
            if a is None:
                raise FitError(f"the law {self.problem.law.name} has no exponent a")
            return np.asarray(a) * np.ones(self.tables)
        best = optimum(self.problem.law, params, self.budget, self.flops)
        return np.log(np.asarray(best[self.quantity.rstrip("*")], float)) * np.ones(self.tables)


def half_widths(values_SxB: np.ndarray, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """1.96 standard deviations over tables of each of S sets of runs, and their Monte Carlo error.

    Returns:
      half_width_S, error_S, and the widths of resampled tables [RESAMPLES, S], in common to all sets: their
      differences have the error of a paired comparison. Over tables in which every set has a value.
    """
    values = np.asarray(values_SxB, float)
    values = values[:, np.isfinite(values).all(0)]
    if values.shape[1] < 20:
        raise FitError(f"only {values.shape[1]} simulated tables could be fitted, too few to know a width")
    picks = np.random.default_rng(seed).integers(0, values.shape[1], (RESAMPLES, values.shape[1]))
    again = 1.96 * values[:, picks].std(2, ddof=1).T
    return 1.96 * values.std(1, ddof=1), again.std(0, ddof=1), again
