"""Spikes in a training curve: found after the fact, so that a fit can look at the runs that had them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

WINDOW = 16
"""Lines before a line that say what is usual there: a twelfth of a cell's curve."""
SIGMAS = 7.0
"""Robust standard deviations above the median that make a spike: by chance, one line in 1e12."""


def count_spikes(losses: Sequence[float], window: int = WINDOW, sigmas: float = SIGMAS) -> int:
    """How often the loss leaves its own recent course upwards.

    A line is a spike where it lies above the median of the ``window`` lines before it by more than
    ``sigmas`` times their spread about a straight line, 1.4826 times the median absolute deviation
    (Rousseeuw and Croux 1993); lines that follow one another count once. The spread is at least 0.2 % of
    the loss, so that a smooth curve's last digits are none.

    Args:
      losses: the training loss at evenly spaced steps.

    Returns:
      The number of spikes; 0 for a curve shorter than the window.
    """
    losses = np.asarray(losses, float)
    count, inside = 0, False
    places = np.arange(window)
    for i in range(window, len(losses)):
        before = losses[i - window : i]
        course = np.polyval(np.polyfit(places, before, 1), places)
        spread = max(1.4826 * np.median(np.abs(before - course)), 0.002 * abs(np.median(before)))
        high = losses[i] > np.median(before) + sigmas * spread
        count += high and not inside
        inside = high
    return int(count)
