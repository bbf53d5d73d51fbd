"""Updates to data: the published form, the frontier, and the cheapest ratio against a search."""

import numpy as np
import pytest

from fits.laws import get_law
from fits.planted import STUDIES

P = STUDIES["updates_to_data"][0]


def answered(question, **given):
    law = get_law("updates_to_data")
    got = law.questions[question].answer(law, {k: np.array([v]) for k, v in P.items()}, given)
    return {k: float(np.squeeze(v)) for k, v in got.items()}


def test_the_published_form():
    """D_min + (beta / sigma)^alpha, with beta = K^(1 / alpha)."""
    beta, sigma = P["K"] ** (1 / P["alpha"]), np.array([0.5, 2.0, 16.0])
    got = get_law("updates_to_data").predict(P, {"R": sigma})
    assert got == pytest.approx(P["E"] + (beta / sigma) ** P["alpha"], rel=1e-12)


def test_the_frontier_trades_data_for_updates():
    few, many = answered("frontier", updates_per_datum=1.0), answered("frontier", updates_per_datum=8.0)
    assert few["data"] > many["data"] > few["least_data"] == P["E"] and few["updates"] < many["updates"]


@pytest.mark.parametrize("price", [1.0, 0.1, 1e-3])
def test_the_cheapest_ratio(price):
    got = answered("budget", price_datum=1.0, price_update=price)
    sigma = np.geomspace(1e-2, 1e4, 400_001)
    cost = get_law("updates_to_data").predict(P, {"R": sigma}) * (1 + price * sigma)
    # the grid's step is 3.5e-5, and the cost is flat there
    assert got["updates_per_datum"] == pytest.approx(sigma[np.argmin(cost)], rel=1e-3)
    assert got["cost"] == pytest.approx(cost.min(), rel=1e-8)
    assert got["updates"] == pytest.approx(got["data"] * got["updates_per_datum"])


@pytest.mark.parametrize("price", [1e-9, 1e9])
def test_the_cheapest_ratio_at_prices_far_apart(price):
    got = answered("budget", price_datum=1.0, price_update=price)
    sigma = got["updates_per_datum"] * np.array([0.99, 1.0, 1.01])
    cost = get_law("updates_to_data").predict(P, {"R": sigma}) * (1 + price * sigma)
    assert cost[1] < cost[0] and cost[1] < cost[2]
    assert got["cost"] == pytest.approx(cost[1], rel=1e-12)


def test_dear_updates_mean_fewer():
    ratios = [
        answered("budget", price_datum=1.0, price_update=c)["updates_per_datum"] for c in (1, 0.1, 0.01)
    ]
    assert ratios == sorted(ratios)
