"""Named clusters and two crossed ways: the pigeonhole bootstrap against exact theory and simulation."""

import math

import numpy as np
import pytest
from fits_tables import planted_table

import fits
from fits.errors import FitError
from fits.table import clean
from fits.uncertainty import find_clusters, intraclass, resample_weights


def test_named_clusters():
    rows = clean(planted_table())
    ids, name = find_clusters(rows, "budget")
    assert name == "budget"
    np.testing.assert_array_equal(ids, np.repeat(np.arange(6), 7))
    ids, name = find_clusters(rows, "compute")
    assert name == "half decade of compute"
    # budgets from 1e19 to 3e21 in steps of 3.13: half decades begin at 1 and at 3.162
    np.testing.assert_array_equal(np.unique(ids, return_counts=True)[1], [14, 7, 7, 7, 7])
    exact = clean({"params": [1e8] * 3, "tokens": [1e9, 2e9, 3e9], "flops": [9.99e17, 1e18, 3.2e18],
                   "loss": [3.0, 2.9, 2.8]})  # fmt: skip
    np.testing.assert_array_equal(find_clusters(exact, "compute")[0], [0, 1, 2])


def test_ways():
    rows = clean({**planted_table(), "lab+site": np.arange(42) % 4, "cell": np.arange(42) // 7})
    ways, name = find_clusters(rows, "size+budget")
    assert name == "model size and budget" and ways.shape == (2, 42)
    np.testing.assert_array_equal(find_clusters(rows, ("size", "budget"))[0], ways)
    assert find_clusters(rows, "size")[0].shape == (42,)
    assert find_clusters(rows, "lab+site")[1] == "lab+site", "a column's own name comes first"
    for bad, words in (
        ("size+budget+compute", "two different"),
        ("size+row", "must group rows"),
        ("size+colour", "cluster is 'colour'"),
        ("budget+cell", "alike"),
        (3, "two different"),
    ):
        with pytest.raises(FitError, match=words):
            find_clusters(rows, bad)


def test_pigeonhole_variance_of_a_mean_is_owens():
    """Owen (2007): on a full R x C table the bootstrap variance of a mean has a closed form.

    Weights are products of independent multinomials, so for a weighted total over R C the variance is
    the sum over pairs of rows of x x' (E[u u'] E[v v'] - 1) / (R C)^2, taken here term by term.
    """
    R, C = 9, 7
    rng = np.random.default_rng(0)
    x = rng.standard_normal((R, C))
    ways = np.stack([np.repeat(np.arange(R), C), np.tile(np.arange(C), R)])
    weights = resample_weights(ways, 20000, "pairs", 0)
    centred = x - x.mean()
    got = (weights @ centred.ravel() / (R * C)).var()
    U, V = ((1 - 1 / n) * np.ones((n, n)) + np.eye(n) for n in (R, C))  # E[u u'] of a multinomial
    want = (np.einsum("ij,kl,ik,jl->", centred, centred, U, V) - 0.0) / (R * C) ** 2
    # 20,000 draws of a variance: a standard error of 1 %, more with the products' heavier tails
    assert abs(got / want - 1) < 0.05, (got, want)


def test_crossed_covers_what_each_way_alone_misses():
    """The mean of a table with effects of both ways: its true deviation over simulations."""
    R, C, effect = 20, 20, 1.0
    ways = np.stack([np.repeat(np.arange(R), C), np.tile(np.arange(C), R)])
    weights = {n: resample_weights(w, 400, "pairs", 0) for n, w in (("both", ways), ("first", ways[0]))}
    rng = np.random.default_rng(1)
    found = {n: [] for n in weights}
    for _ in range(60):
        x = effect * (rng.standard_normal((R, 1)) + rng.standard_normal((1, C)))
        x = (x + rng.standard_normal((R, C))).ravel()
        for n, w in weights.items():
            found[n].append(((w @ x) / w.sum(1)).var())
    true = effect**2 / R + effect**2 / C + 1 / (R * C)
    # 60 tables of 20 + 20 effects: the mean variance has a standard error of about 3 %; a bias of order
    # 1/R and the tripled row term (Owen 2007) stay below 10 %
    assert 0.85 < np.mean(found["both"]) / true < 1.15
    assert np.mean(found["first"]) / true < 0.6, "one way sees half of it"


def test_fit_with_crossed_clusters():
    table = planted_table(noise=1e-3, size_effect=3e-3)
    budget = np.repeat(np.arange(6), 7)
    table["loss"] = table["loss"] * np.exp(3e-3 * np.random.default_rng(5).standard_normal(6)[budget])
    options = {"bootstraps": 300, "sensitivity": False}
    crossed = fits.fit_table(table, cluster="size+budget", **options)
    assert crossed.method["cluster"] == "model size and budget"
    d = crossed.diagnostics
    assert d["clusters"] == 6 and [w["clusters"] for w in d["ways"]] == [12, 6]
    assert crossed.rows[8]["cluster"] == [2, 1]
    assert fits.Fit.from_dict(crossed.to_dict()).rows[8]["cluster"] == [2, 1]
    for one in ("size", "budget"):
        alone = fits.fit_table(table, cluster=one, **options)
        assert d["effective_rows"] < alone.diagnostics["effective_rows"]
        # 300 draws leave 4 % on each deviation
        assert crossed.intervals["a"]["sd"] > 0.95 * alone.intervals["a"]["sd"], one


def test_design_effects_of_two_ways_add():
    rng = np.random.default_rng(0)
    R, C = 60, 40
    x = (rng.standard_normal((R, 1)) + rng.standard_normal((1, C)) + rng.standard_normal((R, C))).ravel()
    ways = np.stack([np.repeat(np.arange(R), C), np.tile(np.arange(C), R)])
    got = intraclass(x, ways)
    # a third of the variance is each way's; 40 effects leave 22 % on a variance, so 0.07 on a share
    assert all(abs(w["icc"] - 1 / 3) < 0.15 for w in got["ways"])
    effect = sum((m - 1) * w["icc"] for m, w in zip((C, R), got["ways"], strict=True))
    assert math.isclose(got["effective_rows"], R * C / (1 + effect), rel_tol=1e-9)


@pytest.mark.slow
def test_epoch_by_half_decades_of_compute(epoch):
    """A published deviation of a of 0.045: half decades from whole powers of ten, the Bayesian scheme.

    4,000 draws leave 1 %. Drawing the same nine clusters with replacement gives 0.061: a
    resample may hold as few as three of them, and the smooth weights always keep all nine.
    """
    options = {"bootstraps": 4000, "cluster": "compute", "sensitivity": False}
    smooth = fits.fit_table(epoch, scheme="bayesian", **options)
    assert smooth.diagnostics["clusters"] == 9
    assert abs(smooth.intervals["a"]["sd"] / 0.045 - 1) < 0.05, smooth.intervals["a"]
    assert any(f["code"] == "few_clusters" for f in smooth.flags)


def test_selection_takes_one_way():
    with pytest.raises(FitError, match="one kind of cluster"):
        fits.select(planted_table(noise=1e-3), laws=("chinchilla",), cluster="size+budget")
