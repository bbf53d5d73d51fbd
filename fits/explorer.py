"""What the report's explorer needs: a law, its draws and its compute count, as compact JSON.

The page itself searches for the optimum (templates/explorer.js), with no network.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from fits.allocate import optimum
from fits.constraints import AtUnique
from fits.laws import PowerSum
from fits.laws.basic import Kaplan
from fits.laws.overtraining import Overtraining
from fits.laws.repetition import DataConstrained, DataConstrainedTied

DRAWS = 400  # enough that the ends of a 95 % interval wander by about a tenth of its width
ABOVE = 1000.0  # the slider ends at this many times the largest budget
DIGITS = 6
GRID_N, GRID_D = 97, 9  # a FLOP function bends with N; per token it hardly depends on D
LIMIT_FIELDS = ("max_params", "max_tokens", "inference_tokens", "unique_tokens", "max_epochs")
MARGIN = 30.0  # the table of FLOPs reaches this far beyond the optima of all budgets, both ways


def explorer_data(
    fit: Any, flops: Callable | None = None, answer: Mapping | None = None
) -> tuple[dict[str, Any] | None, str]:
    """The explorer's data, or None and why there is none.

    Args:
      fit: a ``Fit``.
      flops: training FLOPs of (N, D), embedded as a table of its ratio to 6 N D; default 6 N D.
      answer: an ``Allocation`` as a mapping, whose budget and limits the explorer starts from.

    Returns:
      law (terms to evaluate), names, point, draws (at most ``DRAWS``, evenly spaced in the fit's own
      order), draws_total, range (smallest and largest of flops, params and tokens), budget (low, top, start),
      flops (log N and log D axes, log of the ratio, error: the largest relative error of interpolation
      between its points), limits, capped (the law alone has no best N, so caps are there from the start);
      and "". A law in unique tokens has their range too, and that of the epochs.
    """
    if fit.status in ("not identified", "unconverged"):
        return None, f"The explorer is left out, because the fit is {fit.status}."
    law = _law(fit.law)
    if law is None:
        return None, f"The explorer is left out: {_why_not(fit.law)}; this law is {fit.law.formula}."
    ranges = {k: fit.diagnostics["range"][k] for k in ("flops", "params", "tokens")}
    low, high = ranges["flops"]
    start = answer["budget"] if answer else high
    low, top = min(low, start), max(ABOVE * high, start)
    limits = dict((answer or {}).get("limits") or {})
    if law["kind"] == "repetition":
        ranges |= _repetition_ranges(fit)
        limits.setdefault("unique_tokens", ranges["unique"][1])
    ends = _ends(fit, [low, top], flops, [*ranges.get("unique", ()), limits.get("unique_tokens")])
    capped = ends is None
    if capped:  # such as a product of powers: within a cap on each there is a best N and D
        ends = {"N": np.array(ranges["params"]), "D": np.array(ranges["tokens"])}
        limits = {"max_params": ranges["params"][1], "max_tokens": ranges["tokens"][1], **limits}
    draws = fit.draws[np.isfinite(fit.draws).all(1)] if len(fit.draws) else fit.draws
    kept = np.unique(np.linspace(0, len(draws) - 1, min(DRAWS, len(draws))).round().astype(int))
    table = None if flops is None else _flops_table(flops, ends)
    if flops is not None and table is None:
        return None, "The explorer is left out: the FLOP function gives no finite count at some sizes."
    return {
        "law": law,
        "names": list(fit.law.parameters),
        "point": [_rounded(fit.params[k]) for k in fit.law.parameters],
        "draws": [[_rounded(v) for v in draws[i]] for i in kept],
        "draws_total": len(draws),
        "range": {k: [_rounded(v) for v in ends] for k, ends in ranges.items()},
        "budget": {"low": _rounded(low), "top": _rounded(top), "start": _rounded(start)},
        "flops": table,
        "limits": limits,
        "capped": capped,
    }, ""


def embedded(data: Mapping[str, Any]) -> str:
    """JSON for a script element: no character in it can end the element."""
    text = json.dumps(data, separators=(",", ":"), allow_nan=False, sort_keys=True)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def fields(data: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """The text fields of the page: id, label, first value."""
    limits = data["limits"]
    first = {k: _typed(limits[k]) if k in limits else "" for k in LIMIT_FIELDS}
    repetition = [
        ("unique", "Unique tokens", first["unique_tokens"]),
        ("max-epochs", "Most epochs over them", first["max_epochs"]),
    ]
    return [
        ("budget", "Budget (FLOPs)", _typed(data["budget"]["start"])),
        ("max-params", "Cap on N (parameters)", first["max_params"]),
        ("max-tokens", "Cap on D (tokens)", first["max_tokens"]),
        *(repetition if data["law"]["kind"] == "repetition" else []),
        ("inference", "Tokens served over its life", first["inference_tokens"]),
        ("ratio", "Compare with tokens per parameter", "20"),
    ]


def inside(data: Mapping[str, Any]) -> float:
    """Per cent of the slider, which is logarithmic, up to the largest budget of the table."""
    low, top = math.log(data["budget"]["low"]), math.log(data["budget"]["top"])
    return 100.0 * (math.log(data["range"]["flops"][1]) - low) / (top - low)


def _law(law: Any) -> dict | None:
    """The law's terms for the page; None for a law that the page cannot evaluate."""
    if type(law) in (DataConstrained, DataConstrainedTied):
        beta = "beta" if "beta" in law.parameters else "alpha"
        return {"kind": "repetition", "alpha": "alpha", "beta": beta}
    if set(law.variables) != {"N", "D"}:
        return None
    if type(law) in (Kaplan, Overtraining):
        return {"kind": law.name}
    if isinstance(law, PowerSum) and type(law).predict is PowerSum.predict:
        return {"kind": "sum", "terms": [{"c": t.coefficient, **t.powers} for t in law.terms]}
    return None


