"""The interval for few clusters: exact where theory is exact, its errors, and its coverage in small."""

import numpy as np
import pytest
from fits_tables import planted_table
from scipy import stats

from fits.errors import FitError
from fits.few_clusters import few_cluster_interval
from fits.laws import get_law
from fits.solve import solve

LAW = get_law("chinchilla")


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


def test_coverage_with_a_size_effect():
    """120 data sets of twelve sizes: between 88.3 and 99.2 %, three binomial deviations about 95 %."""
    truth, sizes = None, None
    held = {"rows": [], "sizes": []}
    for seed in range(120):
        table = planted_table(noise=1e-3, size_effect=3e-3, seed=seed)
        if truth is None:
            problem, point = fit(planted_table())
            truth = point.params["alpha"]
            sizes = np.unique(np.round(np.log(table["params"]), 6), return_inverse=True)[1]
        problem, point = fit(table, starts=2)
        for name, ids in (("rows", np.arange(42)), ("sizes", sizes)):
            low, high = few_cluster_interval(problem, point.p_K, ids, lambda p: p["alpha"])["95"]
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
