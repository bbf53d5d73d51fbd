"""The choice of runs: expected widths against real refits of planted tables with the run added."""

import numpy as np
import pytest
from fits_tables import planted_loss, planted_table

import fits
from fits.design import next_runs, spend_for

NOISE, BUDGET = 3e-3, 1e24


@pytest.fixture(scope="module")
def fit():
    return fits.fit_table(
        planted_table(noise=NOISE), loss="least_squares", cluster="row", bootstraps=400, sensitivity=False
    )


def simulated_width(N, D, seeds=40):
    """1.96 sd of log N* over new tables, each with the run in it."""
    got = []
    for seed in range(seeds):
        t = planted_table(noise=NOISE, seed=seed + 10)
        e = np.exp(NOISE * np.random.default_rng(seed + 900).standard_normal())
        new = {"params": N, "tokens": D, "flops": 6 * N * D, "loss": planted_loss(N, D) * e}
        t = {k: np.append(v, new[k]) for k, v in t.items()}
        f = fits.fit_table(t, loss="least_squares", bootstraps=0, sensitivity=False)
        got.append(np.log(f.optimum(BUDGET)["N"][0]))
    return 1.96 * np.std(got, ddof=1)


def test_ranking_agrees_with_refits(fit):
    points = [(1e8, 1e12), (1e9, 2e10), (2e10, 2e9)]
    said = [next_runs(fit, [p], budget_target=BUDGET, max_flops=1e24).runs[0]["half_width"] for p in points]
    real = [simulated_width(*p) for p in points]
    assert np.argsort(said).tolist() == np.argsort(real).tolist(), (said, real)


def test_spending(fit):
    now = next_runs(fit, budget_target=BUDGET, batch=3)
    widths = [now.half_width, *(r["half_width"] for r in now.runs)]
    assert len(now.runs) == 3 and (np.diff(widths) < 0).all()
    got = spend_for(fit, budget_target=BUDGET, within=0.9 * np.expm1(now.half_width))
    assert got.reached and got.runs[-1]["half_width"] <= np.log1p(0.9 * np.expm1(now.half_width))
    never = spend_for(fit, budget_target=BUDGET, within=1e-6)
    assert never.reached is False and str(never).startswith("flag: not reachable within 200 runs")
    with pytest.raises(fits.FitError, match="quantity is 'x'"):
        next_runs(fit, quantity="x", budget_target=BUDGET)