def _why_not(law: Any) -> str:
    """Why the page cannot answer for a law."""
    if law.variables == ("C",):
        return "a law in compute alone says what a budget reaches, not which N and D reach it"
    if len(law.variables) == 1:
        return f"a law in {law.variables[0]} alone does not trade N against D"
    if set(law.variables) - {"N", "D", "U"}:
        return f"a law in {', '.join(law.variables)} is not settled by N and D"
    return "it knows sums of powers of N and D, and the laws of Kaplan, Gadre and Muennighoff et al."


def _repetition_ranges(fit: Any) -> dict[str, list[float]]:
    """Smallest and largest unique tokens and epochs of the fitted rows."""
    pairs = [(r["unique_tokens"], r["tokens"]) for r in fit.rows if r["outcome"] == "used"]
    unique, tokens = np.array(pairs, float).T
    return {k: [float(v.min()), float(v.max())] for k, v in (("unique", unique), ("epochs", tokens / unique))}


def _ends(fit: Any, budgets, flops: Callable | None, uniques) -> dict[str, np.ndarray] | None:
    """N and D of the optima at both ends of the slider; None where there is none.

    Args:
      uniques: for a law in unique tokens, the numbers of them to cover; also without end.
    """
    laws = [fit.law]
    if "U" in fit.law.variables:
        laws = [AtUnique(fit.law, u) for u in (*uniques, math.inf)]
    found = [optimum(law, fit.params, c, flops) for law in laws for c in budgets]
    ends = {k: np.array([float(np.squeeze(f[k])) for f in found]) for k in ("N", "D", "loss")}
    return ends if all(np.isfinite(v).all() for v in ends.values()) else None


def _flops_table(flops: Callable, ends: Mapping[str, np.ndarray]) -> dict | None:
    """Log of flops / (6 N D) over log N and log D; None where it is not finite."""
    spread = math.log(MARGIN)
    axes = [
        np.linspace(math.log(max(ends[k].min(), 1.0)) - spread, math.log(ends[k].max()) + spread, points)
        for k, points in (("N", GRID_N), ("D", GRID_D))
    ]

    def ratio(log_n, log_d):
        N, D = np.exp(log_n[:, None]), np.exp(log_d[None, :])
        N, D = np.broadcast_arrays(N, D)
        with np.errstate(all="ignore"):
            return np.log(np.asarray(flops(N, D), float) / (6.0 * N * D))

    value = ratio(*axes)
    between = [0.5 * (axis[1:] + axis[:-1]) for axis in axes]
    cell = 0.5 * (value[:, 1:] + value[:, :-1])
    first, last = 2 * cell[:1] - cell[1:2], 2 * cell[-1:] - cell[-2:-1]
    cell = np.concatenate([first, cell, last])
    cell = (9 * (cell[1:-2] + cell[2:-1]) - cell[:-3] - cell[3:]) / 16  # as the page's cubic, half way
    error = np.abs(np.expm1(cell - ratio(*between)))
    if not (np.isfinite(value).all() and np.isfinite(error).all()):
        return None
    return {
        "logN": [_rounded(v, 9) for v in axes[0]],
        "logD": [_rounded(v, 9) for v in axes[1]],
        "value": [[_rounded(v) for v in row] for row in value],
        "error": _rounded(error.max(), 2),
    }


def _typed(value: float) -> str:
    return f"{value:.6g}".replace("e+", "e")


def _rounded(value: float, digits: int = DIGITS) -> float:
    return float(f"{float(value):.{digits}g}")
