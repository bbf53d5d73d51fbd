"""Which runs to train next: those that narrow the interval of what is to be decided, per FLOP."""

from __future__ import annotations

import dataclasses
import math

import numpy as np

from fits.allocate import six_nd, tokens_for
from fits.budget import positive
from fits.checks import STARVED
from fits.errors import FitError
from fits.printed import Printed

QUANTITIES = ("N*", "D*", "loss", "a")
LEAST_DRAWS = 100  # a covariance from fewer is off by more than about 15 %
MOST_RUNS = 200


@dataclasses.dataclass
class NextRuns(Printed):
    """Chosen runs in order. Half-widths are of the 95 % interval: of the log (N*, D*, loss) or of a itself.

    Attributes:
      runs: params, tokens, flops and half_width, the expected one once that run is in.
      reached: None where no width was asked for.
    """

    quantity: str
    budget_target: float
    half_width: float
    runs: list[dict]
    flops: float
    reached: bool | None
    flags: list[dict]

    def to_dict(self) -> dict:
        return dataclasses.asdict(self)

    def __str__(self) -> str:
        lines = [f"flag: {f['text']}" for f in self.flags]
        lines.append(
            f"{self.quantity} at {self.budget_target:.4g} FLOPs: 95 % half-width {self.half_width:.3g} now"
        )
        counts: dict[tuple, int] = {}
        for r in self.runs:
            key = r["params"], r["tokens"], r["flops"]
            counts[key] = counts.get(key, 0) + 1
        for (N, D, C), count in sorted(counts.items(), key=lambda kv: -kv[1] * kv[0][2]):
            times = "" if count == 1 else f" x {count}, under other seeds"
            lines.append(f"  N {N:.4g}, D {D:.4g}, {C:.4g} FLOPs{times}")
        if self.runs:
            lines.append(f"  then {self.runs[-1]['half_width']:.3g} is expected")
        return "\n".join([*lines, f"  in all {self.flops:.4g} FLOPs"])


def _ratios(fit) -> tuple[float, float]:
    """Tokens a parameter of candidate runs: as in the table, and never starved, where a law bends."""
    ratios = [r["tokens"] / r["params"] for r in fit.rows if r["outcome"] == "used"]
    return max(min(ratios), STARVED), max(ratios)


def _choose(fit, quantity, budget_target, flops, max_flops, candidates, runs: int, target: float | None):
    """Greedy choice by linear conditioning of the draws: var(q) falls by cov(q, f)^2 / (var f + noise)."""
    if quantity not in QUANTITIES:
        raise FitError(f"quantity is {quantity!r}; it must be one of {', '.join(QUANTITIES)}")
    budget_target = positive("budget_target", budget_target)
    if set(fit.law.variables) != {"N", "D"} or len(fit.draws) < LEAST_DRAWS:
        raise FitError(
            f"{fit.law.name} has {len(fit.draws)} draws; the choice of runs needs a law in N and D with "
            f"{LEAST_DRAWS} draws or more (bootstraps=)"
        )
    cost, ranges = flops or six_nd, fit.diagnostics["range"]
    dearest = positive("max_flops", ranges["flops"][1] if max_flops is None else max_flops)
    if candidates is None:
        N = np.repeat(np.geomspace(*ranges["params"], 8), 8)
        cheapest = min(ranges["flops"][0], dearest)  # smaller runs than any of the table are another regime
        D = tokens_for(cost, N, np.tile(np.geomspace(cheapest, dearest, 8), 8))
        low, high = _ratios(fit)
        keep = (ranges["tokens"][0] / 4 <= D) & (ranges["tokens"][1] * 4 >= D)
        keep &= (low * N <= D) & (high * N >= D)
        N, D = N[keep], D[keep]
    else:
        N, D = np.asarray(candidates, float).reshape(-1, 2).T
    price = np.asarray(cost(N, D), float)
    good = (price <= dearest * (1 + 1e-9)) & (price > 0)
    N, D, price = N[good], D[good], price[good]
    if not len(N):
        raise FitError(f"no candidate run costs {dearest:.4g} FLOPs (max_flops) or less")
    if quantity == "a":
        q = np.asarray(fit.law.compute_exponents(fit.draw_params()).get("a", np.nan)) * np.ones(
            len(fit.draws)
        )
    else:
        q = np.log(fit.optimum_draws(budget_target, flops)[quantity.rstrip("*")][:, 0])
    sample = np.column_stack([q, np.log(fit.predict_draws(params=N, tokens=D))])
    sample = sample[np.isfinite(sample).all(1)]
    if len(sample) < LEAST_DRAWS:
        raise FitError(f"{quantity} exists in {len(sample)} draws; {LEAST_DRAWS} or more are needed")
    S = np.cov(sample.T)
    variance, shared = fit.diagnostics["rms_residual"] ** 2, fit.diagnostics["icc"]
    same = np.abs(np.log(N[:, None] / N[None])) < 1e-6
    S[1:, 1:] += shared * variance * same  # runs of one size share its effect
    noise = max((1 - shared) * variance, 1e-16)
    now, chosen, spent = 1.96 * math.sqrt(S[0, 0]), [], 0.0
    width = now
    while len(chosen) < runs and (target is None or width > target):
        gain = S[0, 1:] ** 2 / (np.diag(S)[1:] + noise)
        best = int(np.argmax(gain / price))
        S = S - np.outer(S[:, best + 1], S[best + 1]) / (S[best + 1, best + 1] + noise)
        width, spent = 1.96 * math.sqrt(max(S[0, 0], 0.0)), spent + float(price[best])
        chosen.append(
            {
                "params": float(N[best]),
                "tokens": float(D[best]),
                "flops": float(price[best]),
                "half_width": width,
            }
        )
    flags = [
        {"code": "linearised", "text": "widths are expected ones, from the draws by a linear approximation"}
    ]
    reached = None if target is None else width <= target
    if reached is False:
        text = f"not reachable within {len(chosen)} runs of at most {dearest:.3g} FLOPs each"
        flags.insert(0, {"code": "not_reached", "text": text})
    return NextRuns(quantity, budget_target, now, chosen, spent, reached, flags)


def next_runs(
    fit, candidates=None, *, quantity="N*", budget_target, flops=None, max_flops=None, batch=1
) -> NextRuns:
    """The ``batch`` runs that most reduce the variance of a quantity per FLOP, chosen one after another.

    Args:
      candidates: (N, D) pairs; default a grid over the table's sizes and up to ``max_flops`` a run.
    """
    if isinstance(batch, bool) or not isinstance(batch, int | np.integer) or batch < 1:
        raise FitError(f"batch is {batch!r}; it must be a positive whole number of runs")
    return _choose(fit, quantity, budget_target, flops, max_flops, candidates, batch, None)


def spend_for(fit, *, quantity="N*", budget_target, flops=None, max_flops=None, within=0.10) -> NextRuns:
    """Runs until the 95 % half-width is ``within`` (a share; for ``a``, an amount), or 200 of them."""
    within = positive("within", within)
    target = within if quantity == "a" else math.log1p(within)
    return _choose(fit, quantity, budget_target, flops, max_flops, None, MOST_RUNS, target)
