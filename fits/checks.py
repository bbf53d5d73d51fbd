"""Doubts, in plain words: flags on rows and on fits. A flag never excludes a row; a declared rule does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from fits.laws import COLUMN_OF, Law
from fits.reading import numbers
from fits.solve import PointFit
from fits.table import BUDGET_WIDTH, Table, group_close

if TYPE_CHECKING:
    from fits.fit import Fit

STARVED = 1.0  # tokens a parameter: below one the surface bends away from a sum of power laws
OUTLIER = 5.0  # robust standard deviations of the residuals
FEW_FREEDOM = 5
FEW_CLUSTERS = 10  # a resample of fewer often holds too few different sizes to fit
DELTA_FACTOR = 5.0  # Huber's width over the median residual, either way
WIDE_EXPONENT = 0.5  # standard deviation of an exponent over its estimate
FAILED_SHARE = 0.01
BOUND_SHARE = 0.05
WARMUP_SHARE = 0.5  # of a run's tokens: a rate that is still rising has taught little
CONDITION = 1e7  # of the column-scaled J'J; 1e11 is where float64 cannot tell parameters apart
ROUNDING = 1e-9  # log residuals below this are rounding, not noise


def flag(code: str, text: str) -> dict[str, str]:
    """A flag: a word for programs and a sentence for people."""
    return {"code": code, "text": text}


def structure(law: Law, table: Table, fixed: Mapping[str, float]) -> list[str]:
    """Why these rows cannot determine the law, whatever their losses; empty where they may.

    With parameters pinned only the count of points is tested; the solver's rank test does the rest.
    """
    x = table.log_x()
    reasons = []
    words = {
        "N": "all runs have the same N",
        "D": "all runs have the same D",
        "C": "all runs are at one budget",
        "U": "all runs have the same number of unique tokens",
        "S": "all runs have the same number of steps",
        "B": "all runs have the same batch",
    }
    # unique tokens may be one pool that the runs repeat more or less often
    needed = [v for v in law.variables if v != "U"] + (["C"] if {"N", "D"} <= set(law.variables) else [])
    needed = [] if fixed else needed
    for variable in needed:
        column = np.exp(x[variable])
        width = BUDGET_WIDTH if variable == "C" else 0.01
        if np.ptp(x[variable]) <= np.log1p(width):
            same = words.get(variable, f"all runs have the same {COLUMN_OF[variable]}")
            reasons.append(f"{same} (from {column.min():.4g} to {column.max():.4g})")
    if not reasons and needed and {"N", "D"} <= set(law.variables):
        reasons += _on_a_line(x["N"], x["D"])
    points = len({tuple(float(x[v][i]) for v in law.variables) for i in range(len(table))})
    free = len(law.parameters) - len(fixed)
    if points <= free:
        reasons.append(f"{points} different points for {free} parameters leave nothing to check the fit by")
    return reasons


def _on_a_line(log_n, log_d) -> list[str]:
    """Why N and D cannot be told apart: D is a power of N in these rows, within ``BUDGET_WIDTH``."""
    slope, start = np.polyfit(log_n, log_d, 1)
    if np.abs(slope * log_n + start - log_d).max() > np.log1p(BUDGET_WIDTH):
        return []
    return [f"D grows as N^{slope:.2f} in all runs, so the effects of N and of D cannot be told apart"]


def row_flags(table: Table, residual_R: np.ndarray) -> list[list[str]]:
    """Flags of each used row: starved, warm-up, outlier, diverged, upturn (a longer run, a higher loss)."""
    flags: list[list[str]] = [[] for _ in range(len(table))]
    for i in np.flatnonzero(table.tokens < STARVED * table.params):
        flags[i].append(f"starved: {table.tokens[i] / table.params[i]:.2g} tokens a parameter")
    for i, share in enumerate(_warmup_share(table)):
        if share >= WARMUP_SHARE:
            flags[i].append(f"warm-up: {100 * share:.3g} % of its tokens, so it hardly trained at its rate")
    off = residual_R - np.median(residual_R)
    spread = max(1.4826 * float(np.median(np.abs(off))), ROUNDING)
    for i in np.flatnonzero(np.abs(off) > OUTLIER * spread):
        flags[i].append(
            f"outlier: residual {residual_R[i]:+.3g}, {abs(off[i]) / spread:.1f} robust deviations"
        )
    for i, why in _diverged(table, off, spread):
        flags[i].append(f"diverged: {why}")
    for i in _upturns(table):
        flags[i].append("upturn: more tokens at this size, yet a higher loss")
    for i, value in enumerate(table.extra.get("interpolated", [])):
        if str(value).lower() in ("1", "1.0", "true"):
            flags[i].append("interpolated: not a measured run")
    return flags


def _warmup_share(table: Table) -> np.ndarray:
    """Warm-up over the whole run, by tokens or by steps where the table has them; NaN where it has not."""
    n, empty = len(table), np.full(len(table), np.nan)
    columns = {
        k: numbers(table.extra[k]) for k in ("warmup_tokens", "warmup_steps", "steps") if k in table.extra
    }
    with np.errstate(all="ignore"):
        by_tokens = columns.get("warmup_tokens", empty) / table.tokens
        by_steps = columns.get("warmup_steps", empty) / columns.get("steps", empty)
    share = np.where(np.isfinite(by_tokens), by_tokens, by_steps)
    return np.where(np.isfinite(share), share, np.nan).reshape(n)


def _diverged(table: Table, off_R: np.ndarray, spread: float) -> list[tuple[int, str]]:
    """Rows said to have diverged, or far above the surface and worse than a run of less N and less D."""
    out = []
    said = table.extra.get("diverged", [None] * len(table))
    vocabulary = (
        numbers(table.extra["vocab_size"]) if "vocab_size" in table.extra else np.full(len(table), np.nan)
    )
    for i in range(len(table)):
        if str(said[i]).lower() in ("1", "1.0", "true"):
            out.append((i, "the table says so"))
        elif vocabulary[i] > 1 and table.loss[i] >= np.log(vocabulary[i]):
            out.append(
                (i, f"loss {table.loss[i]:.4g} is no better than guessing one of {vocabulary[i]:g} tokens")
            )
        elif -off_R[i] > OUTLIER * spread:  # observed above fitted
            below = (table.params <= table.params[i]) & (table.tokens <= table.tokens[i])
            if (below & (table.loss < table.loss[i])).any():
                text = f"loss {table.loss[i]:.4g}, above that of a run with no more parameters and tokens"
                out.append((i, text))
    return out


def _upturns(table: Table) -> list[int]:
    """Rows whose loss is above that of a run of the same size on fewer tokens."""
    if not (np.isfinite(table.params).all() and np.isfinite(table.tokens).all()):
        return []
    groups, out = group_close(table.params), []
    for i in range(len(table)):
        shorter = (groups == groups[i]) & (table.tokens < table.tokens[i])
        if shorter.any() and table.loss[i] > table.loss[shorter].min():
            out.append(i)
    return out


def fit_flags(
    law: Law,
    table: Table,
    point: PointFit,
    cluster: str,
    dependence: Mapping,
    converged_B: np.ndarray,
    bound_share: float,
    deviations: Mapping[str, float | None],
    delta: float | None,
    residual_R: np.ndarray,
    flags_R: Sequence[Sequence[str]],
    fixed: Mapping[str, float] | None = None,
) -> list[dict[str, str]]:
    """Flags of the fit, the gravest first.

    Args:
      dependence: from ``uncertainty.intraclass``. converged_B: per resample; empty without a bootstrap.
      bound_share: share of resamples that ended at a bound. deviations: standard deviation by quantity.
      delta: Huber's width, None for other losses. flags_R: from ``row_flags``. fixed: the
        parameters that are pinned.
    """
    out = []
    if point.status in ("not identified", "unconverged"):
        out.append(
            flag(point.status.replace(" ", "_"), f"the law is {point.status}: {'; '.join(point.reasons)}")
        )
    if point.at_bound:
        text = f"{', '.join(point.at_bound)} ended at a bound"
        if law.offset in point.at_bound:
            text += f"; with {law.offset} at its lowest the rows show no floor"
        out.append(flag("boundary", text + ": take exponents and extrapolations as a guess"))
    free = len(law.parameters) - len(fixed or {})
    left = len(table) - free
    if left < FEW_FREEDOM:
        kind = "free parameters" if fixed else "parameters"
        out.append(flag("few_rows", f"{len(table)} rows for {free} {kind}: {left} degrees of freedom"))
    shared = _cluster_flags(table, cluster, dependence)
    # intervals that cannot be believed come before what merely makes them rough
    out = _family_flags(table) + [f for f in shared if f["code"] == "correlated_rows"] + out
    if point.condition > CONDITION and point.status in ("converged", "boundary"):
        text = f"the rows hardly tell the parameters apart (condition number {point.condition:.1e})"
        out.append(
            flag("ill_conditioned", text + ": believe predictions inside the data, not single parameters")
        )
    out += _width_flags(delta, residual_R)
    out += _bootstrap_flags(law, point, converged_B, bound_share, deviations)
    out += [f for f in shared if f["code"] != "correlated_rows"]
    for word, text in (
        ("starved", f"rows have fewer than {STARVED:g} token a parameter and may bend the fit"),
        ("warm-up", f"rows spent {100 * WARMUP_SHARE:g} % or more of their tokens warming up"),
        ("diverged", "rows look diverged, and pull the surface up; exclude them by a declared rule"),
        ("outlier", f"rows lie more than {OUTLIER:g} robust deviations off the surface"),
        ("upturn", "rows have a higher loss than a run of their size on fewer tokens"),
        ("interpolated", "rows are interpolated, not measured"),
    ):
        count = sum(any(f.startswith(word) for f in row) for row in flags_R)
        if count:
            out.append(flag(word, f"{count} of {len(table)} {text}"))
    return out


def _family_flags(table: Table) -> list[dict]:
    """Says it where the runs are of several families (column ``family``), which one law need not join."""
    names = sorted({name for name in table.extra.get("family", ()) if isinstance(name, str)})
    if len(names) < 2:
        return []
    some = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
    text = f"the rows are of {len(names)} families ({some}) and one law is fitted to all of them: "
    return [
        flag(
            "families", text + "leave out all but one (exclude), or ask for each one's exponents (by family)"
        )
    ]


def _width_flags(delta: float | None, residual_R) -> list[dict]:
    """What a Huber loss amounts to when its width is far from the residuals."""
    typical = float(np.median(np.abs(residual_R)))
    if delta is None or typical < ROUNDING:
        return []
    text = f"Huber's delta {delta:g} is {{}} the typical residual of {typical:.2g}: in effect {{}}"
    if delta < typical / DELTA_FACTOR:
        return [flag("delta_small", text.format("far below", "least absolute deviations"))]
    if delta > typical * DELTA_FACTOR:
        return [flag("delta_large", text.format("far above", "least squares"))]
    return []


def _bootstrap_flags(law: Law, point: PointFit, converged_B, bound_share: float, deviations) -> list[dict]:
    if not len(converged_B):
        return [flag("no_intervals", "no bootstrap was run, so nothing has an interval")]
    out = []
    failed = 1.0 - float(np.mean(converged_B))
    if failed > FAILED_SHARE:
        text = f"{100 * failed:.2g} % of the resamples had no fit; the intervals leave them out"
        out.append(flag("failed_resamples", text))
    if bound_share > BOUND_SHARE and not point.at_bound:
        text = (
            f"{100 * bound_share:.2g} % of the resamples end at a bound of a parameter; intervals are rough"
        )
        out.append(flag("resamples_at_bound", text))
    for name in law.parameters:
        wide = deviations.get(name) or 0.0
        if name.startswith(("alpha", "beta", "gamma")) and wide > WIDE_EXPONENT * abs(point.params[name]):
            text = f"{name} is {point.params[name]:.3g} with a standard deviation of {wide:.2g}"
            out.append(flag("uncertain", text + "; more or wider-spread runs are needed"))
    return out


def _cluster_flags(table: Table, cluster: str, dependence: Mapping) -> list[dict]:
    groups, n = int(dependence["clusters"]), len(table)
    if cluster == "row":
        sizes = len(np.unique(group_close(table.params))) if np.isfinite(table.params).all() else n
        text = f"{n} rows have only {sizes} sizes, but are resampled one by one"
        text += "; runs of one size err together, so the intervals may be far too narrow: cluster by size"
        text += f" (residual correlation {dependence['icc']:.2f}, worth about "
        text += f"{dependence['effective_rows']:.0f} independent rows)"
        return [flag("correlated_rows", text)] if sizes < n else []
    out = []
    if groups < n:
        text = (
            f"{n} rows form {groups} clusters by {cluster} (residual correlation {dependence['icc']:.2f}); "
        )
        text += (
            f"whole clusters are resampled, worth about {dependence['effective_rows']:.0f} independent rows"
        )
        out.append(flag("clustered", text))
    if groups < FEW_CLUSTERS:
        out.insert(0, flag("few_clusters", f"only {groups} clusters: intervals from so few are rough"))
    return out


def sensitivity_flags(fit: Fit) -> list[dict[str, str]]:
    """Flags where one choice (delta, a budget, a size) moves the exponent a by two standard deviations.

    Not for windows: fewer rows over less compute move a by more than that by chance alone.
    """
    got = fit.intervals.get("a")
    if not got or not got["sd"]:
        return []
    out = []
    for row in fit.sensitivity:
        if row["what"].startswith("only"):
            continue
        if row["a"] is not None and abs(row["a"] - got["estimate"]) > 2 * got["sd"]:
            text = f"{row['what']}: a moves from {got['estimate']:.3f} to {row['a']:.3f}, "
            out.append(flag("sensitive", text + f"over two of its standard deviations ({got['sd']:.3f})"))
    return out
