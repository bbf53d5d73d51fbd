"""Further questions that the report asks of a fit: which law forecasts best, which runs next, which study.

Each ``ask_*`` returns an answer, or None and the sentence that says why there is none; the rest
turns answers into words and tables, as ``report_tables`` does for the fit itself.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from fits.compare import compare, comparison_flags
from fits.design import next_runs, spend_for
from fits.errors import FitError
from fits.laws import COLUMN_OF, PowerSum, get_law
from fits.report_tables import NO_ESTIMATE, number, sentence, span
from fits.select import select

RIVALS = {  # forms in the same variables whose fits cost no compilation
    frozenset("ND"): ("chinchilla", "tied", "product"),
    frozenset("NDU"): ("chinchilla", "tied"),
    frozenset("NSB"): ("power_N",),
    frozenset("N"): ("power_N",),
    frozenset("D"): ("power_D",),
    frozenset("C"): ("power_C",),
}
COSTLY_HOLDOUTS = 3  # of a law whose derivatives must first be compiled
NEXT_BATCH = 5
BEYOND = 10.0  # with no budget asked for, the next runs are chosen for this many times the largest
WITHIN = 0.10
CURVE_POINTS = 9  # budgets of the comparison's figure
CURVE_DRAWS = 200  # of each study, where frontiers are searched for: enough for a 95 % interval to be drawn


def ask_selection(
    fit: Any, table: pd.DataFrame | None = None, laws: Sequence[str] = ()
) -> tuple[dict | None, str]:
    """Rolling forecasts of the fit's own rows under its law and its rivals.

    Args:
      table: the study's rows that were given to the fit, in its order, for their planned budgets.
      laws: candidates beside the fit's own; default ``RIVALS``.

    Returns:
      ``Selection.to_dict()`` with ``own``, the candidate that is the fit's law; or None and the reason.

    Raises:
      FitError: ``laws`` names no law.
    """
    m = fit.method
    if m["loss"] in ("quantile", "expectile"):
        return None, f"Forecasts are judged at the typical run, and this fit is by {m['loss']}."
    variables = frozenset(fit.law.variables)
    own = (fit.law, {"fixed": dict(fit.fixed)}) if fit.fixed else fit.law
    rivals = [get_law(name) for name in dict.fromkeys(laws or RIVALS.get(variables, ()))]
    forms = [own, *(law for law in rivals if fit.fixed or law.name != fit.law.name)]
    used = [r["row"] for r in fit.rows if r["outcome"] == "used"]
    rows = pd.DataFrame([fit.rows[i] for i in used])
    rows = rows[[c for c in (*COLUMN_OF.values(), "loss") if c in rows]]
    if table is not None and "budget" in table:
        rows = rows.assign(budget=table["budget"].to_numpy()[used])
    by = COLUMN_OF[next(iter(variables))] if len(variables) == 1 else "flops"
    options = {"loss": m["loss"], "space": m["space"], "by": by}
    options |= {"delta": m["delta"]} if m["delta"] is not None else {}
    try:
        got = _select(rows, forms, options)
    except FitError as error:
        return None, sentence(str(error))
    notes = [] if m["weights"] is None and m["stderr"] is None else ["Every row counts alike here."]
    return {**got.to_dict(), "own": got.candidates[0].name, "notes": notes}, ""


def _select(rows: pd.DataFrame, forms: Sequence, options: Mapping):
    """All forecasts, or only a few where the fit's own law is costly and the table allows as many."""
    own = forms[0][0] if isinstance(forms[0], tuple) else forms[0]
    if not isinstance(own, PowerSum):
        try:
            return select(rows, forms, holdouts=COSTLY_HOLDOUTS, **options)
        except FitError as error:
            if not str(error).startswith("holdouts is"):
                raise
    return select(rows, forms, **options)


