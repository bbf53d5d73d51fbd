"""Limits together, bands, sizes and losses to reach: against brute force over a grid of N and D."""

import json
import math

import numpy as np
import pytest
from fits_tables import PLANTED, planted_loss, planted_table
from scipy.optimize import brentq

import fits
from fits.budget import BANDWIDTH, PEAK_FLOPS, seconds_per_token
from fits.choices import least_budget
from fits.constraints import AtUnique, Limits, limited_optimum
from fits.laws import LAWS, get_law
from fits.search import six_nd

STEP = 0.01  # of the grids, in natural log
LOG_N, LOG_D = np.arange(math.log(1e7), math.log(1e13), STEP), np.arange(math.log(1e8), math.log(1e14), STEP)
SERVED = {"max_latency": 3e-3, "inference_chip": "h100", "inference_devices": 2, "bytes_per_param": 2}


@pytest.fixture(scope="module")
def fit():
    return fits.fit_table(planted_table(noise=2e-3), bootstraps=200, sensitivity=False)


@pytest.fixture(scope="module")
def exact():
    return fits.fit_table(planted_table(), bootstraps=0, sensitivity=False)


def inside(N, D, limits, slack=0.0):
    """Whether N and D keep the limits (to a share ``slack``), written out without the library."""
    good = np.ones(np.broadcast_shapes(np.shape(N), np.shape(D)), bool)
    more = 1 + slack
    good &= limits.get("min_params", 0) <= N * more
    good &= limits.get("max_params", math.inf) * more >= N
    good &= limits.get("max_tokens", math.inf) * more >= D
    if "max_epochs" in limits:
        good &= limits["max_epochs"] * limits["unique_tokens"] * more >= D
    if "max_memory_bytes" in limits:
        good &= limits["max_memory_bytes"] * more >= N * limits["bytes_per_param"]
    if "max_latency" in limits:
        chip = limits["inference_chip"]
        seconds = N * limits["bytes_per_param"] / BANDWIDTH[chip] + 2 * N / PEAK_FLOPS[chip]
        good &= limits["max_latency"] * more >= seconds / limits.get("inference_devices", 1)
    return good


def price(N, D, limits):
    return 6 * N * D + 2 * N * limits.get("inference_tokens", 0.0)


def surfaces(law, params, limits):
    """Loss, cost and whether it is allowed of every N and D of the grid."""
    N, D = np.exp(LOG_N)[:, None], np.exp(LOG_D)[None]
    x = {"N": N, "D": D, "U": np.full((1, 1), limits.get("unique_tokens", 1e12))}
    return law.predict(params, x), price(N, D, limits), inside(N, D, limits)


EVERYTHING = SERVED | {
    "unique_tokens": 1e11, "max_epochs": 4.0, "max_params": 4e9, "min_params": 1e8, "inference_tokens": 1e11,
    "max_memory_bytes": 1.2e10, "max_tokens": 3.5e11,
}  # fmt: skip


@pytest.mark.parametrize("budget", [1e20, 1e22, 3e23])
@pytest.mark.parametrize("name", ["chinchilla", "data_constrained_tied"])
@pytest.mark.parametrize(
    "drop",
    [(), ("max_latency",), ("max_params", "max_memory_bytes", "max_latency"), ("max_tokens", "max_epochs")],
)
def test_every_limit_together_against_brute_force(budget, name, drop):
    limits = {k: v for k, v in EVERYTHING.items() if k not in drop}
    if "max_latency" in drop:
        limits = {
            k: v for k, v in limits.items() if not k.startswith("inference_") or k == "inference_tokens"
        }
    law = LAWS[name]
    params = PLANTED if name == "chinchilla" else law.PUBLISHED
    asked = law if name == "chinchilla" else AtUnique(law, limits["unique_tokens"])
    got = {
        k: float(np.squeeze(v))
        for k, v in limited_optimum(asked, params, budget, None, Limits(**limits)).items()
    }
    assert inside(got["N"], got["D"], limits, 1e-9)
    assert price(got["N"], got["D"], limits) <= budget * (1 + 1e-9)
    loss, cost, allowed = surfaces(law, params, limits)
    brute = np.where(allowed & (cost <= budget), loss, np.inf).min()
    # the grid holds no better point, and its best one is a step or two in log N and D away: a loss
    # whose terms are under 1, times exponents under 0.4, changes by less than 0.4 % of it a step
    assert got["loss"] <= brute * (1 + 1e-12)
    assert brute - got["loss"] < 0.008 * (got["loss"] - params["E"])


