"""Choosing a round's cells: the arithmetic against plain generalised least squares, prices and stopping."""

import math

import numpy as np
import pytest

from fits import FitError, fit_table, next_cells
from fits.adaptive import LEAST_SHARED, PRIOR_SD, Knowledge, is_narrow, reported_half_width, value_of

LAW = {"E": 1.7, "A": 400.0, "B": 410.0, "alpha": 0.34, "beta": 0.28}
N, D = np.geomspace(1e7, 1e9, 6), np.geomspace(2e8, 2e10, 6)
POOL = [(n, d) for n in N for d in D]


@pytest.fixture(scope="module")
def fit():
    rng = np.random.default_rng(0)
    params, tokens = np.array([(n, d) for n in N[:4] for d in D[:4]]).T
    loss = LAW["E"] + LAW["A"] / params ** LAW["alpha"] + LAW["B"] / tokens ** LAW["beta"]
    table = {"params": params, "tokens": tokens, "loss": loss * np.exp(0.003 * rng.standard_normal(16))}
    return fit_table(table, bootstraps=100, sensitivity=False)


def done(fit):
    return [(r["params"], r["tokens"]) for r in fit.rows]


def test_a_runs_worth_is_that_of_generalised_least_squares(fit):
    """Variance of a by (J' V^-1 J + prior)^-1 with slopes written out by hand."""
    points = np.array([*done(fit), (1e9, 2e10)])
    sizes = np.unique(points[:, 0].round(), return_inverse=True)[1]
    known = Knowledge(fit, points, sizes, value_of(fit.law, "a", None))
    p = fit.params
    n, d = points.T
    by_n, by_d = p["A"] * n ** -p["alpha"], p["B"] * d ** -p["beta"]
    parts = {"E": p["E"] + 0 * n, "A": by_n, "B": by_d,
             "alpha": -by_n * np.log(n) * p["alpha"], "beta": -by_d * np.log(d) * p["beta"]}  # fmt: skip
    J = np.stack([parts[k] for k in fit.law.parameters], 1) / (p["E"] + by_n + by_d)[:, None]
    total = (p["alpha"] + p["beta"]) ** 2
    slope = {"alpha": -p["beta"] / total * p["alpha"], "beta": p["alpha"] / total * p["beta"]}
    g = np.array([slope.get(k, 0.0) for k in fit.law.parameters])
    variance = fit.diagnostics["rms_residual"] ** 2 * 16 / 11  # rows over degrees of freedom
    shared = max(fit.diagnostics["icc"], LEAST_SHARED)

    def expected(rows):
        V = variance * ((1 - shared) * np.eye(len(rows)) + shared * (sizes[rows][:, None] == sizes[rows]))
        information = J[rows].T @ np.linalg.solve(V, J[rows]) + np.eye(5) / PRIOR_SD**2
        return g @ np.linalg.solve(information, g)

    for i in range(16):
        known.learn(i)
    before, gain = expected(np.arange(16)), known.gains([16])[0]
    # central differences with a relative step of 1e-4 are good to about 1e-8, conditioning loses some digits
    assert known.gradient @ known.covariance @ known.gradient == pytest.approx(before, rel=1e-4)
    assert before - gain == pytest.approx(expected(np.arange(17)), rel=1e-4)
    assert known.half_width == pytest.approx(2.201 * math.sqrt(before), rel=1e-3)  # Student's t, 11


def test_the_round_keeps_to_its_spending_and_to_prices(fit):
    def price(picks):
        return np.array([6 * n * d for n, d in POOL])

    chosen = next_cells(fit, done(fit), POOL, price, 1e20)
    assert 0 < chosen.flops <= 1e20 and chosen.after < chosen.before
    assert chosen.flops == pytest.approx(price([])[chosen.picks].sum())
    assert len(set(chosen.picks)) == len(chosen.picks)
    assert next_cells(fit, done(fit), POOL, price, 1.0).picks == []
    # the same cell twice in the pool, at two prices: the cheap one is taken first
    twice = [POOL[-1], POOL[-1]]
    assert next_cells(fit, done(fit), twice, lambda picks: np.array([2.0, 1.0]), 3.0).picks == [1, 0]

    # a price that falls once its companion is there
    def together(picks):
        return np.array([1.0, 5.0 if 0 not in picks else 0.1])

    assert next_cells(fit, done(fit), twice, together, 1.2).picks == [0, 1]


def test_n_star_and_what_is_refused(fit):
    chosen = next_cells(fit, done(fit), POOL, lambda p: np.ones(len(POOL)), 5.0, quantity="N*", at=1e21)
    assert len(chosen.picks) == 5 and chosen.after < chosen.before
    assert 0 < reported_half_width(fit, "N*", 1e21) < 3
    ends = fit.intervals["a"]["95"]
    assert reported_half_width(fit) == (ends[1] - ends[0]) / 2
    with pytest.raises(FitError, match="give one in FLOPs"):
        value_of(fit.law, "N*", None)
    with pytest.raises(FitError, match="quantity is 'b'"):
        value_of(fit.law, "b", None)


def test_it_stops_when_narrow_twice_by_both_measures():
    assert is_narrow([(9, 9), (0.1, 0.05), (0.08, 0.1)], 0.1)
    assert not is_narrow([(0.05, 0.05)], 0.1)
    assert not is_narrow([(0.05, 0.05), (0.05, 0.2)], 0.1)
    assert not is_narrow([(0.2, 0.05), (0.05, 0.05)], 0.1)
