"""The law of over-training: loss against compute and tokens per parameter."""

from __future__ import annotations

import math
from typing import ClassVar

import numpy as np

from fits.laws.base import EXPONENT_BOUNDS, Law, balance, linear_starts
from fits.laws.serving import SERVE


class Overtraining(Law):
    """L = E + (a M^eta + b M^-eta) C^-eta with M = D/N and C = 6ND. Units: E in the loss's.

    The same surface as ``tied`` with alpha = 2 eta, A = a / 6^eta, B = b / 6^eta: at any fixed ratio M
    the excess loss falls with one slope, and over-training only moves the line up.
    """

    name = "overtraining"
    formula = "L = E + (a M^eta + b M^-eta) / C^eta, M = D/N, C = 6 N D"
    source = "Gadre et al. 2024, eq. 4 (arXiv:2403.08540)"
    parameters = ("E", "a", "b", "eta")
    bounds: ClassVar = dict.fromkeys(("E", "a", "b"), (0.0, math.inf)) | {"eta": EXPONENT_BOUNDS}
    questions: ClassVar = {"serve": SERVE}

    def predict(self, params, x, xp=np):
        log_m, log_c = xp.log(x["D"]) - xp.log(x["N"]), math.log(6) + xp.log(x["N"]) + xp.log(x["D"])
        size, data = (params["eta"] * (sign * log_m - log_c) for sign in (1.0, -1.0))
        return params["E"] + params["a"] * xp.exp(size) + params["b"] * xp.exp(data)

    def to_solver(self, params, centre, xp=np):
        """Log of each term at the mean row, so that coefficient and exponent are nearly independent."""
        eta = params["eta"]
        return [
            xp.log(params["E"]),
            xp.log(params["a"]) - eta * (math.log(6) + 2 * centre["N"]),
            xp.log(params["b"]) - eta * (math.log(6) + 2 * centre["D"]),
            xp.log(eta),
        ]

    def from_solver(self, p, centre, xp=np):
        eta = xp.exp(p[3])
        return {
            "E": xp.exp(p[0]),
            "a": xp.exp(p[1] + eta * (math.log(6) + 2 * centre["N"])),
            "b": xp.exp(p[2] + eta * (math.log(6) + 2 * centre["D"])),
            "eta": eta,
        }

    def starts(self, x, y):
        def features(values):
            eta = values["eta"]
            scale = 6.0**-eta
            return {"E": np.ones(1), "a": scale * x["N"] ** (-2 * eta), "b": scale * x["D"] ** (-2 * eta)}

        return linear_starts(self, features, y, [{"eta": eta} for eta in np.geomspace(0.03, 0.8, 24)])

    def compute_exponents(self, params):
        half = np.full(np.shape(params["eta"]), 0.5)[()]
        return {"a": half, "b": half}

    def optimum(self, params, budget):
        """By the coefficients of ``tied``; at the optimum M = (b / a)^(1 / 2 eta), whatever the budget."""
        scale, alpha = 6.0 ** -params["eta"], 2 * params["eta"]
        N, D = balance(scale * params["a"], alpha, scale * params["b"], alpha, budget)
        return {"N": N, "D": D, "loss": self.predict(params, {"N": N, "D": D})}
