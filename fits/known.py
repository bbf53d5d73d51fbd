"""A fitted floor beside its true value, where a study's data are of a source of known entropy rate."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def known_floor(manifest: Mapping, fit: Any) -> dict | None:
    """What E should have come to.

    Args:
      manifest: the study's. fit: a ``Fit`` of its run table.

    Returns:
      ``ideal_loss`` (a perfect model's expected held-out loss) and ``entropy_rate``, nats per token; ``E``,
      its 95 % interval and whether that holds ``ideal_loss``. None for other data, and for laws without E.
    """
    data = manifest.get("data") or {}
    if "ideal_loss" not in data or "E" not in fit.intervals:
        return None
    ideal, got = data["ideal_loss"], fit.intervals["E"]
    interval = got["95"]
    return {
        "ideal_loss": ideal,
        "entropy_rate": data["entropy_rate"],
        "E": got["estimate"],
        "interval_95": interval,
        "holds": None if interval is None else bool(interval[0] <= ideal <= interval[1]),
    }


def floor_words(truth: Mapping) -> str:
    """``known_floor`` as a sentence."""
    words = (
        f"known: a perfect model's held-out loss is {truth['ideal_loss']:.5f} (the source's entropy rate is "
        f"{truth['entropy_rate']:.5f}); the fitted E is {truth['E']:.5f}, "
        f"{truth['E'] - truth['ideal_loss']:+.5f}"
    )
    if truth["holds"] is None:
        return words
    low, high = truth["interval_95"]
    return (
        f"{words}; its 95 % interval, {low:.5f} to {high:.5f}, {'holds' if truth['holds'] else 'misses'} it"
    )
