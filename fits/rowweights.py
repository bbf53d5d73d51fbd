"""Row weights, the rows' standard errors and the options of a loss: checks and robust scales."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from fits.errors import FitError
from fits.objective import ASYMMETRIC, LOSSES

DELTA_UNITS = ("absolute", "scale")
CHI2_MEDIAN = 0.45493642311957283  # of one degree of freedom: the square of the normal 0.75 quantile


def check_loss(loss: str, delta: Any, delta_unit: str, tau: Any) -> None:
    """Raises ``FitError`` on an unknown loss or unit, a bad delta, or a tau that does not belong."""
    if loss not in LOSSES:
        raise FitError(f"loss is {loss!r}; it must be one of {', '.join(LOSSES)}")
    if delta_unit not in DELTA_UNITS:
        raise FitError(f"delta_unit is {delta_unit!r}; it must be one of {', '.join(DELTA_UNITS)}")
    if not (_is_number(delta) and np.isfinite(delta) and delta > 0):
        unit = "the unit of the residual" if delta_unit == "absolute" else "robust standard deviations"
        raise FitError(f"delta is {delta!r}; it must be a positive number, in {unit}")
    if not (_is_number(tau) and 0 < tau < 1):
        raise FitError(f"tau is {tau!r}; it must be a number between 0 and 1, such as 0.9")
    if tau != 0.5 and loss not in ASYMMETRIC:
        raise FitError(f"tau is {tau!r} and loss is {loss!r}; tau is for {' and '.join(ASYMMETRIC)} only")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float | np.integer | np.floating) and not isinstance(value, bool)


def check_weights(values: Any, rows: int, name: str) -> np.ndarray:
    """Float64 [rows] of ``weights`` (zero or more; all one where None) or ``stderr`` (above zero).

    Raises:
      FitError: another length, or a value that is no number or out of range.
    """
    if values is None:
        return np.ones(rows)
    try:
        out = np.asarray(values, float)
    except (TypeError, ValueError):
        raise FitError(f"{name} has values that are not numbers, such as {_first_word(values)!r}") from None
    if out.shape != (rows,):
        raise FitError(f"{name} has the shape {out.shape}; it must have one value for each of {rows} rows")
    bad = ~np.isfinite(out) | ((out <= 0) if name == "stderr" else (out < 0))
    if bad.any():
        at = int(np.flatnonzero(bad)[0])
        valid = "above zero" if name == "stderr" else "zero or more"
        raise FitError(
            f"{name} has {bad.sum()} of {rows} values that cannot be used, the first {out[at]:g} at used row "
            f"{at}; each must be a finite number {valid} (leave the others out by a rule of exclude)"
        )
    return out


def _first_word(values: Any) -> Any:
    for value in np.ravel(np.asarray(values, object)):
        try:
            float(value)
        except (TypeError, ValueError):
            return value
    return values


def row_column(table, named: Any, name: str, columns=None) -> np.ndarray | None:
    """Values at the used rows of a column, or of an array over all input rows, [R]; None for None.

    Args:
      table: cleaned rows. named: a column's name, or values. name: "weights" or "stderr", for messages.

    Raises:
      FitError: no such column, or an array that is not one value per input row.
    """
    if named is None:
        return None
    if isinstance(named, str):
        column = (columns or {}).get(named, named)
        if column not in table.extra:
            raise FitError(f"{name} names the column {column!r}; the table has {', '.join(table.extra)}")
        return check_weights(table.extra[column], len(table), name)
    values = np.asarray(named)
    if values.shape != (len(table.rows),):
        raise FitError(
            f"{name} has the shape {values.shape}; it must be a column's name or one value for each of the "
            f"table's {len(table.rows)} rows"
        )
    return check_weights(values[table.index], len(table), name)


def describe_loss(method: Mapping) -> str:
    """The loss of a fit's ``method``, its width or tau, and what weights the rows, in words."""
    out = method["loss"]
    if method.get("tau") is not None:
        out += f" {method['tau']:g}"
    if method.get("delta") is not None:
        out += f", delta {method['delta']:.4g}"
    if method.get("delta_unit") == "scale":
        out += f" ({method['delta_given']:g} robust standard deviations)"
    if method.get("weights"):
        out += f", weights {method['weights']}"
    if method.get("stderr"):
        out += (
            f", standard errors {method['stderr']} with an excess scatter of {method['excess_scatter']:.2g}"
        )
    return out


def weighted_median(values_R: np.ndarray, weights_R: np.ndarray) -> float:
    """Where half of the weight lies on either side; the middle of two such values, as in a plain median."""
    order = np.argsort(values_R, kind="stable")
    order = order[weights_R[order] > 0]
    below = np.cumsum(weights_R[order])
    half = 0.5 * below[-1]
    low = int(np.searchsorted(below, half * (1 - 1e-12)))
    high = int(np.searchsorted(below, half * (1 + 1e-12)))
    return 0.5 * float(values_R[order[low]] + values_R[order[min(high, len(order) - 1)]])


def excess_scatter(residual_R: np.ndarray, stderr_R: np.ndarray, fitted: int) -> float:
    """Standard deviation e that residuals show beyond their standard errors; 0 where they show none.

    The e at which the median of r^2 / (s^2 + e^2) is that of a squared standard normal: a robust form of
    the moment equation of Paule and Mandel (1982). Residuals are of an unweighted least-absolute-
    deviations fit, which passes through as many rows as it has parameters: those rows are left out.
    """
    keep = np.argsort(np.abs(residual_R), kind="stable")[min(fitted, len(residual_R) - 1) :]
    r2, s2 = residual_R[keep] ** 2, stderr_R[keep] ** 2

    def surplus(e2):
        return np.median(r2 / (s2 + e2)) - CHI2_MEDIAN

    low, high = 0.0, float(r2.max()) / CHI2_MEDIAN
    if high == 0 or surplus(0.0) <= 0:
        return 0.0
    for _ in range(100):
        middle = 0.5 * (low + high)
        low, high = (middle, high) if surplus(middle) > 0 else (low, middle)
    return float(np.sqrt(high))
