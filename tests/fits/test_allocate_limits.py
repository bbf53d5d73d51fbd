"""Allocations under limits: against scipy's constrained search, multipliers by hand, and refusals."""

import math

import numpy as np
import pytest
from fits_tables import PLANTED, planted_loss, planted_table
from scipy.optimize import brentq, minimize

import fits
from fits.budget import PEAK_FLOPS, Budget
from fits.constraints import Limits, limited_optimum
from fits.laws import get_law


@pytest.fixture(scope="module")
def fit():
    return fits.fit_table(planted_table(noise=2e-3), bootstraps=200, sensitivity=False)


@pytest.mark.parametrize("seed", range(6))
def test_against_slsqp(seed):
    """Random laws and limits; SLSQP minimises the same loss in log N and log D."""
    rng = np.random.default_rng(seed)
    p = {
        "E": 1.7,
        "A": 400 * rng.uniform(0.7, 1.4),
        "B": 1500 * rng.uniform(0.7, 1.4),
        "alpha": rng.uniform(0.3, 0.38),
        "beta": rng.uniform(0.3, 0.38),
    }
    budget, served = 1e22, (0.0, 1e12)[seed % 2]
    free = limited_optimum(get_law("chinchilla"), p, budget, None, Limits())
    N0, D0 = float(np.squeeze(free["N"])), float(np.squeeze(free["D"]))
    limits = {"max_params": N0 * rng.uniform(0.5, 2), "max_tokens": D0 * rng.uniform(0.5, 2)}
    more = {"inference_tokens": served} if served else {}
    got = limited_optimum(get_law("chinchilla"), p, budget, None, Limits(**limits, **more))

    def left(z):  # log of the budget over the cost
        return math.log(budget) - math.log(6 * math.exp(z[0] + z[1]) + 2 * math.exp(z[0]) * served)

    found = minimize(
        lambda z: planted_loss(math.exp(z[0]), math.exp(z[1]), p),
        [math.log(limits["max_params"] / 3), math.log(limits["max_tokens"] / 3)],
        bounds=[(15, math.log(limits["max_params"])), (15, math.log(limits["max_tokens"]))],
        constraints=[{"type": "ineq", "fun": left}],
        method="SLSQP",
        options={"ftol": 1e-14, "maxiter": 500},
    )
    # SLSQP stops at about the root of its tolerance from the minimum; losses agree to its square
    assert math.isclose(float(got["loss"][0]), found.fun, rel_tol=1e-7)
    assert float(got["N"][0]) <= limits["max_params"] * (1 + 1e-9)
    assert float(got["D"][0]) <= limits["max_tokens"] * (1 + 1e-9)


def test_served_tokens_by_the_stationarity_condition():
    """dL/dN / dL/dD = cost_N / cost_D with cost 6 N D + 2 N T (Sardana et al. 2023), by a root finder."""
    p, budget, served = PLANTED, 1e23, 5e12
    got = limited_optimum(get_law("chinchilla"), p, budget, None, Limits(inference_tokens=served))

    def condition(log_n):
        N = math.exp(log_n)
        D = budget / (6 * N) - served / 3
        gain_n = p["alpha"] * p["A"] * N ** (-p["alpha"] - 1)
        gain_d = p["beta"] * p["B"] * D ** (-p["beta"] - 1)
        return math.log(gain_n / gain_d) - math.log((6 * D + 2 * served) / (6 * N))

    N = math.exp(brentq(condition, math.log(1e8), math.log(budget / 2 / served * (1 - 1e-9))))
    # the place of a flat minimum is good to the root of the loss's rounding
    assert math.isclose(float(got["N"][0]), N, rel_tol=1e-5)
    plain = limited_optimum(get_law("chinchilla"), p, budget, None, Limits())
    assert float(np.squeeze(plain["N"])) > N


def test_marginal_values_are_the_multipliers(fit):
    free = fits.allocate(fit, 1e22)
    p, cap = fit.params, 0.5 * free.N
    got = fits.allocate(fit, 1e22, max_params=cap)
    assert math.isclose(got.N, cap, rel_tol=1e-12) and math.isclose(got.D, 1e22 / 6 / cap, rel_tol=1e-9)
    size, data = p["A"] * cap ** -p["alpha"], p["B"] * got.D ** -p["beta"]
    slope = -p["alpha"] * size + p["beta"] * data  # along C = 6 N D
    (m,) = got.marginal
    assert m["limit"] == "max_params"
    # central differences with a step of 1e-3 in log: errors near 1e-7 of the slope, times the curvature
    assert math.isclose(m["loss_per_log"], slope, rel_tol=1e-4)
    assert math.isclose(m["budget_per_log"], slope / (-p["beta"] * data), rel_tol=1e-4)
    tokens = fits.allocate(fit, 1e22, max_tokens=0.5 * free.D)
    assert tokens.marginal[0]["limit"] == "max_tokens" and tokens.marginal[0]["loss_per_log"] < 0
    assert not fits.allocate(fit, 1e22, max_params=2 * free.N).marginal


