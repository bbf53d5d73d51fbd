"""Clusters by name and two ways: what they group, the variance of the product weights, what a fit says."""

import json

import numpy as np
import pytest
from fits_tables import planted_table

import fits
from fits.errors import FitError
from fits.table import clean
from fits.uncertainty import find_clusters, intraclass, resample_weights


def test_named_clusters():
    table = planted_table(noise=2e-3)
    rows = clean(table)
    budgets = np.repeat(np.arange(6), 7)
    ids, name = find_clusters(rows, "budget")
    np.testing.assert_array_equal(ids, budgets)
    assert name == "budget"
    # budgets 1e19 to 3e21, a factor of 3.13 apart: half decades, edges at 1e19, 3.16e19, ...
    ids, name = find_clusters(rows, "compute")
    bins = np.floor(2 * np.log10(np.geomspace(1e19, 3e21, 6)) + 1e-9)
    np.testing.assert_array_equal(ids, np.unique(bins, return_inverse=True)[1][budgets])
    assert name == "half decade of compute"
    assert find_clusters(rows, "run")[1] == "model size"
    trunks = clean(table | {"trunk": np.arange(42) % 4})
    assert find_clusters(trunks, "run")[1] == "trunk"
    runs = clean(table | {"trunk": np.arange(42) % 4, "run": np.arange(42) // 2})
    ids, name = find_clusters(runs, "run")
    assert name == "run" and len(np.unique(ids)) == 21


def test_a_budget_at_an_edge_stays_in_its_bin():
    """log10 of 1e23 is 22.999999999999996 in float64."""
    table = {"params": [1e9] * 2 + [2e9] * 2, "tokens": [1e10] * 4, "loss": [3.0, 2.9, 2.8, 2.7]}
    rows = clean(table | {"flops": [1e23, 1.01e23, 1e22, 1.01e22]})
    np.testing.assert_array_equal(find_clusters(rows, "compute")[0], [1, 1, 0, 0])


@pytest.mark.parametrize("scheme", ["pairs", "bayesian"])
def test_two_way_weights_are_products(scheme):
    rng = np.random.default_rng(0)
    ways = np.stack([rng.integers(0, 9, 200), rng.integers(0, 14, 200)])
    ways[:, :14] = np.stack([np.arange(14) % 9, np.arange(14)])  # every cluster occurs
    got = resample_weights(ways, 20_000, scheme, 1)
    # Var of a product of independent weights of mean 1: (1 + v1)(1 + v2) - 1
    v = [1 - 1 / 9, 1 - 1 / 14] if scheme == "pairs" else [8 / 10, 13 / 15]
    # the variance of 20,000 products with a kurtosis of about 30 is known to 4 %; averaged over rows
    assert abs(got.var(0).mean() / ((1 + v[0]) * (1 + v[1]) - 1) - 1) < 0.08
    assert abs(got.mean() - 1) < 0.02


def test_two_way_variance_of_a_mean():
    """A mean over a full 30 x 40 grid with effects of both ways: Owen's variance, and one way too little."""
    r, c, sd_r, sd_c, sd = 30, 40, 1.0, 0.7, 0.5
    ways = np.stack([np.repeat(np.arange(r), c), np.tile(np.arange(c), r)])
    two, true = [], sd_r**2 / r + sd_c**2 / c + sd**2 / (r * c)
    weights = {k: resample_weights(ids, 1000, "pairs", 3) for k, ids in (("both", ways), ("first", ways[0]))}
    one = []
    for seed in range(60):
        rng = np.random.default_rng(seed)
        y = sd_r * rng.standard_normal(r)[ways[0]] + sd_c * rng.standard_normal(c)[ways[1]]
        y = y + sd * rng.standard_normal(r * c)
        for key, out in (("both", two), ("first", one)):
            w = weights[key]
            out.append(((w @ y) / w.sum(1)).var())
    # the mean of 60 variances, each with about 25 % of sampling error: 3 %; Owen's bias adds 2 sd^2/(rc), 1 %
    # and the divisor (r - 1)/r takes 3 %; 12 % is three deviations beyond those
    assert abs(np.mean(two) / true - 1) < 0.12
    assert np.mean(one) < 0.85 * true, "by the first way alone the second's effect is missed"


def test_fit_clustered_two_ways_and_its_file(tmp_path):
    table = planted_table(noise=1e-3, size_effect=3e-3)
    by_size = fits.fit_table(table, bootstraps=300, cluster="size", sensitivity=False)
    both = fits.fit_table(table, bootstraps=300, cluster=("size", "budget"), sensitivity=False)
    same = fits.fit_table(table, bootstraps=300, cluster="size + budget", sensitivity=False)
    np.testing.assert_array_equal(both.draws, same.draws)
    assert both.method["cluster"] == "model size and budget"
    # the second way adds variance: 300 draws leave 4 % on a deviation
    assert both.intervals["a"]["sd"] > 0.95 * by_size.intervals["a"]["sd"]
    assert both.rows[9]["cluster"] == [3, 1]
    assert both.diagnostics["effective_rows"] <= by_size.diagnostics["effective_rows"]
    assert json.loads(json.dumps(both.to_dict()))["rows"][9]["cluster"] == [3, 1]
    np.testing.assert_array_equal(fits.Fit.from_dict(both.to_dict()).draws, both.draws)


@pytest.mark.parametrize(
    ("cluster", "says"),
    [("size+colour", "colour"), (("size",), "two different"), (("size", "size"), "two different"),
     (("size", "row"), "must group rows"), (3, "two different")],
)  # fmt: skip
def test_bad_clusters_are_named(cluster, says):
    with pytest.raises(FitError, match=says):
        find_clusters(clean(planted_table()), cluster)


def test_rows_one_by_one_are_doubted_first_and_counted():
    table = planted_table(noise=1e-3, size_effect=4e-3)
    fit = fits.fit_table(table, bootstraps=50, cluster="row", sensitivity=False)
    assert fit.flags[0]["code"] == "correlated_rows" and "far too narrow" in str(fit).splitlines()[0]
    residual = np.array([row["residual"] for row in fit.rows])
    sizes = np.round(np.log(table["params"] / 1e8) / np.log(1.6)).astype(int)
    # the stored residual has the other sign, which correlation does not see
    want = intraclass(residual, sizes)["effective_rows"]
    assert abs(fit.diagnostics["effective_rows"] / want - 1) < 1e-9 and want < 30
    assert f"about {want:.0f} independent rows of 42" in str(fit)
