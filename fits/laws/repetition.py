"""Laws for when tokens run out: repeated tokens and surplus parameters are worth ever less."""

from __future__ import annotations

import itertools
import math
from typing import ClassVar

import numpy as np

from fits.errors import FitError
from fits.laws.base import EXPONENT_BOUNDS, Law, Question, linear_starts


def effective(unique, total, decay, xp=np):
    """What ``total`` is worth with only ``unique`` of it new: U + U R* (1 - exp(-R / R*)), R = total/U - 1.

    Muennighoff et al. 2023, eq. 5; ``total`` itself where it does not exceed ``unique``.
    """
    repeats = xp.maximum(total / unique - 1.0, 0.0)
    return xp.minimum(total, unique) * (1.0 + decay * (1.0 - xp.exp(-repeats / decay)))


def _worth(law, params, given):
    tokens, unique_tokens = given["tokens"], given["unique_tokens"]
    x = {"N": given["params"], "D": tokens, "U": unique_tokens}
    N, D = law.effective_sizes(params, x)
    return {
        "effective_tokens": D, "effective_epochs": D / unique_tokens, "share": D / tokens,
        "effective_params": N, "loss": law.predict(params, x),
    }  # fmt: skip


def _passes(law, params, given):
    """dD'/dD = exp(-(D/U - 1) / R_D)."""
    worth = given["worth"]
    if worth >= 1:
        raise FitError(f"worth is {worth:g}; it must be a share of a new token's worth, below 1")
    passes = 1.0 - params["R_D"] * math.log(worth)
    return {"passes": passes, "effective_epochs": effective(1.0, passes, params["R_D"])}


REPETITION_QUESTIONS = {
    "worth": Question(
        "what are these passes worth, in tokens that were all new?",
        _worth,
        needs={"params": "parameters", "tokens": "training tokens", "unique_tokens": "tokens before repeats"},
        gives={
            "effective_tokens": "tokens that, all new, are worth as much",
            "effective_epochs": "the same over unique_tokens", "share": "of what new tokens would be worth",
            "effective_params": "parameters", "loss": "the law's",
        },
    ),
    "passes": Question(
        "after how many passes is one more token worth only a share of a new one?",
        _passes,
        needs={},
        takes={"worth": (0.5, "that share")},
        gives={"passes": "over the data", "effective_epochs": "what they are worth, in new epochs"},
    ),
}  # fmt: skip


class DataConstrained(Law):
    """L = E + A / N'^alpha + B / D'^beta with U unique tokens.

    D' = U_D + U_D R_D (1 - exp(-(D/U_D - 1)/R_D)) with U_D = min(D, U), and N' likewise from U_N, the
    lesser of N and the size that is compute-optimal for U tokens. R_D and R_N are the numbers of
    repetitions after which more adds little. Units: N parameters, D and U tokens; E, A, B the loss's.
    """

    name = "data_constrained"
    formula = "L = E + A / N'^alpha + B / D'^beta, X' = U_X (1 + R_X (1 - exp(-(X/U_X - 1) / R_X)))"
    source = "Muennighoff et al. 2023, eqs. 5 and 6 (arXiv:2305.16264)"
    variables = ("N", "D", "U")
    parameters = ("E", "A", "B", "alpha", "beta", "R_N", "R_D")
    bounds: ClassVar = (
        dict.fromkeys(("E", "A", "B"), (0.0, math.inf))
        | dict.fromkeys(("alpha", "beta"), EXPONENT_BOUNDS)
        | dict.fromkeys(("R_N", "R_D"), (0.0, math.inf))
    )
    questions = REPETITION_QUESTIONS

    def exponents(self, params):
        return params["alpha"], params["beta"]

    def effective_sizes(self, params, x, xp=np):
        """N' and D'."""
        alpha, beta = self.exponents(params)
        # on 6ND = C the optimum has alpha A / N^alpha = beta B / D^beta; here with D = U
        log_best = xp.log(alpha * params["A"]) - xp.log(beta * params["B"]) + beta * xp.log(x["U"])
        unique_n = xp.minimum(xp.exp(log_best / alpha), x["N"])
        unique_d = xp.minimum(x["U"], x["D"])
        return (
            effective(unique_n, x["N"], params["R_N"], xp),
            effective(unique_d, x["D"], params["R_D"], xp),
        )

    def predict(self, params, x, xp=np):
        alpha, beta = self.exponents(params)
        N, D = self.effective_sizes(params, x, xp)
        size, data = xp.exp(-alpha * xp.log(N)), xp.exp(-beta * xp.log(D))
        return params["E"] + params["A"] * size + params["B"] * data

    def to_solver(self, params, centre, xp=np):
        """Log of each term at the mean row; plain logs of the rest."""
        alpha, beta = self.exponents(params)
        shift = {"A": alpha * centre["N"], "B": beta * centre["D"]}
        return [xp.log(params[k]) - shift.get(k, 0.0) for k in self.parameters]

    def from_solver(self, p, centre, xp=np):
        out = {k: xp.exp(v) for k, v in zip(self.parameters, p, strict=True)}
        alpha, beta = self.exponents(out)
        at = {k: p[i] for i, k in enumerate(self.parameters)}
        out["A"] = xp.exp(at["A"] + alpha * centre["N"])
        out["B"] = xp.exp(at["B"] + beta * centre["D"])
        return out

    def starts(self, x, y):
        def features(values):
            alpha, beta = self.exponents(values)
            D = effective(np.minimum(x["U"], x["D"]), x["D"], values["R_D"])
            return {"E": np.ones(1), "A": x["N"] ** -alpha, "B": D**-beta}

        grid = itertools.product(self._exponent_starts(), (3.0, 12.0, 50.0), (2.0, 8.0, 40.0))
        return linear_starts(self, features, y, [{**e, "R_D": d, "R_N": n} for e, d, n in grid])

    def _exponent_starts(self):
        values = (0.15, 0.25, 0.35, 0.5, 0.7)
        return [{"alpha": a, "beta": b} for a, b in itertools.product(values, values)]


class DataConstrainedTied(DataConstrained):
    """``data_constrained`` with beta = alpha, as published; ``PUBLISHED`` holds the paper's constants."""

    name = "data_constrained_tied"
    formula = "L = E + A / N'^alpha + B / D'^alpha, X' = U_X (1 + R_X (1 - exp(-(X/U_X - 1) / R_X)))"
    parameters = ("E", "A", "B", "alpha", "R_N", "R_D")
    bounds: ClassVar = {k: v for k, v in DataConstrained.bounds.items() if k != "beta"}
    # unrounded: the paper's rounded A, B and E move the fourth decimal of the loss
    PUBLISHED: ClassVar = {
        "E": math.exp(0.6254804), "A": math.exp(6.255414), "B": math.exp(7.3049974), "alpha": 0.3526596,
        "R_N": 5.309743, "R_D": 15.387756,
    }  # fmt: skip

    def exponents(self, params):
        return params["alpha"], params["alpha"]

    def _exponent_starts(self):
        return [{"alpha": a} for a in (0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4, 0.5, 0.6, 0.8)]
