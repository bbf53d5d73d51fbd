"""Approaches 1, 2 and 3 on planted grids, and what each refuses."""

import math

import numpy as np
import pytest
from fits_tables import PLANTED, planted_loss, planted_table

import fits
from fits.approaches import envelope, parabolas
from fits.table import clean

TRUE_A = PLANTED["beta"] / (PLANTED["alpha"] + PLANTED["beta"])


def iso_table(budgets, sizes_about, noise=0.0, seed=0, p=None):
    """At each budget, sizes at fixed ratios to the true optimum."""
    p = p or PLANTED
    a = p["beta"] / (p["alpha"] + p["beta"])
    k = (p["alpha"] * p["A"] / (p["beta"] * p["B"])) ** (1 / (p["alpha"] + p["beta"]))
    C = np.repeat(budgets, len(sizes_about))
    N = k * (C / 6) ** a * np.tile(sizes_about, len(budgets))
    D = C / 6 / N
    error = np.exp(noise * np.random.default_rng(seed).standard_normal(C.size))
    return {"params": N, "tokens": D, "flops": C, "loss": planted_loss(N, D, p) * error}


SYMMETRIC = 2.0 ** np.arange(-3, 4)


def test_all_three_find_the_planted_exponents():
    table = iso_table(np.geomspace(1e18, 1e22, 7), SYMMETRIC)
    got = fits.approaches(table, bootstraps=0)
    one, two, three = (got.approaches[k] for k in "123")
    # the winner of each budget sits at the same ratio to the optimum, so approach 1 is exact here
    assert math.isclose(one.a, TRUE_A, rel_tol=1e-9) and math.isclose(one.b, 1 - TRUE_A, rel_tol=1e-9)
    assert math.isclose(three.a, TRUE_A, rel_tol=1e-8)
    # a parabola is not the surface: its shift is what the bias says (tested below), and small
    assert abs(two.a - TRUE_A) < 0.01
    assert all(p["accepted"] for p in two.points)


ASYMMETRIC = {**PLANTED, "alpha": 0.46, "beta": 0.26, "A": 2500.0, "B": 300.0}


def drifting_table(noise=0.0, seed=0):
    """Asymmetric surface; the sizes drift against the optimum, so the parabolas' shift grows with C."""
    parts = [
        iso_table([c], 2.0 ** (np.arange(-4, 5) + 0.9 * i - 2), noise, 100 * seed + i, ASYMMETRIC)
        for i, c in enumerate(np.geomspace(1e18, 1e22, 6))
    ]
    return {k: np.concatenate([part[k] for part in parts]) for k in parts[0]}


def test_printed_bias_predicts_the_shift_of_parabolas():
    """Without noise the shift is exact; from a noisy table's fit it is foretold within 10 %."""
    exact = fits.approaches(drifting_table(), bootstraps=0)
    true = ASYMMETRIC["beta"] / (ASYMMETRIC["alpha"] + ASYMMETRIC["beta"])
    two = exact.approaches["2"]
    assert two.status == "ok" and sum(p["accepted"] for p in two.points) >= 5
    shift = two.a - true
    assert abs(shift) > 5e-3, "no shift, nothing to predict"
    # the surface is recovered to 1e-8
    assert math.isclose(two.bias["a"], shift, rel_tol=1e-4)
    budgets = np.array([q["budget"] for q in two.points if q["accepted"]])
    optimum = fits.get_law("chinchilla").optimum(ASYMMETRIC, budgets)["N"]
    measured = [q["N"] / n for q, n in zip((q for q in two.points if q["accepted"]), optimum, strict=True)]
    np.testing.assert_allclose(two.bias["N_ratio"], measured, rtol=1e-5)
    assert f"{shift:+.4f}" in str(exact)
    noisy = fits.approaches(drifting_table(noise=3e-4, seed=1), bootstraps=0)
    assert math.isclose(noisy.approaches["2"].bias["a"], shift, rel_tol=0.1)


def test_equal_ratios_shift_n_but_not_the_exponent():
    """Sizes at the same ratios to the optimum at each budget: every vertex is off by one factor."""
    got = fits.approaches(iso_table(np.geomspace(1e18, 1e22, 6), SYMMETRIC, p=ASYMMETRIC), bootstraps=0)
    bias = got.approaches["2"].bias
    assert abs(bias["a"]) < 1e-8
    assert abs(bias["N_ratio"][0] - 1) > 0.05
    np.testing.assert_allclose(bias["N_ratio"], bias["N_ratio"][0], rtol=1e-6)


