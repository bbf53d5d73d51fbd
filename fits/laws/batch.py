"""The three-term law in size, steps and batch."""

from __future__ import annotations

import itertools
import math
from typing import ClassVar

import numpy as np

from fits.laws.base import EXPONENT_BOUNDS, Law, Question, linear_starts


def _trade(law, params, given):
    """Hyperbola of steps and tokens: S = S_min (1 + B_crit / B), D = B S."""
    batch, waste = given["batch_tokens"], 1.0 + params["B_crit"] / given["batch_tokens"]
    loss = law.predict(params, {"N": given["params"], "S": given["steps"], "B": batch})
    return {
        "critical_batch": params["B_crit"], "least_steps": given["steps"] / waste,
        "least_tokens": given["steps"] / waste * params["B_crit"], "loss": loss,
        "steps_at_critical": 2.0 * given["steps"] / waste,
    }  # fmt: skip


class StepsBatch(Law):
    """L = E + A / N^alpha + K / S_min^gamma with S_min = S / (1 + B_crit / B).

    S steps at batch B do the work of S_min steps at a batch far above the critical one. B_crit is held
    constant over the table (Kaplan et al. let it grow as the loss falls; it drifts slowly). Units: B and
    B_crit tokens, E, A, K the loss's.
    """

    name = "steps_batch"
    formula = "L = E + A / N^alpha + K / (S / (1 + B_crit / B))^gamma"
    source = "Kaplan et al. 2020, eqs. 5.4 and 5.6 (arXiv:2001.08361), after arXiv:1812.06162"
    variables = ("N", "S", "B")
    parameters = ("E", "A", "K", "alpha", "gamma", "B_crit")
    bounds: ClassVar = dict.fromkeys(("E", "A", "K", "B_crit"), (0.0, math.inf)) | dict.fromkeys(
        ("alpha", "gamma"), EXPONENT_BOUNDS
    )

    questions: ClassVar = {
        "trade": Question(
            "how few steps, or how few tokens, at other batches for the same loss?",
            _trade,
            needs={"params": "parameters", "steps": "of the run", "batch_tokens": "tokens a step of the run"},
            gives={
                "critical_batch": "tokens a step: twice the least steps at twice the least tokens",
                "least_steps": "at batches far above it", "least_tokens": "at batches far below it",
                "steps_at_critical": "at the critical batch", "loss": "of all these",
            },
        )
    }  # fmt: skip

    def predict(self, params, x, xp=np):
        log_steps = xp.log(x["S"]) - xp.log1p(params["B_crit"] / x["B"])
        size = xp.exp(-params["alpha"] * xp.log(x["N"]))
        return params["E"] + params["A"] * size + params["K"] * xp.exp(-params["gamma"] * log_steps)

    def to_solver(self, params, centre, xp=np):
        """Log of each term at the mean row; B_crit relative to the mean batch."""
        shift = {
            "A": params["alpha"] * centre["N"],
            "K": params["gamma"] * centre["S"],
            "B_crit": centre["B"],
        }
        return [xp.log(params[k]) - shift.get(k, 0.0) for k in self.parameters]

    def from_solver(self, p, centre, xp=np):
        out = {k: xp.exp(v) for k, v in zip(self.parameters, p, strict=True)}
        out["A"] = xp.exp(p[1] + out["alpha"] * centre["N"])
        out["K"] = xp.exp(p[2] + out["gamma"] * centre["S"])
        out["B_crit"] = xp.exp(p[5] + centre["B"])
        return out

    def starts(self, x, y):
        def features(values):
            steps = x["S"] / (1.0 + values["B_crit"] / x["B"])
            return {"E": np.ones(1), "A": x["N"] ** -values["alpha"], "K": steps ** -values["gamma"]}

        middle = float(np.exp(np.log(x["B"]).mean()))
        exponents = (0.15, 0.3, 0.5, 0.8)
        grid = [
            {"alpha": a, "gamma": g, "B_crit": middle * k}
            for a, g, k in itertools.product(exponents, exponents, (0.03, 0.3, 3.0, 30.0))
        ]
        return linear_starts(self, features, y, grid)