def ask_next(fit: Any, budget: float | None, flops: Callable | None) -> tuple[dict | None, str]:
    """The runs that most narrow N* at a budget per FLOP, and what it costs to know N* within 10 %.

    Returns:
      next and spend (``NextRuns.to_dict()`` each), target (N and D at the budget); or None and the reason.
    """
    if fit.status in NO_ESTIMATE:
        return None, f"The fit is {fit.status}."
    if set(fit.law.variables) != {"N", "D"}:
        return None, _not_in_n_and_d(fit, "runs are chosen by N and D alone")
    asked = {"budget_target": budget or BEYOND * fit.diagnostics["range"]["flops"][1], "flops": flops}
    try:
        runs = next_runs(fit, batch=NEXT_BATCH, **asked)
        spend = spend_for(fit, within=WITHIN, **asked)
    except FitError as error:
        return None, sentence(str(error))
    best = fit.optimum(asked["budget_target"], flops)
    target = {k: float(best[k][0]) for k in ("N", "D")}
    return {"next": runs.to_dict(), "spend": spend.to_dict(), "target": target}, ""


def ask_comparison(
    fit: Any,
    other: Any,
    budgets: Sequence[float] = (),
    *,
    names: tuple[str, str] = ("this study", "the other"),
    flops: Callable | None = None,
    other_flops: Callable | None = None,
) -> tuple[dict | None, str]:
    """The effective speed-up of the other study over this one, and where their frontiers cross.

    Args:
      budgets: asked for, FLOPs; the smaller of the two largest budgets is always among them.

    Returns:
      ``StudyComparison.to_dict()`` at the asked budgets; ``curve``, the same over all budgets of the figure;
      ``frontiers``, per study C, loss [C] and draws [draws, C]; ``ranges``; or None and the reason.
    """
    for one, name in zip((fit, other), names, strict=True):
        if set(one.law.variables) != {"N", "D"}:
            return None, f"Of {name}: " + _not_in_n_and_d(one, "a frontier needs N and D")
    both = (_thinned(fit, flops), _thinned(other, other_flops))
    ranges = [f.diagnostics["range"]["flops"] for f in both]
    asked = sorted({float(b) for b in budgets} | {min(r[1] for r in ranges)})
    low, high = min(r[0] for r in ranges), BEYOND * max(*(r[1] for r in ranges), asked[-1] / BEYOND)
    C = np.unique([*np.geomspace(low, high, CURVE_POINTS), *asked])
    try:
        got = compare(*both, C, flops_a=flops, flops_b=other_flops, names=names).to_dict()
    except FitError as error:
        return None, sentence(str(error))
    frontiers = []
    for one, cost in zip(both, (flops, other_flops), strict=True):
        draws = one.optimum_draws(C, cost)["loss"] if len(one.draws) else None
        frontiers.append({"C": C, "loss": one.optimum(C, cost)["loss"], "draws": draws})
    if not all(np.isfinite(f["loss"]).all() for f in frontiers):
        return None, "One of the two laws has no best N along a budget."
    curve, got["speedups"] = got["speedups"], [s for s in got["speedups"] if s["budget"] in asked]
    flags = comparison_flags(names, both, np.array(asked), [r[1] for r in ranges])  # not of the figure's last
    return {**got, "flags": flags, "curve": curve, "frontiers": frontiers, "ranges": ranges}, ""


def _not_in_n_and_d(fit: Any, why: str) -> str:
    return f"{fit.law.name} is a law in {', '.join(fit.law.variables)}, and {why}."


def _thinned(fit: Any, flops: Callable | None) -> Any:
    """The fit with fewer draws, evenly spaced, where each of them costs a search."""
    if (flops is None and fit.law.optimum(fit.params, 1.0) is not None) or len(fit.draws) <= CURVE_DRAWS:
        return fit
    kept = np.linspace(0, len(fit.draws) - 1, CURVE_DRAWS).round().astype(int)
    return dataclasses.replace(fit, draws=fit.draws[kept])


