"""Intervals of a run that was not made: how often they hold it, what they say, what they refuse."""

import json

import numpy as np
import pytest
from fits_tables import planted_loss, planted_table

import fits
from fits.errors import FitError
from fits.predict import predict_run

NEW = {"params": 5e9, "tokens": 1.2e11}


def fit(table, **options):
    options = {"loss": "least_squares", "bootstraps": 0, "sensitivity": False} | options
    return fits.fit_table(table, **options)


def test_coverage_of_a_new_run():
    """100 data sets with an error of each size, and a run of a new size at the top of the grid."""
    held = {"surface": 0, "run": 0}
    truth = float(planted_loss(NEW["params"], NEW["tokens"]))
    for seed in range(100):
        got = predict_run(fit(planted_table(noise=1e-3, size_effect=3e-3, seed=seed)), **NEW)
        rng = np.random.default_rng(1000 + seed)
        run = truth * np.exp(1e-3 * rng.standard_normal() + 3e-3 * rng.standard_normal())
        held["surface"] += got.surface["95"][0] <= truth <= got.surface["95"][1]
        held["run"] += got.run["95"][0] <= run <= got.run["95"][1]
    # a binomial of 100 at 95 % has a deviation of 2.2: three of them
    assert held["surface"] >= 88 and held["run"] >= 88, held


def test_noise_is_corrected_for_the_parameters():
    """Independent rows: the squared noise is unbiased, and without the correction 12 % too small."""
    got = [predict_run(fit(planted_table(noise=2e-3, seed=s), cluster="row"), **NEW).noise for s in range(60)]
    # 60 variances of 37 degrees of freedom: a deviation of 3 %; three of them
    assert abs(np.mean(np.square(got)) / 4e-6 - 1) < 0.09


def test_many_clusters_use_the_draws_and_a_read_fit_agrees():
    table = {k: np.tile(v, 2) for k, v in planted_table(noise=2e-3).items()}  # 84 rows, each on its own
    table["loss"] = table["loss"] * np.exp(1e-3 * np.random.default_rng(1).standard_normal(84))
    got = fit(table, loss="huber", cluster="row", bootstraps=200)
    one = got.prediction(**NEW)
    again = predict_run(fits.Fit.from_dict(json.loads(json.dumps(got.to_dict()))), **NEW)
    assert one.to_dict() == again.to_dict()
    draws = got.predict_draws(**NEW)[:, 0]
    # resampled 20,000 times: the ends move by a small part of the width
    np.testing.assert_allclose(one.surface["80"], np.quantile(draws, [0.1, 0.9]), rtol=2e-4)
    assert one.run["95"][0] < one.surface["95"][0] < one.estimate < one.surface["95"][1] < one.run["95"][1]


def test_the_draws_of_few_clusters_are_doubted():
    got = fit(planted_table(noise=2e-3, size_effect=3e-3), loss="expectile", tau=0.5, bootstraps=200)
    assert got.few_clusters is None
    assert "too seldom" in str(got.prediction(**NEW)).splitlines()[0]


def test_doubts_and_refusals():
    got = fit(planted_table(noise=2e-3))
    assert "10 times outside" in str(
        predict_run(got, params=1e9, tokens=10 * got.diagnostics["range"]["tokens"][1])
    )
    for columns, words in (
        ({"params": 1e9}, "tokens is None"),
        ({"params": -1.0, "tokens": 1e10}, "params is -1.0"),
        (NEW | {"colour": 3}, "colour"),
    ):
        with pytest.raises(FitError, match=words):
            predict_run(got, **columns)
    with pytest.raises(FitError, match="refit it with bootstraps"):
        predict_run(fit(planted_table(noise=2e-3), loss="expectile"), **NEW)
