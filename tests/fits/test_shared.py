"""Shared surfaces: planted multipliers come back, and the F test tells one surface from two."""

import json

import numpy as np
import pytest
from fits_tables import PLANTED, planted_table

from fits import FitError
from fits.shared import shared_fit


def faster(k):
    p = dict(PLANTED)
    return p | {"A": p["A"] * k ** (-p["alpha"] / 2), "B": p["B"] * k ** (-p["beta"] / 2)}


def test_planted_multiplier_and_shape_are_recovered_without_noise():
    got = shared_fit({"base": planted_table(), "new": planted_table(p=faster(1.5))}, bootstraps=0)
    assert got.status == "converged"
    for name, value in (PLANTED | {"k new": 1.5}).items():
        assert got.params[name] == pytest.approx(value, rel=1e-6)
    assert "no bootstrap" in str(got)


def test_f_test_accepts_one_surface_and_refuses_two():
    """Independent noise, so the F distribution holds: p is spread over (0, 1) under one surface."""
    ps = []
    for seed in range(8):
        tables = {f: planted_table(noise=0.003, seed=10 * seed + i, p=faster(k))
                  for i, (f, k) in enumerate((("base", 1.0), ("new", 1.5)))}  # fmt: skip
        ps.append(shared_fit(tables, bootstraps=0).f_test["p"])
    # uniform: all eight below 0.3, or all above 0.7, happens with probability 7e-5 each
    assert max(ps) > 0.3 and min(ps) < 0.7
    other = dict(PLANTED) | {"alpha": 0.25, "A": 80.0}
    tables = {"base": planted_table(noise=0.003), "new": planted_table(noise=0.003, seed=1, p=other)}
    got = shared_fit(tables, bootstraps=50)
    assert got.f_test["p"] < 1e-6
    assert got.differences["new - base"]["alpha"]["95"][1] < 0
    json.dumps(got.to_dict(), allow_nan=False)


def test_bad_input_is_named():
    with pytest.raises(FitError, match="at least two families"):
        shared_fit({"base": planted_table()})
    flat = {k: np.repeat(v[:1], 9) for k, v in planted_table().items()}
    flat["loss"] = flat["loss"] * np.linspace(1, 1.01, 9)
    with pytest.raises(FitError, match="family flat is not identified"):
        shared_fit({"base": planted_table(), "flat": flat}, bootstraps=0)
    with pytest.raises(FitError, match="'chinchilla' only"):
        shared_fit({"base": planted_table(), "b": planted_table()}, "tied")
