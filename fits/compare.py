"""Two studies against each other: how much compute one saves over the other, and where they cross.

Both are read on their compute-optimal frontiers: the lowest loss that each law reaches at a budget.
The effective speed-up of B over A at budget C is the factor x at which A, given x C, reaches the
loss that B reaches with C.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from fits.allocate import SEARCH_STEP, optimum
from fits.checks import flag
from fits.errors import FitError
from fits.printed import Printed, open_ends, word
from fits.uncertainty import LEVELS

if TYPE_CHECKING:
    from fits.fit import Fit

REACH = 12 * math.log(10.0)  # a speed-up is sought from 1e-12 to 1e12; beyond it is called unattainable
SEARCHED_REACH = 4 * math.log(10.0)  # 1e-4 to 1e4, where the frontier has no closed form and is dear
STEPS = 60  # halvings of that range: to below 1e-15 in log budget
FRONTIER_POINTS = 49  # of a frontier found by search, spline-interpolated between
ROUNDING = 1e-7  # in loss: frontiers closer than this are the same, as far as a search can tell
SLOPE_STEP = 1e-3  # of log budget, for the slope of a frontier
SCAN = 241  # budgets scanned for a change of sign before it is bisected
FAR, VERY_FAR = 10.0, 100.0
SOUND = ("converged", "boundary")


class _Frontier:
    """The lowest loss of each of B parameter sets at each one's own budget."""

    def __init__(self, law, params: Mapping[str, np.ndarray], flops, low: float, high: float):
        self.law, self.params, self.spline = law, params, None
        closed = None
        with np.errstate(all="ignore"):
            if flops is None:
                closed = law.optimum(params, np.full(self.count, math.exp(low)))
        if closed is None:
            from scipy.interpolate import CubicSpline

            grid = np.linspace(low, high, FRONTIER_POINTS)
            losses = [optimum(law, params, math.exp(c), flops)["loss"] for c in grid]
            table_GxB = np.array([np.broadcast_to(np.squeeze(v), self.count) for v in losses])
            self.good_B = np.isfinite(table_GxB).all(0)
            self.grid = grid
            self.spline = CubicSpline(grid, np.where(self.good_B, table_GxB, 0.0))

    @property
    def count(self) -> int:
        return len(next(iter(self.params.values())))

    def loss(self, log_c_B: np.ndarray) -> np.ndarray:
        """Loss [B] at natural-log budgets [B]; NaN where there is no optimum."""
        if self.spline is None:
            with np.errstate(all="ignore"):
                return np.asarray(self.law.optimum(self.params, np.exp(log_c_B))["loss"], float)
        at = np.clip(np.searchsorted(self.grid, log_c_B, side="right") - 1, 0, len(self.grid) - 2)
        step, lanes = log_c_B - self.grid[at], np.arange(self.count)
        c = self.spline.c[:, at, lanes]
        value = ((c[0] * step + c[1]) * step + c[2]) * step + c[3]
        inside = (log_c_B >= self.grid[0] - 1e-9) & (log_c_B <= self.grid[-1] + 1e-9)
        return np.where(self.good_B & inside, value, np.nan)


@dataclasses.dataclass
class StudyComparison(Printed):
    """Effective speed-up of B over A, and where the two frontiers cross.

    Attributes:
      speedups: one dict per budget: budget, loss_a, loss_b, speedup with its intervals ("80", "95"),
        the share of draws in which A never reaches B's loss, and the budget over each table's largest.
        An infinite speed-up (A's floor lies above B's loss) is written "infinite".
      crossover: {"budgets", "80", "95", "share", "several", "factor_a", "factor_b", "range", "text"}:
        the budgets in ``range`` at which both losses are equal; the interval is over those draws that
        cross, whose share is ``share``.
      unit: of all budgets.
    """

    name_a: str
    name_b: str
    speedups: list[dict]
    crossover: dict[str, Any]
    draws: int
    method: str
    flags: list[dict]
    unit: str = "FLOPs"

    def to_dict(self) -> dict:
        return dataclasses.asdict(self)

    def __str__(self) -> str:
        lines = [f"flag: {f['text']}" for f in self.flags]
        lines.append(
            f"Effective speed-up of {self.name_b} over {self.name_a} (above 1: {self.name_b} saves):"
        )
        for s in self.speedups:
            lines.append(f"  at {s['budget']:.3g} {self.unit}: {s['text']}")
        lines += [self.crossover["text"], self.method]
        return "\n".join(lines)


