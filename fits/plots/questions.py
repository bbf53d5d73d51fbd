"""Pictures of further questions: how laws forecast, which runs come next, and one study against another."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fits.plots.grid import rows_of
from fits.plots.style import (
    BLUE,
    GREEN,
    GREY,
    INK,
    ORANGE,
    PURPLE,
    label_log_axis,
    panels,
    scientific,
    short,
    styled,
)  # fmt: skip

FORMS = (
    (BLUE, "o"), (ORANGE, "s"), (GREEN, "^"), (PURPLE, "D"), ("#8c510a", "v"), (INK, "P"), (GREY, "X"),
)  # fmt: skip
ROWS_PER_BIN = 8  # held-out rows that a mean is taken over, where there are as many
MOST_BINS = 6
MANY_DOTS = 300  # more than these are drawn as one picture inside the figure
BANDS = (("95", 0.025, 0.975, 0.15), ("80", 0.10, 0.90, 0.25))


@styled
def plot_forecasts(selection: Mapping[str, Any], axes: Sequence[Axes] | None = None) -> Figure:
    """Forecast errors of each candidate against the extrapolation factor: every row, and means over bins.

    Args:
      selection: ``Selection.to_dict()``; candidates that could not be ranked are left out.
      axes: two axes to draw into; a new figure otherwise.
    """
    figure, (left, right) = panels(axes, 2, (11.6, 4.8))
    ranked = [c["name"] for c in selection["candidates"] if c["ranked"]]
    edges = _bin_edges([e["factor"] for e in selection["errors"] if e["candidate"] == ranked[0]])
    left.axhline(0, color=INK, lw=0.8)
    for at, name in enumerate(ranked):
        colour, marker = FORMS[at % len(FORMS)]
        mine = [e for e in selection["errors"] if e["candidate"] == name]
        factor, error = (np.array([e[k] for e in mine]) for k in ("factor", "error"))
        percent = 100 * np.expm1(error)
        left.plot(factor, percent, marker, color=colour, ms=3.5, alpha=0.5, mew=0, label=name,
                  rasterized=len(mine) > MANY_DOTS / len(ranked))  # fmt: skip
        place = np.clip(np.searchsorted(edges, factor, side="right") - 1, 0, len(edges) - 2)
        bins = np.unique(place)
        middle = [np.exp(np.log(factor[place == b]).mean()) for b in bins]
        size = [100 * np.abs(error[place == b]).mean() for b in bins]
        right.plot(middle, size, "-" + marker, color=colour, ms=5, mec="white", mew=0.5, label=name)
    if selection["noise"]:
        right.axhline(100 * selection["noise"], color=GREY, lw=1, ls=(0, (4, 3)))
        right.annotate("typical residual inside the table", (1, 100 * selection["noise"]), (-2, 3),
                       xycoords=("axes fraction", "data"), textcoords="offset points", ha="right",
                       fontsize=8.5, color=GREY)  # fmt: skip
    words = {"flops": "compute", "params": "N", "tokens": "D"}[selection["by"]]
    for ax, label in ((left, "forecast less observed (% of the loss)"), (right, "mean |error| (%)")):
        ax.set_xscale("log")
        ax.set_xlabel(f"extrapolation factor ({words} over the largest trained on)")
        ax.set_ylabel(label)
        label_log_axis(ax.xaxis, lambda x: f"{x:.3g}")
    right.set_ylim(bottom=0)
    handles, labels = right.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(len(labels), 4))
    return figure


def _bin_edges(factors: Sequence[float]) -> np.ndarray:
    """Edges of bins with about equal numbers of rows, rising; at least two edges."""
    factors = np.sort(np.asarray(factors, float))
    count = int(np.clip(len(factors) // ROWS_PER_BIN, 1, MOST_BINS))
    edges = np.unique(np.quantile(factors, np.linspace(0, 1, count + 1)))
    return edges if len(edges) > 1 else np.array([factors[0], factors[0] * 2])


@styled
def plot_next_runs(
    fit: Any, answer: Mapping[str, Any], frontier: Mapping[str, Any] | None = None, ax: Axes | None = None
) -> Figure:
    """The runs of the table over N and D, the proposed ones, and the optimum that they are to narrow.

    Args:
      fit: its used rows are drawn.
      answer: next (``NextRuns.to_dict()``) and target (N and D at the budget).
      frontier: C, N and D of the fitted law's optimum; left out where None.
      ax: draw here; a new figure otherwise.
    """
    figure, (ax,) = panels(ax, 1, (9.2, 5.4))
    rows = rows_of(fit)
    ax.plot(rows["tokens"], rows["params"], "o", color=BLUE, ms=4.5, alpha=0.55, mew=0, label="in the table")
    if frontier is not None:
        ax.plot(frontier["D"], frontier["N"], color=ORANGE, lw=1.6, label="compute-optimal N*, D*")
    best, runs = answer["target"], answer["next"]["runs"]
    ax.plot(best["D"], best["N"], "*", color=ORANGE, ms=14, mec="white", mew=0.8, zorder=6,
            label=f"the optimum at {scientific(answer['next']['budget_target'], 3)} FLOPs")  # fmt: skip
    points: dict[tuple, list[int]] = {}
    for place, run in enumerate(runs, 1):
        points.setdefault((run["tokens"], run["params"]), []).append(place)
    for (D, N), places in points.items():
        ax.plot(D, N, "D", color=PURPLE, ms=9, mec="white", mew=1.0, zorder=7)
        ax.annotate(", ".join(map(str, places)), (D, N), (8, 5), textcoords="offset points", color=PURPLE,
                    fontweight="bold", zorder=8)  # fmt: skip
    ax.plot([], [], "D", color=PURPLE, ms=9, mec="white", label="proposed, in this order")
    ax.set(xscale="log", yscale="log")
    ax.set_xlabel("D (training tokens)")
    ax.set_ylabel("N (parameters)")
    label_log_axis(ax.xaxis, short)
    label_log_axis(ax.yaxis, short)
    ax.legend(loc="upper left", bbox_to_anchor=(1.01, 1.0))
    return figure


@styled
def plot_comparison(
    comparison: Mapping[str, Any],
    frontiers: Sequence[Mapping[str, np.ndarray]],
    ranges: Sequence[Sequence[float]],
    axes: Sequence[Axes] | None = None,
) -> Figure:
    """The compute-optimal loss of both studies against C, and the effective speed-up of the second.

    Args:
      comparison: ``StudyComparison.to_dict()`` at several budgets; infinite speed-ups are not drawn.
      frontiers: of each study C [K], loss [K] and draws [draws, K] or None.
      ranges: smallest and largest budget of each table.
      axes: two axes to draw into; a new figure otherwise.
    """
    figure, (left, right) = panels(axes, 2, (11.6, 4.8))
    names = (comparison["name_a"], comparison["name_b"])
    for name, one, ends, colour in zip(names, frontiers, ranges, (BLUE, ORANGE), strict=True):
        C = np.asarray(one["C"], float)
        left.plot(C, one["loss"], color=colour, lw=1.2, ls=(0, (4, 2)))
        inside = (ends[0] * (1 - 1e-9) <= C) & (ends[1] * (1 + 1e-9) >= C)
        left.plot(C[inside], np.asarray(one["loss"])[inside], color=colour, lw=2.4, label=name)
        if one["draws"] is not None and len(one["draws"]):
            for _, low, high, alpha in BANDS:
                band = np.nanquantile(one["draws"], [low, high], axis=0)
                left.fill_between(C, *band, color=colour, alpha=alpha, lw=0)
    left.set_ylabel("loss at the optimum")
    left.legend(loc="upper right", title="solid: inside its own table", alignment="left")
    rows = [s for s in comparison["speedups"] if _drawable(s["speedup"]["estimate"])]
    C = np.array([s["budget"] for s in rows])
    for level, _, _, alpha in BANDS:
        ends = [s["speedup"][level] for s in rows]
        kept = [bool(e) and all(map(_drawable, e)) for e in ends]
        if any(kept):
            low, high = np.array(
                [e if k else (np.nan, np.nan) for e, k in zip(ends, kept, strict=True)], float
            ).T
            right.fill_between(C, low, high, color=PURPLE, alpha=alpha, lw=0, label=f"{level} % interval")
    right.plot(C, [s["speedup"]["estimate"] for s in rows], color=PURPLE, lw=2, label="estimate")
    right.axhline(1, color=INK, lw=0.8)
    right.set_yscale("log")
    right.set_ylabel(f"compute that {names[1]} saves (factor)")
    label_log_axis(right.yaxis, lambda x: f"{x:.3g}")
    right.legend(loc="best")
    for ax in (left, right):
        for budget in comparison["crossover"]["budgets"]:
            ax.axvline(budget, color=GREEN, lw=1.2, ls=(0, (2, 2)))
        ax.set_xscale("log")
        ax.set_xlim(frontiers[0]["C"][0], frontiers[0]["C"][-1])
        ax.set_xlabel("C (training FLOPs)")
        label_log_axis(ax.xaxis, scientific)
    return figure


def _drawable(value: Any) -> bool:
    return isinstance(value, float | int) and value > 0
