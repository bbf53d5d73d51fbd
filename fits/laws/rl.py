"""The law of value-based reinforcement learning: data to reach a return, against updates a datum."""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from fits.laws.base import PowerSum, Question, Term


def _frontier(law, params, given):
    ratio = given["updates_per_datum"]
    data = law.predict(params, {"R": ratio})
    return {"data": data, "updates": ratio * data, "least_data": params["E"]}


def _budget(law, params, given):
    """The sigma that minimises D (price_data + price_update sigma), by a search over its log."""
    from fits.search import vertex  # it reads the laws

    datum, update = given["price_datum"], given["price_update"]
    wide = {k: v[:, None] for k, v in params.items()}
    grid = np.broadcast_to(np.linspace(np.log(1e-3), np.log(1e5), 401), (len(params["E"]), 401))

    def cost(log_ratio):
        ratio = np.exp(log_ratio)
        return law.predict(wide, {"R": ratio}) * (datum + update * ratio)

    for _ in range(2):
        at = vertex(grid, cost(grid), np.argmin(cost(grid), 1))
        grid = at[:, None] + (grid[:, 1] - grid[:, 0])[:, None] / 200 * np.arange(-200, 201)
    ratio = np.exp(vertex(grid, cost(grid), np.argmin(cost(grid), 1)))
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
