"""Bisection of many ranges at once."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

HALVINGS = 100
"""Halve a range of 100 to below float64's spacing."""


def bisect(is_below: Callable[[np.ndarray], np.ndarray], low, high, halvings: int = HALVINGS):
    """The ends of ranges that hold the place where ``is_below`` ends, after so many halvings.

    Args:
      is_below: whether what is sought lies above a point; arrays that broadcast. low, high: the ranges' ends.

    Returns:
      (low, high), arrays.
    """
    for _ in range(halvings):
        middle = 0.5 * (low + high)
        below = is_below(middle)
        low, high = np.where(below, middle, low), np.where(below, high, middle)
    return low, high
