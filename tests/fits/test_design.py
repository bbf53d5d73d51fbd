"""The choice of runs: expected widths and ranks against refits of fresh tables by SciPy."""

import numpy as np
import pytest
from fits_tables import PLANTED, planted_loss, planted_table
from scipy.optimize import least_squares

import fits
from fits.design import next_runs, spend_for
from fits.simulate import Simulation, half_widths

NOISE, BUDGET = 3e-3, 1e22
SIZES = np.array([1e8, 3e8, 1e9] * 4)
TOKENS = np.repeat([3e18, 1e19, 3e19, 1e20], 3) / 6 / SIZES


def small_table(seed):
    """Three sizes by four budgets: so little that one more run can change much."""
    error = NOISE * np.random.default_rng(seed).standard_normal(12)
    return {"params": SIZES, "tokens": TOKENS, "loss": planted_loss(SIZES, TOKENS) * np.exp(error)}


@pytest.fixture(scope="module")
def fit():
    return fits.fit_table(
        small_table(0), loss="least_squares", cluster="row", bootstraps=400, sensitivity=False
    )


def scipy_width(new, tables=120):
    """1.96 sd of log N* over fresh tables with the run in them, each fitted by SciPy."""
    N, D = (np.append(z, v) for z, v in zip((SIZES, TOKENS), new, strict=True))

    def residual(q, y):
        size = np.exp(q[1] - q[3] * (np.log(N) - 20))
        return np.log(np.exp(q[0]) + size + np.exp(q[2] - q[4] * (np.log(D) - 23))) - np.log(y)

    p = PLANTED
    start = np.array([np.log(p["E"]), np.log(p["A"]) - 20 * p["alpha"], np.log(p["B"]) - 23 * p["beta"],
                      p["alpha"], p["beta"]])  # fmt: skip
    got = []
    for seed in range(tables):
        y = planted_loss(N, D) * np.exp(NOISE * np.random.default_rng(500 + seed).standard_normal(len(N)))
        q = least_squares(residual, start, args=(y,), xtol=1e-12, ftol=1e-12).x
        log_a, log_b = q[1] + 20 * q[3], q[2] + 23 * q[4]
        log_g = (np.log(q[3]) + log_a - np.log(q[4]) - log_b) / (q[3] + q[4])
        got.append(log_g + q[4] / (q[3] + q[4]) * np.log(BUDGET / 6))
    return 1.96 * np.std(got, ddof=1)


def test_clearly_different_runs_are_ranked_as_refits_rank_them(fit):
    """Three runs of one price; with the best the width falls by more than half, with the others hardly."""
    runs = [(1e9, 1e11), (1e10, 1e10), (1e8, 1e12)]
    got = next_runs(fit, runs, budget_target=BUDGET, max_flops=6.1e20)
    real = [scipy_width(r) for r in runs]
    assert real[1] < 0.6 * min(real[0], real[2])
    assert (got.runs[0]["params"], got.runs[0]["tokens"]) == runs[1]
    rivals = {r["params"]: r for r in got.runs[0]["rivals"]}
    assert all(r["told_apart"] for r in rivals.values()) and len(rivals) == 2
    # the fit's own noise and surface differ from the truth, so shares are compared: 120 tables know a
    # width to 6.5 %, and so a share of two to about 9 %
    told = got.runs[0]["half_width"] / rivals[1e8]["half_width"]
    assert told == pytest.approx(real[1] / real[2], rel=0.27)


def test_refits_overrule_the_linear_ranking_where_it_errs(fit):
    """Far outside the table linear widths are off by a fourth, and here put the worse run first."""
    runs = [(1e10, 1e12), (1e8, 1e14)]
    linear = next_runs(fit, runs, budget_target=BUDGET, max_flops=6.1e22, tables=0)
    got = next_runs(fit, runs, budget_target=BUDGET, max_flops=6.1e22)
    real = [scipy_width(r) for r in runs]
    assert real[0] < 0.8 * real[1]
    assert linear.runs[0]["params"] == 1e8 and linear.flags[0]["code"] == "linearised"
    assert got.runs[0]["params"] == 1e10 and got.runs[0]["rivals"][0]["told_apart"]
    told = got.runs[0]["half_width"] / got.runs[0]["rivals"][0]["half_width"]
    assert told == pytest.approx(real[0] / real[1], rel=0.27)


