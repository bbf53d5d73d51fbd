"""What the report says of the fit: plain values, in words and tables.

Every function returns lists and mappings of strings and ``Number``; the page's looks are the
template's work. A ``Number`` keeps its full value beside its printed form.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from fits.constraints import limit_words
from fits.fit import deviation
from fits.plots.style import scientific, short
from fits.rowweights import describe_loss

NO_ESTIMATE = ("not identified", "unconverged")
STATUS_WORDS = {
    "converged": "",
    "boundary": "The fit ended at a bound of a parameter: read exponents and extrapolations as a guess.",
    "not identified": "These rows do not determine the law. No value below is an estimate.",
    "unconverged": "The solver did not converge. No value below is an estimate.",
}

STUCK = 1e-3  # no bootstrap of noisy runs knows N* to a thousandth
STUCK_WORDS = (
    "The interval of N* has next to no width, because the optimum sticks to a corner of the FLOP function: "
    "take N* from the near-optimal band, and its doubt from the interval of a."
)


class Number(NamedTuple):
    """A value and how it is printed."""

    value: float
    text: str


def number(value: Any, form: str = "g5") -> Number | str:
    """A printed number; a missing or non-finite value prints as such, never as a number.

    Args:
      form: ``gK`` for K significant digits, ``count`` (1.31T), ``sci`` (5.76e23), ``int``, ``percent``.
    """
    if value is None:
        return "–"
    value = float(value)
    if not math.isfinite(value):
        return "not finite"
    if form == "count":
        return Number(value, short(value, 3))
    if form == "sci":
        return Number(value, scientific(value, 3))
    if form == "int":
        return Number(value, f"{value:,.0f}")
    if form == "percent":
        tiny = abs(value) < 1e-4  # a hundredth of a per cent of compute is nothing
        return Number(value, f"{100 * value:.2f} %" if tiny else f"{100 * value:.2g} %")
    return Number(value, f"{value:.{int(form[1:])}g}")


def span(ends: Sequence[float] | None, form: str = "g5") -> list:
    """Both ends of an interval, or a dash."""
    return ["–"] if not ends else [number(ends[0], form), "to", number(ends[1], form)]


def sentence(text: str) -> str:
    """The text with a capital letter and a full stop."""
    text = text.strip()
    return text[:1].upper() + text[1:] + ("" if text.endswith((".", "!", "?")) else ".")


def headline(fit: Any, allocations: Sequence[Mapping]) -> dict[str, Any]:
    """The answer in a sentence or two of words and numbers."""
    if fit.status in NO_ESTIMATE:
        return {"answered": False, "lines": [["There is no answer: the fit is", fit.status + "."]]}
    if allocations:
        return {"answered": True, "lines": [_allocation_sentence(answer) for answer in allocations]}
    if "U" in fit.law.variables:
        line = "The fitted law is below; its best N and D depend on the unique tokens too: see the explorer."
        return {"answered": True, "lines": [[line]]}
    if "a" not in fit.intervals:
        return {"answered": True, "lines": [["The fitted law is below; it does not trade N against D."]]}
    a, b = fit.intervals["a"], fit.intervals["b"]
    line = ["Compute-optimal parameters grow as C to the power", number(a["estimate"], "g3")]
    if a["95"]:
        line += ["(95 % interval", *span(a["95"], "g3"), ")"]
    line += [", tokens as C to the power", number(b["estimate"], "g3"), "."]
    return {"answered": True, "lines": [line]}


def _allocation_sentence(answer: Mapping) -> list:
    line = ["For", number(answer["budget"], "sci"), "FLOPs, train", number(answer["N"], "count")]
    line += ["parameters on", number(answer["D"], "count"), "tokens,"]
    line += [number(answer["tokens_per_param"], "g3"), "tokens per parameter; predicted loss"]
    line += [number(answer["loss"], "g5")]
    got = answer["intervals"]
    if got["N"]["95"]:
        line += ["(95 % intervals: N", *span(got["N"]["95"], "count"), ", D", *span(got["D"]["95"], "count")]
        line += [", loss", *span(got["loss"]["95"], "g5"), ")"]
    return [*line, "."]


def warnings(fit: Any, allocations: Sequence[Mapping], points: Sequence[Mapping]) -> list[str]:
    """What to doubt about the fit and its answers, the gravest first, in plain words."""
    said = ("not_identified", "unconverged")  # the status says it already
    out = [sentence(flag["text"]) for flag in fit.flags if flag["code"] not in said]
    for answer in allocations:
        out += [text for flag in answer["flags"] if (text := sentence(flag["text"])) not in out]
        if max(answer["extrapolation"][k] for k in ("budget_ratio", "N_ratio", "D_ratio")) > 1:
            out.append(f"At {scientific(answer['budget'], 3)} FLOPs: {answer['extrapolation']['text']}")
        ends = answer["intervals"]["N"]["95"]
        if ends and ends[1] < ends[0] * (1 + STUCK) and (fit.intervals.get("a") or {}).get("sd"):
            out.append(STUCK_WORDS)
    for point in points:
        if not point["accepted"]:
            out.append(f"No isoFLOP minimum at {scientific(point['budget'], 3)} FLOPs: {point['reason']}.")
    excluded = sum(row["outcome"] == "excluded" for row in fit.rows)
    if excluded:
        total = len(fit.rows)
        out.append(f"{excluded} of {total} rows are not in the fit; each is listed with its reason below.")
    return out


def law_table(fit: Any) -> dict[str, Any]:
    """Parameters and exponents with intervals."""
    rows = []
    for name, got in fit.intervals.items():
        sd = deviation(name, got, fit.fixed, lambda x: number(x, "g3"))
        rows.append([name, number(got["estimate"], "g6"), sd, span(got["80"]), span(got["95"])])
    value = "last value" if fit.status in NO_ESTIMATE else "estimate"
    return {"head": ["", value, "standard deviation", "80 % interval", "95 % interval"], "rows": rows}


QUANTITIES = {
    "N": ("N* (parameters)", "count"),
    "D": ("D* (tokens)", "count"),
    "tokens_per_param": ("D*/N*", "g4"),
    "loss": ("loss", "g5"),
}


def allocation_table(answer: Mapping) -> dict[str, Any]:
    """One allocation: its quantities, its near-optimal band and its buildable shape."""
    rows = []
    for name, (words, form) in QUANTITIES.items():
        got = answer["intervals"][name]
        rows.append([words, number(answer[name], form), span(got["80"], form), span(got["95"], form)])
    notes = [_band_sentence(answer["band"]), [answer["extrapolation"]["text"]]]
    notes.append([f"Compute is counted as {answer['compute']}."])
    if answer.get("limits"):
        notes.append(
            [f"N, D and the band are the best within these limits: {limit_words(answer['limits'])}."]
        )
    if answer.get("buildable"):
        notes.append(_shape_sentence(answer["buildable"], answer.get("shape") or {}))
    if answer.get("policy"):
        notes.append(_policy_sentence(answer["policy"]))
    head = ["", "estimate", "80 % interval", "95 % interval"]
    return {"budget": number(answer["budget"], "sci"), "head": head, "rows": rows, "notes": notes}


def _band_sentence(band: Mapping) -> list:
    (low, high), (low_D, high_D) = band["N"], band["D"]
    cost = [number(band["within"], "percent"), "more compute"]
    if low is None and high is None:
        return ["Every N in reach gives the same loss for at most", *cost, "."]
    if low is None:
        return ["Any N up to", number(high, "count"), "reaches the same loss for at most", *cost, "."]
    if high is None:
        return ["Any N from", number(low, "count"), "up reaches the same loss for at most", *cost, "."]
    line = ["Any N from", number(low, "count"), "(on", number(low_D, "count"), "tokens) to"]
    line += [number(high, "count"), "(on", number(high_D, "count"), "tokens)"]
    return [*line, "reaches the same loss for at most", *cost, "."]


def _policy_sentence(policy: Mapping) -> list:
    line = ["At", number(policy["tokens_per_param"], "g3"), "tokens per parameter: N"]
    line += [number(policy["N"], "count"), ", D", number(policy["D"], "count"), ", loss"]
    line += [number(policy["loss"], "g5"), ";"]
    extra = policy["extra_compute"]
    if extra is None:
        return [*line, "it cannot reach the loss above."]
    if extra < 0:
        return [*line, "it reaches the loss above with", number(-extra, "percent"), "less compute."]
    return [*line, "it takes", number(extra, "percent"), "more compute to reach the loss above."]


def _shape_sentence(built: Mapping, shape: Mapping) -> list:
    line = ["A shape that can be built has", number(built["N"], "count"), "parameters; on"]
    line += [number(built["D"], "count"), "tokens its predicted loss is", number(built["loss"], "g5")]
    line += ["and it costs", number(built["extra_compute"], "percent"), "more compute than the optimum:"]
    return [*line, ", ".join(f"{k} {v}" for k, v in shape.items() if k != "params"), "."]


def approach_table(approaches: Mapping | None) -> dict[str, Any] | None:
    """Exponents of the three approaches side by side."""
    if not approaches:
        return None
    rows = []
    for key in sorted(approaches["approaches"]):
        got = approaches["approaches"][key]
        intervals = got["intervals"] or {}
        ends = {name: (intervals.get(name) or {}).get("95") for name in ("a", "b")}
        row = [f"{key}: {got['name']}", got["status"], number(got["a"], "g4"), span(ends["a"], "g4")]
        rows.append([*row, number(got["b"], "g4"), span(ends["b"], "g4"), "; ".join(got["reasons"])])
    head = ["approach", "status", "a", "95 % interval of a", "b", "95 % interval of b", "reasons"]
    bias = (approaches["approaches"].get("2") or {}).get("bias") or {}
    return {
        "head": head,
        "rows": rows,
        "bias": number(bias["a"], "g2") if bias.get("a") is not None else None,
    }


def isoflop_points(approaches: Mapping | None) -> tuple[list[Mapping], int]:
    """Approach 2's budgets to show, and how many more there are.

    A planned study shows every budget. A table of scattered compute falls into many groups; of those,
    only the ones with enough sizes for a curve are shown.
    """
    points = ((approaches or {}).get("approaches", {}).get("2") or {}).get("points") or []
    curves = [p for p in points if p["parabola"] is not None]
    shown = list(points) if curves and len(points) <= 2 * len(curves) else curves
    return shown, len(points) - len(shown)


def isoflop_table(points: Sequence[Mapping]) -> dict[str, Any]:
    """One line a budget: the fitted minimum, or why there is none."""
    rows = []
    for p in sorted(points, key=lambda p: p["budget"]):
        row = [number(p["budget"], "sci"), str(len(p["rows"])), span(p["N_range"], "count")]
        if p["accepted"]:
            row += [number(p["N"], "count"), number(p["D"], "count"), number(p["loss"]), "interior minimum"]
        else:
            row += ["–", "–", "–", p["reason"]]
        rows.append(row)
    head = ["budget (FLOPs)", "runs", "N of the runs", "N at minimum", "D there", "loss there", ""]
    return {"head": head, "rows": rows}


def row_tables(fit: Any, cells: Sequence[str] | None) -> dict[str, Any]:
    """Every excluded row with its reason and every flagged row with its flags.

    Args:
      cells: the cell of each input row, where the rows are cells of a study.
    """
    head = ["row", *(["cell"] if cells is not None else []), "N", "D", "loss"]
    excluded, flagged = [], []
    for row in fit.rows:
        line = [str(row["row"]), *([cells[row["row"]]] if cells is not None else [])]
        line += [number(row["params"], "count"), number(row["tokens"], "count"), number(row["loss"])]
        if row["outcome"] == "excluded":
            excluded.append([*line, row["reason"]])
        elif row["flags"]:
            flagged.append([*line, number(row["residual"], "g3"), "; ".join(row["flags"])])
    return {
        "excluded": {"head": [*head, "reason"], "rows": excluded},
        "flagged": {"head": [*head, "residual (log loss)", "flags"], "rows": flagged},
    }


def sensitivity_table(fit: Any) -> dict[str, Any]:
    """The fit under other choices."""
    names = list(fit.law.parameters)
    rows = []
    for case in fit.sensitivity:
        values = case["params"] or {}
        row = [case["what"], case["status"], number(case.get("a"), "g4")]
        rows.append([*row, *(number(values.get(name)) for name in names)])
    return {"head": ["change", "status", "a", *names], "rows": rows}


def flops_ratio(fit: Any) -> tuple[float, float] | None:
    """Smallest and largest C / (6 N D) of the fitted rows; both exactly 1 where C is 6 N D."""
    needed = ("params", "tokens", "flops")
    rows = [r for r in fit.rows if r["outcome"] == "used" and all(r[k] for k in needed)]
    if not rows:
        return None
    ratio = [r["flops"] / (6.0 * r["params"] * r["tokens"]) for r in rows]
    if max(abs(r - 1.0) for r in ratio) < 1e-6:  # a table's own rounding
        return 1.0, 1.0
    return min(ratio), max(ratio)


def fit_checklist(fit: Any) -> list[list]:
    """How the fit was made: question and answer."""
    m, d = fit.method, fit.diagnostics
    law = f"{fit.law.formula} ({fit.law.source}); parameters {', '.join(fit.law.parameters)}"
    if fit.fixed:
        law += "; held fixed: " + ", ".join(f"{name} = {value:g}" for name, value in fit.fixed.items())
    columns = ", ".join(f"{ours} = {theirs}" for ours, theirs in fit.data["columns"].items())
    units = ", ".join(f"{k} x {v:g}" for k, v in fit.data["units"].items() if v != 1.0) or "as they stand"
    starts = [number(d["starts_agreeing"], "int"), "of", number(d["starts"], "int")]
    intervals = "none: no resamples were asked for"
    if m["bootstraps"]:
        intervals = (
            f"{m['bootstraps']} resamples ({m['scheme']}) of clusters by {m['cluster']}, seed {m['seed']}"
        )
    objective = f"{describe_loss(m)} on {m['space']} loss, {m['reduction']} over rows:"
    used = [number(d["rows_used"], "int"), "of", number(d["rows"], "int")]
    return [
        ["What was fitted", law],
        ["On which rows", [*used, "rows; every other row stands above with its reason"]],
        ["Which table", fit.data.get("source") or "not recorded"],
        ["Its columns", f"{columns}; units {units}"],
        ["Its hash", fit.data["hash"]],
        ["Objective", [objective, number(fit.objective, "g10")]],
        ["Optimiser", m["optimiser"]],
        ["How initialised", [m["initialisation"], ";", *starts, "starts reach the reported optimum"]],
        ["Convergence", ["scaled gradient", number(d["scaled_gradient"], "g2")]],
        ["Condition number", [number(d["condition"], "g2")]],
        ["Degrees of freedom", [number(d["degrees_of_freedom"], "int")]],
        ["Intervals", intervals],
        ["How compute was counted", m["compute"]],
    ]
