"""The law of value-based reinforcement learning: data to reach a return, against updates a datum."""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from fits.bisection import bisect
from fits.laws.base import PowerSum, Question, Term

WIDEST = 60.0  # of log sigma


def _frontier(law, params, given):
    ratio = given["updates_per_datum"]
    data = law.predict(params, {"R": ratio})
    return {"data": data, "updates": ratio * data, "least_data": params["E"]}


def _budget(law, params, given):
    """The sigma that minimises D (price_datum + price_update sigma), by bisection in its log.

    Its slope times sigma^(1 + alpha) has one root. Infinite where ever more updates are ever cheaper.
    """
    datum, update = given["price_datum"], given["price_update"]
    E, K, alpha = (params[k] for k in ("E", "K", "alpha"))

    def falls(log_ratio):
        rise = E * np.exp((1 + alpha) * log_ratio) + (1 - alpha) * K * np.exp(log_ratio)
        return update * rise < alpha * K * datum

    _, high = bisect(falls, np.full(len(E), -WIDEST), np.full(1, WIDEST))
    ratio = np.where(high < WIDEST, np.exp(high), np.inf)
    data = law.predict(params, {"R": ratio})
    return {
        "updates_per_datum": ratio, "data": data, "updates": ratio * data,
        "cost": data * (datum + update * ratio),
    }  # fmt: skip


class UpdatesToData(PowerSum):
    """D_J = E + K / sigma^alpha, the environment steps that reach return J at sigma updates a step.

    K is beta^alpha of the paper's (beta / sigma)^alpha, and E its D_min. The fitted column is the number of
    environment steps: map it to ``loss``. Units: E and K environment steps.
    """

    name = "updates_to_data"
    formula = "D_J = E + K / sigma^alpha"
    source = "Rybkin et al. 2025 (arXiv:2502.04327)"
    terms = (Term("E"), Term("K", {"R": "alpha"}))
    questions: ClassVar = {
        "frontier": Question(
            "how much data and how many updates at a ratio of updates to data?",
            _frontier,
            needs={"updates_per_datum": "sigma"},
            gives={"data": "environment steps", "updates": "gradient steps", "least_data": "at any sigma"},
        ),
        "budget": Question(
            "which ratio reaches the return most cheaply, at given prices of a step and of an update?",
            _budget,
            needs={"price_datum": "of an environment step", "price_update": "of a gradient step"},
            gives={
                "updates_per_datum": "sigma", "data": "environment steps", "updates": "gradient steps",
                "cost": "of both, in the unit of the prices",
            },
        ),
    }  # fmt: skip
