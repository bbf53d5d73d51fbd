"""Quantiles, expectiles, Huber's width in residual scales, row weights and standard errors of losses."""

import math

import numpy as np
import pytest
from fits_tables import planted_table
from scipy.optimize import linprog, minimize

import fits
from fits.errors import FitError
from fits.laws import get_law
from fits.objective import AutodiffProblem, PowerSumProblem, RowLoss
from fits.rowweights import excess_scatter, weighted_median
from fits.solve import solve


def logs(table):
    return {"N": np.log(table["params"]), "D": np.log(table["tokens"]), "C": np.log(table["flops"])}


TABLE = planted_table(noise=5e-3)
CHINCHILLA = get_law("chinchilla")


def fit(**options):
    return solve(CHINCHILLA, logs(TABLE), TABLE["loss"], **options)


# --- quantile and expectile ---


def test_values_of_one_residual():
    """Predicted minus observed: below the observed loss (r < 0) counts tau, above it 1 - tau."""
    r = np.array([-2.0, -0.1, 0.0, 0.1, 2.0])
    np.testing.assert_allclose(RowLoss("quantile", 1e-9, 0.9).exact(r), [1.8, 0.09, 0, 0.01, 0.2])
    np.testing.assert_allclose(RowLoss("quantile", 1e-9, 0.9).value(r), [1.8, 0.09, 0, 0.01, 0.2], atol=1e-9)
    np.testing.assert_allclose(RowLoss("expectile", 1.0, 0.9).value(r), [3.6, 9e-3, 0, 1e-3, 0.4])


@pytest.mark.parametrize("loss", ["quantile", "expectile"])
@pytest.mark.parametrize("tau", [0.1, 0.5, 0.97])
def test_derivatives_and_majoriser(loss, tau):
    row_loss = RowLoss(loss, 0.3, tau)
    r = np.array([-2.0, -0.31, -0.29, -0.05, 0.05, 0.29, 0.31, 2.0])
    first, second, robust = row_loss.derivatives(r)
    step = 1e-6
    difference = (row_loss.value(r + step) - row_loss.value(r - step)) / (2 * step)
    np.testing.assert_allclose(first, difference, atol=1e-9)
    np.testing.assert_allclose(
        second,
        (row_loss.derivatives(r + step)[0] - row_loss.derivatives(r - step)[0]) / (2 * step),
        atol=1e-8,
    )
    # the parabola of that curvature through each r lies above the loss everywhere
    z = np.linspace(-5, 5, 2001)[:, None]
    parabola = row_loss.value(r) + first * (z - r) + 0.5 * robust * (z - r) ** 2
    assert (parabola >= row_loss.value(z) - 1e-12).all()


@pytest.mark.parametrize("tau", [0.1, 0.5, 0.8])
def test_quantile_is_the_linear_programme(tau):
    """Exponents pinned on the raw loss: quantile regression is linear, and its minimum is a vertex."""
    pinned = {"alpha": 0.35, "beta": 0.37}
    _, point = fit(loss="quantile", tau=tau, space="raw", fixed=pinned)
    X = np.stack([np.ones(42), TABLE["params"] ** -0.35, TABLE["tokens"] ** -0.37], 1)
    scale = X.max(0)
    A = np.hstack([X / scale, np.eye(42), -np.eye(42)])  # observed = X theta + above - below
    cost = np.concatenate([np.zeros(3), np.full(42, tau), np.full(42, 1 - tau)])
    want = linprog(cost, A_eq=A, b_eq=TABLE["loss"], bounds=[(0, None)] * 87, method="highs")
    assert math.isclose(point.objective, want.fun, rel_tol=1e-8)
    for key, value in zip(("E", "A", "B"), want.x[:3] / scale, strict=True):
        assert math.isclose(point.params[key], value, rel_tol=1e-6), key


@pytest.mark.parametrize("tau", [0.1, 0.5, 0.9])
def test_quantile_splits_the_rows(tau):
    """At most tau of the rows lie below the optimal surface and 1 - tau above; K lie on it."""
    problem, point = fit(loss="quantile", tau=tau)
    residual = problem.residuals(point.p_K[None])[0]
    above = int((residual < -1e-8).sum())  # observed above the surface
    below = int((residual > 1e-8).sum())
    assert point.status == "converged", point.reasons
    assert below <= tau * 42 <= 42 - above and 42 - above - below == 5
    assert math.isclose(point.objective, np.where(residual < 0, tau, tau - 1) @ -residual, rel_tol=1e-9)


def test_the_middle_is_lad_and_least_squares():
    _, half = fit(loss="quantile", tau=0.5)
    _, lad = fit(loss="lad")
    _, even = fit(loss="expectile", tau=0.5)
    _, squares = fit(loss="least_squares")
    assert math.isclose(2 * half.objective, lad.objective, rel_tol=1e-9)
    assert math.isclose(even.objective, squares.objective, rel_tol=1e-12)
    for key in lad.params:
        assert math.isclose(half.params[key], lad.params[key], rel_tol=1e-5), key
        assert math.isclose(even.params[key], squares.params[key], rel_tol=1e-6), key