def test_twins_cannot_be_told_apart(fit):
    got = next_runs(fit, [(3e8, 1e10), (3.03e8, 1e10 / 1.01)], budget_target=BUDGET)
    assert not got.runs[0]["rivals"][0]["told_apart"]
    assert "1000 simulated tables cannot tell the first one from N 3" in str(got)
    assert f"{got.half_width:.3g} ± " in str(got)


def test_the_width_now_is_that_of_power_and_its_error_is_what_seeds_scatter(fit):
    """The same planted surface and noise through ``fits.power``, which draws normal errors."""
    simulation = [Simulation(fit, "N*", BUDGET, None, 400, seed).values() for seed in range(8)]
    widths, errors = np.array([[v[0] for v in half_widths([s])[:2]] for s in simulation]).T
    noise = fit.diagnostics["rms_residual"] * np.sqrt(12 / 7)  # five parameters were fitted to twelve rows
    grid = list(zip(SIZES, TOKENS, strict=True))
    plan = fits.power("chinchilla", fit.params, noise, grid, budget_target=BUDGET, loss="least_squares")
    # 400 tables: standard error 3.5 % of a deviation, 6 % of a 95 % range
    assert widths.mean() == pytest.approx(plan.half_width, rel=0.2)
    assert 0.4 < widths.std(ddof=1) / errors.mean() < 2.0  # eight seeds know a scatter to 27 %


def test_runs_of_one_size_share_its_effect():
    """Where errors are of sizes alone, more runs of one size teach little; of new sizes, much."""
    table = planted_table(noise=3e-4, size_effect=4e-3)
    fit = fits.fit_table(table, loss="least_squares", bootstraps=200, sensitivity=False)
    assert fit.diagnostics["icc"] > 0.8
    simulation = Simulation(fit, "N*", BUDGET, None, 600)
    old = table["params"][0]
    same = simulation.values([(old, 2e9 * k) for k in range(2, 12)])
    spread = simulation.values([(old * 1.27 ** (k - 2), 2e9 * k) for k in range(2, 12)])
    (now, of_same, of_spread), _, _ = half_widths([simulation.values(), same, spread])
    assert now - of_spread > 2 * (now - of_same)


def test_spending(fit):
    now = next_runs(fit, budget_target=BUDGET, batch=3, tables=400)
    widths = [now.half_width, *(r["half_width"] for r in now.runs)]
    assert len(now.runs) == 3 and (np.diff(widths) < 0).all()
    got = spend_for(fit, budget_target=BUDGET, within=0.9 * np.expm1(now.half_width), tables=400)
    assert got.reached and got.runs[-1]["half_width"] <= np.log1p(0.9 * np.expm1(now.half_width))
    assert got.flops == pytest.approx(sum(r["flops"] for r in got.runs))
    fewer = Simulation(fit, "N*", BUDGET, None, 400).values(
        [(r["params"], r["tokens"]) for r in got.runs[:-1]]
    )
    assert half_widths([fewer])[0][0] > got.runs[-1]["half_width"]
    done = spend_for(fit, budget_target=BUDGET, within=3.0, tables=400)
    assert done.reached and done.runs == [] and done.flops == 0
    never = spend_for(fit, budget_target=BUDGET, within=1e-6, tables=100)
    assert never.reached is False and str(never).startswith("flag: not reachable within 200 runs")
    for bad, words in (({"quantity": "x"}, "quantity is 'x'"), ({"tables": 5}, "tables is 5")):
        with pytest.raises(fits.FitError, match=words):
            next_runs(fit, budget_target=BUDGET, **bad)


@pytest.mark.parametrize("law, loss", [("kaplan", "huber"), ("chinchilla", "lad"), ("tied", "huber")])
def test_other_laws_and_losses_are_simulated_too(law, loss):
    fit = fits.fit_table(small_table(1), law, loss=loss, cluster="row", bootstraps=0, sensitivity=False)
    values = Simulation(fit, "N*", BUDGET, None, 100).values([(1e9, 1e11)])
    assert np.isfinite(values).mean() > 0.9
    # centred on the planted surface's own N*
    own = np.log(fit.optimum(BUDGET)["N"][0])
    assert abs(np.nanmedian(values) - own) < np.nanstd(values)
