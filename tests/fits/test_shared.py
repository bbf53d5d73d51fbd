"""Shared surfaces: planted multipliers come back, and F tests tell one surface from two."""

import json

import numpy as np
import pytest
from fits_tables import PLANTED, planted_table

from fits import FitError, compare, fit_table
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
    two = {"base": planted_table(), "b": planted_table()}
    for law in ("kaplan", "power_N"):
        with pytest.raises(FitError, match=f"law is '{law}'; a shared fit needs a sum of powers in N and D"):
            shared_fit(two, law)
    with pytest.raises(FitError, match="N and D in one term"):
        shared_fit(two, "product", multipliers="separate")
    with pytest.raises(FitError, match="multipliers is 'both'"):
        shared_fit(two, multipliers="both")


def helped(k_n, k_d, p=PLANTED):
    """The planted surface at (k_n N, k_d D)."""
    return p | {"A": p["A"] * k_n ** -p["alpha"], "B": p["B"] * k_d ** -p["beta"]}


def test_separate_multipliers_are_recovered_and_their_product_is_the_speedup():
    tables = {"base": planted_table(), "new": planted_table(p=helped(1.2, 2.0))}
    got = shared_fit(tables, multipliers="separate", bootstraps=0)
    assert got.status == "converged"
    for name, value in (PLANTED | {"kN new": 1.2, "kD new": 2.0, "k new": 2.4}).items():
        assert got.params[name] == pytest.approx(value, rel=1e-6)
    assert "kN N" in str(got) and got.intervals["k new"]["estimate"] == pytest.approx(2.4, rel=1e-6)
    # two fits of their own, compared on their frontiers, know nothing of multipliers
    fits = [fit_table(t, bootstraps=0, sensitivity=False) for t in tables.values()]
    for row in compare(*fits, [1e18, 1e21, 1e24]).speedups:
        assert row["speedup"]["estimate"] == pytest.approx(2.4, rel=1e-6)


def test_auto_keeps_one_multiplier_unless_the_rows_refuse_it():
    ps = []
    for seed in range(8):
        tables = {f: planted_table(noise=0.003, seed=10 * seed + i, p=helped(k, k))
                  for i, (f, k) in enumerate((("base", 1.0), ("new", 1.25)))}  # fmt: skip
        ps.append(shared_fit(tables, bootstraps=0).multiplier_test["p"])
    # uniform where one multiplier is the truth: all below 0.3, or all above 0.7, has probability 7e-5 each
    assert max(ps) > 0.3 and min(ps) < 0.7
    one = shared_fit(tables, multipliers="auto", bootstraps=0)
    assert one.multipliers == ("separate" if ps[-1] < 0.05 else "compute") and "chosen: F(1, " in str(one)
    tables["new"] = planted_table(noise=0.003, seed=71, p=helped(0.7, 2.5))
    two = shared_fit(tables, multipliers="auto", bootstraps=60)
    assert two.multipliers == "separate" and two.multiplier_test["p"] < 1e-6
    assert two.criteria["separate"] < two.criteria["compute"] - 10
    for name, value in (("kN new", 0.7), ("kD new", 2.5)):
        low, high = two.intervals[name]["95"]
        assert low < value < high or abs(np.log(two.params[name] / value)) < 0.1
    json.dumps(two.to_dict(), allow_nan=False)


def test_the_f_statistic_by_hand():
    """Nested least squares by SciPy: the surface at (kN N, kD D) against kN = kD."""
    from scipy.optimize import least_squares

    tables = {f: planted_table(noise=0.003, seed=i, p=helped(k, 1.3 * k))
              for i, (f, k) in enumerate((("base", 1.0), ("new", 1.2)))}  # fmt: skip
    N, D, y = (np.concatenate([t[c] for t in tables.values()]) for c in ("params", "tokens", "loss"))
    new = np.repeat([0.0, 1.0], len(y) // 2)

    def residual(q, separate):
        E, A, B, alpha, beta = np.exp(q[0]), q[1], q[2], q[3], q[4]
        at_n, at_d = np.log(N) + q[5] * new - 22, np.log(D) + q[5 + separate] * new - 25
        return np.log(E + np.exp(A - alpha * at_n) + np.exp(B - beta * at_d)) - np.log(y)

    start = [np.log(1.8), np.log(480) - 0.35 * 22, np.log(2100) - 0.37 * 25, 0.35, 0.37, 0.2, 0.3]
    rss = {
        s: 2 * least_squares(residual, start[: 6 + s], args=(s,), xtol=1e-15, ftol=1e-15).cost for s in (0, 1)
    }
    F = (rss[0] - rss[1]) / (rss[1] / (len(y) - 7))
    got = shared_fit(tables, bootstraps=0)
    assert got.multiplier_test["F"] == pytest.approx(F, rel=1e-5) and got.multiplier_test["df"] == [1, 77]
    n = len(y)
    difference = n * np.log(rss[1] / rss[0]) + 2 + 2 * 8 * 9 / (n - 9) - 2 * 7 * 8 / (n - 8)
    assert got.criteria["separate"] - got.criteria["compute"] == pytest.approx(difference, rel=1e-5)


def test_tied_exponents_are_shared_too():
    tied = {"E": 1.8, "A": 480.0, "B": 900.0, "alpha": 0.35, "beta": 0.35}
    tables = {f: planted_table(p=helped(k, k, tied)) for f, k in (("base", 1.0), ("b", 1.5), ("c", 0.8))}
    got = shared_fit(tables, "tied", bootstraps=0)
    for name, value in (("alpha", 0.35), ("B", 900.0), ("k b", 2.25), ("k c", 0.64)):
        assert got.params[name] == pytest.approx(value, rel=1e-6)
    assert (
        got.law == "tied" and "beta" not in got.params and set(got.differences["b - base"]) == {"alpha", "a"}
    )
