"""Profile intervals against an exact t interval, pinned refits and SciPy; words where an end is missing."""

import json
import math

import numpy as np
import pytest
from fits_tables import planted_table

import fits
from fits.errors import FitError
from fits.laws import get_law
from fits.profile import dispersion, profile_interval, rebuild
from fits.solve import solve

OPTIONS = {"bootstraps": 0, "sensitivity": False, "cluster": "row"}


def plain(fit):
    """The same fit, its rows taken as independent, so that thresholds compare with other formulas."""
    fit.diagnostics["effective_rows"] = float(fit.diagnostics["rows_used"])
    return fit


@pytest.fixture(scope="module")
def squares():
    return plain(fits.fit_table(planted_table(noise=4e-3), loss="least_squares", **OPTIONS))


def test_linear_case_is_the_exact_t_interval():
    """Raw least squares with both exponents pinned is linear regression: Student's interval, exactly."""
    from scipy.stats import t

    table = planted_table(noise=4e-3)
    fixed = {"alpha": 0.35, "beta": 0.37}
    fit = plain(fits.fit_table(table, loss="least_squares", space="raw", fixed=fixed, **OPTIONS))
    X = np.stack([np.ones(42), table["params"] ** -0.35, table["tokens"] ** -0.37], 1)
    scale = np.linalg.norm(X, axis=0)
    Q, T = np.linalg.qr(X / scale)
    estimate = np.linalg.solve(T, Q.T @ table["loss"])
    s = np.sqrt(((table["loss"] - X / scale @ estimate) ** 2).sum() / 39)
    inverse = np.linalg.inv(T)
    half = t.ppf(0.95, 39) * s * np.sqrt((inverse**2).sum(1)) / scale
    for i, name in enumerate(("E", "A", "B")):
        got = profile_interval(fit, name, 0.90)
        assert got.degrees_of_freedom == 39 and got.notes == []
        want = estimate[i] / scale[i] + np.array([-1, 1]) * half[i]
        # the constraint holds to 1e-7 half-widths
        np.testing.assert_allclose([got.low, got.high], want, rtol=0, atol=1e-5 * half[i])
    x0 = np.array([1.0, 1e9**-0.35, 3e10**-0.37]) / scale
    half = t.ppf(0.975, 39) * s * np.linalg.norm(x0 @ inverse)
    got = profile_interval(fit, "loss", params=1e9, tokens=3e10)
    np.testing.assert_allclose([got.low, got.high], x0 @ estimate + np.array([-half, half]), atol=1e-5 * half)


@pytest.mark.parametrize("loss", ["huber", "least_squares"])
def test_ends_are_where_the_pinned_refit_meets_the_threshold(loss):
    """The other way to constrain a parameter, from independent starts: ``fixed``."""
    table = planted_table(noise=4e-3)
    fit = plain(fits.fit_table(table, loss=loss, **OPTIONS))
    x = {"N": np.log(table["params"]), "D": np.log(table["tokens"])}
    for name in ("E", "A", "beta"):
        got = profile_interval(fit, name)
        for end in (got.low, got.high):
            pinned = solve(get_law("chinchilla"), x, table["loss"], loss=loss, fixed={name: end})[1]
            # root found to 1e-7 of the half-width, so the rise to a few parts in 1e6
            assert math.isclose(pinned.objective - fit.objective, got.threshold, rel_tol=1e-4), (name, end)


@pytest.mark.filterwarnings("ignore:invalid value")  # SLSQP tries points that have no fit
def test_optimum_agrees_with_scipy(squares):
    """N* at its upper end: SLSQP, holding log N* there, finds the same least objective."""
    from scipy.optimize import minimize

    got = profile_interval(squares, "N*", budget=1e22)
    law, table = squares.law, planted_table(noise=4e-3)
    unit = np.array([1.0, 100.0, 1000.0, 0.1, 0.1])

    def parameters(z):
        return dict(zip(law.parameters, z * unit, strict=True))

    def objective(z):
        p = parameters(z)
        fitted = p["E"] + p["A"] * table["params"] ** -p["alpha"] + p["B"] * table["tokens"] ** -p["beta"]
        return 1e3 * ((np.log(fitted) - np.log(table["loss"])) ** 2).sum() / 2

    def held(z):  # Hoffmann et al. 2022, eq. 4, written out
        p = parameters(z)
        a = p["beta"] / (p["alpha"] + p["beta"])
        G = (p["alpha"] * p["A"] / (p["beta"] * p["B"])) ** (1 / (p["alpha"] + p["beta"]))
        return math.log(G * (1e22 / 6) ** a / got.high)

    start = np.array([squares.params[k] for k in law.parameters]) / unit
    best = min(
        (
            minimize(objective, start * factor, method="SLSQP", constraints={"type": "eq", "fun": held},
                     options={"ftol": 1e-14, "maxiter": 2000})
            for factor in (1.0, 1.02, 0.98)
        ),
        key=lambda r: r.fun if abs(held(r.x)) < 1e-8 else math.inf,
    )  # fmt: skip
    # SLSQP with differenced gradients in a narrow valley: a per cent of the rise
    assert math.isclose(best.fun / 1e3 - squares.objective, got.threshold, rel_tol=1e-2)


