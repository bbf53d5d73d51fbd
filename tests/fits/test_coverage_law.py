"""Repeated sampling: against the beta function and simulated problems, the published power, the question."""

import numpy as np
import pytest
from scipy.special import betaln

import fits
from fits.laws import get_law
from fits.laws.coverage import log_gamma_ratio

P = {"U": 0.05, "a": 0.45, "b": 2.0}


def answered(question, constants, **given):
    law = get_law("coverage")
    got = law.questions[question].answer(law, {k: np.array([v]) for k, v in constants.items()}, given)
    return {k: float(np.squeeze(v)) for k, v in got.items()}


@pytest.mark.parametrize("a, b", [(0.02, 0.3), (0.45, 2.0), (3.0, 50.0)])
def test_against_the_beta_function(a, b):
    k = np.array([1.0, 2.0, 10.0, 300.0, 1e4])
    want = np.exp(betaln(a, b + k) - betaln(a, b))
    got = get_law("coverage").predict({"U": 0.0, "a": a, "b": b}, {"K": k})
    # betaln loses a few digits where two large logs cancel
    assert got == pytest.approx(want, rel=1e-10)
    exact = [np.prod((b + np.arange(int(n))) / (a + b + np.arange(int(n)))) for n in k]
    assert got == pytest.approx(exact, rel=1e-12)
    assert log_gamma_ratio(5.0, 1.0) == pytest.approx(-np.log(5.0), rel=1e-14)


def test_against_simulated_problems():
    rng = np.random.default_rng(0)
    rates = np.where(rng.random(400_000) < P["U"], 0.0, rng.beta(P["a"], P["b"], 400_000))
    for k in (1, 4, 64):
        left = (1 - rates) ** k
        # four standard errors of a mean over 400,000 problems
        error = 4 * left.std() / np.sqrt(len(rates))
        assert get_law("coverage").predict(P, {"K": float(k)}) == pytest.approx(left.mean(), abs=error)


def test_failures_fall_as_the_published_power():
    """k^-a for many attempts, though each problem's failures fall exponentially."""
    k = np.array([1e6, 1e7])
    left = get_law("coverage").predict({**P, "U": 0.0}, {"K": k})
    # the power's relative corrections are of order 1 / k
    assert -np.log(left[1] / left[0]) / np.log(10) == pytest.approx(P["a"], abs=1e-5)


def test_attempts_for_a_coverage():
    got = answered("samples", P, coverage=0.9, params=8e9, tokens=1000.0)
    assert answered("coverage", P, samples=got["samples"])["coverage"] == pytest.approx(0.9, rel=1e-9)
    assert got["flops"] == pytest.approx(got["samples"] * 2 * 8e9 * 1000, rel=1e-12)
    assert got["limit"] == pytest.approx(0.95)
    assert answered("samples", P, coverage=0.96, params=1.0, tokens=1.0)["samples"] == np.inf
    rare = {"U": 0.0, "a": 0.05, "b": 2.0}  # no floor forbids it, so that it is a number however large
    many = answered("samples", rare, coverage=0.9, params=1.0, tokens=1.0)["samples"]
    assert many > 1e15 and answered("coverage", rare, samples=many)["coverage"] == pytest.approx(
        0.9, rel=1e-9
    )
    single = answered("coverage", P, samples=100.0)["single"]
    assert single == pytest.approx(0.95 * 0.45 / 2.45, rel=1e-12)  # the mean of a beta
    with pytest.raises(fits.FitError, match="coverage is 1; it must be below 1"):
        answered("samples", P, coverage=1.0, params=1.0, tokens=1.0)