def test_parabolas_against_polyfit():
    table = iso_table(np.geomspace(1e18, 1e22, 5), SYMMETRIC, noise=2e-3)
    two = parabolas(clean(table), 0)
    vertices = []
    for g, point in enumerate(two.points):
        rows = slice(7 * g, 7 * g + 7)
        c2, c1, c0 = np.polyfit(np.log(table["params"][rows]), table["loss"][rows], 2)
        np.testing.assert_allclose(point["parabola"], [c0, c1, c2], rtol=1e-9)
        assert math.isclose(point["N"], math.exp(-c1 / 2 / c2), rel_tol=1e-9)
        assert math.isclose(point["loss"], c0 - c1**2 / 4 / c2, rel_tol=1e-9)
        assert math.isclose(6 * point["N"] * point["D"], point["budget"], rel_tol=1e-9)
        assert point["rows"] == list(range(7 * g, 7 * g + 7))
        vertices.append(-c1 / 2 / c2)
    slope, start = np.polyfit(np.log([p["budget"] for p in two.points]), vertices, 1)
    assert math.isclose(two.a, slope, rel_tol=1e-9) and math.isclose(
        two.coefficient_N, math.exp(start), rel_tol=1e-6
    )
    np.testing.assert_allclose(two.N(np.array([1e20])), math.exp(start + slope * math.log(1e20)), rtol=1e-9)


def test_concave_and_outside_are_refused_with_a_reason():
    table = iso_table(np.geomspace(1e18, 1e22, 6), SYMMETRIC)
    rows = clean(table)
    loss = table["loss"].copy()
    loss[:7] = 2 * loss[:7].max() - loss[:7]  # upside down
    keep = np.ones(42, bool)
    keep[[7 + i for i in (3, 4, 5, 6)]] = False  # second budget: the three smallest sizes only
    keep[[14 + i for i in (4, 5, 6)]] = False  # third budget: sizes below the optimum
    got = parabolas(clean({k: v[keep] for k, v in {**table, "loss": loss}.items()}), 0)
    reasons = [p["reason"] for p in got.points]
    assert "bend downwards" in reasons[0]
    assert reasons[1] == "3 sizes, and a parabola with an error to show needs 4"
    assert reasons[2] == "" or "the minimum lies above the largest size" in reasons[2]
    assert [p["accepted"] for p in got.points[3:]] == [True] * 3 and got.status == "ok"
    assert all(p["N"] is None for p in got.points if not p["accepted"])
    rising = parabolas(rows, 0, loss_R=2 + 1e-3 * (np.log(table["params"]) - 10) ** 2)
    assert all("below the smallest size" in p["reason"] for p in rising.points)
    assert rising.status == "refused" and rising.a is None and "0 usable budgets" in rising.reasons[0]


def test_interval_of_parabolas_covers():
    """95 % intervals of a from parabolas, 120 noisy grids of 4 budgets by 6 sizes, bias taken off."""
    clean_a = parabolas(clean(iso_table(np.geomspace(1e19, 1e22, 4), SYMMETRIC[:6])), 0).a
    hits = 0
    for seed in range(120):
        table = iso_table(np.geomspace(1e19, 1e22, 4), SYMMETRIC[:6], noise=1.5e-3, seed=seed)
        low, high = parabolas(clean(table), 300, seed).intervals["a"]["95"]
        hits += low <= clean_a <= high
    # 120 grids leave a standard error of 2 % on 95 %
    assert hits / 120 >= 0.88, hits


def test_envelope_takes_winners_that_improve():
    table = iso_table(np.geomspace(1e18, 1e22, 5), SYMMETRIC, noise=1e-3)
    table["loss"][14:21] *= 1.5  # a whole budget worse than a cheaper one
    one = envelope(clean(table), np.ones((0, 35)))
    assert [p["accepted"] for p in one.points] == [True, True, False, True, True]
    assert one.points[2]["reason"] == "a cheaper budget reached a lower loss"
    for g in (0, 1, 3, 4):
        best = 7 * g + int(np.argmin(table["loss"][7 * g : 7 * g + 7]))
        assert one.points[g]["row"] == best and one.points[g]["N"] == table["params"][best]