def test_policy_and_regret(fit):
    got = fits.allocate(fit, 1e22, policy=100.0)
    N = math.sqrt(1e22 / 600)
    assert math.isclose(got.policy["N"], N, rel_tol=1e-9)

    def short(log_c):
        n = math.sqrt(math.exp(log_c) / 600)
        return planted_loss(n, 100 * n, fit.params) - got.loss

    needed = math.exp(brentq(short, math.log(1e22), math.log(1e24)))
    assert math.isclose(got.policy["extra_compute"], needed / 1e22 - 1, rel_tol=1e-6)
    own = fit.optimum_draws(1e22)["loss"][:, 0]
    mean = (fit.predict_draws(params=got.N, tokens=got.D)[:, 0] - own).mean()
    assert math.isclose(got.regret["loss"], mean, rel_tol=1e-9) and mean > 0
    held = fits.allocate(fit, 1e22, tokens_per_param=100.0)
    assert math.isclose(held.N, N, rel_tol=1e-9) and math.isclose(held.tokens_per_param, 100, rel_tol=1e-12)


def test_both_caps_leave_budget_and_say_so(fit):
    got = fits.allocate(fit, 1e22, max_params=1e9, unique_tokens=1e10, max_epochs=4)
    assert (got.N, got.D) == (1e9, 4e10)
    assert {"repetition", "unspent"} <= {f["code"] for f in got.flags}
    assert "97.6 % of the budget unspent" in str(got)  # 1 - 6 * 1e9 * 4e10 / 1e22
    memory = fits.allocate(fit, 1e22, max_memory_bytes=2e9, bytes_per_param=2)
    assert memory.N == 1e9 and memory.marginal[0]["limit"] == "max_memory_bytes"


def test_collisions_and_bad_limits(fit):
    for limits, words in (
        ({"min_params": 2e9, "max_params": 1e9}, "the limits collide: N at least 2e.09"),
        ({"min_params": 1e23}, "costs more than the budget"),
        ({"tokens_per_param": 20, "min_params": 1e12}, "tokens_per_param 20"),
        ({"max_epochs": 4}, "max_epochs is given without unique_tokens"),
        ({"max_tokens": -1}, "max_tokens is -1"),
        ({"max_parms": 1e9}, "does not know max_parms"),
        ({"policy": 0}, "policy is 0"),
    ):
        with pytest.raises(fits.FitError, match=words):
            fits.allocate(fit, 1e22, **limits)


def test_budgets(fit):
    hours = Budget(device_hours=1000, chip="h100", mfu=0.4)
    assert math.isclose(hours.total, 1000 * 3600 * 989.4e12 * 0.4, rel_tol=1e-12)
    money = Budget(money=2500, price_per_device_hour=2.5, chip="h100", mfu=0.4)
    assert math.isclose(money.total, hours.total, rel_tol=1e-12)
    assert fits.allocate(fit, hours).N == fits.allocate(fit, hours.total).N
    for bad, words in (
        ({}, "gives nothing"),
        ({"flops": 1e20, "money": 3}, "flops and money"),
        ({"device_hours": 5, "mfu": 0.4}, "lacks chip"),
        ({"device_hours": 5, "chip": "abacus", "mfu": 0.4}, "chip is 'abacus'"),
        ({"device_hours": 5, "chip": "h100", "mfu": 40}, "mfu is 40"),
        ({"money": 5, "chip": "h100", "mfu": 0.4}, "lacks price_per_device_hour"),
        ({"flops": 1e20, "chip": "h100"}, "no use for chip"),
        ({"flops": "many"}, "flops is 'many'"),
    ):
        with pytest.raises(fits.FitError, match=words):
            Budget(**bad)
    assert min(PEAK_FLOPS.values()) > 1e14


def test_repeated_tokens_allocate_as_published():
    """Muennighoff et al. 2023: 25e9 unique tokens at the compute of their 8.7e9-parameter run."""
    from fits.constraints import AtUnique
    from fits.laws import LAWS

    law, budget = LAWS["data_constrained_tied"], 6 * 8.67e9 * 178e9
    best = limited_optimum(AtUnique(law, 25e9), law.PUBLISHED, budget, None, Limits(unique_tokens=25e9))
    # printed with three figures
    assert float(best["N"][0]) == pytest.approx(6.80e9, rel=2e-3)
    assert float(best["D"][0]) == pytest.approx(227e9, rel=3e-3)
    assert float(best["D"][0]) / 25e9 == pytest.approx(9.08, rel=2e-3)


def test_a_policy_that_breaks_the_limits_says_so(fit):
    got = fits.allocate(fit, 1e23, max_tokens=1e10)
    assert got.policy["breaks"] and "breaks the limits" in str(got)
    free = fits.allocate(fit, 1e23)
    assert not free.policy["breaks"] and free.policy["extra_compute"] >= 0