@pytest.mark.parametrize("limits", [
    {}, {"max_params": 4e9}, {"min_params": 1.2e10}, {"max_tokens": 1.2e11}, {"inference_tokens": 1e12},
    {"max_tokens": 4e11, "max_params": 8e9}, SERVED,
])  # fmt: skip
def test_the_band_keeps_the_limits(exact, limits):
    """Its ends are the first and last sizes of the grid that reach the loss within 10 % more compute."""
    got = fits.allocate(exact, 1e22, **limits)
    loss, cost, allowed = surfaces(exact.law, exact.params, limits)
    good = (allowed & (loss <= got.loss) & (cost <= 1.1e22)).any(1)
    sizes = np.exp(LOG_N)[good]
    low, high = got.band["N"]
    # an end moves by more than a step of the grid where the cost is flat
    for end, found in ((low, sizes.min()), (high, sizes.max())):
        assert abs(math.log(end / found)) < 8 * STEP
    for n, d in zip(got.band["N"], got.band["D"], strict=True):
        assert inside(n, d, limits, 1e-8) and price(n, d, limits) <= 1.1e22 * (1 + 1e-6)
        assert math.isclose(planted_loss(n, d), got.loss, rel_tol=1e-8)
    assert low <= got.N * (1 + 1e-9) and high >= got.N * (1 - 1e-9)
    assert ("inside the limits" in str(got)) == bool(limits)


def test_a_held_ratio_leaves_a_band_of_larger_budgets(exact):
    got = fits.allocate(exact, 1e22, tokens_per_param=30.0)
    N = math.sqrt(1e22 / 180)
    np.testing.assert_allclose(got.band["N"], [N, N * math.sqrt(1.1)], rtol=1e-6)


def test_latency_by_hand(exact):
    one = 2 / 3.35e12 + 2 / 989.4e12  # seconds a parameter: two bytes read, two FLOPs
    assert math.isclose(seconds_per_token(7e9, "h100"), 7e9 * one, rel_tol=1e-12)
    # a 70e9 model in bf16 on eight H100s: 140 GB over 26.8 TB/s are 5.2 ms, and its FLOPs little more
    assert 5.2e-3 < seconds_per_token(70e9, "h100", devices=8) < 5.25e-3
    got = fits.allocate(exact, 1e24, max_latency=5e-3, inference_chip="h100", bytes_per_param=2)
    assert math.isclose(got.N, 5e-3 / one, rel_tol=1e-9)
    assert got.marginal[0]["limit"] == "max_latency" and got.marginal[0]["loss_per_log"] < 0
    assert got.limits["inference_chip"] == "h100" and "inference_chip h100" in str(got)
    json.dumps(got.to_dict(), allow_nan=False)
    assert set(BANDWIDTH) == set(PEAK_FLOPS)
    for bad, words in (
        ({"max_latency": 1e-3, "bytes_per_param": 2}, "without inference_chip"),
        ({"max_latency": 1e-3, "inference_chip": "h100"}, "without bytes_per_param"),
        ({"inference_chip": "h100"}, "without max_latency"),
        ({"max_latency": 1e-3, "bytes_per_param": 2, "inference_chip": "abacus"}, "chip is 'abacus'"),
    ):
        with pytest.raises(fits.FitError, match=words):
            fits.allocate(exact, 1e22, **bad)


def test_the_shape_moves_inside_the_limits(exact):
    def shape(N):  # widths in steps of an eighth, rounded up
        return {"params": 2.0 ** (math.ceil(math.log2(N) * 8) / 8)}

    free = fits.allocate(exact, 1e22, shape=shape)
    cap = free.shape["params"] * 0.999  # below the shape that rounding up gives
    got = fits.allocate(exact, 1e22, shape=shape, max_params=cap)
    largest = 2.0 ** (math.floor(math.log2(cap) * 8) / 8)
    assert math.isclose(got.shape["params"], largest, rel_tol=1e-12) and got.buildable["N"] <= cap
    assert math.isclose(got.buildable["loss"], planted_loss(largest, 1e22 / 6 / largest), rel_tol=1e-8)
    floor = shape(0.5 * free.N)["params"] * 1.001
    up = fits.allocate(
        exact, 1e22, shape=lambda N: {"params": N / 1.2}, min_params=floor, max_params=1.4 * floor
    )
    assert floor <= up.shape["params"] <= 1.4 * floor
    none = fits.allocate(exact, 1e22, shape=lambda N: {"params": 1e12}, max_params=cap)
    assert none.buildable is None and "no_shape" in {f["code"] for f in none.flags}


