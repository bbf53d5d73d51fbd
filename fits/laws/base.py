"""What a law is. A sum of power terms needs only its list of terms; any other ``predict`` and ``starts``."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

COLUMN_OF = {
    "N": "params", "D": "tokens", "C": "flops", "U": "unique_tokens", "S": "steps", "B": "batch_tokens",
    "P": "weight_bits", "Pa": "activation_bits", "Pc": "cache_bits", "T": "tokens_per_param_byte",
    "G": "granularity", "X": "active_share", "Na": "average_params", "D1": "dense_tokens", "K": "samples",
    "M": "members", "V": "eval_loss", "R": "updates_per_datum", "I": "input_tokens", "O": "output_tokens",
    "Q": "batch_per_sigma", "Nr": "recurrent_params", "J": "iterations",
}  # fmt: skip
EXPONENT_BOUNDS = (1e-3, 10.0)  # beyond either end a power of N or D is a constant or a step


@dataclasses.dataclass(frozen=True)
class Question:
    """What a law can be asked beyond its loss; ``fits.ask`` answers it with intervals.

    Attributes:
      asks: the question in words.
      answer: (law, parameters as arrays [B], {name given: number or list}) -> {quantity: values [B]}.
      needs: what must be given: name -> what it is, with its unit.
      takes: what may be given: name -> (default, what it is).
      gives: quantity -> what it is, with its unit, in the order of print.
      many: names of which a list may be given.
      ranges: quantity -> the least and the greatest that it can be; an answer beyond them is flagged.
    """

    asks: str
    answer: Callable[..., Mapping[str, Any]]
    needs: Mapping[str, str]
    gives: Mapping[str, str]
    takes: Mapping[str, tuple[Any, str]] = dataclasses.field(default_factory=dict)
    many: tuple[str, ...] = ()
    ranges: Mapping[str, tuple[float, float]] = dataclasses.field(default_factory=dict)


class Law:
    """A functional form with named parameters.

    Subclasses set ``name, formula, source, variables, parameters`` and define ``predict``; a law
    that is no sum of power terms also defines ``starts``.
    """

    name: str = ""
    formula: str = ""
    source: str = ""
    variables: tuple[str, ...] = ("N", "D")
    parameters: tuple[str, ...] = ()
    bounds: Mapping[str, tuple[float, float]] = {}
    offset: str | None = "E"  # the parameter that the loss approaches when every variable grows
    questions: Mapping[str, Question] = {}
    PUBLISHED: Mapping[str, float] | None = None  # the source's own constants, those that are known

    def predict(self, params: Mapping[str, Any], x: Mapping[str, Any], xp=np):
        """The loss; ``params`` and ``x`` hold what broadcasts, ``xp`` is numpy or jax.numpy."""
        raise NotImplementedError

    def starts(self, x: Mapping[str, np.ndarray], y: np.ndarray) -> list[dict[str, float]]:
        """Starting points for the solver, in the law's own parameters."""
        raise NotImplementedError

    def to_solver(self, params: Mapping[str, Any], centre: Mapping[str, float], xp=np) -> list:
        """Solver coordinates (log of positive parameters unless the law knows better)."""
        return [xp.log(params[k]) if self._positive(k) else params[k] for k in self.parameters]

    def from_solver(self, p: Sequence, centre: Mapping[str, float], xp=np) -> dict[str, Any]:
        """The inverse of ``to_solver``."""
        return {k: xp.exp(v) if self._positive(k) else v for k, v in zip(self.parameters, p, strict=True)}

    def _positive(self, name: str) -> bool:
        return self.bounds.get(name, (-math.inf, math.inf))[0] >= 0

    def compute_exponents(self, params: Mapping[str, Any]) -> dict[str, Any]:
        """``{"a", "b"}`` of N* ~ C^a and D* ~ C^b under C = 6ND; ``{}`` where the law has no such powers."""
        return {}

    def optimum(self, params: Mapping[str, Any], budget: Any) -> dict[str, Any] | None:
        """Closed-form ``{"N", "D", "loss"}`` at C = 6ND = ``budget``, or None where there is none."""
        return None

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.formula})"


class Centred(Law):
    """A law whose coefficients are told apart from its exponents by reading each term at the mean row.

    ``shifts`` gives, for a coefficient, what is added to the log of its term at the mean row to get the log
    of the coefficient; it may use every parameter that has no shift itself.
    """

    def shifts(self, params: Mapping[str, Any], centre: Mapping[str, float], xp=np) -> dict[str, Any]:
        raise NotImplementedError

    def to_solver(self, params, centre, xp=np):
        shift = self.shifts(params, centre, xp)
        plain = Law.to_solver(self, params, centre, xp)
        return [v - shift.get(k, 0.0) for k, v in zip(self.parameters, plain, strict=True)]

    def from_solver(self, p, centre, xp=np):
        plain = Law.from_solver(self, p, centre, xp)
        shift = self.shifts(plain, centre, xp)
        return {k: v * xp.exp(shift[k]) if k in shift else v for k, v in plain.items()}


@dataclasses.dataclass(frozen=True)
class Term:
    """``coefficient * prod(x ** -exponent)``; ``powers`` maps a variable to its exponent's name."""

    coefficient: str
    powers: Mapping[str, str] = dataclasses.field(default_factory=dict)


class PowerSum(Law):
    """A sum of power terms: linear in the coefficients once the exponents are known."""

    terms: tuple[Term, ...] = ()

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        names = [t.coefficient for t in cls.terms]
        exponents = list(dict.fromkeys(e for t in cls.terms for e in t.powers.values()))
        cls.parameters = (*names, *exponents)
        cls.variables = tuple(dict.fromkeys(v for t in cls.terms for v in t.powers))
        cls.bounds = {n: (0.0, math.inf) for n in names} | {e: EXPONENT_BOUNDS for e in exponents}

    def predict(self, params, x, xp=np):
        total = 0.0
        for term in self.terms:
            power = sum(params[e] * xp.log(x[v]) for v, e in term.powers.items())
            total = total + params[term.coefficient] * (xp.exp(-power) if term.powers else 1.0)
        return total


def balance(A, alpha, B, beta, budget) -> tuple[Any, Any]:
    """N and D that minimise A/N^alpha + B/D^beta on 6ND = budget (Hoffmann et al. 2022, eq. 4)."""
    log_g = (np.log(alpha * A) - np.log(beta * B)) / (alpha + beta)
    log_nd = np.log(np.asarray(budget, float) / 6.0)
    log_n = log_g + beta / (alpha + beta) * log_nd
    return np.exp(log_n), np.exp(log_nd - log_n)


def linear_starts(law, features, y, fixed_values) -> list[dict[str, float]]:
    """Starts of a law that is linear in its coefficients once the other parameters are given.

    Args:
      features: of the given values, {coefficient: column [R]}; least squares on relative residuals.
      fixed_values: dicts of the other parameters.
    """
    out = []
    for values in fixed_values:
        columns = features(values)
        matrix = np.stack([np.broadcast_to(c, y.shape) for c in columns.values()], 1)
        scale = np.linalg.norm(matrix / y[:, None], axis=0)
        scale = np.where(np.isfinite(scale) & (scale > 0), scale, 1.0)
        matrix = np.nan_to_num(matrix / y[:, None] / scale)
        best = np.linalg.lstsq(matrix, np.ones(len(y)), rcond=None)[0]
        # a start must lie inside the bounds, where every coefficient is positive
        best = np.maximum(best, 1e-2 * np.abs(best).max()) / scale
        out.append({**dict(zip(columns, map(float, best), strict=True)), **values})
    return out
