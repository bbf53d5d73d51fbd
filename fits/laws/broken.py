"""Smoothly broken power laws: one slope before a break, another after it."""

from __future__ import annotations

import itertools
import math
from typing import ClassVar

import numpy as np

from fits.laws.base import COLUMN_OF, EXPONENT_BOUNDS, Law, Question, linear_starts


def _slope(law, params, given):
    """The local exponent of the excess: c0 + c1 / (1 + (d / x)^(1 / f))."""
    name = COLUMN_OF[law.variables[0]]
    after = 1.0 / (1.0 + (params["d"] / given[name]) ** (1.0 / params["f"]))
    loss = law.predict(params, {law.variables[0]: given[name]})
    return {
        "exponent": params["c0"] + params["c1"] * after, "before": params["c0"],
        "after": params["c0"] + params["c1"], "break": params["d"], "past": after, "loss": loss,
    }  # fmt: skip


def _slope_in(column: str, unit: str) -> dict[str, Question]:
    return {
        "slope": Question(
            "how fast does the excess over E fall here, and where does that change?",
            _slope,
            needs={column: unit},
            gives={
                "exponent": "of the excess here", "before": "far below the break", "after": "far above it",
                "break": unit, "past": "share of the change that is behind", "loss": "the law's",
            },
        )
    }  # fmt: skip


class Broken(Law):
    """L = E + K x^-c0 (1 + (x/d)^(1/f))^(-c1 f): slope c0 far below x = d, c0 + c1 far above.

    Units: E and K the loss's; d in x's; f is the width of the break in log x. ``c1`` may be negative.
    """

    source = "Caballero et al. 2022, eq. 1 with one break (arXiv:2210.14891)"
    parameters = ("E", "K", "c0", "c1", "d", "f")
    bounds: ClassVar = {
        "E": (0.0, math.inf), "K": (0.0, math.inf), "c0": EXPONENT_BOUNDS, "c1": (-math.inf, math.inf),
        "d": (0.0, math.inf), "f": (0.0, math.inf),
    }  # fmt: skip

    def _decay(self, params, log_x, xp):
        """Log of the power factor."""
        beyond = xp.logaddexp(0.0, (log_x - xp.log(params["d"])) / params["f"])
        return -params["c0"] * log_x - params["c1"] * params["f"] * beyond

    def predict(self, params, x, xp=np):
        log_x = xp.log(x[self.variables[0]])
        return params["E"] + xp.exp(xp.log(params["K"]) + self._decay(params, log_x, xp))

    def to_solver(self, params, centre, xp=np):
        """The power at the mean row in place of K, and the break relative to the mean."""
        at = centre[self.variables[0]]
        head = [xp.log(params["E"]), xp.log(params["K"]) + self._decay(params, at, xp)]
        tail = [xp.log(params["d"]) - at, xp.log(params["f"])]
        return [*head, xp.log(params["c0"]), params["c1"], *tail]

    def from_solver(self, p, centre, xp=np):
        at = centre[self.variables[0]]
        out = {"E": xp.exp(p[0]), "c0": xp.exp(p[2]), "c1": p[3], "d": xp.exp(p[4] + at), "f": xp.exp(p[5])}
        return {**out, "K": xp.exp(p[1] - self._decay(out, at, xp))}

    def starts(self, x, y):
        log_x = np.log(x[self.variables[0]])
        breaks = np.exp(np.quantile(log_x, (0.2, 0.35, 0.5, 0.65, 0.8)))
        widths = 0.1 * np.ptp(log_x) * np.array((0.3, 1.0, 3.0))
        slopes = [(b, a - b) for b, a in itertools.product((0.05, 0.15, 0.3, 0.6), repeat=2) if a != b]

        def features(values):
            return {"E": np.ones(1), "K": np.exp(self._decay(values, log_x, np))}

        grid = [
            {"c0": c0, "c1": c1, "d": float(d), "f": float(f)}
            for (c0, c1), d, f in itertools.product(slopes, breaks, widths)
        ]
        return linear_starts(self, features, y, grid)


class BrokenD(Broken):
    """The broken power in tokens."""

    name = "broken_D"
    formula = "L = E + K D^-c0 (1 + (D/d)^(1/f))^(-c1 f)"
    variables = ("D",)
    questions = _slope_in("tokens", "training tokens or examples")
    # released with the paper: the noiseless simulation of 4-digit addition against examples (figure 4, right)
    PUBLISHED: ClassVar = {
        "E": 0.41388453071629455, "K": 2.2772722897737556, "c0": 0.055077348404973955,
        "c1": 5.662903816010331, "d": 612.5836172918001, "f": 0.059193036393742314,
    }  # fmt: skip


class BrokenC(Broken):
    """The broken power in compute."""

    name = "broken_C"
    formula = "L = E + K C^-c0 (1 + (C/d)^(1/f))^(-c1 f)"
    variables = ("C",)
    questions = _slope_in("flops", "training FLOPs")
