"""The two exponents of a compute-optimal frontier without a floor: N* ~ C^a and loss ~ C^-x.

For losses that go to zero as powers, where no law with a floor applies: at each budget a least-squares
parabola of the log of the loss over log N, whose vertex is (log N*, log loss*); then a straight line of each
over log C. Where the losses of all budgets have one shape in logs, as on a frontier that is a power law, what
a parabola makes of that shape is the same at each budget and leaves both slopes as they are.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from fits.errors import FitError
from fits.table import Table, clean, find_budgets, group_close

LEAST_SIZES = 4
LEAST_BUDGETS = 3


@dataclasses.dataclass(frozen=True)
class Frontier:
    """Exponents of one group of runs.

    Attributes:
      a, loss: of N* ~ C^a and loss ~ C^-loss. a_stderr, loss_stderr: from the losses' own standard errors, by
        simulated tables; 0 where the table has none. points: budget, N, loss of each vertex.
    """

    a: float
    loss: float
    a_stderr: float
    loss_stderr: float
    points: list[dict]


def frontier_exponents(table: Any, *, draws: int = 1000, seed: int = 0, **reading) -> Frontier:
    """Reads the exponents off isoFLOP runs.

    Args:
      table, reading: see ``fits.fit_table`` (columns, units, exclude). A column loss_stderr, of each loss's
        standard error, is read where there is one. draws: simulated tables for the standard errors.

    Raises:
      FitError: unreadable rows, or fewer than three budgets of four sizes with a minimum inside.
    """
    rows = clean(table, needs=("params", "tokens", "loss"), **reading)
    groups, budgets = find_budgets(rows)
    used = []
    for g, budget in enumerate(budgets):
        members = np.flatnonzero(groups == g)
        if len(np.unique(group_close(rows.params[members]))) >= LEAST_SIZES:
            used.append((float(budget), members))
    log_loss = np.log(rows.loss)
    at = _vertices(rows, log_loss[None], used)
    good = np.isfinite(at).all((0, 2))
    used, at = [u for u, ok in zip(used, good, strict=True) if ok], at[:, good]
    if len(used) < LEAST_BUDGETS:
        raise FitError(
            f"{len(used)} of {len(budgets)} budgets have {LEAST_SIZES} sizes or more and a minimum inside "
            f"them; a frontier needs {LEAST_BUDGETS}"
        )
    log_c = np.log([np.median(rows.flops[m]) for _, m in used])
    (a,), (x,) = _slopes(log_c, at[..., 0]), _slopes(log_c, at[..., 1])
    noise = _relative_error(rows)
    spread = np.zeros(2)
    if noise.any() and draws:
        rng = np.random.default_rng(seed)
        tables = log_loss + noise * rng.standard_normal((draws, len(rows)))
        again = _vertices(rows, tables, used)
        again = again[np.isfinite(again).all((1, 2))]
        if len(again) < 0.9 * draws:
            raise FitError(
                f"with the losses' own errors {draws - len(again)} of {draws} tables lose a minimum"
            )
        spread = np.array([_slopes(log_c, again[..., k]).std(ddof=1) for k in (0, 1)])
    points = [
        {"budget": budget, "N": float(np.exp(n)), "loss": float(np.exp(y))}
        for (budget, _), (n, y) in zip(used, at[0], strict=True)
    ]
    return Frontier(float(a), float(-x), float(spread[0]), float(spread[1]), points)


def _relative_error(rows: Table) -> np.ndarray:
    """Standard error of each log loss, [R]; 0 where the table does not say."""
    if "loss_stderr" not in rows.extra:
        return np.zeros(len(rows))
    return np.nan_to_num(np.asarray(rows.extra["loss_stderr"], float)) / rows.loss


def _vertices(rows: Table, log_loss_BxR: np.ndarray, used: list) -> np.ndarray:
    """(log N*, log loss*) of each table and budget, [B, budgets, 2]; NaN without a minimum inside."""
    out = np.full((len(log_loss_BxR), len(used), 2), np.nan)
    for g, (_, members) in enumerate(used):
        log_n = np.log(rows.params[members])
        centre = log_n.mean()
        c2, c1, c0 = np.polyfit(log_n - centre, log_loss_BxR[:, members].T, 2)
        with np.errstate(all="ignore"):
            vertex, value = centre - c1 / (2 * c2), c0 - c1**2 / (4 * c2)
        inside = (c2 > 0) & (vertex > log_n.min()) & (vertex < log_n.max())
        out[:, g] = np.where(inside[:, None], np.stack([vertex, value], -1), np.nan)
    return out


def _slopes(log_c_G: np.ndarray, y_BxG: np.ndarray) -> np.ndarray:
    dx = log_c_G - log_c_G.mean()
    return y_BxG @ dx / (dx @ dx)
