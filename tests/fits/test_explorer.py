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

TEMPLATES = importlib.resources.files("fits") / "templates"
SCRIPT = "".join((TEMPLATES / f"{name}.js").read_text("utf-8") for name in ("explorer", "explorer_page"))
THREE_DIGITS = 5e-4
# the page holds 6 significant digits of A, alpha, B, beta: log N* then is off by some 1e-5, and every draw
# of these fits is embedded, so intervals are of the same draws


@functools.cache
def engine():
    out = dukpy.JSInterpreter()
    out.evaljs(SCRIPT)
    return out


def solve(data, budget, **state):
    empty = dict.fromkeys(("maxParams", "maxTokens", "inference", "unique", "maxEpochs"))
    state = {
        "ratio": 20.0,
        **empty,
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


VALUES = {
    "kaplan": {"Nc": 8.8e13, "Dc": 5.4e13, "alphaN": 0.076, "alphaD": 0.095},  # Kaplan et al.
    "overtraining": {"E": 1.84, "a": 212.0, "b": 367.0, "eta": 0.136},  # Gadre et al., C4
    "data_constrained_tied": fits.get_law("data_constrained_tied").PUBLISHED,
    "data_constrained": {
        "E": 1.87, "A": 521.0, "B": 1488.0, "alpha": 0.35, "beta": 0.37, "R_N": 5.3, "R_D": 15.4,
    },
    "product": {"E": 1.7, "K": 300.0, "alpha": 0.16, "beta": 0.12},
}  # fmt: skip


@functools.cache
def published(law):
    """A law at others' values, with draws scattered about them: no fit is needed here."""
    form, params = fits.get_law(law), VALUES[law]
    centre = np.array([params[k] for k in form.parameters])
    draws = centre * np.exp(0.05 * np.random.default_rng(0).standard_normal((60, len(centre))))
    rows = [r | {"unique_tokens": r["tokens"] / 2} for r in fitted().rows]  # two epochs each
    return dataclasses.replace(fitted(), law=form, params=dict(params), draws=draws, rows=rows)


@pytest.mark.parametrize("law", ["chinchilla", "tied", "kaplan", "overtraining"])
def test_optimum_and_intervals_are_those_of_allocate(law):
    fit = published(law) if law in VALUES else fitted(law)
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


@pytest.mark.parametrize("flops", [None, with_attention])
@pytest.mark.parametrize("law", ["data_constrained", "data_constrained_tied"])
def test_unique_tokens_move_the_optimum_as_in_allocate(law, flops):
    fit = published(law)
    data, why = explorer.explorer_data(fit, flops)
    assert why == "" and data["range"]["epochs"] == [2.0, 2.0]
    assert data["limits"]["unique_tokens"] == pytest.approx(data["range"]["unique"][1], rel=1e-5)
    found = []
    for unique in (3e9, 25e9, 1e12):
        got = solve(data, 1e22, unique=unique)
        agree(got, fits.allocate(fit, 1e22, flops=flops, unique_tokens=unique))
        tokens = fits.allocate(fit, 1e22, flops=flops, unique_tokens=unique).intervals["D"]
        want = [end / unique for end in tokens.get("percentile", tokens)["95"]]
        assert got["epochs"] == pytest.approx(got["D"] / unique)
        assert got["intervals"]["epochs"]["95"] == pytest.approx(want, rel=THREE_DIGITS)
        found.append(got)
    assert found[0]["epochs"] > found[1]["epochs"] > 1 > found[2]["epochs"]
    assert found[0]["N"] != pytest.approx(found[2]["N"], rel=0.05)
    assert found[0]["loss"] > found[1]["loss"] > found[2]["loss"]
    assert found[0]["times"]["epochs"] == pytest.approx(found[0]["epochs"] / 2)


def test_the_published_optimum_under_repetition():
    """Muennighoff et al. 2023 print 6.80e9 parameters, 227e9 tokens and 9.08 epochs of 25e9 tokens."""
    data, _ = explorer.explorer_data(published("data_constrained_tied"))
    got = solve(data, 6 * 8.67e9 * 178e9, unique=25e9)
    # three printed figures
    assert (got["N"], got["D"]) == (pytest.approx(6.80e9, rel=2e-3), pytest.approx(227e9, rel=3e-3))
    assert got["epochs"] == pytest.approx(9.08, rel=2e-3)


@pytest.mark.parametrize(
    "ours, theirs",
    [
        ({"maxEpochs": 2.5}, {"max_epochs": 2.5}),
        ({"maxParams": 1e9}, {"max_params": 1e9}),
        ({"maxEpochs": 4.0, "maxTokens": 2e10, "inference": 1e10},
         {"max_epochs": 4.0, "max_tokens": 2e10, "inference_tokens": 1e10}),
    ],
)  # fmt: skip
def test_limits_under_repetition_are_those_of_allocate(ours, theirs):
    fit = published("data_constrained")
    data, _ = explorer.explorer_data(fit)
    got = solve(data, 1e21, unique=1e10, **ours)
    want = fits.allocate(fit, 1e21, unique_tokens=1e10, **theirs)
    agree(got, want)
    assert got["binds"]["tokens"] == any(m["limit"] in ("max_epochs", "max_tokens") for m in want.marginal)


def test_no_unique_tokens_means_that_none_is_repeated():
    fit = published("data_constrained")
    data, _ = explorer.explorer_data(fit)
    free = dataclasses.replace(fit, law=fits.get_law("chinchilla"), draws=fit.draws[:, :5])
    got = solve(data, 1e22)
    agree(got, fits.allocate(free, 1e22))
    assert got["epochs"] is None


def test_a_product_is_answered_within_caps_as_by_allocate():
    """Along a budget a product of powers falls to one end; caps on both, or served tokens, end that."""
    fit = published("product")
    data, why = explorer.explorer_data(fit)
    assert why == "" and data["capped"]
    caps = {
        k: fit.diagnostics["range"][c][1] for k, c in (("max_params", "params"), ("max_tokens", "tokens"))
    }
    assert data["limits"] == pytest.approx(caps, rel=1e-5)
    for budget in (1e20, 1e21):
        ours = {"maxParams": data["limits"]["max_params"], "maxTokens": data["limits"]["max_tokens"]}
        theirs = data["limits"]
        agree(solve(data, budget, **ours), fits.allocate(fit, budget, **theirs))
    assert solve(data, 1e21) is None
    with pytest.raises(fits.FitError, match="no optimal N"):
        fits.allocate(fit, 1e21)
    steady = dataclasses.replace(fit, draws=np.empty((0, 4)))
    served = fits.allocate(steady, 1e21, inference_tokens=1e11)  # alpha above beta: served tokens cost N
    agree(solve(data, 1e21, inference=1e11), served, intervals=False)


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


class Own(fits.Law):
    """A law in N and D that the page has no formula for."""

    name, formula, parameters = "own", "L = E + 1 / log(N D)", ("E",)


def test_left_out_where_there_is_no_optimum():
    for fit, word in [
        (
            fitted("power_N", 0),
            "a law in N alone does not trade N against D; this law is L = E + A / N^alpha",
        ),
        (fitted("power_C", 0), "says what a budget reaches, not which N and D"),
        (dataclasses.replace(fitted(), law=fits.get_law("broken_D")), "a law in D alone"),
        (dataclasses.replace(fitted(), law=fits.get_law("steps_batch")), "N, S, B is not settled"),
        (dataclasses.replace(fitted(), law=Own()), "it knows sums of powers"),
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


def test_the_page_repeats_tokens(tmp_path):
    fit = published("data_constrained_tied")
    answer = fits.allocate(fit, 1e22, unique_tokens=25e9, max_epochs=40)
    out = write_report(None, fit, allocation=answer, out=tmp_path / "r.html", ask=())
    page, _, type_in = opened(out)
    assert page.ids["explorer-unique"]["value"] == "2.5e10"
    assert page.ids["explorer-max-epochs"]["value"] == "40"
    assert "the explorer gives them" in out.read_text()
    shown = type_in("budget", "1e22")
    epochs = answer.D / 25e9
    assert f"Every token is seen {epochs:.3g} times" in shown["notes"]["html"]
    assert f"the number of epochs is {epochs / 2:.3g} times" in shown["notes"]["html"]
    assert ">epochs</th>" in shown["body"]["html"] and f"{answer.loss:.5g}" in shown["body"]["html"]
    shown = type_in("max-epochs", "2")
    assert "The cap on epochs holds D at 50B" in shown["notes"]["html"]
    assert "cap on D" in shown["figure"]["html"]
    shown = type_in("unique", "")
    assert "No epochs are capped" in shown["notes"]["html"] and ">epochs</th>" not in shown["body"]["html"]
    assert "nan" not in shown["figure"]["html"].lower()


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
