"""Which runs to train next: those that narrow the interval of what is to be decided, per FLOP.

Candidates are ranked by linear conditioning of the fit's draws, which is quick and, where the law bends, off
by up to a fifth. The best of them are then judged by refits of simulated tables that hold them: these
overrule the ranking where they differ by more than their Monte Carlo error, and the widths told are theirs.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np

from fits.allocate import six_nd, tokens_for
from fits.budget import positive
from fits.checks import STARVED
from fits.errors import FitError
from fits.printed import Printed
from fits.simulate import Simulation, half_widths

QUANTITIES = ("N*", "D*", "loss", "a")
LEAST_DRAWS = 100  # a covariance from fewer is off by more than about 15 %
MOST_RUNS = 200
TOP = 16  # candidates of the linear ranking that are simulated
LEAST_TABLES = 100
TOLD_APART = 2.0  # Monte Carlo errors of a difference
AS_GOOD = 0.05  # share of the narrowing per FLOP: closer ones are called no better or worse
DISAGREE = 0.25  # between the width of the draws and of simulated tables, before it is flagged


@dataclasses.dataclass
class NextRuns(Printed):
    """Chosen runs in order. Half-widths are of the 95 % interval: of the log (N*, D*, loss) or of a itself.

    Attributes:
      half_width, error: now, over simulated tables, and its Monte Carlo error (without simulation: of the
        draws, and None). draws_half_width: by the fit's own draws.
      runs: params, tokens, flops, half_width and error, the expected ones once that run is in (None where
        not simulated), linear_half_width, and rivals: simulated candidates of that step, in rank of
        narrowing per FLOP, with told_apart, whether that is below the chosen one's by more than the Monte
        Carlo error and 5 %.
      reached: None where no width was asked for. tables: how many were simulated.
    """

    quantity: str
    budget_target: float
    half_width: float
    runs: list[dict]
    flops: float
    reached: bool | None
    flags: list[dict]
    error: float | None = None
    draws_half_width: float | None = None
    tables: int = 0

    def to_dict(self) -> dict:
        return dataclasses.asdict(self)

    def __str__(self) -> str:
        lines = [f"flag: {f['text']}" for f in self.flags]
        lines.append(
            f"{self.quantity} at {self.budget_target:.4g} FLOPs: 95 % half-width "
            f"{_with_error(self.half_width, self.error)} now"
        )
        counts: dict[tuple, int] = {}
        for r in self.runs:
            key = r["params"], r["tokens"], r["flops"]
            counts[key] = counts.get(key, 0) + 1
        for (N, D, C), count in sorted(counts.items(), key=lambda kv: -kv[1] * kv[0][2]):
            times = "" if count == 1 else f" x {count}, under other seeds"
            lines.append(f"  N {N:.4g}, D {D:.4g}, {C:.4g} FLOPs{times}")
        if self.runs:
            last = self.runs[-1]
            lines.append(f"  then {_with_error(last['half_width'], last['error'])} is expected")
            close = [r for r in self.runs[0]["rivals"] if not r["told_apart"]]
            if close:
                named = "; ".join(
                    f"N {r['params']:.3g}, D {r['tokens']:.3g} ({_with_error(r['half_width'], r['error'])})"
                    for r in close
                )
                lines.append(f"  {self.tables} simulated tables cannot tell the first one from {named}")
        return "\n".join([*lines, f"  in all {self.flops:.4g} FLOPs"])


def _with_error(width: float, error: float | None) -> str:
    return f"{width:.3g}" if error is None else f"{width:.3g} ± {error:.1g}"


def _ratios(fit) -> tuple[float, float]:
    """Tokens a parameter of candidate runs: as in the table, and never starved, where a law bends."""
    ratios = [r["tokens"] / r["params"] for r in fit.rows if r["outcome"] == "used"]
    return max(min(ratios), STARVED), max(ratios)


class _Candidates:
    """Runs that could be made, and their linear ranking.

    Conditioning the draws linearly on a run's loss f, var(q) falls by cov(q, f)^2 / (var f + noise).
    """

    def __init__(self, fit, quantity, budget_target, flops, max_flops, pairs):
        cost, ranges = flops or six_nd, fit.diagnostics["range"]
        dearest = positive("max_flops", ranges["flops"][1] if max_flops is None else max_flops)
        if pairs is None:
            N = np.repeat(np.geomspace(*ranges["params"], 8), 8)
            cheapest = min(
                ranges["flops"][0], dearest
            )  # smaller runs than any of the table are another regime
            D = tokens_for(cost, N, np.tile(np.geomspace(cheapest, dearest, 8), 8))
            low, high = _ratios(fit)
            keep = (ranges["tokens"][0] / 4 <= D) & (ranges["tokens"][1] * 4 >= D)
            keep &= (low * N <= D) & (high * N >= D)
            N, D = N[keep], D[keep]
        else:
            N, D = np.asarray(pairs, float).reshape(-1, 2).T
        price = np.asarray(cost(N, D), float)
        good = (price <= dearest * (1 + 1e-9)) & (price > 0)
        self.N, self.D, self.price, self.dearest = N[good], D[good], price[good], dearest
        if not len(self.N):
            raise FitError(f"no candidate run costs {dearest:.4g} FLOPs (max_flops) or less")
        if quantity == "a":
            a = fit.law.compute_exponents(fit.draw_params()).get("a", np.nan)
            q = np.asarray(a) * np.ones(len(fit.draws))
        else:
            q = np.log(fit.optimum_draws(budget_target, flops)[quantity.rstrip("*")][:, 0])
        sample = np.column_stack([q, np.log(fit.predict_draws(params=self.N, tokens=self.D))])
        sample = sample[np.isfinite(sample).all(1)]
        if len(sample) < LEAST_DRAWS:
            raise FitError(f"{quantity} exists in {len(sample)} draws; {LEAST_DRAWS} or more are needed")
        self.S = np.cov(sample.T)
        variance, shared = fit.diagnostics["rms_residual"] ** 2, fit.diagnostics["icc"]
        same = np.abs(np.log(self.N[:, None] / self.N[None])) < 1e-6
        self.S[1:, 1:] += shared * variance * same  # runs of one size share its effect
        self.noise = max((1 - shared) * variance, 1e-16)

    @property
    def width(self) -> float:
        return 1.96 * math.sqrt(max(self.S[0, 0], 0.0))

    def ranked(self) -> np.ndarray:
        gain = self.S[0, 1:] ** 2 / (np.diag(self.S)[1:] + self.noise)
        return np.argsort(-gain / self.price, kind="stable")

    def take(self, i: int) -> dict:
        """Conditions on candidate i, and describes it."""
        S = self.S
        self.S = S - np.outer(S[:, i + 1], S[i + 1]) / (S[i + 1, i + 1] + self.noise)
        return self.describe(i) | {
            "half_width": self.width, "error": None, "linear_half_width": self.width, "rivals": [],
        }  # fmt: skip

    def describe(self, i: int) -> dict:
        return {"params": float(self.N[i]), "tokens": float(self.D[i]), "flops": float(self.price[i])}


def _check(fit, quantity: str, budget_target, tables) -> float:
    if quantity not in QUANTITIES:
        raise FitError(f"quantity is {quantity!r}; it must be one of {', '.join(QUANTITIES)}")
    budget_target = positive("budget_target", budget_target)
    if set(fit.law.variables) != {"N", "D"} or len(fit.draws) < LEAST_DRAWS:
        raise FitError(
            f"{fit.law.name} has {len(fit.draws)} draws; the choice of runs needs a law in N and D with "
            f"{LEAST_DRAWS} draws or more (bootstraps=)"
        )
    if isinstance(tables, bool) or not isinstance(tables, int) or not (tables == 0 or tables >= LEAST_TABLES):
        raise FitError(f"tables is {tables!r}; it must be 0 (no simulation) or at least {LEAST_TABLES}")
    return budget_target


def _pick(pool: _Candidates, simulation: Simulation, chosen: list, now_B) -> tuple[dict, np.ndarray]:
    """The best of the top candidates by narrowing per FLOP, and its simulated values; the others are rivals.

    The first of the linear ranking stays, unless another one's simulated narrowing per FLOP is above its by
    more than the Monte Carlo error.
    """
    top = pool.ranked()[:TOP]
    pairs = [(r["params"], r["tokens"]) for r in chosen]
    values = [simulation.values([*pairs, (pool.N[i], pool.D[i])]) for i in top]
    width, error, again = half_widths([now_B, *values])
    price = pool.price[top]
    score = (width[0] ** 2 - width[1:] ** 2) / price
    drawn = (again[:, :1] ** 2 - again[:, 1:] ** 2) / price

    def apart(i: int, k: int) -> bool:
        spread = float((drawn[:, i] - drawn[:, k]).std(ddof=1))
        return bool(score[i] - score[k] > max(TOLD_APART * spread, AS_GOOD * abs(score[i])))

    best = int(np.argmax(score))
    best = best if best != 0 and apart(best, 0) else 0
    rivals = [
        pool.describe(top[k])
        | {"half_width": float(width[1 + k]), "error": float(error[1 + k]), "told_apart": apart(best, k)}
        for k in np.argsort(-score, kind="stable")
        if k != best
    ]
    found = {"half_width": float(width[1 + best]), "error": float(error[1 + best]), "rivals": rivals}
    return pool.take(top[best]) | found, values[best]


def _answer(asked, linear_now, simulated, runs, target, tables, dearest) -> NextRuns:
    """Puts the answer together.

    Args:
      asked: quantity and budget. simulated: the width now and its error, or None.
    """
    now, error = simulated or (linear_now, None)
    width = runs[-1]["half_width"] if runs else now
    reached = None if target is None else width <= target
    flags = []
    if reached is False:
        text = f"not reachable within {len(runs)} runs of at most {dearest:.3g} FLOPs each"
        flags.append({"code": "not_reached", "text": text})
    if simulated is None:
        text = "widths are expected ones, from the draws by a linear approximation"
        flags.append({"code": "linearised", "text": text})
    elif abs(math.log(max(linear_now, 1e-300) / max(now, 1e-300))) > DISAGREE:
        text = f"the fit's draws give a half-width of {linear_now:.3g} now, simulated tables {now:.3g}"
        flags.append({"code": "widths_differ", "text": text})
    spent = float(sum(r["flops"] for r in runs))
    return NextRuns(*asked, now, runs, spent, reached, flags, error, linear_now, tables)


def next_runs(
    fit,
    candidates=None,
    *,
    quantity="N*",
    budget_target,
    flops=None,
    max_flops=None,
    batch=1,
    tables=1000,
    seed=0,
) -> NextRuns:
    """The ``batch`` runs that most reduce the variance of a quantity per FLOP, chosen one after another.

    Args:
      candidates: (N, D) pairs; default a grid over the table's sizes and up to ``max_flops`` a run.
      tables: simulated tables by which the best 16 of the linear ranking are judged; 0 for the linear
        ranking alone. seed: of the simulation.

    Raises:
      FitError: a bad quantity, number or batch, a fit with few draws, or no candidate within ``max_flops``.
    """
    if isinstance(batch, bool) or not isinstance(batch, int | np.integer) or batch < 1:
        raise FitError(f"batch is {batch!r}; it must be a positive whole number of runs")
    budget_target = _check(fit, quantity, budget_target, tables)
    pool = _Candidates(fit, quantity, budget_target, flops, max_flops, candidates)
    linear_now, simulated, runs = pool.width, None, []
    if not tables:
        runs = [pool.take(int(pool.ranked()[0])) for _ in range(batch)]
    else:
        simulation = Simulation(fit, quantity, budget_target, flops, tables, seed)
        now = simulation.values()
        width, error, _ = half_widths([now])
        simulated = float(width[0]), float(error[0])
        for _ in range(batch):
            run, now = _pick(pool, simulation, runs, now)
            runs.append(run)
    return _answer((quantity, budget_target), linear_now, simulated, runs, None, tables, pool.dearest)


def spend_for(
    fit, *, quantity="N*", budget_target, flops=None, max_flops=None, within=0.10, tables=1000, seed=0
) -> NextRuns:
    """Runs until the 95 % half-width is ``within`` (a share; for ``a``, an amount), or 200 of them.

    The runs are those of the linear ranking; how many of them it takes is found by simulated tables (with
    ``tables=0`` by the linear widths).
    """
    within = positive("within", within)
    target = within if quantity == "a" else math.log1p(within)
    budget_target = _check(fit, quantity, budget_target, tables)
    pool = _Candidates(fit, quantity, budget_target, flops, max_flops, None)
    linear_now, simulated, runs = pool.width, None, []
    while len(runs) < MOST_RUNS and (tables or (runs[-1]["half_width"] if runs else linear_now) > target):
        runs.append(pool.take(int(pool.ranked()[0])))
    if tables:
        simulation = Simulation(fit, quantity, budget_target, flops, tables, seed)
        width, error, _ = half_widths([simulation.values()])
        simulated = float(width[0]), float(error[0])
        runs = _fewest(simulation, runs, target) if simulated[0] > target else []
    return _answer((quantity, budget_target), linear_now, simulated, runs, target, tables, pool.dearest)


def _fewest(simulation: Simulation, runs: list[dict], target: float) -> list[dict]:
    """The fewest of the runs, in order, whose simulated width is within the target (all where none are)."""

    def measured(count: int) -> list[dict]:
        width, error, _ = half_widths([simulation.values([(r["params"], r["tokens"]) for r in runs[:count]])])
        last = runs[count - 1] | {"half_width": float(width[0]), "error": float(error[0])}
        return [*({**r, "half_width": None} for r in runs[: count - 1]), last]

    low, high = 0, len(runs)
    best = measured(high)
    while best[-1]["half_width"] <= target and high - low > 1:
        middle = (low + high) // 2
        tried = measured(middle)
        if tried[-1]["half_width"] <= target:
            high, best = middle, tried
        else:
            low = middle
    return best
