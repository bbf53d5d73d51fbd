"""Allocations: closed forms against searches, the near-optimal band against its definition."""

import math

import numpy as np
import pytest
from fits_tables import PLANTED, planted_loss, planted_table
from scipy.optimize import brentq, minimize_scalar

import fits
from fits.allocate import optimum, tokens_for
from fits.laws import get_law


@pytest.fixture(scope="module")
def fit():
    return fits.fit_table(planted_table(noise=2e-3), bootstraps=300, sensitivity=False)


@pytest.fixture(scope="module")
def exact():
    return fits.fit_table(planted_table(), bootstraps=0, sensitivity=False)


def test_epoch_at_gopher_compute(epoch):
    fit = fits.fit_table(epoch, bootstraps=200, sensitivity=False)
    got = fits.allocate(fit, 5.76e23)
    E, A, B, alpha, beta = 1.817218, 477.826, 2143.417, 0.3473105, 0.3671724
    N = (alpha * A / beta / B) ** (1 / (alpha + beta)) * (5.76e23 / 6) ** (beta / (alpha + beta))
    assert math.isclose(got.N, N, rel_tol=1e-5)  # parameters above have six or seven digits
    assert abs(got.N / 72e9 - 1) < 0.05 and abs(got.D / 1.3e12 - 1) < 0.05
    assert math.isclose(got.loss, E + A / N**alpha + B / (5.76e23 / 6 / N) ** beta, rel_tol=1e-6)
    low, high = got.intervals["N"]["95"]
    assert low < got.N < high
    assert math.isclose(got.extrapolation["budget_ratio"], 5.76e23 / epoch.flops.max(), rel_tol=1e-9)
    assert "budget is 44.5 times" in str(got)


def test_optimum_under_another_flop_function():
    """Attention's extra term moves the optimum; a bounded search over the written law agrees."""

    def flops(N, D):
        return 6 * N * D + 1e4 * N**0.67 * D

    budget = 3e21

    def loss(log_n):
        N = math.exp(log_n)
        return planted_loss(N, budget / (6 * N + 1e4 * N**0.67))

    best = minimize_scalar(
        loss, bounds=(math.log(1e6), math.log(1e12)), method="bounded", options={"xatol": 1e-10}
    )
    got = optimum(get_law("chinchilla"), PLANTED, budget, flops)
    # a minimum is located to the root of the rounding of the loss, about 1e-8 in a flat bowl
    assert math.isclose(float(got["N"][0]), math.exp(best.x), rel_tol=1e-5)
    assert math.isclose(float(got["loss"][0]), best.fun, rel_tol=1e-12)
    assert math.isclose(float(flops(got["N"], got["D"])[0]), budget, rel_tol=1e-9)
    plain = optimum(get_law("chinchilla"), PLANTED, budget)
    assert abs(float(got["N"][0]) / float(np.squeeze(plain["N"])) - 1) > 0.01


def test_search_agrees_with_the_closed_form(fit):
    closed = optimum(fit.law, fit.draw_params(), 1e22)
    searched = optimum(fit.law, fit.draw_params(), 1e22, lambda N, D: 6.0 * N * D)
    np.testing.assert_allclose(searched["N"], closed["N"], rtol=1e-5)
    np.testing.assert_allclose(searched["loss"], closed["loss"], rtol=1e-12)


@pytest.mark.parametrize("budget", [1e10, 1e24, 1e27])
def test_search_reaches_small_and_large_budgets(exact, budget):
    closed = fits.allocate(exact, budget)
    searched = fits.allocate(exact, budget, flops=lambda N, D: 6 * N * D)
    # a minimum is flat: float64 finds its place to about the root of its spacing
    assert math.isclose(searched.N, closed.N, rel_tol=1e-6)


def test_a_law_without_a_minimum_says_so():
    """With one term that both variables shrink together the best N lies at an end."""
    params = {"E": 1.5, "K": 1300.0, "alpha": 0.16, "beta": 0.18}
    got = optimum(get_law("product"), params, 1e21)
    assert np.isnan(got["N"]).all()
    N, D = (a.ravel() for a in np.meshgrid(np.geomspace(1e8, 1e10, 6), np.geomspace(1e9, 1e11, 6)))
    table = {"params": N, "tokens": D, "loss": get_law("product").predict(params, {"N": N, "D": D})}
    fit = fits.fit_table(table, "product", bootstraps=0)
    with pytest.raises(fits.FitError, match="has no optimal N"):
        fits.allocate(fit, 1e21)


def test_tokens_for():
    N = np.array([1e6, 1e9])
    np.testing.assert_allclose(tokens_for(lambda n, d: 6 * n * d, N, 1e20), 1e20 / 6 / N, rtol=1e-12)
    assert np.isnan(tokens_for(lambda n, d: 6 * n * d, np.array([1e20]), 1e20))[0]


def test_tokens_are_searched_where_a_cost_is_not_proportional_to_them():
    N, calls = np.array([1e6, 1e9, 1e12]), []

    def priced(n, d):  # with a start that costs as much as a billion tokens
        calls.append(n)
        return 6 * n * (d + 1e9)

    D = tokens_for(priced, N, 1e20)
    np.testing.assert_allclose(D[:2], 1e20 / 6 / N[:2] - 1e9, rtol=1e-12)
    assert np.isnan(D[2]) and len(calls) > 50  # halvings
    calls.clear()
    tokens_for(lambda n, d: priced(n, d - 1e9), N, 1e20)
    assert len(calls) == 2  # one token's cost, and whether it is in proportion


