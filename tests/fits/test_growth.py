"""Sizes that change: the published average of a ramp, and when up-cycling is ahead."""

import numpy as np
import pytest

import fits
from fits.laws import get_law
from fits.laws.growth import ramp_average
from fits.planted import STUDIES


def answered(law, question, constants, **given):
    asked = get_law(law).questions[question]
    got = asked.answer(get_law(law), {k: np.array([v]) for k, v in constants.items()}, given)
    return {k: float(np.squeeze(v)) for k, v in got.items()}


@pytest.mark.parametrize("share", [0.1, 0.5, 1.0])
def test_a_ramp_over_a_share_of_training_averages_as_published(share):
    assert ramp_average(0.0, 3.0, 0.0, share) == pytest.approx(3.0 * (1 - share / 2), rel=1e-14)


def test_a_ramp_against_an_integral():
    t = (np.arange(1_000_000) + 0.5) / 1_000_000
    sizes = np.interp(t, [0.25, 0.8], [1e9, 2e8])
    # the midpoint rule is exact on a ramp but for the two steps that hold its ends
    assert ramp_average(1e9, 2e8, 0.25, 0.8) == pytest.approx(sizes.mean(), rel=1e-9)


def test_the_ramp_question():
    p = STUDIES["average_params"][0]
    got = answered("average_params", "ramp", p, params=1e9, final=2e8, tokens=1e10, start=0.25, end=0.8)
    assert got["average_params"] == ramp_average(1e9, 2e8, 0.25, 0.8)
    assert got["flops"] == pytest.approx(6e10 * got["average_params"], rel=1e-14)
    same = get_law("chinchilla").predict(p, {"N": got["average_params"], "D": 1e10})
    assert got["loss"] == pytest.approx(same, rel=1e-14)
    with pytest.raises(fits.FitError, match="start is 0.9 and end 0.8; they must be shares of training"):
        answered("average_params", "ramp", p, params=1e9, final=2e8, tokens=1e10, start=0.9, end=0.8)


def test_dense_training_slows_what_follows():
    p = STUDIES["upcycling"][0]
    few, many = (answered("upcycling", "slope", p, dense_tokens=d) for d in (1e9, 1e12))
    assert few["exponent"] > many["exponent"] > 0
    limit = few["useless_dense_tokens"]
    assert answered("upcycling", "slope", p, dense_tokens=limit)["exponent"] == pytest.approx(0.0, abs=1e-12)
    loss = get_law("upcycling").predict(p, {"D1": limit, "D": np.array([1e9, 1e13])})
    assert loss[0] == pytest.approx(loss[1], rel=1e-12)


def test_training_from_scratch_overtakes():
    p, scratch = STUDIES["upcycling"][0], {"scratch_E": 1.6, "scratch_K": 40.0, "scratch_beta": 0.25}
    got = answered("upcycling", "scratch", p, dense_tokens=1e11, **scratch)
    D = got["tokens"] * np.array([1 - 1e-9, 1 + 1e-9])
    up = get_law("upcycling").predict(p, {"D1": 1e11, "D": D})
    # slopes of an answer are taken over steps of 1e-3, so that it must be finer by far
    assert up[0] < 1.6 + 40 * D[0] ** -0.25 and up[1] > 1.6 + 40 * D[1] ** -0.25
    later = answered("upcycling", "scratch", p, dense_tokens=1e11, **{**scratch, "scratch_E": 1.7})
    assert later["tokens"] == np.inf  # a higher floor is never ahead for good
    assert np.isnan(later["loss"])  # so that there is no loss of both
    never = answered("upcycling", "scratch", p, dense_tokens=1e8, **{**scratch, "scratch_K": 0.1})
    assert never["tokens"] == 0.0
