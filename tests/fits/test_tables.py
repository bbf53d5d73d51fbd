"""Tables for print: parsed back, and held against the full values that they were made from."""

import csv
import html.parser
import io
import math
import re
import types

import numpy as np
import pytest
from fits_tables import planted_table

import fits
from fits import tables

NUMBER = r"-?\d+(?:\.\d+)?(?:e-?\d+)?"


@pytest.fixture(scope="module")
def fit():
    return fits.fit_table(planted_table(noise=5e-3), bootstraps=200, sensitivity=False)


@pytest.fixture(scope="module")
def answers(fit):
    return [fits.allocate(fit, budget) for budget in (1e21, 1e24)]


@pytest.fixture(scope="module")
def comparison(fit):
    table = planted_table(noise=5e-3)
    counts = {
        "params_total": table["params"],
        "params_nonembedding": table["params"] - 2e3 * table["params"] ** 0.5,
    }
    counts |= {"flops_6N_total": table["flops"]}
    counts["flops_6N_nonembedding"] = 6 * counts["params_nonembedding"] * table["tokens"]
    return fits.approaches({**table, **counts}, fit=fit, bootstraps=30)


def hostile(status="converged"):
    """What a law of a user's own, with any names and any numbers, may hand over."""
    wild = {
        "k_|x": {"estimate": -3.25e-7, "sd": None, "80": None, "95": None},
        "alphaN": {"estimate": math.inf, "sd": math.nan, "80": [0.0, math.inf], "95": [0.0, math.inf]},
        "E": {"estimate": 0.0, "sd": 0.0, "80": [0.0, 0.0], "95": [0.0, 0.0]},
        "<b>": {"estimate": 2.0, "sd": 1.0, "80": [1.5, 2.5], "95": [1.0, 3.0]},
    }
    return types.SimpleNamespace(
        law=types.SimpleNamespace(), intervals=wild, fixed={"E": 0.0}, params=dict.fromkeys(wild, 0.0),
        status=status, reasons=["50 % of a_b & <c> | d"],
        flags=[{"code": "x", "text": "a | b\nc_d #1 ~ 5 %"}],
    )  # fmt: skip