@pytest.mark.parametrize("tau", [0.1, 0.9])
def test_expectile_against_scipy(tau):
    _, point = fit(loss="expectile", tau=tau)
    y = np.log(TABLE["loss"])

    def objective(t):
        terms = [t[0] + 0 * y, t[1] - t[3] * np.log(TABLE["params"]), t[2] - t[4] * np.log(TABLE["tokens"])]
        r = np.logaddexp.reduce(terms, 0) - y
        return (np.where(r > 0, 1 - tau, tau) * r * r).sum()

    ours = [math.log(point.params[k]) for k in ("E", "A", "B")] + [point.params[k] for k in ("alpha", "beta")]
    assert math.isclose(objective(ours), point.objective, rel_tol=1e-10)
    found = minimize(
        objective, ours, method="Nelder-Mead", options={"xatol": 1e-9, "fatol": 1e-16, "maxiter": 800}
    )
    assert found.fun >= point.objective * (1 - 1e-9)
    _, middle = fit(loss="expectile", tau=0.5)
    where = {v: np.exp(z[:1]) for v, z in logs(TABLE).items()}
    higher = CHINCHILLA.predict(point.params, where) > CHINCHILLA.predict(middle.params, where)
    assert bool(higher[0]) == (tau > 0.5)


@pytest.mark.parametrize("loss", ["quantile", "expectile"])
def test_jax_derivatives_of_the_asymmetric_losses(loss):
    x = {v: logs(TABLE)[v] for v in CHINCHILLA.variables}
    params = {"E": 1.8, "A": 480.0, "B": 2100.0, "alpha": 0.35, "beta": 0.37}
    got = []
    for kind in (PowerSumProblem, AutodiffProblem):
        problem = kind(CHINCHILLA, x, TABLE["loss"], "log")
        at = problem.evaluate(problem.from_params(params), np.ones((1, 42)), RowLoss(loss, 1e-3, 0.8))
        got.append((at.value_B[0], at.gradient_BxK[0, 0] * (1.8 if kind is PowerSumProblem else 1.0)))
    np.testing.assert_allclose(got[0], got[1], rtol=1e-9)  # dE in one, d log E in the other


# --- Huber's width in residual scales ---


def test_delta_in_residual_scales():
    problem, lad = fit(loss="lad")
    scale = 1.4826 * np.median(np.abs(problem.residuals(lad.p_K[None])[0]))
    _, scaled = fit(delta=1.345, delta_unit="scale")
    _, absolute = fit(delta=1.345 * scale)
    assert math.isclose(scaled.delta, 1.345 * scale, rel_tol=1e-6)
    assert math.isclose(scaled.objective, absolute.objective, rel_tol=1e-6)
    assert absolute.delta == 1.345 * scale and lad.delta is None


def test_a_perfect_fit_has_a_width():
    table = planted_table()
    _, point = solve(CHINCHILLA, logs(table), table["loss"], delta=1.345, delta_unit="scale")
    assert 0 < point.delta < 1e-8 and math.isclose(point.params["E"], 1.8, rel_tol=1e-6)


def test_ten_times_the_noise_is_ten_times_the_width():
    small, large = (
        solve(CHINCHILLA, logs(t), t["loss"], delta=2.0, delta_unit="scale")[1].delta
        for t in (planted_table(noise=1e-4), planted_table(noise=1e-3))
    )
    # to first order in the noise; the second order is of the noise's own size
    assert math.isclose(large / small, 10.0, rel_tol=0.02)


# --- weights and standard errors ---


def test_weighted_median():
    values, counts = np.array([3.0, 1.0, 2.0, 10.0]), np.array([2, 1, 0, 1])
    assert weighted_median(values, counts) == np.median(np.repeat(values, counts)) == 3.0
    assert weighted_median(values, np.ones(4)) == np.median(values) == 2.5


def test_excess_scatter_is_found():
    """5,000 residuals of standard errors from 0.1 to 1 and 0.5 more: the median's own error is about 2 %."""
    rng = np.random.default_rng(0)
    s = rng.uniform(0.1, 1.0, 5000)
    r = np.hypot(s, 0.5) * rng.standard_normal(5000)
    assert math.isclose(excess_scatter(r, s, 0), 0.5, rel_tol=0.08)
    assert excess_scatter(0.5 * s * rng.standard_normal(5000), s, 0) == 0.0
    r[:250] = 1e3  # one row in twenty is nonsense
    assert math.isclose(excess_scatter(r, s, 0), 0.5, rel_tol=0.25)


