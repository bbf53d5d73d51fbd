"""Computation at fixed parameters: what passes are worth, whether they help, and how many pay."""

import numpy as np
import pytest

import fits
from fits.laws import get_law
from fits.planted import STUDIES, planted_table

LAW, P = get_law("recurrence"), STUDIES["recurrence"][0]
SHAPE = {"params": 1e8, "recurrent_params": 8e7}


def answered(question, params=P, **given):
    arrays = {k: np.array([v]) for k, v in params.items()}
    got = LAW.questions[question].answer(LAW, arrays, {**SHAPE, **given})
    return {k: float(np.squeeze(v)) for k, v in got.items()}


def test_the_published_equivalence():
    """410M at r = 4 cost as much as 1B and are as good as 580M, all three as printed, to their last digit."""
    block = (1e9 - 4.1e8) / 3
    got = fits.ask("recurrence", "worth", params=4.1e8, recurrent_params=block, iterations=4)
    assert got["cost_params"] == pytest.approx(1e9, rel=1e-12)
    # 1B is 0.95B to 1.05B, which the block and its worth follow: 571M to 600M
    assert got["equivalent_params"] == pytest.approx(580e6, rel=0.03)


def test_with_phi_of_one_or_zero_it_is_chinchilla_of_the_depth_or_of_the_parameters():
    x = {"N": 1e8, "Nr": 6e7, "J": 5.0, "D": 1e9}
    plain = get_law("chinchilla")
    shared = {k: P[k] for k in ("E", "A", "B", "alpha", "beta")}
    for phi, size in ((1.0, 4e7 + 5 * 6e7), (0.0, 1e8)):
        got = LAW.predict(P | {"phi": phi}, x)
        assert got == pytest.approx(plain.predict(shared, {"N": size, "D": 1e9}), rel=1e-12)


@pytest.mark.parametrize(("phi", "sign"), [(0.46, 1), (0.0, 0), (-0.2, -1)])
def test_whether_it_helps_is_the_sign_of_phi(phi, sign):
    got = answered("helps", P | {"phi": phi}, iterations=8.0, tokens=1e9)
    assert np.sign(np.round(got["gain"], 12)) == sign
    assert got["loss"] == pytest.approx(got["loss_at_one"] - got["gain"], rel=1e-12)
    # so many passes that r^phi is 0 or beyond every parameter
    at_last = LAW.predict(P | {"phi": phi}, {"N": 1e8, "Nr": 8e7, "J": 1e300, "D": 1e9})
    assert got["limit"] == pytest.approx(at_last, rel=1e-12)
    with np.errstate(divide="ignore"):
        whole = answered("helps", P | {"phi": phi}, recurrent_params=1e8, iterations=8.0, tokens=1e9)
    assert (whole["limit"] == np.inf) == (sign < 0)  # nothing but the block: nothing is left


@pytest.mark.parametrize("flops", [1e16, 1e19, 1e21])
def test_the_best_passes_at_a_budget(flops):
    got = answered("iterations", flops=flops)
    times = np.geomspace(1, 4096, 400_001)
    tokens = flops / (6 * (2e7 + 8e7 * times))
    losses = LAW.predict(P, {"N": 1e8, "Nr": 8e7, "J": times, "D": tokens})
    # 401 points and a parabola: the loss is flat there, the passes less so
    assert got["loss"] == pytest.approx(losses.min(), rel=1e-7)
    assert got["iterations"] == pytest.approx(times[np.argmin(losses)], rel=1e-3)
    assert got["tokens"] * 6 * (2e7 + 8e7 * got["iterations"]) == pytest.approx(flops)
    assert (got["iterations"] == 1) == (flops == 1e16)


def test_a_fit_says_whether_computation_helps():
    """Where passes are planted to be worth 0.46 the gain's interval is above 0; where nothing, it holds 0."""
    for phi in (0.46, 0.0):
        table = planted_table("recurrence", seed=4)
        x = {v: table[fits.laws.COLUMN_OF[v]] for v in LAW.variables}
        table["loss"] *= LAW.predict(P | {"phi": phi}, x) / LAW.predict(P, x)
        fit = fits.fit_table(table, "recurrence", loss="least_squares", bootstraps=40, sensitivity=False)
        got = fits.ask(fit, "helps", **SHAPE, iterations=8, tokens=1e10)
        low, high = got.values["phi"]["95"]
        assert low < phi < high and (low > 0) == (phi > 0)
        assert (got.values["gain"]["95"][0] > 0) == (phi > 0)


def test_what_cannot_be_answered_is_said():
    with pytest.raises(fits.FitError, match="of recurrence only phi is published, and helps needs more"):
        fits.ask("recurrence", "helps", **SHAPE, iterations=2, tokens=1e9)
    with pytest.raises(fits.FitError, match=r"recurrent_params is 2e\+08; it must be at most params, 1e\+08"):
        fits.ask("recurrence", "worth", params=1e8, recurrent_params=2e8, iterations=2)
