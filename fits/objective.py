"""What a fit minimises: a weighted SUM over rows of a loss of the residual, with exact derivatives.

The residual is log(predicted) - log(observed) (``space="log"``) or predicted - observed ("raw").
Everything here works on a batch of B independent fits ("lanes") of the same R rows that differ
only in their row weights: arrays are named p_BxK (solver coordinates) and weights_BxR.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from fits.errors import FitError
from fits.laws import Law, PowerSum
from fits.rowloss import ASYMMETRIC, LOSSES, NARROWED, Evaluation, RowLoss
from fits.traced import LawLane, PowersLane, coordinates, evaluate

SPACES = ("log", "raw")


class Problem:
    """One law on one set of rows: solver coordinates, their bounds, and the objective with derivatives.

    Args:
      law: the law.
      x: log of each variable's column, float64 [R].
      y: observed loss, float64 [R], positive.
      space: "log" or "raw" residuals.
      fixed: values of parameters that are not estimated.
      bounds: (lower, upper) overrides in the law's own parameters; None means unbounded.

    Attributes:
      names: solver coordinates, one per parameter of the law, in the same order.
      lower_K, upper_K: bounds in solver coordinates. free_K: False where fixed.
    """

    def __init__(
        self, law: Law, x: Mapping[str, np.ndarray], y: np.ndarray, space: str, fixed=None, bounds=None
    ):
        self.law, self.space = law, space
        self.log_x = {v: np.asarray(x[v], float) for v in law.variables}
        self.y_R = np.asarray(y, float)
        self.target_R = np.log(self.y_R) if space == "log" else self.y_R
        self.fixed = check_fixed(law, fixed)
        self.free_K = np.array([n not in self.fixed for n in law.parameters])
        self.bounds = check_bounds(law, bounds)
        self.centre = {v: float(z.mean()) for v, z in self.log_x.items()}

    def to_params(self, p_BxK: np.ndarray) -> dict[str, np.ndarray]:
        """The law's own parameters, arrays [B]."""
        raise NotImplementedError

    def from_params(self, params: Mapping[str, Any]) -> np.ndarray:
        """Solver coordinates [B, K] of parameters given as scalars or arrays [B]."""
        raise NotImplementedError

    def evaluate(self, p_BxK, weights_BxR, row_loss: RowLoss) -> Evaluation:
        raise NotImplementedError

    def traced(self, rows: np.ndarray):
        """The lane function of ``traced``, and its data in the order of ``rows``."""
        raise NotImplementedError

    def residuals(self, p_BxK: np.ndarray) -> np.ndarray:
        """Residuals [B, R], in the space of the fit."""
        params = {k: np.asarray(v)[:, None] for k, v in self.to_params(p_BxK).items()}
        predicted = self.law.predict(params, {v: np.exp(z)[None] for v, z in self.log_x.items()})
        return (np.log(predicted) if self.space == "log" else predicted) - self.target_R


def check_fixed(law: Law, fixed: Mapping[str, float] | None) -> dict[str, float]:
    """Raises ``FitError`` on an unknown name or a value outside the law's bounds."""
    out = {}
    for name, value in (fixed or {}).items():
        if name not in law.parameters:
            raise FitError(f"fixed names {name!r}; {law.name} has the parameters {', '.join(law.parameters)}")
        low, high = law.bounds.get(name, (-math.inf, math.inf))
        if not (isinstance(value, int | float) and math.isfinite(value) and low <= value <= high):
            raise FitError(f"fixed {name} is {value!r}; it must be a number between {low:g} and {high:g}")
        out[name] = float(value)
    if len(out) == len(law.parameters):
        raise FitError(f"fixed names every parameter of {law.name}; leave at least one to be estimated")
    return out


def check_bounds(law: Law, bounds: Mapping[str, tuple] | None) -> dict[str, tuple[float, float]]:
    """The law's bounds with overrides; raises ``FitError`` on an unknown name or an empty range."""
    out = {n: law.bounds.get(n, (-math.inf, math.inf)) for n in law.parameters}
    for name, pair in (bounds or {}).items():
        if name not in law.parameters:
            raise FitError(
                f"bounds names {name!r}; {law.name} has the parameters {', '.join(law.parameters)}"
            )
        try:
            low, high = pair
            low, high = float(-math.inf if low is None else low), float(math.inf if high is None else high)
        except (TypeError, ValueError):
            raise FitError(
                f"bounds of {name} are {pair!r}; they must be a pair of numbers, None for no bound"
            ) from None
        if not low < high:
            raise FitError(f"bounds of {name} are {pair!r}; the lower one must be below the upper one")
        out[name] = (low, high)
    return out


