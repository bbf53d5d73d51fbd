"""The library of laws: one small class each, with its formula, its source and its units.

Variables are N (parameters), D (training tokens) and C (training FLOPs); L is the loss in the
table's own unit (nats a token where the table says nothing else). A sum of power terms needs
only its list of terms; every other law needs ``predict`` and ``starts``.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np

from fits.errors import FitError

COLUMN_OF = {"N": "params", "D": "tokens", "C": "flops"}
EXPONENT_BOUNDS = (1e-3, 10.0)  # beyond either end a power of N or D is a constant or a step


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


def _balance(A, alpha, B, beta, budget) -> tuple[Any, Any]:
    """N and D that minimise A/N^alpha + B/D^beta on 6ND = budget (Hoffmann et al. 2022, eq. 4)."""
    log_g = (np.log(alpha * A) - np.log(beta * B)) / (alpha + beta)
    log_nd = np.log(np.asarray(budget, float) / 6.0)
    log_n = log_g + beta / (alpha + beta) * log_nd
    return np.exp(log_n), np.exp(log_nd - log_n)


class Chinchilla(PowerSum):
    """L = E + A / N^alpha + B / D^beta. Units: E, A, B in the loss's; N parameters, D tokens."""

    name = "chinchilla"
    formula = "L = E + A / N^alpha + B / D^beta"
    source = "Hoffmann et al. 2022, eq. 2 (arXiv:2203.15556)"
    terms = (Term("E"), Term("A", {"N": "alpha"}), Term("B", {"D": "beta"}))

    def compute_exponents(self, params):
        total = params["alpha"] + params["beta"]
        return {"a": params["beta"] / total, "b": params["alpha"] / total}

    def optimum(self, params, budget):
        N, D = _balance(params["A"], params["alpha"], params["B"], params["beta"], budget)
        return {"N": N, "D": D, "loss": self.predict(params, {"N": N, "D": D})}


class Tied(PowerSum):
    """Chinchilla with one exponent, so that N* and D* both grow as C^0.5."""

    name = "tied"
    formula = "L = E + A / N^alpha + B / D^alpha"
    source = "Muennighoff et al. 2023 (arXiv:2305.16264), who set alpha = beta"
    terms = (Term("E"), Term("A", {"N": "alpha"}), Term("B", {"D": "alpha"}))

    def compute_exponents(self, params):
        half = np.full(np.shape(params["alpha"]), 0.5)[()]
        return {"a": half, "b": half}

    def optimum(self, params, budget):
        N, D = _balance(params["A"], params["alpha"], params["B"], params["alpha"], budget)
        return {"N": N, "D": D, "loss": self.predict(params, {"N": N, "D": D})}


