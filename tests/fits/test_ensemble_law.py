"""Ensembles: the asymptote is refused without degrees of freedom; the best split against every split."""

import numpy as np
import pytest

import fits
from fits.laws import get_law
from fits.planted import STUDIES, planted_table

P = STUDIES["ensemble"][0]


def test_an_asymptote_is_refused_with_too_few_degrees_of_freedom():
    table = planted_table("ensemble", noise=0.0)
    keep = [0, 1, 7, 13, 19]  # five runs for five parameters
    few = {k: v[keep] for k, v in table.items()}
    fit = fits.fit_table(few, "ensemble", loss="least_squares", bootstraps=0)
    assert fit.status == "not identified"
    assert "5 different points for 5 parameters leave nothing to check the fit by" in fit.reasons
    with pytest.raises(fits.FitError, match="the fit is not identified, so it answers nothing"):
        fits.ask(fit, "asymptote", params=1e9, members=4)


def test_one_size_leaves_the_sizes_asymptote_unknown():
    table = planted_table("ensemble", noise=0.0)
    one = {k: v[table["params"] == table["params"][0]] for k, v in table.items()}
    more = {k: np.concatenate([v, v * (1.0 + 1e-3 * (k == "loss"))]) for k, v in one.items()}
    fit = fits.fit_table(more, "ensemble", loss="least_squares", bootstraps=0)
    assert fit.status == "not identified" and "all runs have the same N" in fit.reasons[0]


def test_the_asymptote_of_a_fit_has_its_interval():
    fit = fits.fit_table(
        planted_table("ensemble", seed=5), "ensemble", loss="least_squares", bootstraps=40, sensitivity=False
    )
    got = fits.ask(fit, "asymptote", params=3e9, members=8)
    low, high = got.values["asymptote"]["95"]
    assert low < P["E"] < high
    assert got["left"] == pytest.approx(got["loss"] - got["asymptote"])


@pytest.mark.parametrize("total", [1e8, 1e10, 1e12])
def test_the_best_split(total):
    law = get_law("ensemble")
    got = law.questions["split"].answer(
        law, {k: np.array([v]) for k, v in P.items()}, {"total_params": total}
    )
    N = np.geomspace(total / 1e4, total, 100_001)
    loss = law.predict(P, {"N": N, "M": total / N})
    # the grid's step is 1e-4 in N
    assert got["params"][0] == pytest.approx(N[np.argmin(loss)], rel=2e-4)
    assert got["loss"][0] == pytest.approx(loss.min(), rel=1e-9)
    assert got["members"][0] * got["params"][0] == pytest.approx(total) and got["members"][0] >= 1 - 1e-12