def test_weighted_rows_profile_weighted():
    table = planted_table(noise=4e-3)
    weight = np.where(np.arange(42) % 3, 1.0, 0.2)
    fit = plain(fits.fit_table(table, loss="least_squares", weights=weight, **OPTIONS))
    got = profile_interval(fit, "alpha")
    x = {"N": np.log(table["params"]), "D": np.log(table["tokens"])}
    options = {"loss": "least_squares", "weights": weight, "fixed": {"alpha": got.low}}
    pinned = solve(get_law("chinchilla"), x, table["loss"], **options)[1]
    assert math.isclose(pinned.objective - fit.objective, got.threshold, rel_tol=1e-4)


def test_quantities_hang_together(squares):
    assert squares.optimum(1e22)["N"][0] == pytest.approx(
        profile_interval(squares, "N*", budget=1e22).estimate
    )
    N, D, ratio = (profile_interval(squares, q, budget=1e22) for q in ("N*", "D*", "tokens_per_param"))
    # D* = C / (6 N*) and D/N = C / (6 N*^2): the same profile, read another way
    assert N.low * D.high == pytest.approx(1e22 / 6, rel=1e-5)
    assert ratio.low * N.high**2 == pytest.approx(1e22 / 6, rel=1e-5)
    a, b = profile_interval(squares, "a"), profile_interval(squares, "b")
    assert a.low + b.high == pytest.approx(1, abs=1e-6)
    narrow = profile_interval(squares, "a", 0.5)
    assert a.low < narrow.low < a.estimate < narrow.high < a.high
    best = profile_interval(squares, "loss*", budget=1e22)
    assert best.low < squares.optimum(1e22)["loss"][0] < best.high


@pytest.mark.slow
def test_a_searched_optimum_profiles_as_the_closed_form(squares):
    exact = profile_interval(squares, "N*", budget=1e22)
    searched = profile_interval(squares, "N*", budget=1e22, flops=lambda n, d: 6.0 * n * d)
    # the constraint holds to 1e-4 half-widths, plus the noise of the search
    assert math.log(searched.high / exact.high) == pytest.approx(
        0, abs=0.01 * math.log(exact.high / exact.low)
    )


def test_dispersion_of_the_losses():
    """Normal residuals of sd s: E psi^2 over E psi' in closed form for each loss."""
    from scipy.stats import norm

    rng = np.random.default_rng(0)
    n, s, k = 20000, 4e-3, 1.0
    table = {"params": 10 ** rng.uniform(7, 9, n), "tokens": 10 ** rng.uniform(9, 11, n)}
    from fits_tables import PLANTED, planted_loss

    table["loss"] = planted_loss(table["params"], table["tokens"]) * np.exp(s * rng.standard_normal(n))
    inside = 2 * norm.cdf(k) - 1
    square = inside - 2 * k * norm.pdf(k) + 2 * k**2 * norm.sf(k)  # E psi^2 in units of s^2
    wanted = {
        "least_squares": s**2,
        "huber": s**2 * square / inside,
        "lad": 1 / (2 * norm.pdf(0) / s),  # E psi^2 = 1, E psi' = 2 f(0)
    }
    from fits.objective import RowLoss, make_problem

    x = {"N": np.log(table["params"]), "D": np.log(table["tokens"])}
    problem = make_problem(get_law("chinchilla"), x, table["loss"], "log")
    p = problem.from_params(PLANTED)[0]
    for loss, want in wanted.items():
        got = dispersion(problem, p, np.ones(n), RowLoss(loss, 0.05 * s if loss == "lad" else k * s))
        # 20,000 rows: 1 % on a variance; the kernel (and lad's rounding) flattens by another 1 %
        assert abs(got / want - 1) < 0.04, loss


