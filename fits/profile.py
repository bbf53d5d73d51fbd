"""Profile likelihood: how far one quantity can move while all else adjusts, before the fit is too bad.

For a value c of the quantity g the objective is minimised over all parameters with g = c (an augmented
Lagrangian around the same Newton; Nocedal and Wright 2006, ch. 17). The interval holds every c whose
minimum exceeds the best one by at most phi t^2 / 2, t the Student quantile and phi the dispersion
(sum psi^2 / (R - K)) / mean psi', psi the slope of the loss (the rho test of robust regression, Huber and
Ronchetti 2009, ch. 13). For least squares phi is the residual variance, and the interval is the exact t
interval where the law is linear; for other losses it is a pseudo-likelihood, right in large samples.

It takes rows as independent but for one number: phi is multiplied by the design effect of the fit's
clusters (rows over effective rows), which is rough. Unlike the bootstrap it needs no draws, it sees where
a quantity has no upper or lower end, and it does not depend on how the law is parametrised.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from fits.allocate import optimum
from fits.errors import FitError
from fits.fit import Fit
from fits.laws import COLUMN_OF
from fits.objective import Evaluation, Problem, RowLoss, make_problem
from fits.printed import Printed
from fits.solve import newton

AT_BUDGET = ("N*", "D*", "tokens_per_param", "loss*")
GROWTH, STEPS = 1.5, 16  # the furthest point tried lies some 650 Wald half-widths out
STRICT, LOOSE = 1e-7, 1e-4  # how well g = c must hold, in Wald half-widths: closed form, or by search
NARROW = 0.05  # lad and quantile are rounded off over this share of the median residual
OUTER = 25


@dataclasses.dataclass
class ProfileInterval(Printed):
    """Where the profile of one quantity crosses its threshold; an end is None where none was found.

    Attributes:
      estimate: at the point fit. low, high: the ends; ``notes`` say why one is missing or at a bound.
      threshold: rise of the objective that ends the interval. dispersion: phi, without the design effect.
    """

    quantity: str
    level: float
    estimate: float
    low: float | None
    high: float | None
    notes: list[str]
    threshold: float
    dispersion: float
    design_effect: float
    degrees_of_freedom: int
    refits: int

    def to_dict(self) -> dict:
        return dataclasses.asdict(self)

    def __str__(self) -> str:
        low = "no lower end" if self.low is None else f"{self.low:.6g}"
        high = "no upper end" if self.high is None else f"{self.high:.6g}"
        lines = [f"doubt: {n}" for n in self.notes]
        lines.append(
            f"{self.quantity}: {self.estimate:.6g}, {100 * self.level:g} % profile interval {low} to {high}"
        )
        return "\n".join(lines)


def profile_interval(
    fit: Fit,
    quantity: str,
    level: float = 0.95,
    *,
    budget: float | None = None,
    flops: Callable | None = None,
    **columns: float,
) -> ProfileInterval:
    """The profile-likelihood interval of one quantity of a fit; the fit may come from a file.

    Args:
      quantity: a parameter, an exponent that the law defines (a, b), one of N*, D*, tokens_per_param and
        loss* (which need ``budget``, in FLOPs), or loss (which needs the columns: params=, tokens=).
      level: between 0 and 1. flops: cost of (N, D), as for ``allocate``.

    Raises:
      FitError: no such quantity, a quantity that is pinned, a fit that is not identified, or a perfect fit.
    """
    from scipy.stats import t as student

    if not (isinstance(level, int | float) and 0 < level < 1):
        raise FitError(f"level is {level!r}; it must be between 0 and 1, such as 0.95")
    if fit.status not in ("converged", "boundary"):
        raise FitError(f"the fit is {fit.status}, so nothing can be profiled: {'; '.join(fit.reasons)}")
    problem, weights_R, row_loss = rebuild(fit)
    measure, closed = _measure(fit, quantity, budget, flops, columns)
    best_p, best = _polish(problem, fit, weights_R, row_loss)
    freedom = int((weights_R > 0).sum()) - int(problem.free_K.sum())
    if freedom < 1:
        raise FitError(f"{quantity} cannot be profiled: the fit has no degree of freedom left")
    phi = dispersion(problem, best_p, weights_R, row_loss)
    rows, worth = fit.diagnostics["rows_used"], fit.diagnostics.get("effective_rows") or 0.0
    effect = max(1.0, rows / worth) if worth > 0 else 1.0
    threshold = 0.5 * phi * effect * float(student.ppf(0.5 + level / 2, freedom)) ** 2
    if not threshold > 1e-20:
        raise FitError(f"{quantity} cannot be profiled: the residuals are rounding, so the fit has no noise")
    estimate = float(measure({k: np.array([v]) for k, v in fit.params.items()})[0])
    limits = problem.bounds.get(quantity, (0.0, math.inf))
    plain = quantity == fit.law.offset or limits[0] < 0 or not estimate > 0
    g = _Quantity(problem, measure, not plain, closed)
    trace = _Trace(problem, g, weights_R, row_loss, best_p, best, threshold)
    if not trace.half_width > 0:
        raise FitError(f"{quantity} does not depend on any free parameter, so it has no interval")
    notes = []
    low = trace.end(-1, limits[0], quantity, notes)
    high = trace.end(+1, limits[1], quantity, notes)
    if trace.lower_found:
        notes.insert(0, "a lower objective than the fit's was met on the way: the fit is not at its optimum")
    if effect > 1.005:
        notes.append(
            f"rows err together: the threshold is {effect:.3g} times that of independent rows, roughly"
        )
    return ProfileInterval(
        quantity, float(level), estimate, low, high, notes, threshold, phi, effect, freedom, trace.refits
    )


def rebuild(fit: Fit) -> tuple[Problem, np.ndarray, RowLoss]:
    """The problem that a fit solved, from its own rows: problem, row weights [R] and loss."""
    used = [r for r in fit.rows if r["outcome"] == "used"]
    x = {v: np.log(np.array([r[COLUMN_OF[v]] for r in used], float)) for v in fit.law.variables}
    m = fit.method
    given = {k: tuple(v) for k, v in m["bounds"].items() if k not in fit.fixed}
    given = {k: (-math.inf if a is None else a, math.inf if b is None else b) for k, (a, b) in given.items()}
    bounds = {k: v for k, v in given.items() if v != tuple(fit.law.bounds.get(k, (-math.inf, math.inf)))}
    y = np.array([r["loss"] for r in used], float)
    problem = make_problem(fit.law, x, y, m["space"], fit.fixed, bounds or None)
    weights_R = np.array([1.0 if r.get("weight") is None else r["weight"] for r in used], float)
    extra = {} if m.get("tau") is None else {"tau": float(m["tau"])}
    name, delta = m["loss"], m.get("delta")
    if name in ("lad", "quantile"):
        p = problem.from_params(fit.params)
        delta = max(NARROW * float(np.median(np.abs(problem.residuals(p)[0]))), 1e-12)
    return problem, weights_R, RowLoss(name, float(delta if delta is not None else 1.0), **extra)


def dispersion(problem: Problem, p_K, weights_R, row_loss: RowLoss) -> float:
    """phi: twice the rise of the objective over phi is a chi-squared of one degree of freedom.

    For lad and quantile the mean of psi', the density of residuals at zero, is taken over a kernel's width
    (Silverman 1986), since the loss itself has no curvature.
    """
    r = problem.residuals(p_K[None])[0]
    first, second, _ = row_loss.derivatives(r)
    freedom = int((weights_R > 0).sum()) - int(problem.free_K.sum())
    total = float(weights_R.sum())
    if row_loss.name in ("lad", "quantile"):
        spread = 1.4826 * float(np.median(np.abs(r - np.median(r))))
        width = max(1.06 * spread * len(r) ** -0.2, 1e-300)
        density = float(weights_R @ np.exp(-0.5 * (r / width) ** 2)) / (
            total * width * math.sqrt(2 * math.pi)
        )
        curve = 2.0 * density if row_loss.name == "lad" else density
    else:
        curve = float(weights_R @ second) / total
    return float(weights_R @ first**2) / freedom / max(curve, 1.0 / len(r))


def _measure(fit: Fit, quantity: str, budget, flops, columns) -> tuple[Callable, bool]:
    """The quantity as a function of parameters (arrays [B]), and whether it is exact (no search)."""
    law = fit.law
    if quantity in law.parameters:
        if quantity in fit.fixed:
            raise FitError(f"{quantity} is pinned at {fit.fixed[quantity]:g}, so it has no interval")
        return (lambda p: p[quantity]), True
    if quantity in law.compute_exponents(fit.params):
        return (lambda p: np.asarray(law.compute_exponents(p)[quantity], float)), True
    if quantity == "loss":
        x = {v: np.asarray(z, float).reshape(-1) for v, z in fit._x(columns).items()}
        if any(len(z) != 1 or not np.isfinite(z).all() or not (z > 0).all() for z in x.values()):
            raise FitError("loss is profiled at one point; give one positive number a column")
        return (lambda p: np.asarray(law.predict(p, {v: z[0] for v, z in x.items()}), float)), True
    if quantity not in AT_BUDGET:
        known = [*law.parameters, *law.compute_exponents(fit.params), *AT_BUDGET, "loss"]
        raise FitError(f"quantity is {quantity!r}; it must be one of {', '.join(known)}")
    if set(law.variables) != {"N", "D"}:
        raise FitError(
            f"{quantity} does not exist: the law {law.name} is in {' and '.join(law.variables)}, not N and D"
        )
    if not (isinstance(budget, int | float) and math.isfinite(budget) and budget > 0):
        raise FitError(f"budget is {budget!r}; {quantity} needs a positive number of FLOPs")

    def at_optimum(p: Mapping[str, Any]) -> np.ndarray:
        got = optimum(law, p, float(budget), flops)
        if quantity == "tokens_per_param":
            return got["D"] / got["N"]
        return np.asarray(got[quantity.rstrip("*")], float)

    if not np.isfinite(at_optimum(fit.params)).all():
        raise FitError(f"{quantity} does not exist at {budget:.4g} FLOPs: the law has no optimum there")
    params = {k: np.array([v]) for k, v in fit.params.items()}
    return at_optimum, flops is None and law.optimum(params, float(budget)) is not None


class _Quantity:
    """The quantity over solver coordinates (its log where it cannot be negative), with derivatives."""

    def __init__(self, problem: Problem, measure: Callable, log: bool, closed: bool):
        self.problem, self.measure, self.closed = problem, measure, closed
        self.log = log
        self.step = 1e-4 if closed else 2e-3  # a search leaves about 1e-7 of noise in what it finds

    def coordinate(self, value: float) -> float:
        if not self.log:
            return value
        return math.log(value) if value > 0 else -math.inf

    def value(self, coordinate: float) -> float:
        return math.exp(coordinate) if self.log else coordinate

    def at(self, p_BxK: np.ndarray) -> np.ndarray:
        with np.errstate(all="ignore"):
            got = np.asarray(self.measure(self.problem.to_params(p_BxK)), float)
            return np.broadcast_to(np.log(got) if self.log else got, (len(p_BxK),))

    def derivatives(self, p_BxK) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Value [B], gradient [B, K] and Hessian [B, K, K] by central differences over free coordinates."""
        with np.errstate(all="ignore"):  # a wild trial step may have no such quantity; Newton then rejects it
            return self._derivatives(p_BxK)

    def _derivatives(self, p_BxK):
        B, K = p_BxK.shape
        free = np.flatnonzero(self.problem.free_K)
        h = self.step * np.maximum(0.1, np.abs(p_BxK)) * self.problem.free_K
        moves = [(i, j) for a, i in enumerate(free) for j in free[a:]]
        points = [p_BxK]
        for i, j in moves:
            d = np.zeros_like(p_BxK)
            d[:, i] += h[:, i]
            if j != i:
                d[:, j] += h[:, j]
            points += [p_BxK + d, p_BxK - d]
        got = self.at(np.concatenate(points)).reshape(len(points), B)
        middle, up, down = got[0], got[1::2], got[2::2]
        gradient, hessian = np.zeros((B, K)), np.zeros((B, K, K))
        second = up - 2 * middle + down  # d' H d along each move
        alone = {i: second[m] for m, (i, j) in enumerate(moves) if i == j}
        for m, (i, j) in enumerate(moves):
            if i == j:
                gradient[:, i] = (up[m] - down[m]) / (2 * h[:, i])
                hessian[:, i, i] = second[m] / h[:, i] ** 2
            else:
                cross = 0.5 * (second[m] - alone[i] - alone[j]) / (h[:, i] * h[:, j])
                hessian[:, i, j] = hessian[:, j, i] = cross
        return middle, gradient, hessian if self.closed else np.zeros_like(hessian)


