"""Planted studies of the laws: recovered without noise, with right slopes, and within their intervals."""

import json
from pathlib import Path

import numpy as np
import pytest
from test_more_laws import PLANTED

import fits
from fits.laws import LAWS
from fits.objective import RowLoss, make_problem
from fits.planted import STUDIES, planted, planted_table, recover
from fits.solve import solve

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
# the laws of test_more_laws are recovered there
NEW = [n for n in STUDIES if n not in PLANTED]


@pytest.mark.parametrize("name", NEW)
def test_planted_law_is_recovered(name):
    """Parameters from noise-free rows, slopes against differences, and coordinates there and back."""
    law, truth, x, loss, _ = planted(name)
    log_x = {v: np.log(values) for v, values in x.items()}
    _, point = solve(law, log_x, loss, loss="least_squares", starts=4)
    assert point.status == "converged", point.reasons
    for key, value in truth.items():
        # noise-free rows have 16 digits; the surfaces' condition numbers (up to 1e8 in J'J) leave half
        assert point.params[key] == pytest.approx(value, rel=1e-5), key
    problem = make_problem(law, log_x, loss * 1.01)
    p = problem.from_params(truth)
    back = problem.to_params(p)
    for key, value in truth.items():
        assert float(back[key][0]) == pytest.approx(value, rel=1e-9), key
    weights, rule = np.ones((1, len(loss))), RowLoss("least_squares", 1.0)
    got = problem.evaluate(p, weights, rule).gradient_BxK[0]
    for k in range(p.shape[1]):
        step = np.zeros_like(p)
        step[0, k] = 1e-5 * max(1.0, abs(p[0, k]))
        up, down = (problem.evaluate(p + s * step, weights, rule).value_B[0] for s in (1, -1))
        # central differences over 1e-5 keep about nine of the objective's 16 digits
        assert (up - down) / (2 * step[0, k]) == pytest.approx(got[k], rel=1e-4, abs=1e-5 * abs(got).max())


def test_recovery_counts_what_it_says():
    got = recover("chinchilla", studies=12)
    assert got["studies"] + got["failed"] == 12 and got["failed"] == 0
    for name, share in got["parameters"].items():
        # of twelve 95 % intervals fewer than nine hold the truth once in 5,000 times
        assert share["covered"] >= 0.75 and share["within"] >= 0.75, name


def test_a_planted_table_has_the_columns_of_its_law():
    table = planted_table("data_constrained_tied", noise=0.0)
    assert set(table) == {"params", "tokens", "unique_tokens", "loss"}
    np.testing.assert_array_equal(table["loss"], planted("data_constrained_tied")[3])
    with pytest.raises(fits.FitError, match="law is 'mine'; studies are planted for chinchilla"):
        planted("mine")


def test_every_law_has_its_measured_recovery():
    """What benchmarks/law_recovery.py printed: 90 to 98 %, of 200 studies or more."""
    found = {g["law"]: g for g in json.loads((RESULTS / "law_recovery.json").read_text())}
    assert set(found) == set(STUDIES) == set(LAWS)
    table = (RESULTS / "law_recovery.md").read_text()
    for name, got in found.items():
        assert f"| `{name}` | {got['rows']} | {got['noise']:g} | {got['studies']} |" in table
        assert got["studies"] + got["failed"] >= 200 and got["failed"] <= 1, name
        for parameter, share in got["parameters"].items():
            assert 0.9 <= share["within"] <= 0.98, (name, parameter)
            assert 0.9 <= share["covered"] <= 0.98, (name, parameter)
