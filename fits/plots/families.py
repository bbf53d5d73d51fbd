"""Families side by side: their runs and compute-optimal frontiers, and what one saves over another."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

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
    styled,
)

COLOURS = (INK, BLUE, ORANGE, GREEN, PURPLE, "#8c510a", "#56B4E9", "#E69F00", GREY)


def budget_word(x: float) -> str:
    """A cost on an axis: seconds plainly, FLOPs by their power of ten."""
    return f"{x:.3g}" if 0.01 <= x < 10_000 else scientific(x)


@styled
def plot_families(
    frontiers: Mapping[str, Mapping[str, Any]],
    multipliers: Mapping[str, Sequence[Mapping]],
    unit: str = "FLOPs",
    axes: Sequence[Axes] | None = None,
) -> Figure:
    """Loss against cost (left), and the multipliers over the first family with their intervals (right).

    Args:
      frontiers: name to ``cost`` [K], ``loss`` [K] of the fitted law's optimum and ``points``, the runs as
        (cost, loss); the first is the reference. No ``cost``: the runs alone.
      multipliers: name to a list of {budget, multiplier, interval}; names left out are not drawn.
      unit: of costs and budgets.
      axes: two axes to draw into; a new figure otherwise.
    """
    figure, (left, right) = panels(axes, 2, (11.6, 5.0))
    colour = {name: COLOURS[i % len(COLOURS)] for i, name in enumerate(frontiers)}
    for name, own in frontiers.items():
        points = np.array(own["points"], float).reshape(-1, 2)
        left.plot(*points.T, ".", color=colour[name], alpha=0.55, ms=6)
        line = (own["cost"], own["loss"]) if own.get("cost") is not None else ([], [])
        left.plot(*line, color=colour[name], label=name)
    left.set(
        xscale="log", yscale="log", xlabel=unit, ylabel="loss, nats per token", title="Runs and frontiers"
    )
    label_log_axis(left.xaxis, budget_word)
    label_log_axis(left.yaxis, lambda x: f"{x:.3g}")
    shift = np.linspace(-0.05, 0.05, max(2, len(multipliers)))
    for dx, (name, rows) in zip(shift, multipliers.items(), strict=False):
        drawn = [r for r in rows if isinstance(r["multiplier"], float) and r["multiplier"] > 0]
        if not drawn:
            continue
        x = np.array([r["budget"] for r in drawn]) * 10**dx
        y = np.array([r["multiplier"] for r in drawn])
        right.plot(x, y, "o", color=colour[name], label=name)
        for at, row in zip(x, drawn, strict=True):
            ends = row["interval"]
            if ends and all(isinstance(v, float) and v > 0 for v in ends):
                right.plot([at, at], ends, color=colour[name])
    right.axhline(1, color=INK, lw=1)
    title = f"Compute multiplier over {next(iter(frontiers))} (95 %)"
    right.set(xscale="log", yscale="log", xlabel=unit, title=title)
    # one legend for both, where it covers nothing
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=6)
    if right.lines[1:]:
        label_log_axis(right.xaxis, budget_word)
        label_log_axis(right.yaxis, lambda x: f"{x:.3g}")
    return figure
