"""N*(C) and D*(C): the study's own law with its bands, its other estimates, and the published laws."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fits.plots.published import PUBLISHED, PublishedLaw
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

PUBLISHED_LINES = (  # colour, dashes
    (GREY, (0, (5, 2))),
    (GREY, (0, (5, 2, 1, 2))),
    (GREY, (0, (1, 1.5))),
    (INK, (0, (7, 2))),
    ("#8c510a", (0, (7, 2))),
    ("#8c510a", (0, (1, 1.5))),
)
BANDS = (("95", 0.025, 0.975, 0.15), ("80", 0.10, 0.90, 0.25))


@styled
def plot_frontier(
    frontier: Mapping[str, Any] | None,
    points: Mapping[str, Sequence[Mapping]] | None = None,
    allocations: Sequence[Mapping] = (),
    flops_range: tuple[float, float] | None = None,
    published: Sequence[PublishedLaw] = PUBLISHED,
    axes: Sequence[Axes] | None = None,
) -> Figure:
    """Compute-optimal N (left) and D (right) against C.

    Args:
      frontier: C [K], N [K], D [K] of the fitted law and, where there are resamples, draws_N and
        draws_D [draws, K]; None where the law gives no optimum.
      points: per approach ("1", "2") its own estimates: budget, N, D (and accepted).
      allocations: budget, N, D and intervals of the answers asked for.
      flops_range: the budgets of the rows, shaded.
      published: laws drawn beside.
      axes: two axes to draw into; a new figure otherwise.
    """
    figure, axes = panels(axes, 2, (11.6, 5.6))
    low, high = _span(frontier, points, allocations, flops_range)
    C = np.geomspace(low, high, 120)
    for ax, symbol in zip(axes, "ND", strict=True):
        for law, (colour, dashes) in zip(published, itertools.cycle(PUBLISHED_LINES), strict=False):
            ax.plot(C, getattr(law, symbol)(C), color=colour, lw=1.0, ls=dashes, label=law.name)
        if frontier is not None:
            _draw_fit(ax, frontier, symbol)
        for name, marker, colour in (("1", "s", GREEN), ("2", "D", PURPLE)):
            kept = [p for p in (points or {}).get(name, ()) if p.get("accepted", True)]
            if kept:
                ax.plot(
                    [p["budget"] for p in kept], [p[symbol] for p in kept], marker, color=colour, ms=5.5,
                    mec="white", mew=0.6, zorder=5, label=f"this study, approach {name}",
                )  # fmt: skip
        for answer in allocations:
            _draw_allocation(ax, answer, symbol)
        if flops_range is not None:
            ax.axvspan(*flops_range, color=BLUE, alpha=0.05, lw=0)
        ax.set(xscale="log", yscale="log", xlim=(low, high))
        ax.set_xlabel("C (training FLOPs)")
        ax.set_ylabel("N* (parameters)" if symbol == "N" else "D* (training tokens)")
        label_log_axis(ax.xaxis, scientific)
        label_log_axis(ax.yaxis, short)
    handles, labels = axes[0].get_legend_handles_labels()
    own = [i for i, text in enumerate(labels) if text.startswith(("this study", "asked for"))]
    order = own + [i for i in range(len(labels)) if i not in own]
    figure.legend(
        [handles[i] for i in order], [labels[i] for i in order], loc="outside lower center", ncols=3
    )
    return figure


def _draw_fit(ax, frontier, symbol):
    C, best = np.asarray(frontier["C"]), np.asarray(frontier[symbol])
    draws = frontier.get(f"draws_{symbol}")
    if draws is not None and len(draws):
        for level, low, high, alpha in BANDS:
            ends = np.nanquantile(draws, [low, high], axis=0)
            ax.fill_between(C, *ends, color=BLUE, alpha=alpha, lw=0, label=f"this study, {level} % interval")
    ax.plot(C, best, color=BLUE, lw=2.2, zorder=4, label="this study, fitted law")


def _draw_allocation(ax, answer, symbol):
    interval = answer["intervals"][symbol].get("95")
    if interval:
        ax.plot([answer["budget"]] * 2, interval, color=ORANGE, lw=2, zorder=6)
    ax.plot(
        answer["budget"], answer[symbol], "o", color=ORANGE, ms=8, mec="white", zorder=7,
        label=f"asked for: {scientific(answer['budget'], 3)} FLOPs",
    )  # fmt: skip


def _span(frontier, points, allocations, flops_range) -> tuple[float, float]:
    seen = [*(flops_range or ()), *(a["budget"] for a in allocations)]
    seen += [p["budget"] for group in (points or {}).values() for p in group]
    if frontier is not None:
        seen += [float(np.min(frontier["C"])), float(np.max(frontier["C"]))]
    if not seen:
        raise ValueError(
            "plot_frontier has nothing to draw: give a frontier, points, allocations or flops_range"
        )
    return min(seen) / 1.5, max(seen) * 1.5