def test_sizes_by_hand(fit):
    sizes, budget = [2e9, 4e9, 1.2e10, 3e10], 1e22
    got = fits.allocate(fit, budget, sizes=sizes, max_params=2e10)
    free = fits.allocate(fit, budget, max_params=2e10)
    loss = {N: planted_loss(N, budget / 6 / N, fit.params) for N in sizes[:3]}
    assert [s["N"] for s in got.sizes] == [*sorted(loss, key=loss.get), 3e10]
    assert got.sizes[-1]["loss"] is None and "size 3e+10: the limits forbid it" in str(got)
    assert (got.buildable["N"], got.shape) == (got.sizes[0]["N"], {"params": got.sizes[0]["N"]})
    E, A, B, alpha, beta = fit.draws.T
    own = fit.optimum_draws(budget)["loss"][:, 0]  # the cap lies above every draw's optimum
    for s in got.sizes[:3]:
        assert math.isclose(s["loss"], loss[s["N"]], rel_tol=1e-12)
        assert math.isclose(s["loss_above"], s["loss"] - free.loss, rel_tol=1e-9)
        drawn = E + A * s["N"] ** -alpha + B * (budget / 6 / s["N"]) ** -beta
        assert math.isclose(s["regret"], (drawn - own).mean(), rel_tol=1e-9)
        needed = brentq(  # the budget whose optimum has that loss
            lambda c, s=s: float(np.squeeze(fit.law.optimum(fit.params, c)["loss"])) - s["loss"], 1e20, 1e22
        )
        assert math.isclose(s["extra_compute"], budget / needed - 1, rel_tol=1e-6)
    assert math.isclose(sum(s["best_share"] for s in got.sizes[:3]), 1.0)
    shapes = fits.allocate(fit, budget, sizes=[{"params": 4e9, "layers": 24}])
    assert shapes.shape == {"params": 4e9, "layers": 24}
    for bad, words in (
        ([], "sizes is empty"),
        ([-1], "a size in sizes is -1"),
        ([3e10], "forbid every size"),
    ):
        with pytest.raises(fits.FitError, match=words):
            fits.allocate(fit, budget, sizes=bad, max_params=2e10)


@pytest.mark.parametrize("limits", [
    {}, {"max_params": 3e9}, {"max_tokens": 1.5e11}, {"min_params": 3e10}, {"tokens_per_param": 100.0},
    SERVED | {"inference_tokens": 1e12}, {"max_params": 9e9, "max_tokens": 6e11, "inference_tokens": 3e12},
])  # fmt: skip
def test_a_target_loss_is_the_inverse_of_a_budget(fit, limits):
    """The search over sizes against the search over D on a budget, for every draw."""
    forward = limited_optimum(fit.law, fit.draw_params(), 1e22, None, Limits(**limits))
    cost = six_nd if "inference_tokens" not in limits else lambda N, D: price(N, D, limits)
    back = least_budget(fit.law, fit.draw_params(), forward["loss"], cost, Limits(**limits))
    spent = cost(forward["N"], forward["D"])  # two caps at once leave budget unspent
    np.testing.assert_allclose(back["budget"], spent, rtol=1e-7)
    # a minimum is flat: its place is good to the root of what its value is
    np.testing.assert_allclose(back["N"], forward["N"], rtol=1e-3)


def test_a_target_loss_against_brute_force(exact):
    limits = {"max_params": 6e9, "inference_tokens": 1e12}
    got = fits.allocate(exact, target_loss=2.11, **limits)
    loss, cost, allowed = surfaces(exact.law, exact.params, limits)
    brute = np.where(allowed & (loss <= 2.11), cost, np.inf).min()
    assert got.budget <= brute * (1 + 1e-9) and brute / got.budget < 1.05
    assert math.isclose(got.loss, 2.11, rel_tol=1e-9)
    assert str(got).splitlines()[1].startswith("Loss 2.11 takes at least")


def test_draws_that_never_reach_the_loss_are_counted(fit):
    """Half-way down the draws' floors about half of them never arrive, and the interval is open."""
    floor = float(np.median(fit.draw_params()["E"]))
    loss = max(floor, fit.params["E"]) + 1e-4
    got = fits.allocate(fit, target_loss=loss)
    # inside float64's reach of D; a floor just below the loss needs more than e^100 tokens
    assert got.target["never"] == pytest.approx((fit.draw_params()["E"] >= loss).mean(), abs=0.03)
    assert got.target["budget"]["95"][1] == "infinite" and "% of the draws" in str(got)
    low, high = fits.allocate(fit, target_loss=2.2).target["budget"]["95"]
    drawn = [brentq(lambda c, i=i: float(np.squeeze(get_law("chinchilla").optimum(
        dict(zip(fit.law.parameters, fit.draws[i], strict=True)), math.exp(c))["loss"])) - 2.2, 40, 60)
        for i in range(len(fit.draws))]  # fmt: skip
    ends = np.sort(np.exp(drawn))[[4, 195]]  # ranks 4.975 and 194.025 of 200, outward to whole draws
    np.testing.assert_allclose([low, high], ends, rtol=1e-7)
    with pytest.raises(fits.FitError, match="does not reach at any budget"):
        fits.allocate(fit, target_loss=1.0)
    with pytest.raises(fits.FitError, match="does not reach inside the limits"):
        fits.allocate(fit, target_loss=2.0, max_params=1e9)
    with pytest.raises(fits.FitError, match="both given"):
        fits.allocate(fit, 1e20, target_loss=2.0)
