"""The report's explorer: its own JavaScript, run in an engine, against fits.allocate."""

import dataclasses
import functools
import html.parser
import importlib.resources
import json
import math
import re

import dukpy
import numpy as np
import pytest
from fits_tables import planted_table

import fits
from fits import explorer
from fits.report import write_report

SCRIPT = (importlib.resources.files("fits") / "templates" / "explorer.js").read_text(encoding="utf-8")
THREE_DIGITS = 5e-4
# the page holds 6 significant digits of A, alpha, B, beta: log N* then is off by some 1e-5, and every draw
# of these fits is embedded, so intervals are of the same draws


@functools.cache
def engine():
    out = dukpy.JSInterpreter()
    out.evaljs(SCRIPT)
    return out


def solve(data, budget, **state):
    state = {
        "ratio": 20.0,
        "maxParams": None,
        "maxTokens": None,
        "inference": None,
        **state,
        "budget": budget,
    }
    return engine().evaljs("Explorer.solve(dukpy.state, dukpy.data)", state=state, data=data)


@functools.cache
def fitted(law="chinchilla", bootstraps=60):
    table = planted_table(noise=0.004, seed=3)
    return fits.fit_table(table, law=law, bootstraps=bootstraps, sensitivity=False)


def with_attention(N, D):
    """6 N D and a share for attention that falls with size, so that the optimum moves."""
    return 6.0 * N * D * (1.0 + 40.0 * N**-0.2)


def agree(got, want, intervals=True):
    names = {"N": "N", "D": "D", "loss": "loss", "ratio": "tokens_per_param"}
    for ours, theirs in names.items():
        assert got[ours] == pytest.approx(getattr(want, theirs), rel=THREE_DIGITS)
        for level in ("80", "95") if intervals else ():
            drawn = want.intervals[theirs].get("percentile", want.intervals[theirs])
            assert got["intervals"][ours][level] == pytest.approx(drawn[level], rel=THREE_DIGITS)
    assert got["policy"]["N"] == pytest.approx(want.policy["N"], rel=THREE_DIGITS)
    assert got["policy"]["loss"] == pytest.approx(want.policy["loss"], rel=THREE_DIGITS)
    # extra compute is a small difference of two computes
    assert got["policy"]["extra"] == pytest.approx(want.policy["extra_compute"], rel=2e-3, abs=2e-5)


def kaplan():
    """The law of Kaplan et al. at their values, with draws scattered about them: no fit is needed here."""
    law = fits.get_law("kaplan")
    params = {"Nc": 8.8e13, "Dc": 5.4e13, "alphaN": 0.076, "alphaD": 0.095}
    centre = np.array([params[k] for k in law.parameters])
    draws = centre * np.exp(0.05 * np.random.default_rng(0).standard_normal((60, 4)))
    return dataclasses.replace(fitted(), law=law, params=params, draws=draws)


@pytest.mark.parametrize("law", ["chinchilla", "tied", "kaplan"])
def test_optimum_and_intervals_are_those_of_allocate(law):
    fit = kaplan() if law == "kaplan" else fitted(law)
    data, why = explorer.explorer_data(fit)
    assert why == "" and len(data["draws"]) == len(fit.draws) == 60
    for budget in (2e19, 1e21, 3e24):
        agree(solve(data, budget), fits.allocate(fit, budget))


@pytest.mark.parametrize(
    "ours, theirs",
    [
        ({"maxParams": 2e9}, {"max_params": 2e9}),
        ({"maxTokens": 4e10}, {"max_tokens": 4e10}),
        ({"inference": 3e11}, {"inference_tokens": 3e11}),
        ({"maxParams": 5e9, "inference": 3e11}, {"max_params": 5e9, "inference_tokens": 3e11}),
        ({"maxParams": 1e9, "maxTokens": 4e10}, {"max_params": 1e9, "max_tokens": 4e10}),
    ],
)
@pytest.mark.parametrize("flops", [None, with_attention])
def test_limits_are_those_of_allocate(ours, theirs, flops):
    fit = fitted(bootstraps=30)
    data, _ = explorer.explorer_data(fit, flops)
    got, want = solve(data, 3e22, **ours), fits.allocate(fit, 3e22, flops=flops, **theirs)
    agree(got, want)
    bound = {m["limit"] for m in want.marginal}
    if len(bound) == 1:  # two that bind at once have no margin in allocate, which then lists none
        assert got["binds"] == {"params": "max_params" in bound, "tokens": "max_tokens" in bound}
    unspent = [f for f in want.flags if f["code"] == "unspent"]
    assert (got["unspent"] > 1e-6) == bool(unspent)


