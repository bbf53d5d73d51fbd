"""The interval for few clusters: exact where theory is exact, its errors, and its coverage in small."""

import json

import numpy as np
import pytest
from fits_tables import planted_table
from scipy import stats

import fits
from fits.errors import FitError
from fits.few_clusters import few_cluster_interval
from fits.laws import get_law
from fits.profile import rebuild
from fits.rowloss import RowLoss
from fits.solve import solve

LAW = get_law("chinchilla")


def alpha(params):
    return params["alpha"]


def fit(table, **options):
    x = {"N": np.log(table["params"]), "D": np.log(table["tokens"])}
    options = {"loss": "least_squares", "starts": 4} | options
    return solve(LAW, x, table["loss"], **options)


def test_a_mean_is_the_t_interval_of_the_cluster_means():
    """With only E free, raw loss and equal clusters: Student's t on cluster means, groups - 1 of freedom."""
    table = planted_table(noise=3e-3, size_effect=5e-3)
    fixed = {"A": 406.4, "B": 410.7, "alpha": 0.34, "beta": 0.28}
    problem, point = fit(table, space="raw", fixed=fixed)
    ids = np.repeat(np.arange(6), 7)
    got = few_cluster_interval(problem, point.p_K, ids, lambda p: p["E"])
    rest = LAW.predict({**fixed, "E": 0.0}, {"N": table["params"], "D": table["tokens"]})
    means = (table["loss"] - rest).reshape(6, 7).mean(1)
    assert got["freedom"] == pytest.approx(5, rel=1e-6)
    # slopes by central differences, 1e-8 of a value of order one
    assert got["sd"] == pytest.approx(stats.sem(means), rel=1e-5)
    want = stats.t.interval(0.95, 5, means.mean(), stats.sem(means))
    np.testing.assert_allclose(got["95"], want, rtol=1e-6)


def test_single_rows_are_hc2():
    """Rows as clusters: the HC2 sandwich (MacKinnon & White 1985), from the law's own derivatives."""
    table = planted_table(noise=3e-3)
    problem, point = fit(table)
    p, log_n, log_d = point.params, np.log(table["params"]), np.log(table["tokens"])
    n, d = np.exp(-p["alpha"] * log_n), np.exp(-p["beta"] * log_d)
    J = np.stack([np.ones(42), n, d, -p["A"] * n * log_n, -p["B"] * d * log_d], 1)
    fitted = LAW.predict(p, {"N": table["params"], "D": table["tokens"]})
    J = J / fitted[:, None]
    bread = np.linalg.pinv(J / np.linalg.norm(J, axis=0)) / np.linalg.norm(J, axis=0)[:, None]
    leverage = (J * bread.T).sum(1)
    residual = np.log(fitted / table["loss"])
    want = np.sqrt(((bread[3] * residual) ** 2 / (1 - leverage)).sum())
    got = few_cluster_interval(problem, point.p_K, np.arange(42), lambda p: p["alpha"])
    # the condition of the uncentred derivatives, about 1e4, times the differences' 1e-9
    assert got["sd"] == pytest.approx(want, rel=1e-4)
    assert 5 < got["freedom"] < 37, "unequal leverage costs freedom: below rows less parameters"


@pytest.mark.parametrize("loss", ["least_squares", "huber"])
def test_coverage_with_a_size_effect(loss):
    """120 data sets of twelve sizes: between 88.3 and 99.2 %, three binomial deviations about 95 %."""
    truth, sizes = None, None
    held = {"rows": [], "sizes": []}
    for seed in range(120):
        table = planted_table(noise=1e-3, size_effect=3e-3, seed=seed)
        if truth is None:
            problem, point = fit(planted_table(), loss=loss)
            truth = point.params["alpha"]
            sizes = np.unique(np.round(np.log(table["params"]), 6), return_inverse=True)[1]
        problem, point = fit(table, starts=2, loss=loss)
        for name, ids in (("rows", np.arange(42)), ("sizes", sizes)):
            row_loss = RowLoss(loss, 1e-3)
            low, high = few_cluster_interval(problem, point.p_K, ids, alpha, row_loss)["95"]
            held[name].append(low <= truth <= high)
    assert 0.89 <= np.mean(held["sizes"]) <= 0.992, np.mean(held["sizes"])
    assert np.mean(held["rows"]) < np.mean(held["sizes"]), "rows taken as independent cover less"


def test_refuses():
    problem, point = fit(planted_table(noise=2e-3))
    two = np.stack([np.arange(42) % 6, np.arange(42) % 7])
    for ids, words in ((two, "two ways"), (np.arange(42) % 2, "2 clusters")):
        with pytest.raises(FitError, match=words):
            few_cluster_interval(problem, point.p_K, ids, lambda p: p["alpha"])
    at_bound = np.array([0.0, *point.p_K[1:]])
    with pytest.raises(FitError, match="at a bound"):
        few_cluster_interval(problem, at_bound, np.arange(42), lambda p: p["alpha"])


