"""Speed-ups and crossovers that are known exactly."""

import json
import math

import numpy as np
import pytest
from benchmark_script import load_script
from fits_tables import PLANTED, planted_table

from fits import FitError, fit_table
from fits.compare import compare


def faster(k):
    """The planted surface as if all compute were multiplied by k: N and D each by sqrt(k)."""
    p = dict(PLANTED)
    return p | {"A": p["A"] * k ** (-p["alpha"] / 2), "B": p["B"] * k ** (-p["beta"] / 2)}


def fitted(p=None, noise=0.0, seed=0, bootstraps=0, **options):
    table = planted_table(noise=noise, seed=seed, p=p)
    return fit_table(table, bootstraps=bootstraps, sensitivity=False, **options)


def test_a_known_speedup_is_recovered_at_every_budget():
    got = compare(fitted(), fitted(faster(1.5)), [1e18, 1e21, 1e24])
    for row in got.speedups:
        # the fits are exact to about 1e-9 of the loss, and 1 % of compute moves it by about 1e-3
        assert row["speedup"]["estimate"] == pytest.approx(1.5, rel=1e-6)
    assert got.crossover["budgets"] == [] and "B is the better throughout" in got.crossover["text"]
    assert any(f["code"] == "far_extrapolation" for f in got.flags)
    assert "no draws" in got.method
    back = compare(fitted(faster(1.5)), fitted(), 1e21)
    assert back.speedups[0]["speedup"]["estimate"] == pytest.approx(1 / 1.5, rel=1e-6)


def test_a_flop_function_that_costs_half_is_a_speedup_of_two():
    """The searched frontier against the closed form: the same surface, trained at half the cost."""
    fit = fitted()
    got = compare(fit, fit, 1e21, flops_a=lambda N, D: 6 * N * D, flops_b=lambda N, D: 3 * N * D)
    # searched to 1e-9 in log N, interpolated between 49 budgets by a cubic
    assert got.speedups[0]["speedup"]["estimate"] == pytest.approx(2.0, rel=1e-4)


def test_a_planted_crossover_is_found():
    """Tied laws have L* = E + K C^(-alpha/2), K = 2 sqrt(A B) 6^(alpha/2): the crossing is in closed form."""
    a = {"E": 1.8, "A": 480.0, "B": 2100.0, "alpha": 0.36, "beta": 0.36}
    b = {"E": 1.8, "A": 250.0, "B": 900.0, "alpha": 0.32, "beta": 0.32}

    def front(p):
        return 2 * math.sqrt(p["A"] * p["B"]) * 6 ** (p["alpha"] / 2)

    log_c = math.log(front(a) / front(b)) / ((a["alpha"] - b["alpha"]) / 2)
    got = compare(fitted(a), fitted(b), 1e20, search=(math.exp(log_c) / 1e5, math.exp(log_c) * 1e5))
    assert got.crossover["budgets"] == [pytest.approx(math.exp(log_c), rel=1e-6)]
    top = planted_table()["flops"].max()
    assert got.crossover["factor_a"] == pytest.approx(math.exp(log_c) / top, rel=1e-6)


def test_a_loss_below_the_others_floor_is_said_in_words():
    low = dict(PLANTED) | {"E": 1.5}
    got = compare(fitted(), fitted(low), 3e24)
    assert got.speedups[0]["speedup"]["estimate"] == "infinite"
    assert "does not reach" in str(got)
    json.dumps(got.to_dict(), allow_nan=False)


def test_intervals_cover_the_planted_speedup():
    """The benchmark's study in little: 40 pairs of noisy tables, at three budgets.

    At 95 % nominal fewer than 33 covered has probability 1e-3 a budget; at the 75 % of rows that are wrongly
    taken as independent it has 0.8. Medians of widths, and deviations, of 40 are known to about 15 %.
    """
    study = load_script("coverage")
    got = study.speedup_study(9, 5, 0.0, "huber", "row", pairs=40, resamples=100)
    assert got["pairs"] >= 38 and set(got["coverage"]) == {"0.1x top", "1x top", "10x top"}
    assert min(got["coverage"].values()) * got["pairs"] >= 33 * got["pairs"] / 40
    # not by being uselessly wide
    assert all(0.7 < w < 1.6 for w in got["width"].values()), got["width"]


def test_crossover_share_and_interval_over_draws():
    b = dict(PLANTED) | {"A": PLANTED["A"] * 0.7, "E": 1.86}
    fits = [fitted(p, 0.003, i, 200) for i, p in enumerate((None, b))]
    exact = compare(fitted(), fitted(b), 1e21).crossover["budgets"]
    got = compare(*fits, 1e21).crossover
    assert 0 < got["share"] <= 1 and len(exact) == 1
    assert got["95"][0] <= exact[0] <= got["95"][1]
    same = compare(fits[0], fits[0], 1e21).speedups[0]["speedup"]["95"]
    assert same[0] < 1 < same[1]  # equal fits are still treated as two independent studies


def test_bad_input_is_named():
    fit = fitted()
    with pytest.raises(FitError, match="budget is -1"):
        compare(fit, fit, -1)
    with pytest.raises(FitError, match="search is"):
        compare(fit, fit, 1e20, search=(1e22, 1e20))
    with pytest.raises(FitError, match="needs N and D"):
        compare(fit, fit_table(planted_table(), "power_C", bootstraps=0), 1e20)
    one = {k: np.repeat(v[:1], 8) * np.linspace(1, 1.01, 8) for k, v in planted_table().items()}
    with pytest.raises(FitError, match="fit B is not identified"):
        compare(fit, fit_table(one, bootstraps=0), 1e20)