def selection_words(answer: Mapping) -> dict[str, Any]:
    """The recommendation, its doubts, the candidates and the forecasts."""
    own = next(c for c in answer["candidates"] if c["name"] == answer["own"])
    lines = [answer["text"], f"The law of this report, {own['name']}: {own['verdict']}."]
    rows = []
    for c in sorted(answer["candidates"], key=lambda c: (not c["ranked"], c["mean_error"] or 0.0)):
        gap = c["difference"] or {"estimate": None, "95": None}
        row = [c["name"], number(c["free"], "int"), number(c["mean_error"], "percent")]
        row += [number(c["max_error"], "percent"), number(gap["estimate"], "percent")]
        rows.append([*row, span(gap["95"], "percent"), c["verdict"]])
    head = ["form", "free parameters", "mean |error|", "largest", "above the best by", "95 % interval", ""]
    form = "sci" if answer["by"] == "flops" else "count"
    folds = [
        [number(f["train_rows"], "int"), number(f["trained_to"], form), number(f["held_out_rows"], "int"),
         number(f["largest_factor"], "g3")]
        for f in answer["folds"]
    ]  # fmt: skip
    symbol = {"flops": "C (FLOPs)", "params": "N", "tokens": "D"}[answer["by"]]
    fold_head = ["rows trained on", f"up to {symbol}", "rows held out", "largest factor"]
    return {
        "lines": lines,
        "notes": [sentence(f["text"]) for f in answer["flags"]] + answer["notes"],
        "candidates": {"head": head, "rows": rows},
        "folds": {"head": fold_head, "rows": folds},
        "clusters": f"{answer['clusters']} clusters by {answer['cluster']}",
    }


def selection_warnings(answer: Mapping | None) -> list[str]:
    """A law that forecasts worse than another belongs among the first doubts."""
    for c in answer["candidates"] if answer else ():
        if c["name"] == answer["own"] and c["verdict"].startswith("worse"):
            return [f"In forecasts of the largest runs, {c['name']} is {c['verdict']}. {answer['text']}"]
    return []


def next_words(answer: Mapping) -> dict[str, Any]:
    """The proposed runs, and what it takes to know N* within ten per cent."""
    runs, spend = answer["next"], answer["spend"]
    rows = []
    for place, run in enumerate(runs["runs"], 1):
        row = [str(place), number(run["params"], "count"), number(run["tokens"], "count")]
        row += [number(run["tokens"] / run["params"], "g3"), number(run["flops"], "sci")]
        rows.append([*row, _known(run["half_width"])])
    head = ["run", "N", "D", "D/N", "C (FLOPs)", "N* then known within"]
    now = ["N* at", number(runs["budget_target"], "sci"), "FLOPs is known within", _known(runs["half_width"])]
    now += ["now (half of the 95 % interval). These runs narrow it most per FLOP; one that comes up again"]
    now += ["is trained under another seed:"]
    more = ["To know it within", number(WITHIN, "percent")]
    if not spend["runs"]:
        more += ["nothing more is needed."]
    elif spend["reached"]:
        more += [f"takes about {len(spend['runs'])} runs and", number(spend["flops"], "sci"), "FLOPs in all."]
    else:
        more += [f"is out of reach of {len(spend['runs'])} runs of the table's kind; after these, within"]
        more += [_known(spend["runs"][-1]["half_width"]), "is expected, for"]
        more += [number(spend["flops"], "sci"), "FLOPs."]
    return {
        "lines": [now],
        "after": [more],
        "notes": [sentence(f["text"]) for f in runs["flags"]],
        "runs": {"head": head, "rows": rows},
    }


def _known(half_width: float):
    return number(math.expm1(half_width), "percent")


def comparison_words(answer: Mapping) -> dict[str, Any]:
    """Speed-ups at the asked budgets, and the crossover."""
    rows = []
    for s in answer["speedups"]:
        row = [number(s["budget"], "sci"), _value(s["loss_a"]), _value(s["loss_b"])]
        row += [_value(s["speedup"]["estimate"], "g4"), *(_ends(s["speedup"][k]) for k in ("80", "95"))]
        rows.append([*row, number(s["factor_a"], "g3"), number(s["factor_b"], "g3")])
    a, b = answer["name_a"], answer["name_b"]
    head = [
        "budget (FLOPs)",
        f"loss, {a}",
        f"loss, {b}",
        f"speed-up of {b}",
        "80 % interval",
        "95 % interval",
    ]
    head += [f"budget over the largest of {a}", f"of {b}"]
    return {
        "names": (a, b),
        "lines": [answer["crossover"]["text"], answer["method"]],
        "notes": [sentence(f["text"]) for f in answer["flags"]],
        "speedups": {"head": head, "rows": rows},
    }


def _value(value: Any, form: str = "g5"):
    return value if isinstance(value, str) else number(value, form)


def _ends(ends: Sequence | None) -> list:
    return ["–"] if not ends else [_value(ends[0], "g3"), "to", _value(ends[1], "g3")]