def test_flop_function_moves_the_optimum_and_is_interpolated_closely():
    fit = fitted(bootstraps=30)
    data, _ = explorer.explorer_data(fit, with_attention)
    assert 0 < data["flops"]["error"] < 1e-3
    for budget in (1e20, 1e24):
        agree(solve(data, budget), fits.allocate(fit, budget, flops=with_attention))
    assert solve(data, 1e20)["N"] != pytest.approx(fits.allocate(fit, 1e20).N, rel=0.01)


def test_curve_is_the_law_along_the_budget():
    fit = fitted()
    data, _ = explorer.explorer_data(fit)
    curve = solve(data, 1e22)["curve"]
    N = np.exp(curve["n"])
    D = 1e22 / 6 / N
    assert curve["loss"] == pytest.approx(fit.predict(params=N, tokens=D), rel=1e-5)
    draws = fit.predict_draws(params=N, tokens=D)
    assert pytest.approx(np.quantile(draws, [0.025, 0.975], axis=0), rel=1e-4) == np.array(curve["95"]).T
    assert min(curve["loss"]) >= solve(data, 1e22)["loss"]


def test_thinned_draws_are_spaced_and_counted():
    fit = fitted()
    many = dataclasses.replace(fit, draws=np.tile(fit.draws, (20, 1)))
    data, _ = explorer.explorer_data(many)
    assert len(data["draws"]) == explorer.DRAWS and data["draws_total"] == 1200
    assert data == explorer.explorer_data(many)[0]
    first, last = many.draws[0], many.draws[-1]
    assert data["draws"][0] == pytest.approx(first, rel=1e-5)
    assert data["draws"][-1] == pytest.approx(last, rel=1e-5)


@pytest.mark.parametrize(
    "text, value",
    [("2e12", 2e12), ("1.5T", 1.5e12), ("70 B", 7e10), ("1,000", 1e3), ("5.76e+23", 5.76e23), ("", None)],
)
def test_numbers_as_people_write_them(text, value):
    assert engine().evaljs("Explorer.read(dukpy.text)", text=text) == value


@pytest.mark.parametrize("text", ["-3", "0", "many", "1e999", "<b>", "3 apples"])
def test_what_is_no_number(text):
    assert engine().evaljs("isNaN(Explorer.read(dukpy.text))", text=text)


def test_left_out_where_there_is_no_optimum():
    for fit, word in [
        (fitted("product", 0), "no best N"),
        (fitted("power_N", 0), "E + A / N^alpha"),
        (dataclasses.replace(fitted(), status="not identified"), "not identified"),
        (dataclasses.replace(fitted(), status="unconverged"), "unconverged"),
    ]:
        data, why = explorer.explorer_data(fit)
        assert data is None and word in why


class Page(html.parser.HTMLParser):
    """Elements by id, the labels, and what the page would fetch."""

    def __init__(self, text):
        super().__init__()
        self.ids, self.labels, self.fetched = {}, set(), []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        if "id" in attrs:
            assert attrs["id"] not in self.ids
            self.ids[attrs["id"]] = attrs
        if tag == "label":
            self.labels.add(attrs["for"])
        if tag in ("script", "link", "img", "iframe"):
            self.fetched += [attrs[k] for k in ("src", "href") if k in attrs]