def test_envelope_says_when_the_winner_is_at_an_end():
    table = iso_table(np.geomspace(1e18, 1e22, 5), 2.0 ** np.arange(0, 5))
    one = envelope(clean(table), np.ones((0, 25)))
    assert one.reasons == ["5 of 5 winners are at an end of their budget's sizes"]


def test_refusals():
    one_budget = {k: v[:7] for k, v in planted_table(noise=1e-3).items()}
    got = fits.approaches(one_budget, bootstraps=20)
    for key in "123":
        assert got.approaches[key].status == "refused", key
        assert got.approaches[key].a is None and np.isnan(got.approaches[key].N([1e20])).all()
    assert "all runs are at one budget" in str(got)


def test_exponent_under_each_counting_convention():
    """N without embeddings, 150 N^(2/3) of them: the exponent under that count is another one."""
    table = iso_table(np.geomspace(1e18, 1e22, 6), 1.25 ** np.arange(-3, 4))
    inner = table["params"] - 150 * table["params"] ** (2 / 3)
    table |= {
        "params_total": table["params"], "params_nonembedding": inner,
        "flops_6N_total": 6 * table["params"] * table["tokens"],
        "flops_6N_nonembedding": 6 * inner * table["tokens"],
    }  # fmt: skip
    table["budget"] = np.repeat(np.geomspace(1e18, 1e22, 6), 7)
    got = fits.approaches(table, bootstraps=0)
    rows = {r["convention"]: r for r in got.conventions}
    assert set(rows) == {"exact", "6 N_total D", "6 N_nonembedding D"}
    alone = fits.fit_table({**table, "params": inner}, bootstraps=0, sensitivity=False)
    # the same rows through another door
    assert math.isclose(rows["6 N_nonembedding D"]["a"], alone.intervals["a"]["estimate"], rel_tol=1e-9)
    assert abs(rows["6 N_nonembedding D"]["a"] - rows["6 N_total D"]["a"]) > 1e-3
    assert math.isclose(rows["exact"]["a"], got.approaches["3"].a, rel_tol=1e-9)
    # parabolas: the true optimum of each budget, recounted; its slope over the recounted FLOPs
    N = fits.get_law("chinchilla").optimum(PLANTED, np.geomspace(1e18, 1e22, 6))["N"]
    recounted = N - 150 * N ** (2 / 3)
    flops = recounted / N * np.geomspace(1e18, 1e22, 6)
    slope = np.polyfit(np.log(flops), np.log(recounted), 1)[0]
    # sizes within a factor of two of the optimum: parabolas shift by little
    assert abs(rows["6 N_nonembedding D"]["approach_2_a"] - slope) < 0.006
    assert abs(slope - TRUE_A) > 0.015, "the convention should matter, else this tests nothing"


def test_comparison_is_json(epoch):
    import json

    got = fits.approaches(epoch, bootstraps=100)
    data = json.loads(json.dumps(got.to_dict(), allow_nan=False))
    assert data["approaches"]["3"]["a"] == got.approaches["3"].a
    # approach 3 of the published table; the other two must agree with it within their intervals
    assert abs(got.approaches["3"].a - 0.5139) < 5e-5
    for key in "12":
        low, high = got.approaches[key].intervals["a"]["95"]
        assert low < 0.5139 < high


def test_a_given_fit_is_approach_three():
    table = planted_table(noise=2e-3)
    fit = fits.fit_table(table, "tied", bootstraps=50, sensitivity=False)
    got = fits.approaches(table, fit=fit, bootstraps=50)
    assert got.approaches["3"].a == 0.5 and "tied" in got.approaches["3"].name
    budget = np.array([1e20, 1e23])
    np.testing.assert_allclose(got.approaches["3"].N(budget), fit.optimum(budget)["N"], rtol=1e-9)
    np.testing.assert_allclose(got.approaches["3"].D(budget), fit.optimum(budget)["D"], rtol=1e-9)


def test_bad_input_is_the_tables():
    with pytest.raises(fits.FitError, match="the table has no column 'loss'"):
        fits.approaches({"params": [1e9], "tokens": [1e10]})