def test_robust_losses_by_pseudo_residuals():
    """One mean fitted by lad to normal rows: its standard error is sqrt(pi/2) that of the mean."""
    table = planted_table(noise=2e-3, seed=2)
    rows = 400
    rng = np.random.default_rng(0)
    table = {k: np.resize(np.asarray(v), rows) for k, v in table.items()}
    fixed = {"A": 406.4, "B": 410.7, "alpha": 0.34, "beta": 0.28}
    clean = LAW.predict({**fixed, "E": 1.69}, {"N": table["params"], "D": table["tokens"]})
    table["loss"] = clean + 2e-3 * rng.standard_normal(rows)
    problem, point = fit(table, space="raw", loss="lad", fixed=fixed)
    ids = np.arange(rows) % 50
    got = few_cluster_interval(problem, point.p_K, ids, lambda p: p["E"], RowLoss("lad", 1e-10))
    # 50 clusters tell a standard deviation to 10 %, 400 rows the density at zero to 7 %
    assert got["sd"] == pytest.approx(np.sqrt(np.pi / 2) * 2e-3 / np.sqrt(rows), rel=0.3)


def test_outliers_do_not_widen_a_robust_fit_as_they_do_least_squares():
    table = planted_table(noise=1e-3, seed=3)
    problem, point = fit(table, loss="huber")
    clean = few_cluster_interval(problem, point.p_K, np.arange(42), alpha, RowLoss("huber", 1e-3))
    table["loss"][[5, 20, 33]] *= [1.05, 0.96, 1.04]
    problem, point = fit(table, loss="huber")
    robust = few_cluster_interval(problem, point.p_K, np.arange(42), alpha, RowLoss("huber", 1e-3))
    squares = few_cluster_interval(problem, point.p_K, np.arange(42), alpha)
    assert robust["sd"] < 2 * clean["sd"] < squares["sd"]


def test_a_weight_of_two_is_the_row_twice():
    table = planted_table(noise=3e-3, seed=4)
    weights = np.ones(42)
    weights[7:14] = 2.0
    problem, point = fit(table, weights=weights)
    sizes = np.repeat(np.arange(6), 7)
    once = few_cluster_interval(problem, point.p_K, sizes, alpha, weights_R=weights)
    twice = {k: np.concatenate([np.asarray(v), np.asarray(v)[7:14]]) for k, v in table.items()}
    again, same = fit(twice)
    want = few_cluster_interval(again, same.p_K, np.append(sizes, sizes[7:14]), alpha)
    assert once["sd"] == pytest.approx(want["sd"], rel=1e-4)


def test_an_asymmetric_loss_is_refused():
    problem, point = fit(planted_table(noise=2e-3))
    with pytest.raises(FitError, match="quantile"):
        few_cluster_interval(problem, point.p_K, np.arange(42), alpha, RowLoss("quantile", 1e-3, 0.9))


def test_a_fit_prints_these_intervals_and_keeps_the_percentiles(tmp_path):
    table = planted_table(noise=2e-3, size_effect=3e-3, seed=5)
    got = fits.fit_table(table, bootstraps=200, sensitivity=False)
    problem, weights, row_loss = rebuild(got)
    ids = np.array([r["cluster"] for r in got.rows])
    want = few_cluster_interval(problem, problem.from_params(got.params)[0], ids, alpha, row_loss, weights)
    assert got.intervals["alpha"]["method"] == "few clusters"
    np.testing.assert_allclose(got.intervals["alpha"]["95"], want["95"], rtol=1e-6)
    draws = got.draw_params()["alpha"]
    np.testing.assert_allclose(got.intervals["alpha"]["percentile"]["95"], np.quantile(draws, [0.025, 0.975]))
    log_a = few_cluster_interval(
        problem, problem.from_params(got.params)[0], ids, lambda p: np.log(p["A"]), row_loss, weights
    )
    np.testing.assert_allclose(np.log(got.intervals["A"]["95"]), log_a["95"], rtol=1e-6)
    assert "few clusters" in str(got)
    # a fit read from its file gives the same
    again = fits.Fit.from_dict(json.loads(json.dumps(got.to_dict())))
    one, two = (fits.allocate(f, 1e21).intervals["N"] for f in (got, again))
    assert one["method"] == "few clusters"
    np.testing.assert_allclose(one["95"], two["95"], rtol=1e-9)
    capped = fits.allocate(got, 1e21, max_params=1e12).intervals["N"]
    assert capped["method"] == "percentile"
