"""The law of inference energy: joules a request of given input and output lengths."""

from __future__ import annotations

import math
from typing import ClassVar

import numpy as np

from fits.laws.base import Law, Question


def _sweet(law, params, given):
    """J / O = (c0 + ci I + cii I^2) / O + co + coi I + coo O is least where its outer terms are equal."""
    length = given["input_tokens"]
    fixed = params["c0"] + params["ci"] * length + params["cii"] * length**2
    best = np.sqrt(fixed / params["coo"])
    energy = law.predict(params, {"I": length, "O": best})
    return {"output_tokens": best, "joules": energy, "joules_per_token": energy / best}


def _energy(law, params, given):
    energy = law.predict(params, {"I": given["input_tokens"], "O": given["output_tokens"]})
    return {"joules": energy, "joules_per_token": energy / given["output_tokens"]}


class Energy(Law):
    """J = c0 + ci I + cii I^2 + co O + coi I O + coo O^2 for I tokens in and O tokens out.

    What a transformer does: I products of weights and activations and I^2 of attention in the prefill; in the
    decoding each of O tokens reads the weights and a cache of I + O / 2 tokens. The fitted column is the
    energy: map it to ``loss``. Units: joules a request.
    """

    name = "energy"
    formula = "J = c0 + ci I + cii I^2 + co O + coi I O + coo O^2"
    source = "after Pizzini Cavagna et al. 2026 (arXiv:2602.05695); form unverified"
    variables = ("I", "O")
    parameters = ("c0", "ci", "cii", "co", "coi", "coo")
    bounds: ClassVar = dict.fromkeys(parameters, (0.0, math.inf))
    offset = None
    questions: ClassVar = {
        "sweet_spot": Question(
            "which output length costs the least energy a token, for an input length?",
            _sweet,
            needs={"input_tokens": "of a request"},
            gives={
                "output_tokens": "of a request", "joules": "a request", "joules_per_token": "of output",
            },
        ),
        "energy": Question(
            "how much energy for a request?",
            _energy,
            needs={"input_tokens": "of a request", "output_tokens": "of a request"},
            gives={"joules": "a request", "joules_per_token": "of output"},
        ),
    }  # fmt: skip

    def columns(self, x) -> dict:
        ones = 1.0 + 0.0 * x["I"]
        return {
            "c0": ones, "ci": x["I"], "cii": x["I"] ** 2, "co": x["O"], "coi": x["I"] * x["O"],
            "coo": x["O"] ** 2,
        }  # fmt: skip

    def predict(self, params, x, xp=np):
        return sum(params[k] * v for k, v in self.columns(x).items())

    def starts(self, x, y):
        """Non-negative least squares on relative residuals, and two moved away from it."""
        from scipy.optimize import nnls

        matrix = np.stack(list(self.columns(x).values()), 1) / y[:, None]
        scale = np.linalg.norm(matrix, axis=0)
        best = nnls(matrix / scale, np.ones(len(y)))[0]
        best = np.maximum(best, 1e-3 * best.max()) / scale  # a start lies inside the bounds
        start = dict(zip(self.parameters, map(float, best), strict=True))
        return [start] + [{k: v * f ** (i % 2) for i, (k, v) in enumerate(start.items())} for f in (0.5, 2.0)]
