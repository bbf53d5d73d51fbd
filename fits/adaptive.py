"""Which cells of a pool to train next: those that narrow a quantity most per FLOP, a whole round at once.

Around a fit the log loss of a run is linear in the law's parameters, beside an effect that runs of one size
share and the run's own error. Knowledge of all of these is then normal, and a run narrows it by an amount
that does not depend on its outcome: the c-optimal design of a study (Elfving 1952; Pukelsheim 2006, chapter
2), here local, greedy and per FLOP. Unlike a ranking by the bootstrap's draws (``fits.design``) it needs no
draws, which the few sizes of a search's first rounds do not give.

A search that looks at its own interval stops sooner where that is narrow by luck: see ``is_narrow``.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from fits.allocate import optimum
from fits.errors import FitError
from fits.table import group_close

QUANTITIES = ("a", "N*")
STEP = 1e-4  # relative, of central differences
PRIOR_SD = 3.0  # of each parameter, relative to its estimate: as good as unknown, yet never singular
LEAST_SHARED = 0.1  # of the variance, taken to be shared by a size's runs: few sizes do not know it
LEAST_SD = 1e-6  # of log loss


@dataclasses.dataclass
class NextCells:
    """Cells chosen for a round.

    Attributes:
      picks: indices into the pool, in the order in which they were chosen. flops: what they cost in all.
      before, after: 95 % half-width of the quantity (of its natural log for N*) now and with them in, by the
        linear model with the fit's own scatter.
    """

    picks: list[int]
    flops: float
    before: float
    after: float


def value_of(law, quantity: str, at: float | None, flops=None) -> Callable[[Mapping], np.ndarray]:
    """The quantity as a function of the law's parameters; N* by its natural log.

    Raises:
      FitError: another quantity, a law without exponents, or N* without a budget.
    """
    if quantity not in QUANTITIES:
        raise FitError(f"quantity is {quantity!r}; it must be one of {', '.join(QUANTITIES)}")
    if quantity == "N*":
        if at is None:
            raise FitError("N* is wanted at no budget; give one in FLOPs")
        return lambda p: np.log(np.asarray(optimum(law, p, at, flops)["N"], float))
    if "a" not in law.compute_exponents({k: np.ones(1) for k in law.parameters}):
        raise FitError(f"the law {law.name} has no exponent a")
    return lambda p: np.asarray(law.compute_exponents(p)["a"], float)


def reported_half_width(fit, quantity: str = "a", at: float | None = None, flops=None) -> float:
    """Half the fit's own 95 % interval of the quantity (of its log for N*); infinite where it has none."""
    measure = value_of(fit.law, quantity, at, flops)
    if fit.status not in ("converged", "boundary") or not len(fit.draws):
        return math.inf
    if quantity == "a":
        ends = fit.intervals["a"]["95"]
        return math.inf if ends is None else (ends[1] - ends[0]) / 2
    with np.errstate(all="ignore"):
        draws = np.exp(measure(fit.draw_params()))
        best = float(np.exp(np.squeeze(measure(fit.params))))
        ends = fit.interval_of(draws[np.isfinite(draws)], best, lambda p: np.exp(measure(p)), step=1e-3)["95"]
    return math.inf if ends is None or not ends[0] > 0 else math.log(ends[1] / ends[0]) / 2


