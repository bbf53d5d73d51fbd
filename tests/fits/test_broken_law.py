"""Broken powers: the released formula and simulation, its constants recovered, the local slope."""

import numpy as np
import pytest

import fits
from fits.laws import get_law
from fits.solve import solve

X = np.unique(np.round(np.geomspace(1, 4095, 120)))  # of the released simulation's 1 to 4095


def test_the_released_simulation():
    """a + b x^-c0 (1 + (x/d1)^(1/f1))^(-c1 f1), in plain arithmetic."""
    law, p = get_law("broken_D"), get_law("broken_D").PUBLISHED
    want = p["E"] + p["K"] * X ** -p["c0"] * (1 + (X / p["d"]) ** (1 / p["f"])) ** (-p["c1"] * p["f"])
    assert law.predict(p, {"D": X}) == pytest.approx(want, rel=1e-12)


def test_the_released_constants_are_recovered():
    law, p = get_law("broken_D"), get_law("broken_D").PUBLISHED
    _, point = solve(law, {"D": np.log(X)}, law.predict(p, {"D": X}), loss="least_squares", starts=4)
    assert point.status == "converged", point.reasons
    for key, value in p.items():
        assert point.params[key] == pytest.approx(value, rel=1e-6), key  # half of the 16 digits of the rows


@pytest.mark.parametrize("tokens", [50.0, 600.0, 3000.0])
def test_the_local_slope(tokens):
    law, p = get_law("broken_D"), get_law("broken_D").PUBLISHED
    got = fits.ask("broken_D", "slope", tokens=tokens)
    step = 1e-5
    up, down = (law.predict(p, {"D": tokens * np.exp(s)}) - p["E"] for s in (step, -step))
    # a central difference over 1e-5 keeps about nine digits
    assert got["exponent"] == pytest.approx(-np.log(up / down) / (2 * step), rel=1e-6)
    assert got["before"] == p["c0"] and got["break"] == p["d"] and 0 < got["past"] < 1
