"""The report's further questions: each number on the page is that of select, next_runs and compare."""

import dataclasses
import json

import numpy as np
import pytest
from fits_tables import PLANTED, planted_table
from matplotlib.image import imread
from test_report import Page, assert_printed_numbers, assert_self_contained

import fits
from fits import report_questions as questions
from fits.report import write_report

pytestmark = pytest.mark.slow
BUDGET = 1e23


def fitted(law="chinchilla", seed=0, p=None, bootstraps=120, **options):
    table = planted_table(noise=0.004, seed=seed, p=p)
    return fits.fit_table(table, law, bootstraps=bootstraps, sensitivity=False, **options)


def twice_as_good():
    """The planted surface with N and D each worth sqrt(2) times as much: half the compute for a loss."""
    p = dict(PLANTED)
    return p | {"A": p["A"] * 2 ** (-p["alpha"] / 2), "B": p["B"] * 2 ** (-p["beta"] / 2)}


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """A report with every section, and what the sections were made from."""
    folder = tmp_path_factory.mktemp("questions")
    fit, other = fitted(), fitted(seed=1, p=twice_as_good())
    answer = fits.allocate(fit, BUDGET)
    out = write_report(None, fit, allocation=answer, against=other, against_name="the <other>",
                       out=folder / "r.html")  # fmt: skip
    return folder, Page(out), fit, other


def test_page_holds_together(page):
    folder, read, _, _ = page
    assert_self_contained(read)
    assert_printed_numbers(read)
    for name in ("forecasts", "next_runs", "comparison"):
        assert f"figure-{name}" in read.ids
        pixels = imread(folder / "r.plots" / f"{name}.png")[..., :3]
        edge = [pixels[:2].ravel(), pixels[-2:].ravel(), pixels[:, :2].ravel(), pixels[:, -2:].ravel()]
        assert np.all(np.concatenate(edge) == 1.0), f"{name} is cut off at its edge"


def test_selection_is_that_of_select(page):
    _, read, _, _ = page
    table = planted_table(noise=0.004)
    rows = {k: table[k] for k in ("params", "tokens", "flops", "loss")}
    want = fits.select(rows, ("chinchilla", "tied", "product"))
    text = read.sections["selection"]
    assert want.text in text and "The law of this report, chinchilla:" in text
    printed = [value for section, value, _ in read.numbers if section == "selection"]
    for c in want.candidates:
        assert c.ranked and c.mean_error in printed and c.max_error in printed and c.verdict in text
        assert c.difference is None or set(c.difference["95"]) <= set(printed)
    assert [f["largest_factor"] for f in want.folds] == printed[-1 : -4 * len(want.folds) : -4][::-1]


def test_next_runs_are_those_of_design(page):
    _, read, fit, _ = page
    want = fits.next_runs(fit, budget_target=BUDGET, batch=questions.NEXT_BATCH)
    printed = [value for section, value, _ in read.numbers if section == "next"]
    assert printed[:2] == [BUDGET, np.expm1(want.half_width)]
    rows = np.array(printed[2 : 2 + 5 * len(want.runs)]).reshape(-1, 5)
    for row, run in zip(rows, want.runs, strict=True):
        ratio = run["tokens"] / run["params"]
        wanted = [run["params"], run["tokens"], ratio, run["flops"], np.expm1(run["half_width"])]
        assert row.tolist() == pytest.approx(wanted, rel=1e-12)
    spend = fits.spend_for(fit, budget_target=BUDGET, within=0.1)
    assert spend.flops in printed
    assert ("takes about" if spend.reached else "is out of reach") in read.sections["next"]


def test_comparison_is_that_of_compare(page):
    _, read, fit, other = page
    want = fits.compare(fit, other, [3e21, BUDGET], names=("this study", "the <other>"))
    text = read.sections["comparison"]
    assert want.crossover["text"] in text and want.method in text
    assert "the &lt;other&gt;" in read.source and "<other>" not in read.source
    printed = [value for section, value, _ in read.numbers if section == "comparison"]
    for s in want.speedups:
        assert {s["budget"], s["loss_a"], s["loss_b"], s["speedup"]["estimate"]} <= set(printed)
        assert set(s["speedup"]["95"]) <= set(printed)
    assert want.speedups[0]["speedup"]["95"][0] < 2 < want.speedups[0]["speedup"]["95"][1]
    assert all(sentence["text"][1:] in text for sentence in want.flags)


def test_a_law_that_forecasts_worse_is_said_first(tmp_path):
    """``product`` has the wrong shape for planted rows; noise-free, so that the forecasts can tell."""
    fit = fits.fit_table(planted_table(), "product", bootstraps=0, sensitivity=False)
    read = Page(write_report(None, fit, out=tmp_path / "r.html", ask=("selection",)))
    first = read.sections["answer"]
    assert "product is worse by" in first and "Recommended: chinchilla" in first
    assert "No runs are proposed: It was not asked for." in read.sections["next"]
    assert "comparison" not in read.sections


