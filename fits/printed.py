"""How results show themselves: as text in a terminal, as HTML in a notebook."""

from __future__ import annotations

import math

import numpy as np

LEVELS = {"80": (0.10, 0.90), "95": (0.025, 0.975)}


class Printed:
    """A result whose ``__str__`` says everything, doubts first."""

    def __rich__(self):
        from rich.text import Text

        return Text(str(self))

    def _repr_html_(self) -> str:
        from fits.tables import notebook

        return notebook(self)


def word(value) -> float | str | None:
    """A number for JSON: no number is None, infinity is the word."""
    return None if np.isnan(value) else "infinite" if np.isinf(value) else float(value)


def open_ends(draws) -> dict[str, list | None]:
    """80 % and 95 % intervals that may end at infinity; none where over 1 % of the draws have no value."""
    kept = np.sort(draws[~np.isnan(draws)])
    if len(kept) < 20 or len(kept) < 0.99 * len(draws):
        return {"80": None, "95": None}
    # outward to whole draws: between a finite draw and an infinite one there is nothing to interpolate
    rank = {
        k: (math.floor(p * (len(kept) - 1)), math.ceil(q * (len(kept) - 1))) for k, (p, q) in LEVELS.items()
    }
    return {k: [word(kept[i]), word(kept[j])] for k, (i, j) in rank.items()}