def compare(
    fit_a: Fit,
    fit_b: Fit,
    budget: float | Sequence[float],
    *,
    flops_a=None,
    flops_b=None,
    names: tuple[str, str] = ("A", "B"),
    search: tuple[float, float] | None = None,
    seed: int = 0,
    unit: str = "FLOPs",
    tops: tuple[float, float] | None = None,
) -> StudyComparison:
    """Effective speed-up of study B over study A at each budget, and their crossover.

    Args:
      budget: training FLOPs, one or several.
      flops_a, flops_b: training FLOPs of (N, D) on arrays; default 6 N D.
      search: budgets between which a crossover is sought; default from a tenth of the smallest run of
        either table to 1000 times the largest.
      seed: draws of the two fits are paired at random, as of independent studies.
      unit: of budgets, for the words; another than FLOPs where ``flops_a`` and ``flops_b`` give another cost.
      tops: the cost of the largest run of either table, beyond which it is extrapolated; default its FLOPs.

    Raises:
      FitError: a bad budget or range, a fit whose status forbids numbers, or a law not in N and D.
    """
    for name, fit in zip(names, (fit_a, fit_b), strict=True):
        if fit.status not in SOUND:
            reasons = "; ".join(fit.reasons)
            raise FitError(f"fit {name} is {fit.status} ({reasons}), so it can be compared with nothing")
        if set(fit.law.variables) != {"N", "D"}:
            raise FitError(
                f"fit {name} has the law {fit.law.name} in "
                f"{', '.join(fit.law.variables)}; a frontier needs N and D"
            )
    budgets = np.atleast_1d(np.asarray(budget, float))
    if not budgets.size or not (np.isfinite(budgets) & (budgets > 0)).all():
        raise FitError(f"budget is {budget!r}; it must be one or several positive numbers of FLOPs")
    tops = tops or [fit.diagnostics["range"]["flops"][1] for fit in (fit_a, fit_b)]
    if search is None:
        lowest = min(fit.diagnostics["range"]["flops"][0] for fit in (fit_a, fit_b))
        search = (lowest / 10, 1000 * max(tops))
    if not (len(search) == 2 and 0 < search[0] < search[1] < math.inf):
        raise FitError(f"search is {search!r}; it must be two rising positive budgets in FLOPs")
    closed = flops_a is None and fit_a.law.optimum(fit_a.params, float(budgets[0])) is not None
    reach = REACH if closed else SEARCHED_REACH
    low = min(math.log(search[0]), math.log(budgets.min()))
    high = max(math.log(search[1]), math.log(budgets.max()))
    sets = [_parameter_sets(fit_a, fit_b, seed, side) for side in (0, 1)]
    a = _Frontier(fit_a.law, sets[0], flops_a, low - reach, high + reach)
    b = _Frontier(fit_b.law, sets[1], flops_b, low, high)
    flags = comparison_flags(names, (fit_a, fit_b), budgets, tops)
    speedups = [_speedup(a, b, float(c), reach, names, tops) for c in budgets]
    for got in speedups:
        _with_few_clusters(got, a, (fit_a, fit_b), (flops_a, flops_b))
    draws = a.count - 1
    method = f"{draws} independent pairs of draws of the two fits" if draws else "no draws, so no intervals"
    return StudyComparison(
        *names, speedups, _crossover(a, b, search, names, tops, unit), draws,
        f"Both at their own compute-optimal N and D; {method}.", flags, unit,
    )  # fmt: skip


def _parameter_sets(fit_a: Fit, fit_b: Fit, seed: int, side: int) -> dict[str, np.ndarray]:
    """The point estimate, then draws in random order, arrays [1 + draws]."""
    count = min(len(fit_a.draws), len(fit_b.draws))
    fit = (fit_a, fit_b)[side]
    rng = np.random.default_rng([seed, side])  # two streams: equal schemes and seeds must not pair up
    order = rng.permutation(len(fit.draws))[:count]
    return {k: np.concatenate([[fit.params[k]], v[order]]) for k, v in fit.draw_params().items()}