class PowerSumProblem(Problem):
    """A sum of power terms, in NumPy, with derivatives written out.

    Solver coordinates are the exponents and, for each term, its value at the mean row (log x
    centred), so that coefficient and exponent are nearly independent. A term with a fixed
    coefficient is not centred: its coordinate is the coefficient itself.
    """

    law: PowerSum

    def __init__(self, law, x, y, space, fixed=None, bounds=None):
        super().__init__(law, x, y, space, fixed, bounds)
        names = law.parameters
        self.exponents = names[len(law.terms) :]
        self.z_term_exp_R = []  # per term: {index of exponent in p: centred log x}
        self.shift_term_exp = []
        for term in law.terms:
            centred = term.coefficient not in self.fixed
            z, shift = {}, {}
            for variable, exponent in term.powers.items():
                at = names.index(exponent)
                mean = self.centre[variable] if centred else 0.0
                z[at] = z.get(at, 0.0) + self.log_x[variable] - mean
                shift[at] = shift.get(at, 0.0) + mean
            self.z_term_exp_R.append(z)
            self.shift_term_exp.append(shift)
        self._set_bounds()

    def _set_bounds(self):
        low, high = np.array([self.bounds[n] for n in self.law.parameters]).T
        for i, (term, z) in enumerate(zip(self.law.terms, self.z_term_exp_R, strict=True)):
            shifted = z and term.coefficient not in self.fixed
            if shifted and (low[i], high[i]) not in ((0.0, math.inf), (-math.inf, math.inf)):
                raise FitError(
                    f"bounds of {term.coefficient} are ({low[i]:g}, {high[i]:g}); the coefficient of a power "
                    "can be bounded by zero only, (0, None), or fixed"
                )
        for name, value in self.fixed.items():
            low[self.law.parameters.index(name)] = high[self.law.parameters.index(name)] = value
        self.lower_K, self.upper_K = low, high

    def to_params(self, p_BxK):
        out = {n: p_BxK[:, i].copy() for i, n in enumerate(self.law.parameters)}
        for term, shift in zip(self.law.terms, self.shift_term_exp, strict=True):
            for at, mean in shift.items():
                with np.errstate(over="ignore"):  # a far start may overflow; it then loses to the others
                    out[term.coefficient] = out[term.coefficient] * np.exp(p_BxK[:, at] * mean)
        return out

    def from_params(self, params):
        p = np.stack(np.broadcast_arrays(*(np.atleast_1d(params[n]) for n in self.law.parameters)), 1).astype(
            float
        )
        for i, shift in enumerate(self.shift_term_exp):
            for at, mean in shift.items():
                p[:, i] = p[:, i] * np.exp(-p[:, at] * mean)
        return p

    def traced(self, rows):
        """See ``Problem.traced``."""
        terms, exponents = len(self.law.terms), len(self.exponents)
        logs = np.zeros((terms, exponents, len(rows)))
        for i, z in enumerate(self.z_term_exp_R):
            for at, z_R in z.items():
                logs[i, at - terms] = z_R[rows]
        return PowersLane(), logs

    def _terms(self, p_BxK):
        """Each term over its coordinate, arrays [B, R] (or None for the constant term)."""
        out = []
        for z in self.z_term_exp_R:
            log_power = sum(-p_BxK[:, at, None] * z_R for at, z_R in z.items())
            out.append(np.exp(log_power) if z else None)
        return out

    def predict(self, p_BxK):
        total = np.zeros((len(p_BxK), len(self.y_R)))
        for i, power in enumerate(self._terms(p_BxK)):
            total += p_BxK[:, i, None] * (1.0 if power is None else power)
        return total

    def residuals(self, p_BxK):
        with np.errstate(invalid="ignore", divide="ignore"):
            predicted = self.predict(p_BxK)
            return (np.log(predicted) if self.space == "log" else predicted) - self.target_R

    def evaluate(self, p_BxK, weights_BxR, row_loss):
        with np.errstate(all="ignore"):  # a wild trial step may overflow; its infinite value rejects it
            return self._evaluate(p_BxK, weights_BxR, row_loss)

    def _evaluate(self, p_BxK, weights_BxR, row_loss):
        B, K = p_BxK.shape
        J_BxKxR = np.zeros((B, K, len(self.y_R)))
        predicted = np.zeros((B, len(self.y_R)))
        powers = self._terms(p_BxK)
        for i, (power, z) in enumerate(zip(powers, self.z_term_exp_R, strict=True)):
            J_BxKxR[:, i] = 1.0 if power is None else power
            value = p_BxK[:, i, None] * J_BxKxR[:, i]
            predicted += value
            for at, z_R in z.items():
                J_BxKxR[:, at] -= z_R * value
        residual = (np.log(predicted) if self.space == "log" else predicted) - self.target_R
        value_B = (weights_BxR * row_loss.value(residual)).sum(1)
        first, second, robust = (weights_BxR * d for d in row_loss.derivatives(residual))
        if self.space == "log":
            inverse = 1.0 / predicted
            first = first * inverse
            robust = robust * inverse * inverse
            second = (second * inverse - first) * inverse
        # one product for gradient, Hessian and majoriser
        left = np.empty((B, 2 * K + 1, len(self.y_R)))
        left[:, 0] = first
        np.multiply(J_BxKxR, second[:, None], out=left[:, 1 : K + 1])
        np.multiply(J_BxKxR, robust[:, None], out=left[:, K + 1 :])
        sums = left @ J_BxKxR.transpose(0, 2, 1)
        gradient, hessian, majoriser = sums[:, 0], sums[:, 1 : K + 1], sums[:, K + 1 :]
        self._add_curvature(hessian, p_BxK, powers, first)
        value_B = np.where(np.isfinite(value_B), value_B, np.inf)
        return Evaluation(value_B, gradient, hessian, majoriser)

    def _add_curvature(self, hessian, p_BxK, powers, first):
        """Adds sum_r first_r * (second derivatives of the prediction) in place."""
        for i, (power, z) in enumerate(zip(powers, self.z_term_exp_R, strict=True)):
            if power is None:
                continue
            slope = first * power
            for at, z_R in z.items():
                cross = -(slope @ z_R)
                hessian[:, i, at] += cross
                hessian[:, at, i] += cross
                for other, z2_R in z.items():
                    hessian[:, at, other] += p_BxK[:, i] * (slope @ (z_R * z2_R))