class Knowledge:
    """What is known of the parameters and of each size's effect, as a normal distribution around a fit.

    Args:
      fit: of a law in N and D. sizes: group of every point by its N, int [points]. points: (N, D), float
        [points, 2], all that may ever be asked about.
    """

    def __init__(self, fit, points: np.ndarray, sizes: np.ndarray, measure: Callable):
        law, names = fit.law, fit.law.parameters
        if set(law.variables) != {"N", "D"}:
            raise FitError(
                f"{law.name} is in {', '.join(law.variables)}; cells are chosen for a law in N and D"
            )
        x = {"N": points[:, 0], "D": points[:, 1]}
        base = {k: float(fit.params[k]) for k in names}
        free = [k for k in names if k not in fit.fixed]
        slopes, gradient = [], []
        for name in free:
            scale = abs(base[name]) or 1.0
            up, down = (base | {name: base[name] + s * STEP * scale} for s in (1, -1))
            slopes.append((np.log(law.predict(up, x)) - np.log(law.predict(down, x))) / (2 * STEP))
            gradient.append(float(np.squeeze(measure(up) - measure(down))) / (2 * STEP))
        K, S = len(free), int(sizes.max()) + 1
        variance = max(fit.diagnostics["rms_residual"], LEAST_SD) ** 2
        self.freedom = max(int(fit.diagnostics["degrees_of_freedom"]), 1)
        variance *= (self.freedom + K) / self.freedom
        shared = max(float(fit.diagnostics["icc"]), LEAST_SHARED)
        self.error = (1 - shared) * variance
        self.rows = np.concatenate([np.stack(slopes, 1), np.eye(S)[sizes]], 1)  # [points, K + S]
        self.gradient = np.concatenate([gradient, np.zeros(S)])
        self.covariance = np.diag(np.concatenate([np.full(K, PRIOR_SD**2), np.full(S, shared * variance)]))
        if not (np.isfinite(self.rows).all() and np.isfinite(self.gradient).all()):
            raise FitError("the fitted law has no finite slopes at the cells of the pool")

    @property
    def half_width(self) -> float:
        """95 %, by Student's t with the fit's degrees of freedom."""
        from scipy import stats  # loaded when needed: `import fits` is light

        variance = float(self.gradient @ self.covariance @ self.gradient)
        return float(stats.t.ppf(0.975, self.freedom)) * math.sqrt(max(variance, 0.0))

    def learn(self, i: int) -> None:
        """A run at point i has been made."""
        v = self.covariance @ self.rows[i]
        self.covariance = self.covariance - np.outer(v, v) / (self.rows[i] @ v + self.error)

    def gains(self, points: Sequence[int]) -> np.ndarray:
        """By how much a run at each of these points would lower the quantity's variance, float [points]."""
        spread = self.rows[points] @ self.covariance
        return (spread @ self.gradient) ** 2 / ((spread * self.rows[points]).sum(1) + self.error)


def next_cells(
    fit,
    done: Sequence[tuple[float, float]],
    pool: Sequence[tuple[float, float]],
    price: Callable[[Sequence[int]], np.ndarray],
    spend: float,
    *,
    quantity: str = "a",
    at: float | None = None,
    flops=None,
) -> NextCells:
    """The cells of a pool that narrow the quantity most per FLOP, one after another, within a spending limit.

    Args:
      fit: of what is done. done, pool: (N, D) of what is trained and of what may be.
      price: (indices chosen so far) to the FLOPs that each cell of the pool costs on top of them, float
        [pool]; so a trunk that is there already makes its other branches cheap.
      spend: FLOPs that the round may cost. quantity: "a", or "N*" at the budget ``at`` under ``flops``.

    Raises:
      FitError: as ``value_of``, or a law that is not in N and D.
    """
    measure = value_of(fit.law, quantity, at, flops)
    points = np.asarray([*done, *pool], float).reshape(-1, 2)
    known = Knowledge(fit, points, group_close(points[:, 0]), measure)
    for i in range(len(done)):
        known.learn(i)
    before, picks, spent = known.half_width, [], 0.0
    candidates = np.arange(len(done), len(points))
    open_ = np.ones(len(pool), bool)
    while open_.any():
        cost = np.asarray(price(picks), float)
        fits_in = open_ & (spent + cost <= spend)
        score = np.where(fits_in, known.gains(candidates) / np.maximum(cost, 1e-300), -1.0)
        best = int(np.argmax(score))
        if score[best] <= 0:
            break
        spent += float(cost[best])
        picks.append(best)
        open_[best] = False
        known.learn(candidates[best])
    return NextCells(picks, spent, before, known.half_width)


def is_narrow(widths: Sequence[tuple[float, float]], within: float) -> bool:
    """Whether a search may stop: its width was within what was asked for in two rounds, by two measures.

    A fit's interval from few runs is narrow now and then by luck, and a search that stopped at the first such
    round would stop too soon (the optional stopping of sequential analysis). So both the fit's interval and
    the linear model's must be within, in this round and in the one before. benchmarks/budgeted_search.py
    measures how often the interval holds the truth then.

    Args:
      widths: (reported, by the linear model) of each round, in order.
    """
    return len(widths) >= 2 and all(max(pair) <= within for pair in widths[-2:])