def test_reasons_where_there_is_no_answer():
    fit = fitted(bootstraps=0)
    assert "100 draws or more" in questions.ask_next(fit, None, None)[1]
    stuck = dataclasses.replace(fit, status="not identified")
    assert questions.ask_next(stuck, None, None) == (None, "The fit is not identified.")
    assert "Fit this study is not identified" in questions.ask_comparison(stuck, fit)[1]
    alone = fits.fit_table(planted_table(), "power_C", bootstraps=0, sensitivity=False)
    assert "power_C is a law in C" in questions.ask_next(alone, BUDGET, None)[1]
    assert questions.ask_comparison(fit, alone, names=("A", "B"))[1].startswith("Of B: power_C is a law in C")
    quantile = fitted(bootstraps=0, loss="quantile", tau=0.7)
    assert "this fit is by quantile" in questions.ask_selection(quantile)[1]
    table = planted_table()
    few = {k: v[table["flops"] < 5e19] for k, v in table.items()}
    small = fits.fit_table(few, "tied", bootstraps=0, sensitivity=False)
    assert "2 groups by flops" in questions.ask_selection(small)[1]
    product = fits.fit_table(planted_table(), "product", bootstraps=0, sensitivity=False)
    assert questions.ask_comparison(fit, product) == (
        None,
        "One of the two laws has no best N along a budget.",
    )


def test_forecasts_of_a_law_in_one_variable_are_ordered_by_it():
    D = np.geomspace(1e6, 1e9, 12)
    table = {"params": np.full(12, 1e5), "tokens": D, "loss": 1.0 + 40 * D**-0.3}
    fit = fits.fit_table(table, "power_D", bootstraps=0, sensitivity=False)
    got, why = questions.ask_selection(fit)
    assert why == "" and got["by"] == "tokens" and got["own"] == "power_D"
    # noise-free rows under the law that made them
    assert got["candidates"][0]["max_error"] < 1e-6


def test_pinned_parameters_and_chosen_laws():
    """The fit's own law is tried as it was fitted, beside the same law free and those asked for."""
    fit = fitted(bootstraps=0, fixed={"E": PLANTED["E"]})
    got, _ = questions.ask_selection(fit)
    assert got["own"] == "chinchilla (fixed E = 1.8)"
    names = [c["name"] for c in got["candidates"]]
    assert names == [got["own"], "chinchilla", "tied", "product"]
    assert [c["free"] for c in got["candidates"]] == [4, 5, 4, 4]
    asked, _ = questions.ask_selection(fitted(bootstraps=0), laws=["tied"])
    assert [c["name"] for c in asked["candidates"]] == ["chinchilla", "tied"]


def test_planned_budgets_order_the_forecasts():
    """Rows in one planned budget are one group, however their own FLOPs scatter."""
    import pandas as pd

    fit = fitted(bootstraps=0)
    by_flops, _ = questions.ask_selection(fit)
    budget = np.repeat([1e19, 1e20, 1e21], 14)  # three plans over the six true budgets
    planned, _ = questions.ask_selection(fit, pd.DataFrame({"budget": budget}))
    assert len(by_flops["folds"]) == 3 and len(planned["folds"]) == 1
    assert planned["folds"][0]["held_out_rows"] == 14


def test_a_searched_frontier_is_thinned_and_agrees_with_the_closed_form(monkeypatch):
    monkeypatch.setattr(questions, "CURVE_DRAWS", 20)
    fit, other = fitted(bootstraps=30), fitted(seed=1, p=twice_as_good(), bootstraps=30)

    def plain(N, D):
        return 6.0 * N * D

    got, _ = questions.ask_comparison(fit, other, flops=plain, other_flops=plain)
    assert all(len(f["draws"]) == questions.CURVE_DRAWS for f in got["frontiers"])
    closed, _ = questions.ask_comparison(fit, other)
    assert all(len(f["draws"]) == len(fit.draws) for f in closed["frontiers"])
    # searched, then interpolated between 49 budgets by a cubic
    pair = [a["speedups"][0]["speedup"]["estimate"] for a in (got, closed)]
    assert pair[0] == pytest.approx(pair[1], rel=1e-4)
    json.dumps({k: v for k, v in got.items() if k != "frontiers"}, allow_nan=False)


def test_unknown_question_is_named(tmp_path):
    with pytest.raises(fits.FitError, match="ask has weather; the questions are selection, next"):
        write_report(None, fitted(bootstraps=0), out=tmp_path / "r.html", ask=("weather",))
