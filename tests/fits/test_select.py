"""Rolling forecasts: the planted law wins, ties are called ties, and published runs are forecast."""

import json

import numpy as np
import pytest
from fits_tables import planted_table

from fits import FitError, fit_table
from fits.select import select


def only(selection, name):
    return next(c for c in selection.candidates if c.name == name)


def test_planted_law_forecasts_exactly_and_wins_without_noise():
    """Twelve sizes, so the intervals may tell the forms apart; the wrong form errs by far more."""
    got = select(planted_table(), ("chinchilla", "product"))
    assert got.recommended == "chinchilla"
    assert only(got, "chinchilla").max_error < 1e-8  # the solver's own accuracy on noise-free rows
    assert only(got, "product").verdict.startswith("worse by")
    assert only(got, "product").difference["95"][0] > 0


def test_errors_and_factors_are_those_of_a_separate_fit():
    table = planted_table(noise=0.01, seed=3)
    got = select(table, ("chinchilla", "tied"), holdouts=1)
    assert len(got.folds) == 1 and got.folds[0]["held_out_rows"] == 7
    held = table["flops"] > 2e21
    small = {k: v[~held] for k, v in table.items()}
    fit = fit_table(small, bootstraps=0, sensitivity=False)
    ours = [e for e in got.errors if e["candidate"] == "chinchilla"]
    assert [e["row"] for e in ours] == list(np.flatnonzero(held))
    expected = np.log(fit.predict(params=table["params"][held], tokens=table["tokens"][held]))
    np.testing.assert_allclose([e["error"] for e in ours], expected - np.log(table["loss"][held]), rtol=1e-9)
    ratio = 300 ** (1 / 5)  # six budgets, geometric from 1e19 to 3e21
    np.testing.assert_allclose([e["factor"] for e in ours], ratio, rtol=1e-12)


def test_nested_forms_that_both_hold_are_a_tie_and_the_smaller_is_preferred():
    same = {"E": 1.8, "A": 480.0, "B": 2100.0, "alpha": 0.35, "beta": 0.35}
    got = select(planted_table(noise=0.003, seed=1, p=same), ("chinchilla", "tied"))
    assert got.recommended == "tied" and "cannot be told apart" in got.text
    assert "fewest parameters (4)" in got.text


def test_a_form_that_cannot_be_fitted_is_not_ranked():
    """Two sizes cannot determine E, A and alpha, so by size the first forecast has no fit."""
    table = planted_table(noise=0.003)
    keep = np.isin(np.round(np.log(table["params"] / 1e8) / np.log(1.6)), [3, 4, 5])
    got = select({k: v[keep] for k, v in table.items()}, ("chinchilla", "tied"), by="params")
    assert not only(got, "chinchilla").ranked and only(got, "chinchilla").mean_error is None
    assert "chinchilla is not ranked" in str(got)
    assert only(got, "tied").ranked and got.recommended == "tied"


def test_few_clusters_never_say_worse():
    """Three sizes: a coin falls the same way three times in a row one time in four."""
    table = planted_table(noise=0.003)
    keep = np.isin(np.round(np.log(table["params"] / 1e8) / np.log(1.6)), [3, 4, 5, 6])
    got = select({k: v[keep] for k, v in table.items()}, ("tied", "product"))
    assert not any(c.verdict.startswith("worse") for c in got.candidates)
    assert any(f["code"] == "few_clusters" for f in got.flags)


def test_options_are_candidates_judged_on_the_same_rows():
    table = planted_table(noise=0.003)
    table["loss"][0] *= 1.5  # a spoilt small run, left out of one candidate's training alone
    rule = "(params < 1.1e8) & (loss > 3.9)"
    got = select(table, ("chinchilla", ("chinchilla", {"loss": "least_squares"}),
                         ("chinchilla", {"loss": "least_squares", "exclude": rule})))  # fmt: skip
    plain, squares, cleaned = got.candidates
    assert squares.name == "chinchilla (loss least_squares)"
    rows = {c.name: [e["row"] for e in got.errors if e["candidate"] == c.name] for c in got.candidates}
    assert rows[plain.name] == rows[squares.name] == rows[cleaned.name]
    assert cleaned.folds[0]["train_rows"] == squares.folds[0]["train_rows"] - 1
    assert cleaned.mean_error < squares.mean_error  # least squares chases the spoilt run
    json.dumps(got.to_dict(), allow_nan=False)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"by": "loss"}, "by is 'loss'"),
        ({"laws": "chinchilla"}, "must be a list of laws"),
        ({"laws": [("tied", {"speed": 1})]}, "option 'speed'"),
        ({"laws": ["tied", "tied"]}, "names tied twice"),
        ({"holdouts": 0}, "holdouts is 0"),
        ({"holdouts": 5}, "from 1 to 4"),
    ],
)
def test_bad_input_is_named(change, words):
    with pytest.raises(FitError, match=words.replace("(", r"\(")):
        select(planted_table(), **change)


def test_too_few_groups_are_refused():
    table = planted_table()
    keep = table["flops"] < 5e19
    with pytest.raises(FitError, match="2 groups by flops"):
        select({k: v[keep] for k, v in table.items()})


def test_overtraining_hold_out(overtraining):
    """RedPajama's 1.4B run at 640 tokens a parameter and its 6.9B run, from the runs below 1B alone.

    Choices by declared reason: ``params`` with embeddings, since the table's tokens are M times it; the
    loss on C4 (column 1), the evaluation set of the paper's scaling figures; the form by selection among
    the small runs with default options. No run is left out. The target is 0.8 % of the loss.
    The other corpora have no 1.4B run at M = 640, and the same steps do worse there (largest error: C4
    5.2 %, by tied; RefinedWeb 15 %, by kaplan, where tied errs by 0.74 %): selection from four small
    sizes cannot tell the forms apart, and says so.
    """
    runs = overtraining[overtraining.dataset == "rpj"]
    small, large = runs[runs.params < 1e9], runs[runs.params > 1e9]
    columns = {"loss": "loss_eval1"}
    chosen = select(small, columns=columns)
    assert chosen.recommended == "tied"  # the paper's own form, rewritten in N and D
    fit = fit_table(small, chosen.recommended, columns=columns, bootstraps=0, sensitivity=False)
    forecast = fit.predict(params=large.params, tokens=large.tokens)
    error = forecast / large.loss_eval1.to_numpy() - 1
    multiples = (large.tokens / large.params).round().to_numpy()
    assert 640.0 in multiples and large.params.max() > 6.8e9
    assert np.abs(error).max() <= 0.008
