"""Searches for an optimum: the tokens that a budget buys, and the best N and D for it, in many lanes."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from fits.bisection import bisect
from fits.laws import Law

Flops = Callable[[np.ndarray, np.ndarray], np.ndarray]
WIDEST = 100.0  # of log N and log D
ROUNDING = 1e-14  # of a cost and of what is divided by it, some 50 roundings
REACH = 70.0  # log range searched: from the largest N, below 1e28, down to less than one parameter


def six_nd(N, D):
    """C = 6 N D."""
    return 6.0 * N * D


def tokens_for(flops: Flops, N: np.ndarray, budget) -> np.ndarray:
    """The D at which training N costs ``budget``; NaN where even one token costs more.

    Costs that are proportional to D are divided by, as they turn out to be; others are searched by halves.
    """
    of_one = np.asarray(flops(N, np.ones(np.shape(N))))
    affordable = of_one <= budget
    with np.errstate(all="ignore"):
        D = budget / of_one
        off = np.abs(np.asarray(flops(N, D)) - budget)
    if np.any(affordable & ~(off <= ROUNDING * budget)):
        low, high = bisect(
            lambda log_d: ~(np.asarray(flops(N, np.exp(log_d))) > budget),
            np.zeros(np.shape(N)),
            np.full(np.shape(N), WIDEST),
        )
        D = np.exp(0.5 * (low + high))
    return np.where(affordable, D, np.nan)


def optimum(
    law: Law, params: Mapping[str, Any], budget: float, flops: Flops | None = None
) -> dict[str, np.ndarray]:
    """N, D and loss that minimise the law at one budget, arrays [B] for parameters given as arrays [B].

    Closed form where the law has one and C = 6ND; else a search over log N (NaN where the lowest
    loss lies at an end of the search, so that there is no optimum).
    """
    params = {k: np.atleast_1d(np.asarray(v, float)) for k, v in params.items()}
    if flops is None:
        with np.errstate(all="ignore"):
            closed = law.optimum(params, budget)
        if closed is not None:
            return closed
    flops = flops or six_nd
    top = math.log(float(_largest_size(flops, budget)))
    centre = np.full(len(next(iter(params.values()))), top - REACH / 2)
    half, inside = REACH / 2, True
    while half > 1e-9:  # each pass narrows the range 20-fold, down to where a loss near its minimum is flat
        grid_BxG = centre[:, None] + half * np.linspace(-1, 1, 61)
        loss = _loss_at(law, params, grid_BxG, flops, budget)
        best = np.argmin(np.where(np.isnan(loss), np.inf, loss), 1)
        inside = inside & ((best > 0) & (best < 60) if half == REACH / 2 else True)
        centre = vertex(grid_BxG, loss, best)
        half /= 20.0
        if half < 1e-4:
            break
    N = np.where(inside, np.exp(centre), np.nan)
    D = tokens_for(flops, N, budget)
    return {"N": N, "D": D, "loss": law.predict(params, {"N": N, "D": D, "C": budget})}


def _largest_size(flops: Flops, budget: float) -> float:
    """The N that one token could train."""
    low, _ = bisect(
        lambda log_n: ~(np.asarray(flops(np.exp(log_n), np.ones(1))) > budget),
        np.zeros(1),
        np.full(1, WIDEST),
    )
    return float(np.exp(low[0]))


def _loss_at(law: Law, params, log_n_BxG, flops: Flops, budget) -> np.ndarray:
    N = np.exp(log_n_BxG)
    D = tokens_for(flops, N, budget)
    with np.errstate(all="ignore"):
        return law.predict({k: v[:, None] for k, v in params.items()}, {"N": N, "D": D, "C": budget})


def vertex(grid_BxG, loss_BxG, best_B) -> np.ndarray:
    """The vertex of the parabola through the lowest point and its neighbours."""
    lanes = np.arange(len(best_B))
    at = np.clip(best_B, 1, grid_BxG.shape[1] - 2)
    left, middle, right = (loss_BxG[lanes, at + k] for k in (-1, 0, 1))
    step = grid_BxG[lanes, at + 1] - grid_BxG[lanes, at]
    with np.errstate(all="ignore"):  # what is beyond reach may be infinite
        curve = left - 2 * middle + right
        shift = np.where(curve > 0, 0.5 * (left - right) / curve, 0.0)
    return grid_BxG[lanes, at] + step * np.clip(np.nan_to_num(shift), -1, 1)
