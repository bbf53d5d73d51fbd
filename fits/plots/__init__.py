"""Figures of a study, each a function that returns a matplotlib Figure."""

from fits.plots.families import plot_families
from fits.plots.frontier import plot_frontier
from fits.plots.grid import plot_isoflop, plot_loss_curves, plot_surface, rows_of
from fits.plots.published import PUBLISHED, PublishedLaw
from fits.plots.questions import plot_comparison, plot_forecasts, plot_next_runs
from fits.plots.residuals import plot_residuals, plot_sensitivity
from fits.plots.style import png, scientific, short, svg

__all__ = [
    "PUBLISHED",
    "PublishedLaw",
    "plot_comparison",
    "plot_families",
    "plot_forecasts",
    "plot_frontier",
    "plot_isoflop",
    "plot_loss_curves",
    "plot_next_runs",
    "plot_residuals",
    "plot_sensitivity",
    "plot_surface",
    "png",
    "rows_of",
    "scientific",
    "short",
    "svg",
]
