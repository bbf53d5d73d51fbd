"""Questions of laws: what they read, what they refuse, their intervals, and the command."""

import dataclasses
import json
import math

import numpy as np
import pytest
from click.testing import CliRunner

import fits
from fits.planted import planted_table
from launch.cli import cli

TRUTH = {"E": 1.69, "A": 406.4, "B": 410.7, "alpha": 0.34, "beta": 0.28}  # of the planted study
ASKED = {"params": 3e9, "inference_tokens": 3e12}


@pytest.fixture(scope="module")
def fit():
    table = planted_table("chinchilla", seed=3)
    return fits.fit_table(table, "chinchilla", loss="least_squares", bootstraps=40, sensitivity=False)


def test_an_answer_of_a_fit_has_intervals_that_hold_the_truth(fit):
    got = fits.ask(fit, "serve", **ASKED)
    truth = fits.ask(dataclasses.replace(fit, params=TRUTH, draws=fit.draws[:0]), "serve", **ASKED)
    assert truth.values["params"]["95"] is None
    for name in ("params", "tokens", "saved_share", "loss"):
        low, high = got.values[name]["95"]
        assert low < truth[name] < high and got.values[name]["sd"] > 0, name
        assert got.values[name]["method"] == "few clusters"
    assert not [f for f in got.flags if f["code"] == "far_extrapolation"]
    assert "95 %" in str(got) and json.dumps(got.to_dict())


def test_a_count_has_the_interval_of_its_draws(fit, monkeypatch):
    """Near the fit it stays the same, so that slopes alone would be sure of it."""
    middle = fit.params["alpha"]
    count = fits.Question(
        "how many?",
        lambda law, params, given: {"count": 10 + np.round((params["alpha"] - middle) * 1000)},
        needs={},
        gives={"count": "of them"},
    )
    monkeypatch.setattr(type(fit.law), "questions", {"count": count})
    got = fits.ask(fit, "count").values["count"]
    low, high = got["95"]
    assert got["estimate"] == 10 and low < 10 < high and got["method"] == "percentile"


def test_far_from_the_rows_is_said(fit):
    got = fits.ask(fit, "serve", **{**ASKED, "params": 1e12})
    [flag] = [f for f in got.flags if f["code"] == "far_extrapolation"]
    assert flag["text"].startswith("params is 100 times outside the rows")


def test_published_constants_answer_without_intervals():
    got = fits.ask("data_constrained_tied", "passes")
    assert got.given == {"worth": 0.5} and got.values["passes"]["95"] is None
    assert got["passes"] == pytest.approx(1 + 15.387756 * math.log(2), rel=1e-12)


@pytest.mark.parametrize("subject, question, given, said", [
    ("chinchilla", "worth", {}, "question is 'worth'; the law chinchilla answers serve"),
    ("power_N", "serve", {}, "the law power_N answers none"),
    ("chinchilla", "serve", {"params": 1e9}, r"serve lacks inference_tokens \(tokens to be served\)"),
    ("chinchilla", "serve", {**ASKED, "params": -1.0}, "params is -1.0; it must be a positive number"),
    ("chinchilla", "serve", {**ASKED, "x": 1}, "serve does not know x; it reads params, inference_tokens"),
    ("tied", "serve", ASKED, "the law tied has no published constants; ask a fit of it"),
    ("data_constrained_tied", "passes", {"worth": 2.0}, "worth is 2; it must be a share"),
    ("chinchilla", "serve", {**ASKED, "params": [1e9, 2e9]}, r"params is \[1.*\]; serve reads one number"),
    ("leverage", "leverage", {"active_share": 3, "granularity": 8, "flops": 1e22}, "active_share is 3; it"),
    ("leverage", "granularity", {"active_share": 3, "flops": 1e22}, "active_share is 3; it must be at"),
])  # fmt: skip
def test_bad_questions_are_refused_in_words(subject, question, given, said):
    with pytest.raises(fits.FitError, match=said):
        fits.ask(subject, question, **given)


def test_an_unsound_fit_answers_nothing(fit):
    with pytest.raises(fits.FitError, match="the fit is not identified, so it answers nothing"):
        fits.ask(dataclasses.replace(fit, status="not identified"), "serve", **ASKED)


def test_no_answer_is_said_as_never():
    class Far(fits.Law):
        name, parameters, PUBLISHED = "far", ("E",), {"E": 2.0}
        questions = {  # noqa: RUF012
            "reach": fits.Question(
                "when?",
                lambda law, params, given: {"tokens": np.inf * params["E"], "loss": params["E"] * np.nan},
                needs={},
                gives={"tokens": "until then", "loss": "then"},
            )
        }

    got = fits.ask(Far(), "reach")
    assert got["tokens"] is None and got["loss"] is None and str(got).count("never") == 2
    assert json.loads(json.dumps(got.to_dict(), allow_nan=False))["values"]["tokens"]["estimate"] is None
    assert "far" in fits.describe(Far()) and "gives tokens: until then" in fits.describe(Far())
    assert "has no questions of its own" in fits.describe("power_N")


def test_the_command(fit, tmp_path):
    fits.write_fit(fit, tmp_path / "a.json")

    def run(*args):
        done = CliRunner().invoke(cli, ["ask", *args], standalone_mode=False, catch_exceptions=False)
        return done.output

    assert "needs inference_tokens" in run(str(tmp_path / "a.json"))
    assert "needs unique_tokens" in run("data_constrained_tied")
    got = json.loads(run(str(tmp_path / "a.json"), "serve", "params=3e9", "inference_tokens=3e12", "--json"))
    assert (
        got["given"] == ASKED
        and got["values"]["params"]["estimate"] == fits.ask(fit, "serve", **ASKED)["params"]
    )
    run("chinchilla", "serve", "params=1e9", "inference_tokens=1e12", "--out", str(tmp_path / "b.json"))
    kept = json.loads((tmp_path / "b.json").read_text())
    assert kept["law"] == "chinchilla" and kept["command"].startswith("scaling")
