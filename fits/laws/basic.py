"""The laws of size, data and compute: Chinchilla and its kin, Kaplan, and single powers."""

from __future__ import annotations

import math
from typing import ClassVar

import numpy as np

from fits.laws.base import EXPONENT_BOUNDS, Law, PowerSum, Term, balance
from fits.laws.serving import SERVE


class Chinchilla(PowerSum):
    """L = E + A / N^alpha + B / D^beta. Units: E, A, B in the loss's; N parameters, D tokens."""

    name = "chinchilla"
    formula = "L = E + A / N^alpha + B / D^beta"
    source = "Hoffmann et al. 2022, eq. 2 (arXiv:2203.15556)"
    terms = (Term("E"), Term("A", {"N": "alpha"}), Term("B", {"D": "beta"}))
    questions: ClassVar = {"serve": SERVE}
    # the exponents with the third figure that the paper's text rounds away
    PUBLISHED: ClassVar = {"E": 1.69, "A": 406.4, "B": 410.7, "alpha": 0.336, "beta": 0.283}

    def compute_exponents(self, params):
        total = params["alpha"] + params["beta"]
        return {"a": params["beta"] / total, "b": params["alpha"] / total}

    def optimum(self, params, budget):
        N, D = balance(params["A"], params["alpha"], params["B"], params["beta"], budget)
        return {"N": N, "D": D, "loss": self.predict(params, {"N": N, "D": D})}


class Tied(PowerSum):
    """Chinchilla with one exponent, so that N* and D* both grow as C^0.5."""

    name = "tied"
    formula = "L = E + A / N^alpha + B / D^alpha"
    source = "Muennighoff et al. 2023 (arXiv:2305.16264), who set alpha = beta"
    terms = (Term("E"), Term("A", {"N": "alpha"}), Term("B", {"D": "alpha"}))
    questions: ClassVar = {"serve": SERVE}

    def compute_exponents(self, params):
        half = np.full(np.shape(params["alpha"]), 0.5)[()]
        return {"a": half, "b": half}

    def optimum(self, params, budget):
        N, D = balance(params["A"], params["alpha"], params["B"], params["alpha"], budget)
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
