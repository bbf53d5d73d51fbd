"""Pictures of the runs themselves: isoFLOP curves and the fitted surface over N and D."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fits.plots.style import (
    GREY,
    INK,
    ORANGE,
    label_log_axis,
    log_norm,
    ordered_colours,
    panels,
    scientific,
    short,
    styled,
)  # fmt: skip

SURFACE_MARGIN = 1.5
"""The surface is drawn this factor beyond the rows on every side."""


def rows_of(fit: Any, outcome: str = "used") -> pd.DataFrame:
    """The fit's rows of one outcome as a table: row, params, tokens, flops, loss, fitted, residual, flags."""
    table = pd.DataFrame(fit.rows)
    return table[table["outcome"] == outcome].reset_index(drop=True) if len(table) else table


@styled
def plot_isoflop(table: pd.DataFrame, points: Sequence[Mapping], ax: Axes | None = None) -> Figure:
    """Loss against N at each budget, with the parabola of approach 2 and its minimum.

    Args:
      table: runs, with params, tokens, loss and the index that ``points`` refer to as ``row``.
      points: approach 2's points (``approaches(...).approaches["2"].points``): budget in FLOPs,
        rows, parabola (c0, c1, c2 of the loss in log N), N, loss, accepted, reason.
      ax: draw here; a new figure otherwise.
    """
    figure, (ax,) = panels(ax, 1, (9.2, 5.4))
    budgets = np.array([p["budget"] for p in points], float)
    cmap, norm = ordered_colours(), log_norm(budgets)
    by_row = table.set_index("row")
    for point in sorted(points, key=lambda p: p["budget"]):
        colour = cmap(norm(point["budget"]))
        runs = by_row.loc[list(point["rows"])].sort_values("params")
        label = scientific(point["budget"], 3) + ("" if point["accepted"] else "  (no minimum)")
        ax.plot(runs["params"], runs["loss"], "o", color=colour, ms=5, mec="white", mew=0.6, label=label)
        if point.get("parabola") is not None:
            c0, c1, c2 = point["parabola"]
            low, high = np.log(runs["params"].min()), np.log(runs["params"].max())
            x = np.linspace(low, high, 200)
            style = "-" if point["accepted"] else ":"
            ax.plot(np.exp(x), c0 + c1 * x + c2 * x**2, style, color=colour, lw=1.5)
        if point["accepted"]:
            ax.plot(point["N"], point["loss"], "D", color=ORANGE, ms=7, mec="white", mew=0.8, zorder=5)
    if any(p["accepted"] for p in points):
        ax.plot([], [], "D", color=ORANGE, ms=7, mec="white", label="fitted minimum")
    ax.set_xscale("log")
    ax.set_xlabel("N (parameters)")
    ax.set_ylabel("loss")
    label_log_axis(ax.xaxis, short)
    handles, labels = ax.get_legend_handles_labels()
    marks = 1 if labels and labels[-1] == "fitted minimum" else 0  # highest curve first, like the picture
    curves = len(labels) - marks
    order = [*range(curves), *range(curves, len(labels))]
    ax.legend(
        [handles[i] for i in order], [labels[i] for i in order], title="budget (FLOPs)",
        loc="upper left", bbox_to_anchor=(1.01, 1.0), alignment="left", ncols=1 + curves // 16,
    )  # fmt: skip
    return figure


