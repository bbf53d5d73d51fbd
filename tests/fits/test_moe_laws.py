"""Mixtures of experts: the published table of optima through the question, and the published leverage."""

import itertools

import numpy as np
import pytest

import fits
from fits.laws import get_law
from fits.laws.moe import shape_cost

# FLOPs, active parameters, granularity, tokens, loss (None: not at hand), as printed for an expansion of 64
TABLE = [
    (2.95e18, 100e6, 8, 4.37e9, None),
    (1.93e20, 1e9, 16, 28.94e9, None),
    (6.46e21, 7e9, 32, 137.60e9, 2.076),
    (4.97e25, 1e12, 64, 7.94e12, 1.367),
]


@pytest.mark.parametrize("flops, active, granularity, tokens, loss", TABLE)
def test_published_optima(flops, active, granularity, tokens, loss):
    got = fits.ask("fine_grained", "granularity", flops=flops)
    # the table tries powers of two: the continuous optimum lies nearest to the one printed
    assert 2 ** np.round(np.log2(got["granularity"])) == granularity
    # constants of two or three figures move the optimum along a flat valley
    assert got["active_params"] == pytest.approx(active, rel=0.05)
    assert got["tokens"] == pytest.approx(tokens, rel=0.07)
    assert got["loss"] < got["loss_at_1"]


@pytest.mark.parametrize("flops, active, granularity, tokens, loss", TABLE)
def test_published_shapes_cost_what_is_printed(flops, active, granularity, tokens, loss):
    width = (active * 64 / 12) ** (1 / 3)
    total, again, per_token = shape_cost(width, granularity, 64.0)
    assert again == pytest.approx(active, rel=1e-12) and total == pytest.approx(active * 516 / 12, rel=1e-12)
    assert per_token * tokens == pytest.approx(flops, rel=5e-3)  # printed with three figures
    if loss is not None:  # within what the rounding of the printed constants allows
        law, p = get_law("fine_grained"), get_law("fine_grained").PUBLISHED
        half = {"E": 0.005, "A": 0.05, "K": 0.05, "B": 0.05, "alpha": 5e-4, "gamma": 0.005, "beta": 5e-4}
        corners = [
            law.predict({k: p[k] + s * half[k] for k, s in zip(p, signs, strict=True)},
                        {"N": total, "D": tokens, "G": granularity})
            for signs in itertools.product((-1, 1), repeat=len(p))
        ]  # fmt: skip
        assert min(corners) < loss < max(corners) and max(corners) - min(corners) < 0.1


def test_coarse_experts_are_never_best():
    got = [fits.ask("fine_grained", "granularity", flops=c)["granularity"] for c in (1e17, 1e20, 1e23, 1e26)]
    assert min(got) > 2 and got == sorted(got)


def test_the_search_against_a_grid():
    law, p = get_law("fine_grained"), get_law("fine_grained").PUBLISHED
    got = fits.ask("fine_grained", "granularity", flops=1e20)
    width, G = np.meshgrid(np.geomspace(500, 10_000, 1500), np.geomspace(4, 64, 600), indexing="ij")
    total, _, per_token = shape_cost(width, G, 64.0)
    loss = law.predict(p, {"N": total, "D": 1e20 / per_token, "G": G})
    at = np.unravel_index(np.argmin(loss), loss.shape)
    # the grid's step in G is 0.5 %, and the valley is flat
    assert got["granularity"] == pytest.approx(G[at], rel=0.02)
    assert got["loss"] == pytest.approx(loss[at], rel=1e-6)


def test_published_leverage():
    """Over seven at 3.1 % of the experts, granularity 12 and 1e22 FLOPs; the best granularity is 8 to 12."""
    got = fits.ask("leverage", "leverage", active_share=0.031, granularity=12, flops=1e22)
    assert 7.0 < got["leverage"] < 7.5
    best = fits.ask("leverage", "granularity", active_share=0.031, flops=1e22)
    assert 8 <= best["granularity"] <= 12 and best["leverage"] >= got["leverage"]
    # with X + X0 above 1 the same granularity has the least leverage, and none the most
    assert fits.ask("leverage", "granularity", active_share=1, flops=1e22)["granularity"] is None