def test_a_floor_that_the_rows_do_not_show():
    """E at zero fits as well: the lower end is the bound, and that is said."""
    p = {"E": 0.005, "A": 480.0, "B": 2100.0, "alpha": 0.35, "beta": 0.37}
    fit = plain(fits.fit_table(planted_table(noise=5e-2, p=p), loss="least_squares", **OPTIONS))
    got = profile_interval(fit, "E")
    assert got.low == 0.0 and any("is its bound" in n for n in got.notes)
    assert got.high > fit.params["E"]
    # A, B and the exponents of a fit at its boundary still have intervals
    assert profile_interval(fit, "alpha").high > fit.params["alpha"]


def test_an_open_end_is_said():
    """A D term below the noise: it may fall off ever more steeply, so B has no upper end."""
    table = planted_table(noise=1e-2, p={"E": 1.8, "A": 480.0, "B": 60.0, "alpha": 0.35, "beta": 0.37})
    fit = plain(fits.fit_table(table, loss="least_squares", **OPTIONS))
    got = profile_interval(fit, "B")
    assert got.high is None and 60 < got.low < fit.params["B"]
    assert any("no upper end found for B" in n for n in got.notes)
    assert str(got).startswith("doubt: ") and "no upper end" in str(got).splitlines()[-1]
    json.dumps(got.to_dict(), allow_nan=False)
    beta = profile_interval(fit, "beta")
    assert beta.high == 10.0 and any("the upper end of beta is its bound, 10" in n for n in beta.notes)


def test_a_fit_from_its_file_profiles_alike(tmp_path, squares):
    again = fits.read_fit(fits.write_fit(squares, tmp_path / "fit.json"))
    here, there = profile_interval(squares, "alpha"), profile_interval(again, "alpha")
    assert (here.low, here.high) == (there.low, there.high)
    problem, weights, row_loss = rebuild(again)
    value = problem.evaluate(problem.from_params(again.params), weights[None], row_loss).value_B[0]
    assert math.isclose(value, squares.objective, rel_tol=1e-12)


def test_dependent_rows_widen_the_interval():
    table = planted_table(noise=1e-3, size_effect=4e-3)
    fit = fits.fit_table(table, loss="least_squares", bootstraps=0, sensitivity=False)
    got = profile_interval(fit, "a")
    assert got.design_effect > 1.5 and any("err together" in n for n in got.notes)
    alone = profile_interval(plain(fit), "a")
    # the profile is nearly a parabola: the width grows as the root of the threshold
    ratio = (got.high - got.low) / (alone.high - alone.low)
    assert ratio == pytest.approx(math.sqrt(got.design_effect), rel=0.1)


def test_other_laws_and_losses_profile():
    table = planted_table(noise=4e-3)
    for options in ({"loss": "lad"}, {"space": "raw"}, {"fixed": {"E": 1.8}}):
        fit = plain(fits.fit_table(table, **OPTIONS | options))
        got = profile_interval(fit, "alpha")
        assert got.low < fit.params["alpha"] < got.high and got.high - got.low < 0.3, options


@pytest.mark.slow
def test_a_law_with_derivatives_by_jax_profiles():
    table = planted_table(noise=4e-3)
    kaplan = plain(fits.fit_table(table, law="kaplan", loss="least_squares", **OPTIONS))
    name = kaplan.law.parameters[0]
    got = profile_interval(kaplan, name)
    x = {"N": np.log(table["params"]), "D": np.log(table["tokens"])}
    pinned = solve(kaplan.law, x, table["loss"], loss="least_squares", fixed={name: got.high})[1]
    assert math.isclose(pinned.objective - kaplan.objective, got.threshold, rel_tol=1e-3)


@pytest.mark.parametrize(
    ("quantity", "options", "says"),
    [
        ("gamma", {}, "quantity is 'gamma'; it must be one of E, A, B"),
        ("N*", {}, "needs a positive number of FLOPs"),
        ("N*", {"budget": -1.0}, "budget is -1"),
        ("loss", {"params": 1e9}, "lacks tokens"),
        ("loss", {"params": 1e9, "tokens": -1.0}, "one positive number"),
        ("a", {"level": 1.5}, "level is 1.5"),
    ],
)
def test_bad_questions_end_in_a_sentence(squares, quantity, options, says):
    with pytest.raises(FitError, match=says):
        profile_interval(squares, quantity, **options)


def test_what_cannot_be_profiled():
    with pytest.raises(FitError, match="pinned"):
        profile_interval(fits.fit_table(planted_table(noise=1e-3), fixed={"E": 1.8}, **OPTIONS), "E")
    with pytest.raises(FitError, match="no noise"):
        profile_interval(fits.fit_table(planted_table(), **OPTIONS), "a")
    one = {k: v[:7] for k, v in planted_table(noise=1e-3).items()}
    with pytest.raises(FitError, match="not identified"):
        profile_interval(fits.fit_table(one, **OPTIONS), "a")
