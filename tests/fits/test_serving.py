"""The cheapest model to train and serve: published savings, and a search by brute force."""

import numpy as np
import pytest

import fits
from fits.laws import get_law
from fits.laws.serving import compute_optimal_tokens


@pytest.mark.parametrize("size, served, params, share", [(13e9, 2e12, 7e9, 0.17), (30e9, 1e13, 13.6e9, 0.28)])
def test_published_savings(size, served, params, share):
    got = fits.ask("chinchilla", "serve", params=size, inference_tokens=served)
    # printed with two and three figures
    assert got["params"] == pytest.approx(params, rel=6e-3)
    assert got["saved_share"] == pytest.approx(share, abs=5e-3)
    if size == 13e9:
        assert got["saved_flops"] == pytest.approx(1.7e22, rel=0.03)


def test_against_every_size():
    law, served = get_law("chinchilla"), 5e12
    p = law.PUBLISHED
    got = fits.ask("chinchilla", "serve", params=20e9, inference_tokens=served)
    N = np.geomspace(1e9, 1e11, 200_001)
    rest = got["loss"] - p["E"] - p["A"] / N ** p["alpha"]
    with np.errstate(invalid="ignore"):
        cost = 6 * N * (p["B"] / rest) ** (1 / p["beta"]) + 2 * N * served
    # a grid of 200,001 sizes finds the least cost, which is flat there, to far below 1e-6
    assert got["flops"] == pytest.approx(np.nanmin(cost), rel=1e-6)


def test_tokens_that_make_a_size_optimal():
    law = get_law("overtraining")
    p = {k: np.array([v]) for k, v in {"E": 1.84, "a": 212.0, "b": 367.0, "eta": 0.136}.items()}
    D = compute_optimal_tokens(law, p, 3e9)
    assert law.optimum(p, 6 * 3e9 * D)["N"] == pytest.approx([3e9], rel=1e-9)  # a bisection to rounding
    ratio = (D / 3e9).item()
    assert ratio == pytest.approx((367 / 212) ** (0.5 / 0.136), rel=1e-9)
