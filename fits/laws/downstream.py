"""Laws from a model's loss to its error on a benchmark."""

from __future__ import annotations

import itertools
import math
from typing import ClassVar

import numpy as np

from fits.bisection import bisect
from fits.laws.base import Centred, Law, Question


def _error(law, params, given):
    return {"error": law.predict(params, {"V": given["eval_loss"]})}


def _loss_for(law, params, given):
    """The loss at which the law gives an error, by bisection: every such law rises with the loss."""
    low, high = bisect(
        lambda loss: ~(law.predict(params, {"V": loss}) > given["error"]),
        np.zeros(len(next(iter(params.values())))),
        np.full(1, 30.0),
    )
    found = 0.5 * (low + high)
    inside = (found > 1e-9) & (found < 30.0 - 1e-9)
    return {"eval_loss": np.where(inside, found, np.nan)}


QUESTIONS = {
    "error": Question(
        "which error on the benchmark at a loss?",
        _error,
        needs={"eval_loss": "nats a token"},
        gives={"error": "on the benchmark"},
        ranges={"error": (0.0, 1.0)},
    ),
    "loss": Question(
        "which loss must a model reach for an error?",
        _loss_for,
        needs={"error": "on the benchmark"},
        gives={"eval_loss": "nats a token"},
    ),
}


class DownstreamExponential(Centred):
    """error = top - k exp(-gamma L): the error of guessing less what a lower loss earns.

    The fitted column is the error, in (0, 1]: map it to ``loss``. Units: L and 1 / gamma nats a token.
    """

    name = "downstream_exponential"
    formula = "error = top - k exp(-gamma L)"
    source = "Gadre et al. 2024, eq. 5 (arXiv:2403.08540)"
    variables = ("V",)
    parameters = ("top", "k", "gamma")
    bounds: ClassVar = dict.fromkeys(("top", "k", "gamma"), (0.0, math.inf))
    offset = None
    questions: ClassVar = QUESTIONS

    def predict(self, params, x, xp=np):
        return params["top"] - xp.exp(xp.log(params["k"]) - params["gamma"] * x["V"])

    def shifts(self, params, centre, xp=np):
        return {"k": params["gamma"] * xp.exp(centre["V"])}

    def starts(self, x, y):
        out = []
        for gamma in (0.3, 0.6, 1.0, 1.7, 3.0):
            columns = np.stack([np.ones(len(y)), -np.exp(-gamma * x["V"])], 1)
            top, k = np.linalg.lstsq(columns / y[:, None], np.ones(len(y)), rcond=None)[0]
            if top > 0 and k > 0:
                out.append({"top": float(top), "k": float(k), "gamma": gamma})
        return out or [{"top": float(y.max()), "k": 1.0, "gamma": 1.0}]


class DownstreamSigmoid(Law):
    """error = low + (top - low) / (1 + exp(-k (L - L0))): from the error of guessing down to the least.

    The fitted column is the error: map it to ``loss``. Units: L and L0 nats a token, k their inverse.
    """

    name = "downstream_sigmoid"
    formula = "error = low + (top - low) / (1 + exp(-k (L - L0)))"
    source = "Bhagia et al. 2024 (arXiv:2412.04403), written for the error"
    variables = ("V",)
    parameters = ("low", "top", "k", "L0")
    bounds: ClassVar = dict.fromkeys(("low", "top", "k", "L0"), (0.0, math.inf))
    offset = "low"
    questions: ClassVar = QUESTIONS

    def predict(self, params, x, xp=np):
        rise = 0.5 * (1.0 + xp.tanh(0.5 * params["k"] * (x["V"] - params["L0"])))
        return params["low"] + (params["top"] - params["low"]) * rise

    def starts(self, x, y):
        middle, width = float(np.median(x["V"])), max(float(np.ptp(x["V"])), 1e-3)
        grid = itertools.product((0.3, 0.7, 0.95), (1.02, 1.3), (2.0, 5.0, 12.0), (-0.25, 0.0, 0.25))
        return [
            {"low": a * y.min(), "top": t * y.max(), "k": k / width, "L0": middle + s * width}
            for a, t, k, s in grid
        ]