def comparison_flags(names, fits, budgets, tops) -> list[dict]:
    """What to doubt of a comparison at budgets [B] in FLOPs; ``tops`` are the largest of the tables."""
    out = []
    for name, fit, top in zip(names, fits, tops, strict=True):
        ratio = budgets.max() / top
        if ratio > FAR:
            far = "very far" if ratio > VERY_FAR else "far"
            text = f"{far} extrapolation: a budget is {ratio:.3g} times the largest of {name}"
            out.append(flag("far_extrapolation", text + "; the law's form is assumed to hold there"))
        graver = ("boundary", "few_clusters", "uncertain", "no_intervals", "failed_resamples")
        out += [flag(f["code"], f"{name}: {f['text']}") for f in fit.flags if f["code"] in graver]
    columns = [fit.data.get("columns", {}).get("loss", "loss") for fit in fits]
    if len(set(columns)) > 1:
        shared = [f"{name} {column}" for name, column in zip(names, columns, strict=True)]
        text = f"the losses come from columns of different names ({', '.join(shared)})"
        out.append(flag("loss_columns", text + "; they compare only on one evaluation set, in one unit"))
    return out


def _speedup(a: _Frontier, b: _Frontier, budget: float, reach: float, names, tops) -> dict:
    target_B = b.loss(np.full(b.count, math.log(budget)))
    low, high = (np.full(a.count, math.log(budget) + s * reach) for s in (-1, 1))
    never_B = a.loss(high) > target_B
    always_B = a.loss(low) <= target_B
    bad_B = ~np.isfinite(target_B + a.loss(low) + a.loss(high))
    for _ in range(STEPS):
        middle = 0.5 * (low + high)
        short = a.loss(middle) > target_B
        low, high = np.where(short, middle, low), np.where(short, high, middle)
    x_B = np.exp(0.5 * (low + high) - math.log(budget))
    x_B = np.where(never_B, np.inf, np.where(always_B, 0.0, x_B))
    x_B = np.where(bad_B, np.nan, x_B)
    loss_a = float(a.loss(np.full(a.count, math.log(budget)))[0])
    got: dict[str, Any] = {"estimate": word(x_B[0])} | open_ends(x_B[1:])
    drawn = x_B[1:][~np.isnan(x_B[1:])]
    share = float(np.isinf(drawn).mean()) if len(drawn) else None
    if np.isnan(x_B[0]):
        text = "no speed-up: one of the two has no optimum there"
    elif np.isinf(x_B[0]):
        text = f"infinite: {names[0]} does not reach {names[1]}'s loss {target_B[0]:.4g} "
        text += f"with {math.exp(reach):.0e} times the compute"
    elif x_B[0] == 0:
        text = (
            f"below {math.exp(-reach):.0e}: {names[0]} reaches {names[1]}'s loss {target_B[0]:.4g} with less"
        )
    else:
        text = f"{x_B[0]:.4g} (losses {loss_a:.4g} and {target_B[0]:.4g})"
    if share:
        text += f"; {names[0]} never reaches that loss in {100 * share:.2g} % of the draws"
    return {
        "budget": budget, "loss_a": word(loss_a), "loss_b": word(target_B[0]), "speedup": got,
        "unattainable_share": share, "factor_a": budget / tops[0], "factor_b": budget / tops[1], "text": text,
    }  # fmt: skip


def _with_few_clusters(speedup: dict, a: _Frontier, fits, flops) -> None:
    """Ends by both fits' few-cluster variances, where every draw has a speed-up; and the ends in words.

    The log of the speed-up moves with the log losses of the two optima over the slope of A's frontier.
    """
    from scipy import stats

    got = speedup["speedup"]
    few = [fit.few_clusters for fit in fits]
    drawn = got["95"] is not None and all(isinstance(v, float) and v > 0 for v in got["95"])
    if None not in few and drawn and not speedup["unattainable_share"] and isinstance(got["estimate"], float):
        there = speedup["budget"] * got["estimate"]
        parts = []
        for fit, one, c, own in zip(fits, few, (there, speedup["budget"]), flops, strict=True):

            def log_loss(params, law=fit.law, c=c, own=own):
                return np.log(optimum(law, params, c, own)["loss"])

            step = None if own is None and fit.law.optimum(fit.params, c) is not None else SEARCH_STEP
            try:
                parts.append(one.interval(log_loss, step))
            except FitError:
                return _add_ends(speedup)
        up, down = (
            float(np.log(a.loss(np.full(a.count, math.log(there) + s * SLOPE_STEP))[0])) for s in (1, -1)
        )
        slope = (up - down) / (2 * SLOPE_STEP)
        variances = [p["sd"] ** 2 for p in parts]
        total = sum(variances)
        spread = sum(v**2 / p["freedom"] for v, p in zip(variances, parts, strict=True))
        if slope < 0 and total > 0:
            got["percentile"] = {level: got[level] for level in LEVELS}
            for level in LEVELS:
                quantile = float(stats.t.ppf(0.5 + int(level) / 200, total**2 / spread))
                reach = quantile * math.sqrt(total) / -slope
                got[level] = [got["estimate"] * math.exp(s * reach) for s in (-1, 1)]
            got["method"] = "few clusters"
    _add_ends(speedup)