DOCUMENT = """
var elements = {}, ids = dukpy.ids, data = dukpy.data, document = {getElementById: function (id) {
  if (!(id in ids)) throw new Error("no element " + id);
  if (!elements[id]) elements[id] = {value: ids[id].value || "", textContent: data, innerHTML: "",
    hidden: true, set: {}, on: {},
    setAttribute: function (name, value) { this.set[name] = value; },
    getAttribute: function (name) { return ids[id][name]; },
    addEventListener: function (name, act) { this.on[name] = act; }};
  return elements[id];
}};
"""
READ = """
function state(id) { var e = elements["explorer-" + id]; return {html: e.innerHTML, value: e.value}; }
function all() { return {notes: state("notes"), body: state("body"), figure: state("figure"),
  budget: state("budget"), tokens: state("max-tokens"), slider: state("slider"),
  hidden: elements["explorer-live"].hidden}; }
function type(id, value) {
  var e = elements["explorer-" + id]; e.value = value; e.on.input.call(e, {}); return all();
}
"""


def opened(path):
    """The page's script run on the page's own data, and a function that types into a field."""
    text = path.read_text()
    page = Page(text)
    data = re.search(r'<script type="application/json" id="explorer-data">(.*?)</script>', text, re.S)[1]
    script = re.search(r"<script>\n(.*?)</script>", text, re.S)[1]
    run = dukpy.JSInterpreter()
    run.evaljs([DOCUMENT, script, READ, "0"], ids=page.ids, data=data)

    def type_in(field, value):
        return run.evaljs("type(dukpy.field, dukpy.value)", field=field, value=value)

    return page, json.loads(data), type_in


def test_the_page_answers_what_is_typed(tmp_path):
    fit = fitted()
    answer = fits.allocate(fit, 4e22, max_tokens=1e11)
    out = write_report(None, fit, allocation=answer, out=tmp_path / "r.html")
    page, data, type_in = opened(out)
    assert not page.fetched
    told = re.sub(r"<[^>]+>", "", out.read_text())
    assert "best within these limits: max_tokens 1e+11" in told
    extra = answer.policy["extra_compute"]
    assert f"{100 * abs(extra):.2g} % {'more' if extra >= 0 else 'less'} compute" in told
    inputs = {i for i, attrs in page.ids.items() if attrs.get("type") in ("text", "range")}
    assert inputs and inputs <= page.labels
    shown = type_in("ratio", "20")
    assert not shown["hidden"]
    assert "Extrapolation: the budget is 13.3 times" in shown["notes"]["html"]  # 4e22 over 3e21
    assert shown["tokens"]["value"] == "1e11" and "cap on tokens holds D at 100B" in shown["notes"]["html"]
    assert f"{answer.loss:.5g}" in shown["body"]["html"]
    assert "cap on D" in shown["figure"]["html"] and "nan" not in shown["figure"]["html"].lower()
    free = fits.allocate(fit, 1e21)
    type_in("max-tokens", "")
    shown = type_in("budget", "1e21")
    assert "Inside the table" in shown["notes"]["html"]
    assert f"{free.loss:.5g}" in shown["body"]["html"] and "cap on D" not in shown["figure"]["html"]
    # the slider runs over log budget, and typing moves it
    low, top = data["budget"]["low"], data["budget"]["top"]
    assert top == pytest.approx(1000 * 3e21) and low == pytest.approx(1e19)
    assert float(shown["slider"]["value"]) == round(400 * math.log(1e21 / low) / math.log(top / low))
    shown = type_in("slider", 400)
    assert shown["budget"]["value"] == "3e24" and "1000 times" in shown["notes"]["html"]
    shown = type_in("max-params", "<b>")
    assert "Not a positive number: Cap on N" in shown["notes"]["html"] and shown["body"]["html"] == ""


def test_page_without_draws_says_so(tmp_path):
    out = write_report(None, fitted(bootstraps=0), out=tmp_path / "r.html")
    assert "only point values are shown and their doubt is not" in out.read_text()
    shown = opened(out)[2]("budget", "1e21")
    assert "doubt is not known" in shown["notes"]["html"] and "–" in shown["body"]["html"]


def test_page_without_explorer_says_why(tmp_path):
    out = write_report(None, fitted("power_N", 0), out=tmp_path / "r.html")
    text = out.read_text()
    assert "The explorer is left out" in text and "<script" not in text


def test_data_cannot_end_its_element():
    text = explorer.embedded({"name": "</script><script>alert(1)</script>&"})
    assert "<" not in text and json.loads(text)["name"].startswith("</script>")