def test_stderr_weights_are_inverse_variances():
    rng = np.random.default_rng(3)
    s = TABLE["loss"] * rng.uniform(0.01, 0.05, 42)  # far above the scatter, so nothing is in excess
    _, point = fit(stderr=s, loss="least_squares")
    assert point.excess == 0.0
    variance = (s / TABLE["loss"]) ** 2
    np.testing.assert_allclose(point.weights_R, (1 / variance) / (1 / variance).mean())
    _, weighted = fit(weights=(1 / variance) / (1 / variance).mean(), loss="least_squares")
    assert math.isclose(point.objective, weighted.objective, rel_tol=1e-12)
    _, scaled = fit(stderr=s, loss="least_squares", space="raw")
    np.testing.assert_allclose(scaled.weights_R, s**-2.0 / (s**-2.0).mean())


def test_tiny_standard_errors_do_not_decide():
    """One row with next to no evaluation error: the scatter between runs keeps its weight near 1."""
    even_s = 1e-3 * TABLE["loss"]
    s = even_s.copy()
    s[0] = 1e-9
    _, point = fit(stderr=s)
    assert point.excess > 1e-3 and point.weights_R[0] < 1.2
    _, even = fit(stderr=even_s)
    _, none = fit()
    np.testing.assert_allclose(even.weights_R, 1.0)
    assert math.isclose(even.objective, none.objective, rel_tol=1e-12)


def test_fit_table_takes_columns():
    rng = np.random.default_rng(0)
    table = {
        **TABLE,
        "loss": TABLE["loss"].copy(),
        "se": 0.01 * rng.uniform(1, 3, 42),
        "w": rng.integers(0, 4, 42),
    }
    table["loss"][5] = np.nan  # an unused row: arrays go by the input's rows
    keep = np.arange(42) != 5
    named = fits.fit_table(table, weights="w", stderr="se", bootstraps=30)
    valued = fits.fit_table(table, weights=table["w"], stderr=table["se"], bootstraps=30)
    x = {k: v[keep] for k, v in logs(table).items()}
    _, point = solve(CHINCHILLA, x, table["loss"][keep], weights=table["w"][keep], stderr=table["se"][keep])
    assert named.params == valued.params == point.params
    assert named.method["weights"] == "w" and valued.method["stderr"] == "given by value"
    assert named.method["excess_scatter"] == point.excess
    assert "weights w, standard errors se with an excess scatter of" in str(named)
    for key in named.intervals:
        assert named.intervals[key]["95"] == valued.intervals[key]["95"]
    high = fits.fit_table(table, loss="quantile", tau=0.9, bootstraps=0, sensitivity=False)
    assert high.method["tau"] == 0.9 and high.method["delta"] is None and "quantile 0.9 on log" in str(high)
    wide = fits.fit_table(table, delta=1.345, delta_unit="scale", bootstraps=0, sensitivity=False)
    assert "(1.345 robust standard deviations)" in str(wide) and wide.method["delta_given"] == 1.345


def test_resamples_keep_the_row_weights():
    """Rows of weight 0 count for nothing in the intervals either."""
    table = {**TABLE, "loss": TABLE["loss"].copy(), "w": (np.arange(42) % 3 > 0).astype(float)}
    one = fits.fit_table(table, weights="w", bootstraps=40, cluster="row", sensitivity=False)
    table["loss"][::3] *= 1.5
    two = fits.fit_table(table, weights="w", bootstraps=40, cluster="row", sensitivity=False)
    for key in one.params:
        assert math.isclose(one.params[key], two.params[key], rel_tol=1e-7)
        np.testing.assert_allclose(one.intervals[key]["80"], two.intervals[key]["80"], rtol=1e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss": "quantile", "tau": 0.0}, "tau is 0.0; it must be a number between 0 and 1"),
        ({"loss": "expectile", "tau": "high"}, "tau is 'high'"),
        ({"tau": 0.9}, "tau is 0.9 and loss is 'huber'; tau is for quantile and expectile only"),
        ({"delta_unit": "mad"}, "delta_unit is 'mad'; it must be one of absolute, scale"),
        ({"delta": None}, "delta is None; it must be a positive number"),
        ({"weights": np.ones(3)}, r"weights has the shape \(3,\); it must .* of .* 42 rows"),
        ({"weights": -np.ones(42)}, "weights has 42 of 42 values that cannot be used, the first -1"),
        ({"weights": ["a"] * 42}, "weights has values that are not numbers, such as 'a'"),
        ({"weights": [1.0] * 4 + [0.0] * 38}, "4 usable rows of positive weight"),
        ({"stderr": np.zeros(42)}, "stderr has 42 of 42 .* a finite number above zero"),
        ({"stderr": [np.nan] + [0.1] * 41}, "stderr has 1 of 42 values that cannot be used, the first nan"),
        ({"stderr": "se"}, "stderr names the column 'se'; the table has params"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(FitError, match=message):
        fits.fit_table(TABLE, bootstraps=0, sensitivity=False, **options)