@pytest.mark.parametrize("within", [0.05, 0.10, 0.5])
def test_band_is_where_the_same_loss_costs_that_much_more(exact, within):
    got = fits.allocate(exact, 1e22, within=within)

    def extra(log_n):  # compute for the optimal loss at this N, over the budget
        N = math.exp(log_n)
        left = got.loss - PLANTED["E"] - PLANTED["A"] / N ** PLANTED["alpha"]
        if left <= 0:
            return 1e9
        return 6 * N * (PLANTED["B"] / left) ** (1 / PLANTED["beta"]) / 1e22 - (1 + within)

    middle = math.log(got.N)
    low = math.exp(brentq(extra, middle - 5, middle))
    high = math.exp(brentq(extra, middle, middle + 5))
    # recovered parameters are exact to 1e-8, and the band's end moves as the root of what is left
    np.testing.assert_allclose(got.band["N"], [low, high], rtol=1e-6)
    for n, d in zip(got.band["N"], got.band["D"], strict=True):
        assert math.isclose(6 * n * d, (1 + within) * 1e22, rel_tol=1e-6)
        assert math.isclose(planted_loss(n, d), got.loss, rel_tol=1e-9)


def test_percentiles_are_of_the_draws(fit):
    got = fits.allocate(fit, 1e23)
    drawn = {k: v["percentile"] for k, v in got.intervals.items()}
    E, A, B, alpha, beta = fit.draws.T
    N = (alpha * A / (beta * B)) ** (1 / (alpha + beta)) * (1e23 / 6) ** (beta / (alpha + beta))
    D = 1e23 / 6 / N
    np.testing.assert_allclose(drawn["N"]["95"], np.quantile(N, [0.025, 0.975]), rtol=1e-9)
    np.testing.assert_allclose(drawn["D"]["80"], np.quantile(D, [0.1, 0.9]), rtol=1e-9)
    np.testing.assert_allclose(drawn["tokens_per_param"]["80"], np.quantile(D / N, [0.1, 0.9]), rtol=1e-9)
    loss = E + A / N**alpha + B / D**beta
    np.testing.assert_allclose(drawn["loss"]["95"], np.quantile(loss, [0.025, 0.975]), rtol=1e-9)
    assert math.isclose(got.tokens_per_param, got.D / got.N, rel_tol=1e-12)


def test_buildable_shape(exact):
    got = fits.allocate(exact, 1e22, shape=lambda N: {"params": 0.8 * N, "layers": 12})
    N = 0.8 * got.N
    assert got.shape == {"params": N, "layers": 12}
    assert math.isclose(got.buildable["D"], 1e22 / 6 / N, rel_tol=1e-9)
    loss = planted_loss(N, 1e22 / 6 / N)
    assert math.isclose(got.buildable["loss"], loss, rel_tol=1e-9)
    # the extra compute, by its definition: the budget whose optimum has that loss
    needed = brentq(
        lambda c: float(np.squeeze(get_law("chinchilla").optimum(PLANTED, c)["loss"])) - loss, 1e21, 1e22
    )
    assert math.isclose(got.buildable["extra_compute"], 1e22 / needed - 1, rel_tol=1e-4)
    with pytest.raises(fits.FitError, match="it must give 'params'"):
        fits.allocate(exact, 1e22, shape=lambda N: {"layers": 3})


def test_extrapolation_is_said(exact):
    inside = fits.allocate(exact, 1e20)
    assert inside.extrapolation["text"].startswith("Inside the table") and not inside.flags[1:]
    far = fits.allocate(exact, 3e24)
    assert math.isclose(far.extrapolation["budget_ratio"], 1000, rel_tol=1e-9)
    assert [f["code"] for f in far.flags] == ["no_intervals", "far_extrapolation"]
    assert str(far).splitlines()[1].startswith("flag: the budget is 1e+03 times the largest")


@pytest.mark.parametrize("budget", [0, -1e20, float("nan"), float("inf"), "1e20", True, None])
def test_bad_budgets(exact, budget):
    with pytest.raises(fits.FitError, match="budget is .*; it must be a positive number of FLOPs"):
        fits.allocate(exact, budget)


def test_other_refusals(exact):
    with pytest.raises(fits.FitError, match="within is 0"):
        fits.allocate(exact, 1e20, within=0)
    one = fits.fit_table(planted_table(noise=1e-4), "power_C", bootstraps=0)
    if one.status in ("converged", "boundary"):
        with pytest.raises(
            fits.FitError, match="the law power_C is in C; an allocation needs one in N and D"
        ):
            fits.allocate(one, 1e20)
    else:
        with pytest.raises(fits.FitError, match="so it allocates nothing"):
            fits.allocate(one, 1e20)


def test_fit_optimum_over_budgets(fit):
    budgets = np.geomspace(1e19, 1e23, 4)
    point, draws = fit.optimum(budgets), fit.optimum_draws(budgets)
    assert draws["N"].shape == (len(fit.draws), 4)
    for i, c in enumerate(budgets):
        assert math.isclose(point["N"][i], fits.allocate(fit, float(c)).N, rel_tol=1e-12)
    slope = np.polyfit(np.log(budgets), np.log(point["N"]), 1)[0]
    assert math.isclose(slope, fit.intervals["a"]["estimate"], rel_tol=1e-9)