@styled
def plot_surface(fit: Any, optimum: Mapping[str, np.ndarray] | None = None, ax: Axes | None = None) -> Figure:
    """Contours of the fitted L(N, D), the runs coloured by their measured loss, and the efficient frontier.

    Args:
      fit: a fit of a law in N and D.
      optimum: N and D arrays along the frontier; left out where None.
      ax: draw here; a new figure otherwise.
    """
    figure, (ax,) = panels(ax, 1, (9.2, 5.8))
    rows = rows_of(fit)
    N, D = (rows[c].to_numpy(float) for c in ("params", "tokens"))
    x = np.geomspace(D.min() / SURFACE_MARGIN, D.max() * SURFACE_MARGIN, 160)
    y = np.geomspace(N.min() / SURFACE_MARGIN, N.max() * SURFACE_MARGIN, 160)
    loss_NxD = fit.predict(params=y[:, None], tokens=x[None, :])
    loss_NxD = np.broadcast_to(loss_NxD, (len(y), len(x)))
    seen = rows["loss"].to_numpy(float)
    low, high = seen.min(), seen.max()
    levels = np.geomspace(max(low, loss_NxD.min()), high, 12)
    cmap, norm = ordered_colours().reversed(), log_norm(seen)
    lines = ax.contour(x, y, loss_NxD, levels=levels, cmap=cmap, norm=norm, linewidths=1.2)
    ax.clabel(lines, fmt="%.3g", fontsize=8, inline_spacing=2)
    dots = ax.scatter(D, N, c=seen, cmap=cmap, norm=norm, s=30, edgecolor=INK, linewidth=0.5, zorder=4)
    if optimum is not None:
        inside = (
            (optimum["N"] >= y[0])
            & (optimum["N"] <= y[-1])
            & (optimum["D"] >= x[0])
            & (optimum["D"] <= x[-1])
        )
        ax.plot(
            optimum["D"][inside], optimum["N"][inside], color=ORANGE, lw=2.2, label="compute-optimal N*, D*"
        )
        ax.legend(loc="lower left", bbox_to_anchor=(0.0, 1.0))
    ax.set(xscale="log", yscale="log", xlim=(x[0], x[-1]), ylim=(y[0], y[-1]))
    ax.set_xlabel("D (training tokens)")
    ax.set_ylabel("N (parameters)")
    label_log_axis(ax.xaxis, short)
    label_log_axis(ax.yaxis, short)
    bar = figure.colorbar(dots, ax=ax, pad=0.02)
    bar.set_label("loss (dots: measured, lines: fitted)")
    bar.ax.yaxis.set_major_locator(_few_ticks(low, high))
    bar.ax.yaxis.set_major_formatter(lambda v, _: f"{v:.3g}")
    bar.ax.yaxis.set_minor_formatter(lambda v, _: "")
    bar.outline.set_visible(False)
    return figure


def _few_ticks(low: float, high: float):
    from matplotlib.ticker import FixedLocator, MaxNLocator

    ticks = MaxNLocator(6).tick_values(low, high)
    return FixedLocator([t for t in ticks if low <= t <= high] or [low, high])


@styled
def plot_loss_curves(
    curves: Mapping[str, pd.DataFrame],
    params: Mapping[str, float],
    diverged: Sequence[str] = (),
    ax: Axes | None = None,
) -> Figure:
    """Training loss against tokens, one line a cell, coloured by N.

    Args:
      curves: cell to a table with tokens and loss at the logged steps.
      params: cell to N. diverged: cells whose last point gets a cross.
      ax: draw here; a new figure otherwise.
    """
    figure, (ax,) = panels(ax, 1, (9.2, 5.2))
    sizes = np.array([params[c] for c in curves], float)
    cmap, norm = ordered_colours(), log_norm(sizes)
    for cell in sorted(curves, key=lambda c: params[c]):
        table = curves[cell]
        ok = (table["tokens"] > 0) & np.isfinite(table["loss"].astype(float))
        tokens, loss = table["tokens"][ok], table["loss"][ok]
        ax.plot(tokens, loss, color=cmap(norm(params[cell])), lw=0.9, alpha=0.9)
        if cell in diverged and len(tokens):
            ax.plot(tokens.iloc[-1], loss.iloc[-1], "x", color=ORANGE, ms=8, mew=2, zorder=5)
    ax.set_xscale("log")
    ax.set_xlabel("training tokens")
    ax.set_ylabel("training loss (nats per token)")
    label_log_axis(ax.xaxis, short)
    _size_bar(figure, ax, cmap, norm, sizes)
    if any(c in curves for c in diverged):
        ax.plot([], [], "x", color=ORANGE, ms=8, mew=2, label="diverged")
        ax.legend(loc="upper right")
    return figure


def _size_bar(figure, ax, cmap, norm, sizes):
    from matplotlib.cm import ScalarMappable

    bar = figure.colorbar(ScalarMappable(norm, cmap), ax=ax, pad=0.02)
    bar.set_label("N (parameters)")
    label_log_axis(bar.ax.yaxis, short)
    bar.outline.set_visible(False)
    for size in np.unique(sizes):  # one stroke a size that was trained
        bar.ax.axhline(size, color="white", lw=0.8)
    bar.ax.tick_params(color=GREY)