def markdown_rows(text):
    """Cells of the rows below the head, unescaped."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    split = [re.split(r"(?<!\\)\|", line)[1:-1] for line in lines]
    assert len({len(cells) for cells in split}) == 1
    return [[re.sub(r"\\(.)", r"\1", c.strip()) for c in cells] for cells in split[2:]]


def latex_rows(text):
    """Cells between midrule and bottomrule, numbers back in the form 1.2e3."""
    body = text.split(r"\midrule")[1].split(r"\bottomrule")[0].strip()
    text = re.sub(r" \\times 10\^\{(-?\d+)\}", r"e\1", body).replace("$", "")
    return [[c.strip() for c in re.split(r"(?<!\\)&", row)] for row in text.split(r"\\") if row.strip()]


def assert_rounded(text, value, sd=None):
    """``text`` is ``value`` to its last printed digit, and rounding hides under a fifth of the deviation."""
    assert re.fullmatch(NUMBER, text), text
    mantissa, _, power = text.partition("e")
    step = 10.0 ** (int(power or 0) - len(mantissa.partition(".")[2]))
    if "." not in mantissa and not power:  # zeros before the point may be rounding
        step *= 10.0 ** (len(mantissa) - len(mantissa.rstrip("0")))
    assert abs(float(text) - value) <= 0.5 * step * (1 + 1e-9)
    if sd:
        assert abs(float(text) - value) < 0.2 * sd


@pytest.mark.parametrize("read, format", [(markdown_rows, "markdown"), (latex_rows, "latex")])
def test_printed_parameters_parse_back(fit, read, format):
    rows = read(tables.parameters(fit, format))
    assert [r[0].strip("\\") for r in rows] == ["E", "A", "B", "alpha", "beta", "a", "b"]
    for row, got in zip(rows, fit.intervals.values(), strict=True):
        assert_rounded(row[1], got["estimate"], got["sd"])
        for text, end in zip(row[2].split(" to "), got["95"], strict=True):
            assert_rounded(text, end, got["sd"])


def test_printed_parameters_predict_the_loss(fit):
    # the published A, B, E rounded to their intervals move the fourth decimal; six digits must not
    rows = {r[0]: float(r[1]) for r in markdown_rows(tables.parameters(fit))}
    point = {"N": np.geomspace(1e8, 1e11, 5), "D": np.geomspace(1e9, 1e12, 5)}
    printed = fit.law.predict(rows, point)
    np.testing.assert_allclose(printed, fit.law.predict(fit.params, point), atol=2e-5)


def test_csv_keeps_every_digit(fit, answers):
    rows = list(csv.DictReader(io.StringIO(tables.parameters(fit, "csv"))))
    for row, (name, got) in zip(rows, fit.intervals.items(), strict=True):
        assert row["name"] == name and row["status"] == fit.status
        assert [float(row[k]) for k in ("estimate", "sd", "low_80", "high_80", "low_95", "high_95")] == [
            got["estimate"], got["sd"], *got["80"], *got["95"]
        ]  # fmt: skip
    rows = list(csv.DictReader(io.StringIO(tables.allocations(answers, "csv"))))
    for row, answer in zip(rows, answers, strict=True):
        assert float(row["budget"]) == answer.budget
        assert [float(row["N_low_95"]), float(row["N_high_95"])] == answer.intervals["N"]["95"]
        assert float(row["tokens_per_param"]) == answer.tokens_per_param
    assert "Extrapolation" in rows[1]["doubts"]


@pytest.mark.parametrize("read, format", [(markdown_rows, "markdown"), (latex_rows, "latex")])
def test_frontier_has_a_row_a_budget_and_says_what_is_extrapolated(answers, read, format):
    text = tables.allocations(answers, format)
    rows = read(text)
    assert [float(r[0]) for r in rows] == [1e21, 1e24]
    for row, answer in zip(rows, answers, strict=True):
        for k, name in enumerate(("N", "D", "tokens_per_param", "loss")):
            got = answer.intervals[name]
            assert_rounded(row[1 + 2 * k], got["estimate"], got["sd"])
    doubt = "At 1e24 FLOPs: " + answers[1].extrapolation["text"]
    assert 0 <= text.index(doubt) < text.index("95")  # before the head
    assert tables.allocations(answers[0].to_dict()) == tables.allocations(answers[0])


def test_approaches_and_conventions(comparison):
    rows = markdown_rows(tables.approaches(comparison))
    for row, (key, way) in zip(rows, comparison.approaches.items(), strict=True):
        assert row[0] == f"{key}: {way.name}" and row[5] == way.status
        assert (row[1] == "–") if way.a is None else abs(float(row[1]) - way.a) < 5e-3
    parsed = list(csv.DictReader(io.StringIO(tables.approaches(comparison.to_dict(), "csv"))))
    assert float(parsed[2]["a"]) == comparison.approaches["3"].a
    assert float(parsed[1]["bias_of_a"]) == comparison.approaches["2"].bias["a"]
    said = markdown_rows(tables.conventions(comparison))
    assert [r[0] for r in said] == [c["convention"] for c in comparison.conventions]
    assert len(said) == 3 and said[0][2] != said[2][2]
    for row, c in zip(said, comparison.conventions, strict=True):
        assert_rounded(row[1], c["approach_2_a"])
        assert_rounded(row[2], c["a"])
    assert latex_rows(tables.conventions(comparison, "latex"))[1][2] == said[1][2]
    lone = {"approaches": {}, "conventions": []}
    assert tables.conventions(lone).startswith("> The table gives one count")


def test_text_from_outside_is_escaped():
    wild = hostile()
    rows = markdown_rows(tables.parameters(wild))
    assert [r[0] for r in rows] == list(wild.intervals)
    assert [r[1] for r in rows] == ["-3.25e-7", "not finite", "0", "2"]
    assert [r[2] for r in rows] == ["–", "0 to not finite", "fixed", "1.00 to 3.00"] or rows[3][
        2
    ] == "1.0 to 3.0"
    latex = tables.parameters(wild, "latex")
    bare = re.sub(r"\\[&%$#_{}]", "", latex.split("\n", 1)[1])
    assert not re.search(r"[%#~|]", bare)
    assert bare.count("{") == bare.count("}") and bare.count("$") % 2 == 0
    assert r"$\alpha_{N}$" in latex and r"\texttt{k\_\textbar{}x}" in latex
    assert list(csv.reader(io.StringIO(tables.parameters(wild, "csv"))))[4][0] == "<b>"
    assert "<b>" not in tables.parameters(wild, "html") and "&lt;b&gt;" in tables.parameters(wild, "html")


@pytest.mark.parametrize("format", ["markdown", "latex", "html"])
def test_what_is_no_estimate_is_said_first(format):
    text = tables.parameters(hostile("not identified"), format)
    assert "Not identified: 50" in text and "not estimates" in text
    assert text.index("not estimates") < text.index("last value")
    assert "estimate<" not in text and "| estimate" not in text and "& estimate" not in text


def test_bad_requests_name_what_is_valid(fit):
    with pytest.raises(fits.FitError, match="markdown, latex, csv, html"):
        tables.parameters(fit, "word")
    with pytest.raises(fits.FitError, match="needs a Fit"):
        tables.parameters({})
    with pytest.raises(fits.FitError, match="must be an Allocation"):
        tables.allocations(fit.intervals)
    with pytest.raises(fits.FitError, match="must be a Comparison"):
        tables.approaches(3)
    with pytest.raises(fits.FitError, match="at least one"):
        tables.allocations([])


class Balanced(html.parser.HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.open, self.text = [], ""
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        assert tag in ("p", "strong", "ul", "li", "table", "thead", "tbody", "tr", "th", "td", "pre")
        self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def test_notebook_shows_doubts_then_numbers_then_the_rest(fit, answers, comparison):
    said = Balanced(fit._repr_html_()).text
    assert f"{fit.intervals['a']['estimate']:.2g}" in said and "resamples" in said
    for flag in fit.flags:
        assert said.index(flag["text"][1:]) < said.index("estimate")
    said = Balanced(answers[1]._repr_html_()).text
    assert said.count(answers[1].extrapolation["text"]) == 1
    assert said.index("Extrapolation") < said.index("N*") < said.index("same loss within")
    said = Balanced(comparison._repr_html_()).text
    assert ("counted as" in said and "isoFLOP" in said) or "parabola" in said
    assert Balanced(tables.notebook("a < b & c")).text == "a < b & c"
