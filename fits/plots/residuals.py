"""What the fit leaves unexplained, and how far the answer moves when a choice is made otherwise."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy import stats

from fits.plots.grid import rows_of
from fits.plots.style import BLUE, GREY, INK, ORANGE, label_log_axis, panels, short, styled


@styled
def plot_residuals(fit: Any, axes: list[Axes] | None = None) -> Figure:
    """Residuals against N, D and the fitted loss, and their normal quantile-quantile plot.

    Args:
      fit: its ``rows`` carry fitted and residual (in log loss or loss, as the fit's ``space`` says).
      axes: four axes to draw into; a new figure otherwise.
    """
    figure, axes = panels(axes, 4, (11.0, 7.0), columns=2)
    rows = rows_of(fit)
    residual = rows["residual"].to_numpy(float)
    flagged = np.array([bool(f) for f in rows["flags"]])
    unit = "log loss" if fit.method["space"] == "log" else "loss"
    names = (("params", "N (parameters)"), ("tokens", "D (training tokens)"), ("fitted", "fitted loss"))
    for ax, (column, label) in zip(axes[:3], names, strict=True):
        x = rows[column].to_numpy(float)
        ax.axhline(0, color=INK, lw=0.8)
        ax.plot(x[~flagged], residual[~flagged], "o", color=BLUE, ms=4, alpha=0.75, mew=0)
        ax.plot(
            x[flagged], residual[flagged], "o", mfc="none", mec=ORANGE, ms=6, mew=1.3, label="flagged row"
        )
        ax.set_xlabel(label)
        ax.set_ylabel(f"residual ({unit})")
        if column != "fitted":
            ax.set_xscale("log")
            label_log_axis(ax.xaxis, short)
    if flagged.any():
        axes[0].legend(loc="best")
    _quantiles(axes[3], residual, unit)
    return figure


def _quantiles(ax: Axes, residual: np.ndarray, unit: str) -> None:
    """Ordered residuals against normal quantiles (Blom's positions), with the line through the quartiles."""
    ordered = np.sort(residual)
    n = len(ordered)
    expected = stats.norm.ppf((np.arange(1, n + 1) - 0.375) / (n + 0.25))
    low, high = np.quantile(ordered, [0.25, 0.75])
    slope = (high - low) / (2 * stats.norm.ppf(0.75))
    ends = expected[[0, -1]]
    ax.plot(ends, 0.5 * (low + high) + slope * ends, color=GREY, lw=1.2)
    ax.plot(expected, ordered, "o", color=BLUE, ms=4, alpha=0.75, mew=0)
    ax.set_xlabel("normal quantile")
    ax.set_ylabel(f"residual ({unit})")


@styled
def plot_sensitivity(fit: Any, ax: Axes | None = None) -> Figure:
    """The exponent a under each change of method, beside the fit's own value and 80 % and 95 % intervals."""
    rows = [r for r in fit.sensitivity if r.get("a") is not None and np.isfinite(r["a"])]
    figure, (ax,) = panels(ax, 1, (9.2, 1.4 + 0.27 * max(len(rows), 3)))
    own = fit.intervals["a"]
    for level, alpha in (("95", 0.12), ("80", 0.22)):
        if own.get(level):
            ax.axvspan(*own[level], color=BLUE, alpha=alpha, lw=0, label=f"{level} % interval")
    ax.axvline(own["estimate"], color=BLUE, lw=1.6, label="this fit")
    for place, row in enumerate(rows):
        fine = row.get("status", "converged") == "converged"
        ax.plot(row["a"], place, "o", color=INK if fine else "white", mec=INK if fine else ORANGE, ms=5.5)
    ax.set_yticks(range(len(rows)), [r["what"] for r in rows])
    ax.set_ylim(len(rows) - 0.4, -0.6)
    ax.set_xlabel("a, the exponent of N* in C")
    ax.legend(loc="upper left", bbox_to_anchor=(1.01, 1.0))
    return figure
