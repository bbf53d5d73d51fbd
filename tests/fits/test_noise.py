"""Seed noise: the pooled deviation and its interval, an exact test of lack of fit, repeats found."""

import json
import math

import numpy as np
import pytest
from fits_tables import planted_loss

import fits
from fits.noise import find_repeats, seed_noise
from fits.table import clean


def seeded(noise=2e-3, seeds=3, bend=0.0, seed=0, points=14):
    """A grid with some points run under several seeds; ``bend`` adds what no Chinchilla surface has."""
    rng = np.random.default_rng(seed)
    N = np.tile(np.geomspace(1e7, 1e9, points // 2), 2).repeat(seeds)
    D = N * np.array([15.0, 60.0]).repeat(points // 2).repeat(seeds)
    wave = bend * np.sin(np.arange(N.size) // seeds * 2.4)
    loss = planted_loss(N, D) * np.exp(wave + noise * rng.standard_normal(N.size))
    return {"params": N, "tokens": D, "loss": loss, "seed": np.tile(np.arange(seeds), points)}


def test_pooled_deviation_is_the_textbook_one():
    table = {"params": [1e8] * 3 + [2e8] * 2 + [4e8], "tokens": [1e9] * 6,
             "loss": np.exp([1.0, 1.02, 1.04, 0.9, 0.92, 0.8])}  # fmt: skip
    got = seed_noise(clean(table), ("N", "D"), np.zeros(6), 5)
    # sums of squares 8e-4 on 2 and 2e-4 on 1
    assert got["degrees_of_freedom"] == 3 and got["groups"] == 2 and got["kind"] == "repeats"
    assert math.isclose(got["sd"], math.sqrt(1e-3 / 3), rel_tol=1e-9)
    # chi-squared quantiles of 3 degrees of freedom from tables: 9.3484 and 0.21580
    want = [math.sqrt(1e-3 / 9.3484), math.sqrt(1e-3 / 0.21580)]
    np.testing.assert_allclose(got["interval"], want, rtol=1e-4)
    assert got["lack_of_fit"] is None, "three points, five parameters"
    assert seed_noise(clean({k: v[3:] for k, v in table.items()}), ("N", "D"), np.zeros(3), 1)["groups"] == 1


def test_interval_covers_the_noise():
    hits = 0
    for seed in range(200):
        got = seed_noise(clean(seeded(seed=seed)), ("N", "D"), np.zeros(42), 5)
        hits += got["interval"][0] <= 2e-3 <= got["interval"][1]
    # 95 % of 200, three standard errors of 1.5 %
    assert hits >= 181 and got["degrees_of_freedom"] == 28


def test_lack_of_fit_is_the_exact_test_of_a_linear_law():
    """With exponents near fixed the surface is linear, and p is uniform where the law is right."""
    p = []
    for seed in range(150):
        rows = clean(seeded(seed=seed))
        y = np.log(rows.loss) - np.log(planted_loss(rows.params, rows.tokens))
        X = np.stack([np.ones(42), np.log(rows.params) - 18, (np.log(rows.params) - 18) ** 2], 1)
        residual = y - X @ np.linalg.lstsq(X, y, rcond=None)[0]
        p.append(seed_noise(rows, ("N", "D"), residual, 3)["lack_of_fit"]["p"])
    from scipy.stats import kstest

    assert kstest(p, "uniform").pvalue > 1e-3


def test_a_bent_surface_is_flagged_and_a_straight_one_is_not():
    options = {"loss": "least_squares", "bootstraps": 0, "sensitivity": False}
    fit = fits.fit_table(seeded(), **options)
    noise = fit.diagnostics["seed_noise"]
    assert noise["kind"] == "seeds" and noise["lack_of_fit"]["degrees_of_freedom"] == [9, 28]
    assert noise["interval"][0] < 2e-3 < noise["interval"][1]
    assert not any(f["code"] == "lack_of_fit" for f in fit.flags)
    bent = fits.fit_table(seeded(bend=8e-3), **options)
    assert any(f["code"] == "lack_of_fit" and "not in the law" in f["text"] for f in bent.flags)
    # the total of squares parts exactly into lack and noise
    parts = bent.diagnostics["seed_noise"]
    total = sum(r["residual"] ** 2 for r in bent.rows)
    lack = parts["lack_of_fit"]["sd"] ** 2 * 9
    assert math.isclose(total, lack + parts["sd"] ** 2 * 28, rel_tol=1e-9)
    json.dumps(fit.to_dict(), allow_nan=False)
    assert "seed noise" in str(fit)


def test_runs_of_one_seed_are_no_repeats():
    table = seeded()
    table["seed"] = np.where(np.arange(42) < 21, 0, table["seed"])  # half the groups differ otherwise
    ids, kind = find_repeats(clean(table), ("N", "D"))
    assert kind == "seeds" and (np.bincount(ids) > 1).sum() == 7
    assert find_repeats(clean({k: v for k, v in table.items() if k != "seed"}), ("N", "D"))[1] == "repeats"


@pytest.mark.parametrize("seed", [[None] * 42, ["x"] * 42, [float("nan")] * 42])
def test_unknown_seeds_are_not_believed(seed):
    fit = fits.fit_table(seeded() | {"seed": np.array(seed, object)}, bootstraps=0, sensitivity=False)
    assert fit.diagnostics["seed_noise"] is None