class Kaplan(Law):
    """L = ((Nc / N)^(alphaN / alphaD) + Dc / D)^alphaD. Units: Nc parameters, Dc tokens; no floor."""

    name = "kaplan"
    formula = "L = ((Nc / N)^(alphaN / alphaD) + Dc / D)^alphaD"
    source = "Kaplan et al. 2020, eq. 1.5 (arXiv:2001.08361)"
    parameters = ("Nc", "Dc", "alphaN", "alphaD")
    bounds: ClassVar = {"Nc": (0.0, math.inf), "Dc": (0.0, math.inf)} | dict.fromkeys(
        ("alphaN", "alphaD"), EXPONENT_BOUNDS
    )
    offset = None

    def predict(self, params, x, xp=np):
        ratio = params["alphaN"] / params["alphaD"]
        size = xp.exp(ratio * (xp.log(params["Nc"]) - xp.log(x["N"])))
        data = xp.exp(xp.log(params["Dc"]) - xp.log(x["D"]))
        return xp.exp(params["alphaD"] * xp.log(size + data))

    def to_solver(self, params, centre, xp=np):
        """Log of both inner terms at the mean row, then log exponents: near-independent directions."""
        ratio = params["alphaN"] / params["alphaD"]
        size = ratio * (xp.log(params["Nc"]) - centre["N"])
        return [size, xp.log(params["Dc"]) - centre["D"], xp.log(params["alphaN"]), xp.log(params["alphaD"])]

    def from_solver(self, p, centre, xp=np):
        alpha_n, alpha_d = xp.exp(p[2]), xp.exp(p[3])
        log_nc = p[0] * alpha_d / alpha_n + centre["N"]
        return {"Nc": xp.exp(log_nc), "Dc": xp.exp(p[1] + centre["D"]), "alphaN": alpha_n, "alphaD": alpha_d}

    def starts(self, x, y):
        """For fixed exponents L^(1/alphaD) is linear in two coefficients: least squares on a grid."""
        out = []
        for alpha_d in (0.03, 0.06, 0.12, 0.25, 0.5, 1.0):
            target = np.exp(np.log(y) / alpha_d - np.mean(np.log(y)) / alpha_d)
            for ratio in (0.3, 0.6, 1.0, 1.6, 3.0):
                log_size, log_data = -ratio * np.log(x["N"]), -np.log(x["D"])
                shift = log_size.mean(), log_data.mean()
                columns = np.stack([np.exp(log_size - shift[0]), np.exp(log_data - shift[1])], 1)
                coefficients = np.linalg.lstsq(columns / target[:, None], np.ones(len(y)), rcond=None)[0]
                size, data = np.log(np.maximum(coefficients, 1e-3)) + np.mean(np.log(y)) / alpha_d - shift
                Nc, Dc = np.exp(np.clip([size / ratio, data], -600.0, 600.0))  # float64 ends at e^709
                out.append({"Nc": Nc, "Dc": Dc, "alphaN": ratio * alpha_d, "alphaD": alpha_d})
        return out

    def compute_exponents(self, params):
        ratio = params["alphaN"] / params["alphaD"]
        return {"a": 1.0 / (1.0 + ratio), "b": ratio / (1.0 + ratio)}

    def optimum(self, params, budget):
        """The inner sum is a power sum with exponents alphaN / alphaD and 1, and L grows with it."""
        ratio = params["alphaN"] / params["alphaD"]
        log_g = (np.log(ratio) + ratio * np.log(params["Nc"]) - np.log(params["Dc"])) / (1.0 + ratio)
        log_nd = np.log(np.asarray(budget, float) / 6.0)
        log_n = log_g + log_nd / (1.0 + ratio)
        N, D = np.exp(log_n), np.exp(log_nd - log_n)
        return {"N": N, "D": D, "loss": self.predict(params, {"N": N, "D": D})}


class PowerN(PowerSum):
    """L = E + A / N^alpha: the loss against size alone, for runs with data to spare."""

    name = "power_N"
    formula = "L = E + A / N^alpha"
    source = "Henighan et al. 2020, eq. 1.1 (arXiv:2010.14701)"
    terms = (Term("E"), Term("A", {"N": "alpha"}))


class PowerD(PowerSum):
    """L = E + B / D^beta: the loss against data alone, at one size or with size to spare."""

    name = "power_D"
    formula = "L = E + B / D^beta"
    source = "Henighan et al. 2020, eq. 1.1 (arXiv:2010.14701)"
    terms = (Term("E"), Term("B", {"D": "beta"}))


class PowerC(PowerSum):
    """L = E + K / C^gamma: the loss along a compute frontier."""

    name = "power_C"
    formula = "L = E + K / C^gamma"
    source = "Henighan et al. 2020, eq. 1.1 (arXiv:2010.14701)"
    terms = (Term("E"), Term("K", {"C": "gamma"}))


class Product(PowerSum):
    """L = E + K / (N^alpha D^beta): one term that both variables shrink together."""

    name = "product"
    formula = "L = E + K / (N^alpha D^beta)"
    source = "Zhang et al. 2024, eq. 1 (arXiv:2402.17193)"
    terms = (Term("E"), Term("K", {"N": "alpha", "D": "beta"}))


LAWS: dict[str, Law] = {
    law.name: law for law in (Chinchilla(), Tied(), Kaplan(), PowerN(), PowerD(), PowerC(), Product())
}


def law_names() -> list[str]:
    """The names that ``get_law`` knows."""
    return list(LAWS)


def get_law(law: str | Law) -> Law:
    """The law of that name; a ``Law`` passes through.

    Raises:
      FitError: an unknown name.
    """
    if isinstance(law, Law):
        return law
    if law not in LAWS:
        raise FitError(f"law is {law!r}; it must be one of {', '.join(LAWS)}, or a fits.Law object")
    return LAWS[law]
