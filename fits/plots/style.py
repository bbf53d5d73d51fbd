"""One restrained style for every figure, and figures as bytes that do not change from run to run."""

from __future__ import annotations

import functools
import io
import math
import re
from collections.abc import Callable, Sequence

import matplotlib as mpl
import numpy as np
from matplotlib import ticker
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import Colormap, LinearSegmentedColormap, LogNorm
from matplotlib.figure import Figure

# Okabe and Ito's palette, told apart under the common colour blindnesses.
BLUE, ORANGE, GREEN, PURPLE = "#0072B2", "#D55E00", "#009E73", "#CC79A7"
INK, GREY, PALE = "#222222", "#777777", "#dddddd"

RC = {
    "figure.dpi": 100,
    "figure.facecolor": "white",
    "figure.constrained_layout.use": True,
    "font.family": "DejaVu Sans",  # shipped with matplotlib, so every machine draws the same glyphs
    "font.size": 10,
    "axes.titlesize": 10.5,
    "axes.titlelocation": "left",
    "axes.labelsize": 10,
    "axes.edgecolor": GREY,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#ececec",
    "grid.linewidth": 0.8,
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "lines.linewidth": 1.6,
    "svg.fonttype": "path",  # text as outlines: nothing moves on a machine with other fonts
    "svg.hashsalt": "scaling",
    "path.simplify": False,
}


class NotebookFigure(Figure):
    """A figure that a notebook shows as the last value of a cell, without pyplot keeping it alive."""

    def _repr_png_(self) -> bytes:
        return png(self)


def styled(draw: Callable) -> Callable:
    """Runs a plot function under the house style."""

    @functools.wraps(draw)
    def wrapped(*args, **kwargs):
        with mpl.rc_context(RC):
            return draw(*args, **kwargs)

    return wrapped


def panels(
    axes: Axes | Sequence[Axes] | None, count: int, size: tuple[float, float], columns: int = 0
) -> tuple[Figure, list[Axes]]:
    """The caller's axes, or a new figure of ``size`` inches with ``count`` axes in ``columns`` columns.

    Raises:
      ValueError: ``axes`` is not as many as the plot draws into.
    """
    if axes is not None:
        given = [axes] if isinstance(axes, Axes) else list(np.ravel(axes))
        if len(given) != count:
            raise ValueError(f"axes has {len(given)} axes; this plot draws into {count}")
        return given[0].figure, given
    columns = columns or count
    figure = NotebookFigure(figsize=size)
    FigureCanvasAgg(figure)
    return figure, list(np.ravel(figure.subplots(math.ceil(count / columns), columns, squeeze=False)))[:count]


def ordered_colours() -> Colormap:
    """Viridis without its palest fifth, which is lost on white paper."""
    return LinearSegmentedColormap.from_list("ordered", mpl.colormaps["viridis"](np.linspace(0.0, 0.82, 256)))


def log_norm(values: np.ndarray) -> LogNorm:
    """A logarithmic colour scale over positive values; one value alone gets a scale around it."""
    low, high = float(np.min(values)), float(np.max(values))
    return LogNorm(low, high) if high > low * 1.0001 else LogNorm(low / 1.5, high * 1.5)


def short(x: float, digits: int = 2) -> str:
    """A count for an axis or a label: 7.1k, 30k, 1.2M, 70B, 1.4T; scientific outside 1 to 10^15.

    ``digits`` are significant ones, but no digit before the point is dropped: 123M, not 120M.
    """
    if not math.isfinite(x):
        return str(x)
    if x == 0:
        return "0"
    if not 1 <= abs(x) < 1e15:
        return scientific(x, digits)
    power = sum(abs(x) >= 1000**k for k in (1, 2, 3, 4))
    text = _significant(x / 1000**power, digits)
    if abs(float(text)) >= 1000 and power < 4:  # rounded up to the next unit
        power += 1
        text = _significant(x / 1000**power, digits)
    return text + ("", "k", "M", "B", "T")[power]


def _significant(x: float, digits: int) -> str:
    """``x`` in [0.9, 1000) without trailing zeros after the point."""
    whole = len(str(int(abs(x))))
    text = f"{x:.{max(0, digits - whole)}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def scientific(x: float, digits: int = 2) -> str:
    """FLOPs and the like: 4.8e11, 5.76e23."""
    mantissa, power = f"{x:.{digits - 1}e}".split("e")
    mantissa = mantissa.rstrip("0").rstrip(".") if "." in mantissa else mantissa
    return f"{mantissa}e{int(power)}"


def label_log_axis(axis, form: Callable[[float], str]) -> None:
    """Ticks of a logarithmic axis in plain words; 1-2-5 steps where the axis spans little."""
    low, high = axis.get_view_interval()
    decades = math.log10(high / low)
    subs = (1.0,) if decades > 2.5 else (1.0, 3.0) if decades > 1.6 else (1.0, 2.0, 5.0)
    if decades < 0.7:
        subs = (1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 7.0)
    axis.set_major_locator(ticker.LogLocator(subs=subs, numticks=9 if decades > 2.5 else 40))
    axis.set_major_formatter(ticker.FuncFormatter(lambda x, _: form(x)))
    axis.set_minor_formatter(ticker.NullFormatter())


def png(figure: Figure, dpi: int = 150) -> bytes:
    """The figure as PNG bytes, the same for the same figure."""
    out = io.BytesIO()
    with mpl.rc_context(RC):
        figure.savefig(out, format="png", dpi=dpi, metadata={"Software": None})
    return out.getvalue()


def svg(figure: Figure, name: str, description: str) -> str:
    """The figure as an ``<svg>`` element to put inside a page, the same for the same figure.

    Args:
      figure: what to draw.
      name: prefix of every id, so that several figures can share a page.
      description: read aloud in place of the picture.
    """
    out = io.StringIO()
    with mpl.rc_context(RC):
        figure.savefig(out, format="svg", metadata={"Date": None})
    text = out.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>\s*", "", text, flags=re.S)
    text = re.sub(r'\bid="([^"]+)"', rf'id="{name}-\1"', text)
    text = re.sub(r'href="#([^"]+)"', rf'href="#{name}-\1"', text)
    text = re.sub(r"url\(#([^)]+)\)", rf"url(#{name}-\1)", text)
    width, height = re.search(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', text).groups()
    words = description.replace("&", "&amp;").replace("<", "&lt;").replace('"', "&quot;")
    head = (
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{words}" '
        'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink">'
    )
    return head + text[text.index(">") + 1 :].rstrip()
