"""Profile intervals: the exact t interval of a linear law, constrained refits, the bootstrap, open ends."""

import math

import numpy as np
import pytest
from fits_tables import PLANTED, planted_table

import fits
from fits.errors import FitError
from fits.laws import get_law
from fits.profile import profile_interval
from fits.solve import solve

LEAST = {"loss": "least_squares", "sensitivity": False, "cluster": "row", "bootstraps": 0}


def test_linear_law_has_the_t_interval():
    """With exponents fixed and raw residuals the law is linear: the profile is the textbook t interval."""
    from scipy import stats

    table = planted_table(noise=3e-3)
    fit = fits.fit_table(table, space="raw", fixed={"alpha": 0.35, "beta": 0.37}, **LEAST)
    X = np.stack([np.ones(42), table["params"] ** -0.35, table["tokens"] ** -0.37], 1)
    scale = np.abs(X).max(0)
    beta, rss = np.linalg.lstsq(X / scale, table["loss"], rcond=None)[:2]
    sd = np.sqrt(np.diag(np.linalg.inv((X / scale).T @ (X / scale))) * rss[0] / 39) / scale
    for level in (0.8, 0.95):
        wide = stats.t.ppf((1 + level) / 2, 39)
        for i, name in enumerate("EAB"):
            got = profile_interval(fit, name, level)
            half = wide * sd[i] * math.sqrt(got.design_effect)  # of the sizes, stated beside the interval
            want = beta[i] / scale[i] + half * np.array([-1, 1])
            # far below what an interval is read to, far above the search tolerance
            np.testing.assert_allclose([got.low, got.high], want, atol=2e-4 * half, rtol=0)
    point = profile_interval(fit, "loss", params=1e9, tokens=2e10)
    row = np.array([1, 1e9**-0.35, 2e10**-0.37]) / scale
    half = (
        math.sqrt(point.design_effect)
        * stats.t.ppf(0.975, 39)
        * math.sqrt(row @ np.linalg.inv((X / scale).T @ (X / scale)) @ row * rss[0] / 39)
    )
    np.testing.assert_allclose(
        [point.low, point.high], row @ beta + half * np.array([-1, 1]), atol=1e-3 * half
    )


@pytest.mark.parametrize("loss", ["least_squares", "huber"])
def test_ends_lie_where_constrained_refits_reach_the_threshold(loss):
    """Refitting with the parameter pinned at an end gives exactly the allowed rise of the objective."""
    table = planted_table(noise=3e-3, seed=4)
    fit = fits.fit_table(table, **(LEAST | {"loss": loss}))
    x = {"N": np.log(table["params"]), "D": np.log(table["tokens"])}
    for name in ("E", "A", "alpha", "beta"):
        got = profile_interval(fit, name)
        assert got.low < fit.params[name] < got.high
        for end in (got.low, got.high):
            _, pinned = solve(get_law("chinchilla"), x, table["loss"], loss=loss, fixed={name: end})
            # an end off by 5e-4 of the half-width: nobody reads that closely
            assert abs((pinned.objective - fit.objective) / got.threshold - 1) < 1e-3, (name, end)


def test_optimum_against_a_law_in_which_it_is_a_parameter():
    """a by the profile equals the range of beta / (alpha + beta) over a fine grid of pinned exponents."""
    table = planted_table(noise=3e-3, seed=1)
    fit = fits.fit_table(table, **LEAST)
    got = profile_interval(fit, "a")
    x = {"N": np.log(table["params"]), "D": np.log(table["tokens"])}
    inside = []
    for alpha in np.linspace(fit.params["alpha"] - 0.06, fit.params["alpha"] + 0.06, 25):
        for a in np.linspace(got.low - 0.004, got.high + 0.004, 25):
            beta = a * alpha / (1 - a)
            _, p = solve(
                get_law("chinchilla"), x, table["loss"], loss="least_squares",
                fixed={"alpha": float(alpha), "beta": float(beta)}, starts=1,
            )  # fmt: skip
            inside += [a] if p.objective <= fit.objective + got.threshold else []
    # the grid has steps of (width + 0.008) / 24 in a, and misses the corner by at most a few of alpha's
    step = (got.high - got.low + 0.008) / 24
    assert abs(min(inside) - got.low) < 2 * step and abs(max(inside) - got.high) < 2 * step
    assert got.low <= min(inside) + 1e-9 and max(inside) <= got.high + 1e-9


def test_a_fit_read_from_its_file_has_the_same_profile():
    fit = fits.fit_table(planted_table(noise=3e-3), sensitivity=False, bootstraps=0)
    again = fits.Fit.from_dict(fit.to_dict())
    one, two = (profile_interval(f, "N*", budget=1e22) for f in (fit, again))
    assert one == two and one.low < fit.optimum(1e22)["N"][0] < one.high


def test_clusters_are_doubted_and_open_ends_are_words():
    fit = fits.fit_table(planted_table(noise=1e-3, size_effect=4e-3), sensitivity=False, bootstraps=0)
    got = profile_interval(fit, "a")
    assert got.design_effect > 1.5 and "err together" in str(got).splitlines()[0]
    # a floor that noise hides: E may be anything down to its bound at zero
    rng = np.random.default_rng(2)
    table = planted_table(p=PLANTED | {"E": 0.3, "alpha": 0.12, "beta": 0.12, "A": 10.0, "B": 12.0})
    table["loss"] = table["loss"] * np.exp(0.02 * rng.standard_normal(42))
    fit = fits.fit_table(table, **LEAST)
    if fit.status in ("converged", "boundary"):
        got = profile_interval(fit, "E")
        assert got.low == 0.0 and any("bound" in r for r in got.notes)
    else:
        with pytest.raises(FitError, match=fit.status):
            profile_interval(fit, "E")


@pytest.mark.parametrize(
    ("name", "options", "says"),
    [("gamma", {}, "gamma"), ("N*", {}, "budget"), ("loss", {"params": 1e9}, "tokens"),
     ("E", {"level": 95}, "level")],
)  # fmt: skip
def test_bad_requests_are_named(name, options, says):
    fit = fits.fit_table(planted_table(noise=3e-3), sensitivity=False, bootstraps=0)
    with pytest.raises(FitError, match=says):
        profile_interval(fit, name, **options)