class AutodiffProblem(Problem):
    """Any law, with derivatives by JAX in float64 (locally: the rest of the process stays as it was)."""

    def __init__(self, law, x, y, space, fixed=None, bounds=None):
        super().__init__(law, x, y, space, fixed, bounds)
        K = len(law.parameters)
        self.lower_K, self.upper_K = np.full(K, -np.inf), np.full(K, np.inf)
        for name in bounds or {}:
            self._bound(name)
        # coordinates of a law's own may mix parameters; to pin or bound one, each needs a coordinate
        self._plain = bool(self.fixed or bounds)
        self._to_solver, self._from_solver = coordinates(law, self._plain)
        for name, value in self.fixed.items():
            at = law.parameters.index(name)
            self.lower_K[at] = self.upper_K[at] = _log(value) if law._positive(name) else value

    def _bound(self, name: str):
        """A bound in the law's own parameter, as one of its plain coordinate (log where it is positive)."""
        low, high = self.bounds[name]
        if self.law._positive(name):
            if low < 0:
                raise FitError(
                    f"bounds of {name} are ({low:g}, {high:g}); {name} of {self.law.name} is positive, so "
                    "the lower one must be at least 0"
                )
            low, high = -math.inf if low == 0 else math.log(low), math.log(high)
        at = self.law.parameters.index(name)
        self.lower_K[at], self.upper_K[at] = low, high

    def to_params(self, p_BxK):
        params = self._from_solver(list(np.asarray(p_BxK).T), self.centre)
        return {k: np.asarray(v, float) for k, v in params.items()}

    def from_params(self, params):
        arrays = np.broadcast_arrays(*(np.atleast_1d(params[n]) for n in self.law.parameters))
        p = self._to_solver(dict(zip(self.law.parameters, arrays, strict=True)), self.centre)
        return np.stack([np.asarray(v, float) for v in p], 1)

    def traced(self, rows):
        """See ``Problem.traced``."""
        log_x = {v: z[rows] for v, z in self.log_x.items()}
        return LawLane(self.law, self._plain), (log_x, self.centre)

    def evaluate(self, p_BxK, weights_BxR, row_loss):
        return evaluate(self, p_BxK, weights_BxR, row_loss)


def _log(value: float) -> float:
    """A finite stand-in for log 0, whose exponential is 0."""
    return math.log(value) if value > 0 else -1000.0


def make_problem(law: Law, x, y, space: str = "log", fixed=None, bounds=None) -> Problem:
    """The NumPy problem for a sum of power terms, the autodiff one for every other law."""
    if space not in SPACES:
        raise FitError(f"space is {space!r}; it must be one of {', '.join(SPACES)}")
    kind = PowerSumProblem if isinstance(law, PowerSum) else AutodiffProblem
    return kind(law, x, y, space, fixed, bounds)


__all__ = [
    "ASYMMETRIC",
    "LOSSES",
    "NARROWED",
    "SPACES",
    "AutodiffProblem",
    "Evaluation",
    "PowerSumProblem",
    "Problem",
    "RowLoss",
    "make_problem",
]
