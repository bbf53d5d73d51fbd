"""Precision: the question's optimum by brute force, its closed case, and the published shares of QAT."""

import math

import numpy as np
import pytest

import fits
from fits.laws import get_law
from fits.planted import STUDIES


@pytest.mark.parametrize("S, share", [(40, 0.161), (2000, 0.413)])
def test_published_shares_of_quantization_aware_training(S, share):
    """S tokens a parameter-byte: here 1B parameters of 4 bits."""
    got = fits.ask("qat_share", "share", params=1e9, tokens=S * 0.5e9, weight_bits=4)
    assert got["tokens_per_param_byte"] == pytest.approx(S, rel=1e-12)
    assert got["share"] == pytest.approx(share, abs=5e-4)  # printed with three decimals
    assert got["tokens"] == pytest.approx(got["share"] * S * 0.5e9, rel=1e-12)
    with pytest.raises(fits.FitError, match="0.5 a parameter-byte, are too few"):
        fits.ask("qat_share", "share", params=1e9, tokens=0.25e9, weight_bits=4)


def answered(law, question, constants, **given):
    """A question to constants that are not published."""
    asked = law.questions[question]
    got = asked.answer(law, {k: np.array([v]) for k, v in constants.items()}, given)
    return {k: float(np.squeeze(v)) for k, v in got.items()}


def test_the_best_bits_against_every_size_and_precision():
    law, p, budget = get_law("precision_joint"), STUDIES["precision_joint"][0], 1e21
    got = answered(law, "bits", p, flops=budget)
    N, bits = np.meshgrid(np.geomspace(1e8, 1e11, 3001), np.linspace(2, 8, 1201), indexing="ij")
    D = budget * 16 / 6 / N / bits
    loss = law.predict(p, {"N": N, "D": D, "P": bits, "Pa": bits, "Pc": bits})
    at = np.unravel_index(np.argmin(loss), loss.shape)
    # the grid's steps: 0.005 bits and 0.2 % of N
    assert got["bits"] == pytest.approx(bits[at], abs=0.006)
    assert got["params"] == pytest.approx(N[at], rel=3e-3)
    assert got["loss"] == pytest.approx(loss[at], rel=1e-6) and got["loss"] < got["loss_at_16"]
    again = answered(law, "bits", p, flops=1e24)  # the best precision does not move with the budget
    assert again["bits"] == pytest.approx(got["bits"], rel=1e-12)


def test_three_equal_gammas():
    """Then e^u = 1 + 3 u at the best P = gamma u."""
    p = STUDIES["precision_joint"][0] | dict.fromkeys(("gamma_w", "gamma_a", "gamma_c"), 2.0)
    u = answered(get_law("precision_joint"), "bits", p, flops=1e21)["bits"] / 2.0
    assert math.exp(u) == pytest.approx(1 + 3 * u, rel=1e-12)


def test_many_bits_are_chinchilla():
    p = STUDIES["precision"][0]
    x = {"N": np.array([1e8, 1e9]), "D": np.array([1e9, 1e11])}
    got = get_law("precision").predict(p, {**x, "P": 200.0})
    plain = {k: p[k] for k in ("E", "A", "B", "alpha", "beta")}
    assert got == pytest.approx(get_law("chinchilla").predict(plain, x), rel=1e-14)


def test_training_beyond_the_limit_hurts_a_rounded_model():
    law, p = get_law("post_training"), STUDIES["post_training"][0]
    got = answered(law, "limit", p, params=1e9, weight_bits=4, B=18060.0, beta=0.4965)
    D = got["tokens"] * np.array([0.9, 1.0, 1.1])
    loss = 18060.0 * D**-0.4965 + law.predict(p, {"N": 1e9, "D": D, "P": 4.0})
    assert loss[1] < min(loss[0], loss[2])
    assert (
        answered(law, "limit", p, params=1e9, weight_bits=5, B=18060.0, beta=0.4965)["tokens"] > got["tokens"]
    )
