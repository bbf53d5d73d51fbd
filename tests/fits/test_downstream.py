"""Error from loss: the released formula, both ways through the questions, a forecast of stronger models."""

import numpy as np
import pytest

import fits
from fits.laws import get_law
from fits.planted import STUDIES, planted, planted_table

NAMES = ("downstream_exponential", "downstream_sigmoid")


def answered(name, question, **given):
    law = get_law(name)
    got = law.questions[question].answer(law, {k: np.array([v]) for k, v in STUDIES[name][0].items()}, given)
    return {k: float(np.squeeze(v)) for k, v in got.items()}


def test_the_exponential_as_released():
    """The authors write e - a (exp L)^-b: a power of the perplexity."""
    p, L = STUDIES["downstream_exponential"][0], np.array([1.5, 2.7, 4.0])
    got = get_law("downstream_exponential").predict(p, {"V": L})
    assert got == pytest.approx(p["top"] - p["k"] * np.exp(L) ** -p["gamma"], rel=1e-13)


def test_the_sigmoid_between_its_ends():
    p = STUDIES["downstream_sigmoid"][0]
    got = get_law("downstream_sigmoid").predict(p, {"V": np.array([-50.0, p["L0"], 60.0])})
    assert got == pytest.approx([p["low"], (p["low"] + p["top"]) / 2, p["top"]], rel=1e-12)
    one = get_law("downstream_sigmoid").predict(p, {"V": 2.0})
    assert one == pytest.approx(p["low"] + (p["top"] - p["low"]) / (1 + np.exp(-p["k"] * (2.0 - p["L0"]))))


@pytest.mark.parametrize("name", NAMES)
def test_loss_for_an_error_and_back(name):
    loss = answered(name, "loss", error=0.5)["eval_loss"]
    assert answered(name, "error", eval_loss=loss)["error"] == pytest.approx(0.5, rel=1e-12)
    assert np.isnan(answered(name, "loss", error=0.9)["eval_loss"])  # worse than guessing: never


@pytest.mark.parametrize("name", NAMES)
def test_stronger_models_are_forecast_within_the_published_points(name):
    """Fitted to the weaker 27 of 40 planted models: the rest are within six points, as published."""
    _, _, x, exact, _ = planted(name)
    table = planted_table(name, seed=1)
    weak = x["V"] > x["V"][12]
    fit = fits.fit_table(
        {k: v[weak] for k, v in table.items()}, name, loss="least_squares", bootstraps=0, sensitivity=False
    )
    assert fit.status == "converged", fit.reasons
    assert np.abs(fit.predict(eval_loss=x["V"][~weak]) - exact[~weak]).max() < 0.06


def test_an_error_below_zero_is_said():
    """Far below its rows the exponential goes below no error at all."""
    table = planted_table("downstream_exponential", seed=1)
    fit = fits.fit_table(
        table, "downstream_exponential", loss="least_squares", bootstraps=0, sensitivity=False
    )
    inside, outside = (fits.ask(fit, "error", eval_loss=v) for v in (table["eval_loss"].min(), 0.1))
    assert "impossible" not in [f["code"] for f in inside.flags]
    assert outside["error"] < 0 and outside.flags[0]["code"] == "impossible"
    assert "error is -" in str(outside).splitlines()[0]
