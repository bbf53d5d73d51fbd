"""Doubts, in plain words: flags on rows and on fits. A flag never excludes a row; a declared rule does."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from fits.laws import Law
from fits.solve import PointFit
from fits.table import Table, group_close

if TYPE_CHECKING:
    from fits.fit import Fit

STARVED = 1.0  # tokens a parameter: below one the surface bends away from a sum of power laws
OUTLIER = 5.0  # robust standard deviations of the residuals
FEW_FREEDOM = 5
FEW_CLUSTERS = 10  # a resample of fewer often holds too few different sizes to fit
WIDE_EXPONENT = 0.5  # standard deviation of an exponent over its estimate
FAILED_SHARE = 0.01
BUDGET_TOLERANCE = 0.10  # FLOPs of one planned budget differ by rounding of steps and shapes


def flag(code: str, text: str) -> dict[str, str]:
    return {"code": code, "text": text}


def structure(law: Law, table: Table) -> list[str]:
    """Why these rows cannot determine the law, whatever their losses; empty where they may."""
    x = table.log_x()
    reasons = []
    words = {
        "N": "all runs have the same N",
        "D": "all runs have the same D",
        "C": "all runs are at one budget",
    }
    needed = list(law.variables) + (["C"] if {"N", "D"} <= set(law.variables) else [])
    for variable in needed:
        column = {"N": table.params, "D": table.tokens, "C": table.flops}[variable]
        tolerance = BUDGET_TOLERANCE if variable == "C" else 0.01
        if np.ptp(x[variable]) <= np.log1p(tolerance):
            reasons.append(f"{words[variable]} (from {column.min():.4g} to {column.max():.4g})")
    points = len({tuple(float(x[v][i]) for v in law.variables) for i in range(len(table))})
    if points <= len(law.parameters):
        reasons.append(
            f"{points} different points for {len(law.parameters)} parameters leave nothing to check the fit by"
        )
    return reasons


def row_flags(table: Table, residual_R: np.ndarray) -> list[list[str]]:
    """Flags of each used row: starved, outlier, upturn (a longer run at that size with a higher loss)."""
    flags: list[list[str]] = [[] for _ in range(len(table))]
    spread = 1.4826 * float(np.median(np.abs(residual_R - np.median(residual_R))))
    for i in np.flatnonzero(table.tokens < STARVED * table.params):
        flags[i].append(f"starved: {table.tokens[i] / table.params[i]:.2g} tokens a parameter")
    if spread > 0:
        for i in np.flatnonzero(np.abs(residual_R - np.median(residual_R)) > OUTLIER * spread):
            flags[i].append(
                f"outlier: residual {residual_R[i]:+.3g}, {abs(residual_R[i]) / spread:.1f} robust deviations"
            )
    if np.isfinite(table.params).all() and np.isfinite(table.tokens).all():
        groups = group_close(table.params)
        for g in np.unique(groups):
            rows = np.flatnonzero(groups == g)
            rows = rows[np.argsort(table.tokens[rows], kind="stable")]
            lowest = np.minimum.accumulate(table.loss[rows])
            for k in range(1, len(rows)):
                longer = table.tokens[rows[k]] > table.tokens[rows[k - 1]]
                if longer and table.loss[rows[k]] > lowest[k - 1]:
                    flags[rows[k]].append("upturn: more tokens at this size, yet a higher loss")
    if "interpolated" in table.extra:
        for i, value in enumerate(table.extra["interpolated"]):
            if str(value).lower() in ("1", "1.0", "true"):
                flags[i].append("interpolated: not a measured run")
    return flags


def fit_flags(
    law: Law, table: Table, point: PointFit, cluster: str, dependence: dict, draws: dict[str, Any], flags_R
) -> list[dict[str, str]]:
    """Flags of the fit, the gravest first."""
    out = []
    names = ", ".join(point.at_bound)
    if point.at_bound:
        floor = (
            f"; with {law.offset} at zero the law has no floor in these rows"
            if law.offset in point.at_bound
            else ""
        )
        out.append(
            flag("boundary", f"{names} ended at a bound{floor}: take exponents and extrapolations as a guess")
        )
    free = len(table) - len(law.parameters)
    if free < FEW_FREEDOM:
        out.append(
            flag(
                "few_rows",
                f"{len(table)} rows for {len(law.parameters)} parameters leave {free} degrees of freedom",
            )
        )
    if len(draws["converged"]):
        failed = 1.0 - float(np.mean(draws["converged"]))
        if failed > FAILED_SHARE:
            out.append(
                flag(
                    "failed_resamples",
                    f"{100 * failed:.2g} % of the resamples had no fit; the intervals leave them out",
                )
            )
        for name in law.parameters:
            if name.startswith(("alpha", "beta", "gamma")) and draws["sd"].get(name):
                if draws["sd"][name] > WIDE_EXPONENT * abs(point.params[name]):
                    out.append(flag("uncertain", f"{name} is {point.params[name]:.3g} with a standard deviation of "
                                    f"{draws['sd'][name]:.2g}; more or wider-spread runs are needed"))  # fmt: skip
    else:
        out.append(flag("no_intervals", "no bootstrap was run, so nothing has an interval"))
    repeated = len(table) - dependence["clusters"]
    if cluster == "row":
        sizes = len(np.unique(group_close(table.params))) if np.isfinite(table.params).all() else len(table)
        if sizes < len(table):
            out.append(flag("correlated_rows", f"{len(table)} rows have only {sizes} different sizes, but rows are resampled "
                            "one by one; runs of one size err together, so intervals may be too narrow"))  # fmt: skip
    elif repeated:
        out.append(flag("clustered", f"{len(table)} rows form {dependence['clusters']} clusters by {cluster} (residual correlation "
                        f"{dependence['icc']:.2f}); whole clusters are resampled, worth about "
                        f"{dependence['effective_rows']:.0f} independent rows"))  # fmt: skip
        if dependence["clusters"] < FEW_CLUSTERS:
            out.append(
                flag(
                    "few_clusters", f"only {dependence['clusters']} clusters: intervals from so few are rough"
                )
            )
    for word, text in (
        ("starved", f"rows have fewer than {STARVED:g} token a parameter and may bend the fit"),
        ("outlier", f"rows lie more than {OUTLIER:g} robust deviations off the surface"),
        ("upturn", "rows have a higher loss than a shorter run of their size"),
        ("interpolated", "rows are interpolated, not measured"),
    ):
        count = sum(any(f.startswith(word) for f in row) for row in flags_R)
        if count:
            out.append(flag(word, f"{count} of {len(table)} {text}"))
    return out


def sensitivity_flags(fit: Fit) -> list[dict[str, str]]:
    """Flags where one choice (delta, a budget, a size) moves the exponent a by more than its own deviation."""
    got = fit.intervals.get("a")
    if not got or not got["sd"]:
        return []
    out = []
    for row in fit.sensitivity:
        if row.get("a") is not None and abs(row["a"] - got["estimate"]) > 2 * got["sd"]:
            out.append(flag("sensitive", f"{row['what']} moves a from {got['estimate']:.3f} to {row['a']:.3f}, "
                            f"more than two of its standard deviations ({got['sd']:.3f})"))  # fmt: skip
    return out
