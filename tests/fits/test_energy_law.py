"""Inference energy: the quadratic form, its cost counted token by token, and the sweet spot by a search."""

import numpy as np
import pytest

from fits.laws import get_law
from fits.planted import STUDIES

P = STUDIES["energy"][0]


def answered(question, **given):
    law = get_law("energy")
    got = law.questions[question].answer(law, {k: np.array([v]) for k, v in P.items()}, given)
    return {k: float(np.squeeze(v)) for k, v in got.items()}


def test_token_by_token():
    """A prefill and O decoding steps, each reading a cache that grows by one token."""
    I, O = 300, 50
    step, read = 0.4, 1.5e-5
    decode = sum(step + read * (I + t + 0.5) for t in range(O))  # the token in the middle of its own step
    p = {**P, "co": step, "coi": read, "coo": read / 2}
    want = P["c0"] + P["ci"] * I + P["cii"] * I**2 + decode
    assert get_law("energy").predict(p, {"I": float(I), "O": float(O)}) == pytest.approx(want, rel=1e-12)


@pytest.mark.parametrize("length", [16.0, 1000.0, 32768.0])
def test_the_sweet_spot(length):
    got = answered("sweet_spot", input_tokens=length)
    out = np.geomspace(1, 1e6, 200_001)
    each = get_law("energy").predict(P, {"I": length, "O": out}) / out
    # the grid's step is 7e-5
    assert got["output_tokens"] == pytest.approx(out[np.argmin(each)], rel=1e-4)
    assert got["joules_per_token"] == pytest.approx(each.min(), rel=1e-8)
    again = answered("energy", input_tokens=length, output_tokens=got["output_tokens"])
    assert again["joules"] == pytest.approx(got["joules"], rel=1e-12)


def test_longer_inputs_want_longer_outputs():
    best = [answered("sweet_spot", input_tokens=i)["output_tokens"] for i in (16.0, 1000.0, 32768.0)]
    assert best == sorted(best)