def _add_ends(speedup: dict) -> None:
    ends = speedup["speedup"]["95"]
    if ends:
        words = " to ".join(v if isinstance(v, str) else f"{v:.3g}" for v in ends)
        speedup["text"] += f"; 95 %: {words}"


def _crossover(a: _Frontier, b: _Frontier, search, names, tops, unit) -> dict:
    """All crossings of the point estimates; of each draw the first one in range."""
    grid = np.linspace(math.log(search[0]), math.log(search[1]), SCAN)
    gap_GxB = np.array([a.loss(np.full(a.count, c)) - b.loss(np.full(b.count, c)) for c in grid])
    # a gap of rounding alone has no sign: two fits of one table are the same frontier
    gap_GxB = np.where(np.abs(gap_GxB) > ROUNDING, gap_GxB, np.where(np.isnan(gap_GxB), np.nan, 0.0))
    change = (np.sign(gap_GxB[:-1]) != np.sign(gap_GxB[1:])) & (gap_GxB[:-1] != 0)
    change &= np.isfinite(gap_GxB[:-1]) & np.isfinite(gap_GxB[1:])
    first_B, count_B = change.argmax(0), change.sum(0)
    roots_B = np.where(count_B > 0, _root(a, b, grid, first_B), np.nan)
    points = []
    for g in np.flatnonzero(change[:, 0]):
        points.append(float(np.exp(_root(a, b, grid, np.where(np.arange(a.count) == 0, g, first_B))[0])))
    drawn = np.exp(roots_B[1:][count_B[1:] > 0])
    draws = a.count - 1
    share = float((count_B[1:] > 0).mean()) if draws else None
    several = float((count_B[1:] > 1).mean()) if draws else None
    ends = open_ends(drawn)
    span = f"from {search[0]:.3g} to {search[1]:.3g} {unit}"
    if not points:
        better = names[0] if gap_GxB[len(grid) // 2, 0] < 0 else names[1]
        text = f"No crossover {span}: {better} is the better throughout."
        if not np.nanmax(np.abs(gap_GxB[:, 0]), initial=0.0) > 0:
            text = f"No crossover {span}: the two frontiers are the same."
    else:
        where = " and ".join(f"{c:.4g}" for c in points)
        far = " and ".join(
            f"{points[0] / t:.3g} times the largest of {n}" for n, t in zip(names, tops, strict=True)
        )
        text = f"Crossover at {where} {unit} ({far})"
        if points[0] > FAR * min(tops):
            text += (
                ", a far extrapolation" if points[0] <= VERY_FAR * min(tops) else ", a very far extrapolation"
            )
        text += "."
    if share is not None:
        text += f" {100 * share:.3g} % of the draws cross {span}"
        if ends["95"]:
            text += f"; among these 95 %: {ends['95'][0]:.3g} to {ends['95'][1]:.3g}"
        text += "."
    return {
        "budgets": points, **ends, "share": share, "several": several, "range": [float(s) for s in search],
        "factor_a": points[0] / tops[0] if points else None,
        "factor_b": points[0] / tops[1] if points else None, "text": text,
    }  # fmt: skip


def _root(a: _Frontier, b: _Frontier, grid, bracket_B) -> np.ndarray:
    """Log budget [B] at which the losses are equal, by halving each lane's bracket."""
    low, high = grid[bracket_B], grid[bracket_B + 1]
    sign = np.sign(a.loss(low) - b.loss(low))
    for _ in range(STEPS):
        middle = 0.5 * (low + high)
        same = np.sign(a.loss(middle) - b.loss(middle)) == sign
        low, high = np.where(same, middle, low), np.where(same, high, middle)
    return 0.5 * (low + high)
