"""What else could be trained: sizes that cost little more or can be built, a fixed rule, a loss to reach.

All rest on one question: what does it cost a model of N parameters to reach a loss, inside the limits?
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from fits.bisection import bisect
from fits.budget import positive
from fits.constraints import Limits, size_for, tokens_within
from fits.errors import FitError
from fits.search import REACH, Flops, vertex

HALVINGS = 60  # of a range of 100 in log D or log N: to below float64's spacing
LARGEST = 64.0  # of log N (6e27 parameters) and
MOST = 100.0  # of log D: a loss not reached there is never reached
SAME_LOSS = 1e-12  # relative: losses closer than this are one
NUDGES = 0.99 ** np.arange(0, 140)  # down to a quarter of a size


def cost_to_reach(law, params, target, log_n, cost: Flops, limits: Limits):
    """Compute and tokens for ``target`` at each size inside limits; infinite compute where it cannot.

    Args:
      params: arrays that broadcast against ``log_n``, as does ``target``. log_n: natural log of N.
    """
    N, shape = np.exp(log_n), np.broadcast_shapes(np.shape(log_n), np.shape(target))
    if limits.tokens_per_param is not None:
        D = np.broadcast_to(limits.tokens_per_param * N, shape)
        reached = law.predict(params, {"N": N, "D": D}) <= target + SAME_LOSS * np.abs(target)
    else:
        _, high = bisect(
            lambda log_d: law.predict(params, {"N": N, "D": np.exp(log_d)}) > target,
            np.zeros(shape),
            np.full(shape, MOST),
            HALVINGS,
        )
        D, reached = np.exp(high), high < MOST - 1
    good = reached & limits.allows(N, D)
    return np.where(good, np.asarray(cost(N, D)), np.inf), np.where(good, D, np.nan)


def least_budget(
    law, params: Mapping[str, Any], target, cost: Flops, limits: Limits
) -> dict[str, np.ndarray]:
    """The least compute that reaches a loss inside the limits, by searching over N; arrays [B].

    Args:
      params: the law's, arrays [B]. target: loss, one or [B].

    Returns:
      budget (infinite where the loss is never reached), N and D (then NaN).
    """
    lanes = np.broadcast_shapes(np.shape(target), *(np.shape(v) for v in params.values()))
    params = {k: np.broadcast_to(np.asarray(v, float), lanes).reshape(-1, 1) for k, v in params.items()}
    target = np.broadcast_to(np.asarray(target, float), lanes).reshape(-1, 1)
    bottom = math.log(limits.smallest_params) if limits.smallest_params else 0.0
    top = min(math.log(limits.largest_params), LARGEST) if limits.largest_params < math.inf else LARGEST
    ratio = limits.tokens_per_param

    def enough(log_n):  # whether the size reaches the loss on all tokens that there are
        N = np.exp(log_n)
        D = (
            np.full(np.shape(N), min(limits.largest_tokens, math.exp(MOST - 1)))
            if ratio is None
            else ratio * N
        )
        return law.predict(params, {"N": N, "D": D}) <= target

    # the loss falls in N, so that sizes under an edge never reach it
    low, high = np.full(target.shape, bottom), np.full(target.shape, top)
    never = ~enough(high)
    low = np.where(enough(low), low - 1e-9, low)
    _, high = bisect(lambda log_n: ~enough(log_n), low, high, HALVINGS)
    edge = np.clip(high, bottom, top)

    def priced(log_n):
        return cost_to_reach(law, params, target, log_n, cost, limits)[0]

    centre = edge
    if ratio is None:
        centre, half, points = None, 0.5 * (top - edge), 65
        while centre is None or half.max() > 1e-4:
            middle = 0.5 * (edge + top) if centre is None else centre
            grid = np.clip(middle + half * np.linspace(-1, 1, points), edge, top)
            price = np.log(priced(grid))
            best = np.argmin(np.where(np.isnan(price), np.inf, price), 1)
            centre = np.clip(vertex(grid, price, best)[:, None], edge, top)
            half, points = half * (4.0 / (points - 1)), 21
        tried = np.concatenate([centre, edge, np.take_along_axis(grid, best[:, None], 1)], 1)
        centre = np.take_along_axis(tried, np.argmin(priced(tried), 1)[:, None], 1)
    budget, D = cost_to_reach(law, params, target, centre, cost, limits)
    budget, D = (np.where(never, out, v)[:, 0] for v, out in ((budget, np.inf), (D, np.nan)))
    return {"budget": budget, "N": np.where(np.isinf(budget), np.nan, np.exp(centre[:, 0])), "D": D}


def near_optimal(
    law, params: Mapping[str, float], budget: float, best: Mapping, within: float, cost: Flops, limits: Limits
) -> dict[str, Any]:
    """The band of N that, inside the limits, reaches the optimal loss with (1 + within) times the budget."""
    scalar = {k: np.atleast_1d(v) for k, v in params.items()}
    target = float(np.squeeze(best["loss"])) * (1 + SAME_LOSS)

    def at(log_n: float):
        price, D = cost_to_reach(law, scalar, target, np.array([log_n]), cost, limits)
        return float(price[0]) / budget, float(D[0])

    start = math.log(float(np.squeeze(best["N"])))
    ends: dict[str, list] = {"N": [None, None], "D": [None, None]}
    for side, direction in enumerate((-1.0, 1.0)):
        inner, outer = 0.0, REACH / 2
        if at(start + direction * outer)[0] <= 1 + within:
            continue
        for _ in range(HALVINGS):
            middle = 0.5 * (inner + outer)
            inner, outer = (
                (middle, outer) if at(start + direction * middle)[0] <= 1 + within else (inner, middle)
            )
        edge = start + direction * inner
        D = at(edge)[1]
        D = D if math.isfinite(D) else float(np.squeeze(best["D"]))  # rounding, where the band is one point
        ends["N"][side] = min(max(math.exp(edge), limits.smallest_params), limits.largest_params)
        ends["D"][side] = min(D, limits.largest_tokens)
    return {"within": within, **ends}


def follow_policy(
    law, params, budget: float, cost: Flops, ratio: float, target: float, limits: Limits
) -> dict:
    """N, D and loss at D/N = ratio, the extra compute with which that reaches ``target``, the limits kept."""

    def at(log_budget):
        N = size_for(cost, math.exp(log_budget), lambda n: ratio * n)
        loss = law.predict(params, {"N": np.array([N]), "D": np.array([ratio * N])})
        return N, float(np.squeeze(loss))

    start = math.log(budget)
    N, loss = at(start)
    low, high = -REACH / 4, REACH / 4  # log of compute over the budget; limits may make the rule the better
    extra = None
    if at(start + high)[1] <= target:
        for _ in range(HALVINGS):
            middle = 0.5 * (low + high)
            low, high = (middle, high) if at(start + middle)[1] > target else (low, middle)
        extra = math.expm1(high)
    return {
        "tokens_per_param": ratio, "N": N, "D": ratio * N, "loss": loss,
        "extra_compute": extra, "breaks": not bool(limits.allows(N, ratio * N)),
    }  # fmt: skip


def trained_at(
    law, params, N: np.ndarray, budget: float, cost: Flops, limits: Limits
) -> dict[str, np.ndarray]:
    """D, loss and extra compute [S] of given sizes [S]; NaN for those that the limits forbid.

    Extra compute is the share by which a size costs more than the least compute for its own loss.
    """
    N = np.asarray(N, float)
    D = tokens_within(cost, N, budget, limits)
    good = np.isfinite(D)
    loss, extra = np.full(N.shape, np.nan), np.full(N.shape, np.nan)
    loss[good] = law.predict(params, {"N": N[good], "D": D[good]})
    if good.any():
        least = least_budget(law, params, loss[good], cost, limits)["budget"]
        extra[good] = np.maximum(np.asarray(cost(N[good], D[good])) / least - 1.0, 0.0)
    return {"D": D, "loss": loss, "extra_compute": extra}


def build(shape: Callable[[float], Mapping], N: float, allowed: Callable[[float], bool]) -> dict | None:
    """The shape for N; where that breaks the limits, the shape of the nearest size that keeps them, or None.

    Raises:
      FitError: the shape does not say how many parameters it has.
    """

    def made(size: float) -> dict:
        out = dict(shape(size))
        if "params" not in out:
            raise FitError(
                f"shape returned {', '.join(out)}; it must give 'params', the shape's own parameter count"
            )
        return out

    first = made(N)
    nudges = NUDGES if float(first["params"]) > N else 1.0 / NUDGES
    tries = (first, *(made(N * nudge) for nudge in nudges)) if not allowed(first["params"]) else (first,)
    return next((out for out in tries if allowed(out["params"])), None)


def read_sizes(sizes: Sequence) -> list[dict]:
    """Numbers of parameters, or shapes with ``params``, as shapes in rising order.

    Raises:
      FitError: no size, or one that is no positive number.
    """
    shapes = [dict(s) if isinstance(s, Mapping) else {"params": s} for s in sizes]
    if not shapes:
        raise FitError("sizes is empty; give the sizes that can be built")
    for shape in shapes:
        shape["params"] = positive("a size in sizes", shape.get("params"))
    return sorted(shapes, key=lambda s: s["params"])


def compare_sizes(
    law, fit, draws_best, shapes, budget: float, point: Mapping, cost: Flops, limits: Limits
) -> list:
    """The given sizes side by side, best first; those that the limits forbid last, with no loss.

    Args:
      draws_best: loss of each draw's own optimum, [B], or empty.

    Returns:
      Dicts of N, D, loss, loss_above (the optimum's), extra_compute, regret (the mean over draws of the
      loss above the draw's own optimum) and best_share (of the draws in which it is the best size).

    Raises:
      FitError: the limits forbid every size.
    """
    N = np.array([s["params"] for s in shapes])
    got = trained_at(law, fit.params, N, budget, cost, limits)
    good = np.isfinite(got["D"])
    if not good.any():
        raise FitError("the limits forbid every size in sizes at this budget")
    regret, share = np.full(N.shape, np.nan), np.full(N.shape, np.nan)
    if len(draws_best):
        params = {k: v[:, None] for k, v in fit.draw_params().items()}
        loss_BxS = np.asarray(law.predict(params, {"N": N[good], "D": got["D"][good]}))
        above = loss_BxS - np.asarray(draws_best)[:, None]
        above = above[np.isfinite(above).all(1)]
        if len(above):
            regret[good] = above.mean(0)
            share[good] = np.bincount(np.argmin(above, 1), minlength=int(good.sum())) / len(above)
    columns = {
        "N": N, "D": got["D"], "loss": got["loss"], "loss_above": got["loss"] - point["loss"],
        "extra_compute": got["extra_compute"], "regret": regret, "best_share": share,
    }  # fmt: skip
    order = np.argsort(np.where(good, got["loss"], np.inf), kind="stable")
    return [{k: float(v[i]) if np.isfinite(v[i]) else None for k, v in columns.items()} for i in order]