class _Constrained:
    """A problem whose objective carries the augmented Lagrangian of g = c; what Newton needs of a problem."""

    def __init__(self, problem: Problem, g: _Quantity, c: float, multiplier: float, stiffness: float):
        self.problem, self.g, self.c, self.multiplier, self.stiffness = problem, g, c, multiplier, stiffness
        for name in ("law", "lower_K", "upper_K", "free_K", "target_R"):
            setattr(self, name, getattr(problem, name))

    def evaluate(self, p_BxK, weights_BxR, row_loss) -> Evaluation:
        got = self.problem.evaluate(p_BxK, weights_BxR, row_loss)
        value, gradient, hessian = self.g.derivatives(p_BxK)
        off = value - self.c
        pull = (self.multiplier + self.stiffness * off)[:, None]
        outer = self.stiffness * gradient[:, :, None] * gradient[:, None, :]
        with np.errstate(all="ignore"):
            total = got.value_B + self.multiplier * off + 0.5 * self.stiffness * off**2
        return Evaluation(
            np.where(np.isfinite(total), total, np.inf), got.gradient_BxK + pull * gradient,
            got.hessian_BxKxK + outer + pull[:, :, None] * hessian, got.majoriser_BxKxK + outer,
        )  # fmt: skip


class _Trace:
    """Constrained refits along one quantity, each from the last."""

    def __init__(self, problem, g, weights_R, row_loss, best_p, best, threshold):
        self.problem, self.g, self.weights, self.row_loss = problem, g, weights_R[None], row_loss
        self.best_p, self.best, self.threshold = best_p, best, threshold
        self.refits, self.lower_found = 0, False
        at = problem.evaluate(best_p[None], self.weights, row_loss)
        value, slope, _ = g.derivatives(best_p[None])
        self.centre = float(value[0])
        inner = problem.free_K & (best_p > problem.lower_K) & (best_p < problem.upper_K)
        if (inner & (slope[0] != 0)).sum() == 0:  # a floor at its bound: it can still move inwards
            inner = problem.free_K
        slope_K = np.where(inner, slope[0], 0.0)
        # the majoriser is positive where a robust loss leaves the Hessian without rank
        for matrix in (at.hessian_BxKxK[0], at.majoriser_BxKxK[0]):
            sub = matrix[np.ix_(inner, inner)]
            spread = float(slope_K[inner] @ np.linalg.lstsq(sub, slope_K[inner], rcond=None)[0])
            if spread > 0 and math.isfinite(spread):
                break
        self.curve = 1.0 / spread if spread > 0 else 0.0
        self.half_width = math.sqrt(2 * threshold / self.curve) if self.curve > 0 else 0.0

    def refit(self, c: float, state: tuple) -> tuple[float, tuple] | None:
        """Rise of the objective at g = c and the state to go on from; None where no such fit was found."""
        p, multiplier, stiffness = state[0], state[1], max(state[2], 100.0 * self.curve)
        allowed = (STRICT if self.g.closed else LOOSE) * self.half_width
        last = math.inf
        for _ in range(OUTER):
            made = _Constrained(self.problem, self.g, c, multiplier, stiffness)
            solution = newton(made, p[None], self.weights, self.row_loss)
            self.refits += 1
            p = solution.p_BxK[0]
            off = float(self.g.at(p[None])[0]) - c
            if not math.isfinite(off):
                return None
            if abs(off) <= allowed:
                value = float(self.problem.evaluate(p[None], self.weights, self.row_loss).value_B[0])
                settled = solution.converged_B[0] or solution.decrement_B[0] <= 1e-6 * self.threshold
                if not (settled and math.isfinite(value)):
                    return None
                rise = value - self.best
                self.lower_found |= rise < -1e-3 * self.threshold
                return rise, (p, multiplier, stiffness)
            multiplier += stiffness * off
            if abs(off) > 0.25 * last:
                stiffness *= 10.0
            last = abs(off)
        return None

    def end(self, sign: int, bound: float, quantity: str, notes: list[str]) -> float | None:
        """One end of the interval, or None with the reason in ``notes``."""
        from scipy.optimize import brentq

        side = "lower" if sign < 0 else "upper"
        limit = self.g.coordinate(bound)
        state, inside, step = (self.best_p, 0.0, 0.0), self.centre, self.half_width
        outside = None
        states = {self.centre: state}
        halvings = 0
        for _ in range(STEPS):
            c = self.centre + sign * step
            at_limit = sign * (c - limit) >= 0
            c = limit if at_limit else c
            got = None if not math.isfinite(c) else self.refit(c, states[inside])
            if got is None:
                halvings += 1
                if halvings > 6:
                    break
                step = 0.5 * (step + abs(inside - self.centre))
                continue
            states[c] = got[1]
            if got[0] >= self.threshold:
                outside = c
                break
            inside = c
            if at_limit:
                notes.append(f"the {side} end of {quantity} is its bound, {bound:g}")
                return float(bound)
            step *= GROWTH
        if outside is None:
            reach = self.g.value(inside)
            why = "no refit holds beyond" if halvings > 6 else "the fit is still good enough at"
            notes.append(f"no {side} end found for {quantity}: {why} {reach:.4g}")
            return None
        root = math.sqrt(self.threshold)

        def excess(c: float) -> float:  # nearly linear in c, since the objective is nearly a parabola
            near = min(states, key=lambda s: abs(s - c))
            got = self.refit(c, states[near])
            if got is None:
                raise FitError(f"{quantity} has no refit at {self.g.value(c):.6g}")
            states[c] = got[1]
            return math.sqrt(max(got[0], 0.0)) - root

        try:
            found = brentq(excess, inside, outside, xtol=1e-7 * self.half_width, rtol=1e-14)
        except (FitError, ValueError):
            notes.append(
                f"the {side} end of {quantity} lies between {self.g.value(inside):.6g} and "
                f"{self.g.value(outside):.6g}, where the refits fail; the further one is given"
            )
            found = outside
        return self.g.value(found)


def _polish(problem: Problem, fit: Fit, weights_R, row_loss) -> tuple[np.ndarray, float]:
    """The optimum in solver coordinates, once more from the fit's parameters (a file keeps all digits)."""
    p = problem.from_params({k: float(v) for k, v in fit.params.items()})
    solution = newton(problem, p, weights_R[None], row_loss)
    return solution.p_BxK[0], float(solution.value_B[0])


__all__ = ["ProfileInterval", "dispersion", "profile_interval", "rebuild"]
