"""Each law: its formula against plain arithmetic, its optimum against a search, planted recovery."""

import math

import numpy as np
import pytest
from scipy.optimize import minimize_scalar

import fits
from fits.laws import LAWS
from fits.solve import solve

# name: (parameters, the formula written out)
WRITTEN = {
    "chinchilla": (
        {"E": 1.7, "A": 400.0, "B": 900.0, "alpha": 0.34, "beta": 0.28},
        lambda p, N, D, C: p["E"] + p["A"] / N ** p["alpha"] + p["B"] / D ** p["beta"],
    ),
    "tied": (
        {"E": 1.9, "A": 500.0, "B": 1500.0, "alpha": 0.35},
        lambda p, N, D, C: p["E"] + p["A"] / N ** p["alpha"] + p["B"] / D ** p["alpha"],
    ),
    "kaplan": (
        {"Nc": 8.8e13, "Dc": 5.4e13, "alphaN": 0.076, "alphaD": 0.095},
        lambda p, N, D, C: ((p["Nc"] / N) ** (p["alphaN"] / p["alphaD"]) + p["Dc"] / D) ** p["alphaD"],
    ),
    "power_N": (
        {"E": 2.1, "A": 300.0, "alpha": 0.31},
        lambda p, N, D, C: p["E"] + p["A"] / N ** p["alpha"],
    ),
    "power_D": (
        {"E": 2.0, "B": 900.0, "beta": 0.29},
        lambda p, N, D, C: p["E"] + p["B"] / D ** p["beta"],
    ),
    "power_C": (
        {"E": 1.6, "K": 1500.0, "gamma": 0.16},
        lambda p, N, D, C: p["E"] + p["K"] / C ** p["gamma"],
    ),
    "product": (
        {"E": 1.5, "K": 1300.0, "alpha": 0.16, "beta": 0.18},
        lambda p, N, D, C: p["E"] + p["K"] / (N ** p["alpha"] * D ** p["beta"]),
    ),
}


@pytest.fixture(scope="module")
def points():
    N, D = (a.ravel() for a in np.meshgrid(np.geomspace(1e7, 3e10, 7), np.geomspace(1e9, 1e12, 6)))
    return N, D, 6 * N * D


def test_every_law_is_written_out():
    """Here, in test_more_laws, or among the planted studies."""
    from test_more_laws import PLANTED

    from fits.planted import STUDIES

    assert set(WRITTEN) | set(PLANTED) | set(STUDIES) == set(LAWS) == set(fits.law_names())


@pytest.mark.parametrize("name", list(WRITTEN))
def test_formula(name, points):
    params, written = WRITTEN[name]
    N, D, C = points
    got = LAWS[name].predict(params, {"N": N, "D": D, "C": C})
    # exp(a log x) against x ** a: a few units in the last place times the size of the logarithm
    np.testing.assert_allclose(got, written(params, N, D, C), rtol=1e-13)


@pytest.mark.parametrize("name", list(WRITTEN))
def test_planted_recovery_without_noise(name, points):
    params, written = WRITTEN[name]
    N, D, C = points
    x = {"N": np.log(N), "D": np.log(D), "C": np.log(C)}
    _, point = solve(LAWS[name], x, written(params, N, D, C))
    assert point.status == "converged", point.reasons
    for key, value in params.items():
        # data carry 1e-16; coefficients and exponents are told apart to about 1e-11 of that basis
        assert math.isclose(point.params[key], value, rel_tol=1e-8), key


@pytest.mark.parametrize("name", ["chinchilla", "tied", "kaplan"])
@pytest.mark.parametrize("budget", [1e18, 5.76e23])
def test_closed_form_optimum_against_a_search(name, budget):
    params, written = WRITTEN[name]
    best = minimize_scalar(
        lambda log_n: written(params, math.exp(log_n), budget / 6 / math.exp(log_n), budget),
        bounds=(math.log(1e4), math.log(budget / 6 / 1e4)),
        method="bounded",
        options={"xatol": 1e-10},
    )
    got = LAWS[name].optimum(params, budget)
    # a search sees a minimum only to the root of the rounding of the loss
    assert math.isclose(got["N"], math.exp(best.x), rel_tol=1e-6)
    assert math.isclose(got["loss"], best.fun, rel_tol=1e-12)
    assert math.isclose(6 * got["N"] * got["D"], budget, rel_tol=1e-12)


@pytest.mark.parametrize("name", ["chinchilla", "tied", "kaplan"])
def test_exponents_are_the_slopes_of_the_optimum(name):
    params, _ = WRITTEN[name]
    low, high = LAWS[name].optimum(params, 1e20), LAWS[name].optimum(params, 1e22)
    exponents = LAWS[name].compute_exponents(params)
    assert math.isclose(exponents["a"], math.log(high["N"] / low["N"]) / math.log(100), rel_tol=1e-12)
    assert math.isclose(exponents["b"], math.log(high["D"] / low["D"]) / math.log(100), rel_tol=1e-12)


def test_a_users_law_in_ten_lines(points):
    class Logarithmic(fits.Law):
        name, formula, source = "mine", "L = E + k log(1 + M / N)", "a test"
        variables, parameters = ("N",), ("E", "k", "M")
        bounds = {"E": (0.0, math.inf), "k": (0.0, math.inf), "M": (0.0, math.inf)}  # noqa: RUF012

        def predict(self, params, x, xp=np):
            return params["E"] + params["k"] * xp.log1p(params["M"] / x["N"])

        def starts(self, x, y):
            return [{"E": float(y.min()), "k": k, "M": m} for k in (0.1, 1.0) for m in (1e7, 1e8, 1e9)]

    N = points[0]
    table = {"params": N, "tokens": points[1], "loss": 1.5 + 0.3 * np.log1p(3e8 / N)}
    fit = fits.fit_table(table, Logarithmic(), loss="least_squares", bootstraps=0)
    assert fit.status == "converged", fit.reasons
    for key, value in {"E": 1.5, "k": 0.3, "M": 3e8}.items():
        assert math.isclose(fit.params[key], value, rel_tol=1e-8), key


def test_a_new_power_law_is_its_list_of_terms(points):
    class Cross(fits.PowerSum):
        name, formula, source = "cross", "L = E + A/N^a + K/(N^c D^d)", "a test"
        terms = (fits.Term("E"), fits.Term("A", {"N": "a"}), fits.Term("K", {"N": "c", "D": "d"}))

    assert Cross.parameters == ("E", "A", "K", "a", "c", "d")
    planted = {"E": 1.7, "A": 300.0, "K": 2000.0, "a": 0.33, "c": 0.05, "d": 0.3}
    N, D, _ = points
    loss = 1.7 + 300 / N**0.33 + 2000 / (N**0.05 * D**0.3)
    _, point = solve(Cross(), {"N": np.log(N), "D": np.log(D)}, loss)
    assert point.status == "converged", point.reasons
    for key, value in planted.items():
        # six parameters, one of them a weak cross exponent: two digits worse conditioned than the library's
        assert math.isclose(point.params[key], value, rel_tol=1e-6), key


def test_unknown_law_is_named():
    with pytest.raises(fits.FitError, match=r"law is 'chinchila'; it must be one of chinchilla, tied"):
        fits.get_law("chinchila")
