"""Bounds of laws whose derivatives come from JAX, against the same laws with derivatives written out."""

import math

import numpy as np
import pytest
from fits_tables import planted_table
from scipy.optimize import minimize

import fits
from fits.errors import FitError
from fits.laws import get_law
from fits.objective import AutodiffProblem, PowerSumProblem
from fits.solve import minimise, solve


def logs(table):
    return {"N": np.log(table["params"]), "D": np.log(table["tokens"]), "C": np.log(table["flops"])}


# bounds of overtraining, and what they are for tied, the same surface with alpha = 2 eta
@pytest.mark.parametrize(
    ("bounds", "equivalent", "held"),
    [
        ({"E": (0.0, 1.5)}, {"E": (0.0, 1.5)}, ("E", 1.5)),
        ({"E": (2.0, None)}, {"E": (2.0, None)}, ("E", 2.0)),
        ({"eta": (0.05, 0.15)}, {"alpha": (0.1, 0.3)}, ("eta", 0.15)),
        ({"eta": (0.22, 1.0)}, {"alpha": (0.44, 2.0)}, ("eta", 0.22)),
        ({"E": (0.5, 5.0), "eta": (0.01, 1.0)}, {}, None),
    ],
)
def test_bounded_overtraining_is_bounded_tied(bounds, equivalent, held):
    table = planted_table(noise=4e-3)
    _, ours = solve(get_law("overtraining"), logs(table), table["loss"], bounds=bounds)
    _, tied = solve(get_law("tied"), logs(table), table["loss"], bounds=equivalent)
    assert ours.status == tied.status == ("boundary" if held else "converged"), (ours, tied)
    assert math.isclose(ours.objective, tied.objective, rel_tol=1e-9)
    # the optimum of a sum known to 1e-13 of itself is known to the root of that, about 3e-7
    assert math.isclose(ours.params["E"], tied.params["E"], rel_tol=1e-5)
    assert math.isclose(2 * ours.params["eta"], tied.params["alpha"], rel_tol=1e-5)
    if held:
        assert ours.at_bound == [held[0]] and math.isclose(ours.params[held[0]], held[1], rel_tol=1e-12)
        assert ours.reasons[0] == f"{held[0]} ended at its bound, {held[1]:g}"


def test_numpy_and_jax_agree_at_a_bound():
    table, law = planted_table(noise=4e-3), get_law("chinchilla")
    x, weights = {v: logs(table)[v] for v in law.variables}, np.ones((1, 42))
    found = []
    for kind in (PowerSumProblem, AutodiffProblem):
        problem = kind(law, x, table["loss"], "log", bounds={"E": (0.0, 1.7)})
        start = problem.from_params({"E": 1.6, "A": 400.0, "B": 2000.0, "alpha": 0.34, "beta": 0.37})
        solution = minimise(problem, start, weights, "huber", 1e-3)
        assert solution.converged_B.all()
        found.append({k: float(v[0]) for k, v in problem.to_params(solution.p_BxK).items()})
    assert math.isclose(found[0]["E"], 1.7) and math.isclose(found[1]["E"], 1.7)
    for key, value in found[0].items():
        assert math.isclose(found[1][key], value, rel_tol=1e-6), key


def test_kaplan_within_bounds_against_scipy():
    """The same objective written out, minimised by L-BFGS-B over logs with the same bound."""
    table = planted_table(noise=4e-3)
    N, D, y = table["params"], table["tokens"], np.log(table["loss"])
    options = {"loss": "least_squares", "bounds": {"alphaD": (0.2, 0.5)}}
    _, free = solve(get_law("kaplan"), logs(table), table["loss"], loss="least_squares")
    _, held = solve(get_law("kaplan"), logs(table), table["loss"], **options)
    assert free.params["alphaD"] < 0.2, "else the bound holds nothing"
    assert held.status == "boundary" and held.at_bound == ["alphaD"], held

    def objective(t):
        inner = np.logaddexp(np.exp(t[2] - t[3]) * (t[0] - np.log(N)), t[1] - np.log(D))
        return 0.5 * ((np.exp(t[3]) * inner - y) ** 2).sum()

    start = np.log([held.params[k] for k in ("Nc", "Dc", "alphaN", "alphaD")])
    assert math.isclose(objective(start), held.objective, rel_tol=1e-9)
    limits = [(None, None)] * 3 + [(math.log(0.2), math.log(0.5))]
    for move in (0.0, 0.05, -0.05):
        found = minimize(objective, start + move, bounds=limits, method="L-BFGS-B", tol=1e-14)
        assert found.fun >= held.objective * (1 - 1e-9)


def test_intervals_respect_bounds():
    table = planted_table(noise=4e-3)
    fit = fits.fit_table(table, "overtraining", bounds={"E": (0.0, 1.85)}, bootstraps=40, sensitivity=False)
    draws = fit.draw_params()["E"]
    assert len(draws) >= 36 and draws.max() <= 1.85 * (1 + 1e-12)
    assert fit.method["bounds"]["E"] == [0.0, 1.85]


def test_an_offset_fixed_at_zero():
    """A positive parameter has a logarithm for its coordinate, and 0 has none."""
    table = planted_table(noise=4e-3)
    _, ours = solve(get_law("overtraining"), logs(table), table["loss"], fixed={"E": 0.0})
    _, tied = solve(get_law("tied"), logs(table), table["loss"], fixed={"E": 0.0})
    assert ours.params["E"] == 0.0 and ours.status == tied.status == "converged", (ours, tied)
    assert math.isclose(ours.objective, tied.objective, rel_tol=1e-9)


@pytest.mark.parametrize(
    ("bounds", "message"),
    [
        ({"E": (-1.0, 2.0)}, r"bounds of E are \(-1, 2\); E of overtraining is positive"),
        ({"E": (None, 2.0)}, r"bounds of E are \(-inf, 2\); E of overtraining is positive"),
        ({"eta": 0.5}, "bounds of eta are 0.5; they must be a pair of numbers"),
        ({"eta": ("a", 1)}, "they must be a pair of numbers"),
        ({"eta": (0.5, 0.5)}, "the lower one must be below the upper one"),
        ({"alpha": (0.1, 0.5)}, "bounds names 'alpha'; overtraining has the parameters E, a, b, eta"),
    ],
)
def test_bad_bounds_are_named(bounds, message):
    table = planted_table()
    with pytest.raises(FitError, match=message):
        solve(get_law("overtraining"), logs(table), table["loss"], bounds=bounds)
