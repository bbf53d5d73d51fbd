"""What to train: the best N and D for a budget under a law, with intervals and the near-optimal band."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from fits.budget import Budget, positive
from fits.constraints import AtUnique, Limits, limited_optimum, marginal_values, size_for, with_inference
from fits.errors import FitError
from fits.laws import Law
from fits.printed import Printed

if TYPE_CHECKING:
    from fits.fit import Fit

Flops = Callable[[np.ndarray, np.ndarray], np.ndarray]
BISECTIONS = 100  # halves a range of 100 in log D to below float64's spacing
SEARCH_STEP = 1e-3  # of slopes of a searched optimum, which is exact to about 1e-6
REACH = 70.0  # log range searched: from the largest N, below 1e28, down to less than one parameter


@dataclasses.dataclass
class Allocation(Printed):
    """The answer for one budget. N in parameters, D in tokens, loss in the table's unit.

    Attributes:
      intervals: N, D, loss, tokens_per_param -> {"estimate", "sd", "80", "95"}.
      band: {"within", "N": [low, high], "D": [low, high]}: the sizes that reach the same loss with at
        most (1 + within) times the budget, and the tokens that each end needs for it (None: no end found).
        Limits are not applied to it.
      extrapolation: budget, N and D over the largest in the table, and the same in words.
      shape: what the ``shape`` callback returned for N. buildable: N, D and loss of that shape at this
        budget, and extra_compute, the share of compute that it costs against the optimum.
      limits: the limits given. marginal: what each limit that binds is worth (``marginal_values``).
      policy: tokens_per_param, N, D and loss of a fixed ratio at this budget, and extra_compute, the
        share of compute that it needs beyond the budget to reach the loss above (None: it cannot).
      regret: means over the draws, were this N and D trained: loss above the draw's own optimum.
    """

    budget: float
    N: float
    D: float
    loss: float
    tokens_per_param: float
    intervals: dict[str, dict]
    band: dict[str, Any]
    extrapolation: dict[str, Any]
    compute: str
    law: str
    shape: dict | None
    buildable: dict | None
    flags: list[dict]
    limits: dict[str, float] = dataclasses.field(default_factory=dict)
    marginal: list[dict] = dataclasses.field(default_factory=list)
    policy: dict | None = None
    regret: dict | None = None

    def to_dict(self) -> dict:
        return dataclasses.asdict(self)

    def __str__(self) -> str:
        lines = [f"flag: {f['text']}" for f in self.flags]
        lines.append(f"For {self.budget:.4g} FLOPs ({self.compute}) under {self.law}:")
        for name, unit in (("N", "parameters"), ("D", "tokens"), ("tokens_per_param", ""), ("loss", "")):
            got = self.intervals[name]
            text = f"  {name:17}{got['estimate']:<11.5g}{unit:11}"
            if got["95"]:
                (l80, h80), (l95, h95) = got["80"], got["95"]
                text += f" 80 %: {l80:.4g} to {h80:.4g}; 95 %: {l95:.4g} to {h95:.4g}"
            lines.append(text)
        low, high = self.band["N"]
        ends = ["no end found" if end is None else f"{end:.3g}" for end in (low, high)]
        lines.append(
            f"  same loss within {100 * self.band['within']:g} % of the compute: N {ends[0]} to {ends[1]}"
            + (", limits aside" if self.limits else "")
        )
        lines.append("  " + self.extrapolation["text"])
        if self.buildable:
            b = self.buildable
            lines.append(f"  buildable: N {b['N']:.5g}, D {b['D']:.5g}, loss {b['loss']:.5g}, "
                         f"{100 * b['extra_compute']:.2g} % more compute than the optimum")  # fmt: skip
        if self.limits:
            lines.append("  limits: " + ", ".join(f"{k} {v:.5g}" for k, v in self.limits.items()))
        for m in self.marginal:
            worth = "" if m["budget_per_log"] is None else (
                f"; 1 % more of it is worth {m['budget_per_log']:.2g} % more budget")  # fmt: skip
            lines.append(
                f"  {m['limit']} binds: loss changes by {m['loss_per_log'] / 100:.2g} per 1 %{worth}"
            )
        if self.policy:
            p = self.policy
            extra = _compute_words(p["extra_compute"]) + (", but breaks the limits" if p["breaks"] else "")
            lines.append(f"  at {p['tokens_per_param']:g} tokens a parameter: N {p['N']:.5g}, "
                         f"D {p['D']:.5g}, loss {p['loss']:.5g}; {extra}")  # fmt: skip
        if self.regret:
            lines.append(f"  expected regret: loss {self.regret['loss']:.2g} above the best, over the draws")
        return "\n".join(lines)


def six_nd(N, D):
    """C = 6 N D."""
    return 6.0 * N * D


def tokens_for(flops: Flops, N: np.ndarray, budget) -> np.ndarray:
    """The D at which training N costs ``budget``; NaN where even one token costs more."""
    low, high = np.zeros(np.shape(N)), np.full(np.shape(N), 100.0)
    for _ in range(BISECTIONS):
        middle = 0.5 * (low + high)
        over = np.asarray(flops(N, np.exp(middle))) > budget
        low, high = np.where(over, low, middle), np.where(over, middle, high)
    D = np.exp(0.5 * (low + high))
    return np.where(np.asarray(flops(N, np.ones(np.shape(N)))) <= budget, D, np.nan)


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
        centre = _vertex(grid_BxG, loss, best)
        half /= 20.0
        if half < 1e-4:
            break
    N = np.where(inside, np.exp(centre), np.nan)
    D = tokens_for(flops, N, budget)
    return {"N": N, "D": D, "loss": law.predict(params, {"N": N, "D": D, "C": budget})}


def _largest_size(flops: Flops, budget: float) -> float:
    """The N that one token could train."""
    low, high = 0.0, 100.0
    for _ in range(BISECTIONS):
        middle = 0.5 * (low + high)
        over = float(np.asarray(flops(np.array([math.exp(middle)]), np.array([1.0])))[0]) > budget
        low, high = (low, middle) if over else (middle, high)
    return math.exp(low)


def _loss_at(law: Law, params, log_n_BxG, flops: Flops, budget) -> np.ndarray:
    N = np.exp(log_n_BxG)
    D = tokens_for(flops, N, budget)
    with np.errstate(all="ignore"):
        return law.predict({k: v[:, None] for k, v in params.items()}, {"N": N, "D": D, "C": budget})


def _vertex(grid_BxG, loss_BxG, best_B) -> np.ndarray:
    """The vertex of the parabola through the lowest point and its neighbours."""
    lanes = np.arange(len(best_B))
    at = np.clip(best_B, 1, grid_BxG.shape[1] - 2)
    left, middle, right = (loss_BxG[lanes, at + k] for k in (-1, 0, 1))
    step = grid_BxG[lanes, at + 1] - grid_BxG[lanes, at]
    curve = left - 2 * middle + right
    with np.errstate(all="ignore"):
        shift = np.where(curve > 0, 0.5 * (left - right) / curve, 0.0)
    return grid_BxG[lanes, at] + step * np.clip(np.nan_to_num(shift), -1, 1)


def near_optimal(
    law: Law, params: Mapping[str, float], budget: float, best: Mapping, within: float, flops: Flops
):
    """The band of N that reaches the optimal loss with at most (1 + within) times the budget."""
    scalar = {k: np.atleast_1d(v) for k, v in params.items()}
    target = float(np.squeeze(best["loss"]))

    def cost_and_tokens(log_n):
        low, high = np.zeros(np.shape(log_n)), np.full(np.shape(log_n), 120.0)
        for _ in range(BISECTIONS):
            middle = 0.5 * (low + high)
            short = law.predict(scalar, {"N": np.exp(log_n), "D": np.exp(middle)}) > target
            low, high = np.where(short, middle, low), np.where(short, high, middle)
        D = np.where(high > 119.0, np.inf, np.exp(high))
        return np.asarray(flops(np.exp(log_n), D)) / budget, D

    start = math.log(float(np.squeeze(best["N"])))
    ends = {"N": [None, None], "D": [None, None]}
    for side, direction in enumerate((-1.0, 1.0)):
        inner, outer = 0.0, REACH / 2
        if cost_and_tokens(np.array([start + direction * outer]))[0][0] <= 1 + within:
            continue
        for _ in range(60):
            middle = 0.5 * (inner + outer)
            cost, _ = cost_and_tokens(np.array([start + direction * middle]))
            inner, outer = (middle, outer) if cost[0] <= 1 + within else (inner, middle)
        edge = start + direction * inner
        ends["N"][side] = math.exp(edge)
        ends["D"][side] = float(cost_and_tokens(np.array([edge]))[1][0])
    return {"within": within, **ends}


def _extrapolation(fit: Fit, budget: float, N: float, D: float) -> dict:
    ranges = fit.diagnostics["range"]
    ratios = {
        k: v / ranges[c][1]
        for k, c, v in (("budget", "flops", budget), ("N", "params", N), ("D", "tokens", D))
    }
    if max(ratios.values()) <= 1:
        text = "Inside the table: budget, N and D are no larger than the largest fitted."
    else:
        parts = [f"{name} is {ratio:.3g} times" for name, ratio in ratios.items() if ratio > 1]
        text = "Extrapolation: " + ", ".join(parts) + " the largest in the table."
    return {"budget_ratio": ratios["budget"], "N_ratio": ratios["N"], "D_ratio": ratios["D"], "text": text}


def allocate(
    fit: Fit,
    budget: float | Budget,
    *,
    flops: Flops | None = None,
    within: float = 0.10,
    shape: Callable[[float], Mapping] | None = None,
    policy: float = 20.0,
    **limits: float | None,
) -> Allocation:
    """The compute-optimal N and D for a budget, with intervals from the fit's draws.

    Args:
      budget: FLOPs, or a ``Budget``. With ``inference_tokens`` it pays for training and for serving.
      flops: training FLOPs of (N, D) on arrays, rising in both; default 6 N D.
      within: how much more compute the near-optimal band may cost (0.10: ten per cent).
      shape: gives a buildable shape for N: a mapping with at least ``params``.
      policy: tokens a parameter of the rule to compare with.
      limits: ``min_params``, ``max_params``, ``max_tokens``, ``unique_tokens`` (with ``max_epochs``, or for a
        law in U), ``tokens_per_param`` (held), ``inference_tokens`` (served, at 2 N FLOPs each),
        ``max_memory_bytes`` with ``bytes_per_param``. None: no limit.

    Raises:
      FitError: limits that collide, a bad budget, a fit whose status forbids numbers, or a law with no
      optimum in N and D.
    """
    if isinstance(budget, Budget):
        budget = budget.total
    unknown = set(limits) - {f.name for f in dataclasses.fields(Limits)}
    if unknown:
        known = ", ".join(f.name for f in dataclasses.fields(Limits))
        raise FitError(f"allocate does not know {', '.join(sorted(unknown))}; the limits are {known}")
    bounds = Limits(**limits)
    policy = positive("policy", policy)
    if isinstance(budget, bool) or not (
        isinstance(budget, int | float | np.number) and math.isfinite(budget) and budget > 0
    ):
        raise FitError(f"budget is {budget!r}; it must be a positive number of FLOPs")
    if not (math.isfinite(within) and within > 0):
        raise FitError(f"within is {within!r}; it must be a positive share of compute, such as 0.1")
    if fit.status in ("not identified", "unconverged"):
        raise FitError(f"the fit is {fit.status} ({'; '.join(fit.reasons)}), so it allocates nothing")
    law = fit.law
    if set(law.variables) == {"N", "D", "U"}:
        if bounds.unique_tokens is None:
            raise FitError(f"the law {law.name} is in unique tokens too; give unique_tokens")
        law = AtUnique(law, bounds.unique_tokens)
    if set(law.variables) != {"N", "D"}:
        raise FitError(
            f"the law {fit.law.name} is in {', '.join(fit.law.variables)}; an allocation needs one in N and D"
        )
    budget = float(budget)
    point = {
        k: float(np.squeeze(v)) for k, v in limited_optimum(law, fit.params, budget, flops, bounds).items()
    }
    if not all(math.isfinite(v) and v > 0 for v in point.values()):
        raise FitError(
            f"the law {fit.law.name} as fitted has no optimal N at {budget:.3g} FLOPs (status {fit.status})"
        )
    point["tokens_per_param"] = point["D"] / point["N"]
    draws = {k: np.empty(0) for k in point}
    if len(fit.draws):
        draws = dict(limited_optimum(law, fit.draw_params(), budget, flops, bounds))
        draws["tokens_per_param"] = draws["D"] / draws["N"]
    cost = flops or six_nd
    if bounds.inference_tokens is not None:
        cost = with_inference(cost, bounds.inference_tokens)
    built = None
    made = dict(shape(point["N"])) if shape else None
    if made is not None:
        built = _buildable(law, fit.params, made, budget, point, cost)
    flags = [f for f in fit.flags if f["code"] in ("boundary", "uncertain", "no_intervals")]
    given = {k: float(v) for k, v in dataclasses.asdict(bounds).items() if v is not None}
    if bounds.unique_tokens is not None and law is fit.law and point["D"] > bounds.unique_tokens:
        text = f"the law {law.name} knows nothing of repeated tokens: each epoch counts as new data"
        flags.append({"code": "repetition", "text": text})
    spent = float(np.asarray(cost(np.array([point["N"]]), np.array([point["D"]])))[0])
    if spent < (1 - 1e-6) * budget:
        text = f"the limits leave {100 * (1 - spent / budget):.3g} % of the budget unspent"
        flags.append({"code": "unspent", "text": text})
    extrapolation = _extrapolation(fit, budget, point["N"], point["D"])
    if extrapolation["budget_ratio"] > 100:
        far = f"the budget is {extrapolation['budget_ratio']:.3g} times the largest in the table"
        text = far + "; the intervals assume that the law's form still holds there"
        flags.append({"code": "far_extrapolation", "text": text})
    return Allocation(
        budget, point["N"], point["D"], point["loss"], point["tokens_per_param"],
        _intervals(fit, law, point, draws, budget, flops, bounds),
        near_optimal(law, fit.params, budget, point, within, cost),
        extrapolation, "C = 6 N D" if flops is None else getattr(flops, "label", "the given FLOP function"),
        f"{fit.law.name}: {fit.law.formula}", made, built, flags, given,
        marginal_values(law, fit.params, budget, flops, bounds, point),
        _policy(law, fit.params, budget, cost, policy, point["loss"], bounds),
        _regret(law, fit, point, draws["loss"]),
    )  # fmt: skip


def _intervals(fit: Fit, law, point, draws, budget: float, flops, bounds: Limits) -> dict[str, dict]:
    """Intervals of N, D, loss and D/N at the optimum; of the draws alone where limits put kinks in them."""
    closed = flops is None and law.optimum(fit.params, budget) is not None
    out = {}
    for name, value in point.items():

        def quantity(params, name=name):
            best = limited_optimum(law, params, budget, flops, bounds)
            return best["D"] / best["N"] if name == "tokens_per_param" else best[name]

        smooth = None if bounds.any() else quantity
        out[name] = fit.interval_of(draws[name], value, smooth, step=None if closed else SEARCH_STEP)
    return out


def _compute_words(extra: float | None) -> str:
    if extra is None:
        return "cannot reach the loss above"
    which = "more" if extra >= 0 else "less"
    return f"needs {100 * abs(extra):.2g} % {which} compute to reach the loss above"


def _policy(law, params, budget: float, cost: Flops, ratio: float, target: float, bounds: Limits) -> dict:
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
        for _ in range(60):
            middle = 0.5 * (low + high)
            low, high = (middle, high) if at(start + middle)[1] > target else (low, middle)
        extra = math.expm1(high)
    breaks = not bounds.smallest_params <= N <= bounds.largest_params or ratio * N > bounds.largest_tokens
    return {
        "tokens_per_param": ratio, "N": N, "D": ratio * N, "loss": loss,
        "extra_compute": extra, "breaks": breaks,
    }  # fmt: skip


def _regret(law, fit: Fit, point: Mapping, best_B: np.ndarray) -> dict | None:
    """Mean over the draws of the loss of this N and D above the draw's own (limited) optimum."""
    if not len(best_B):
        return None
    x = {"N": np.array([point["N"]]), "D": np.array([point["D"]])}
    above = np.asarray(law.predict(fit.draw_params(), x)) - best_B
    above = above[np.isfinite(above)]
    return {"loss": float(above.mean())} if len(above) else None


def _buildable(law: Law, params, made: Mapping, budget: float, point: Mapping, flops: Flops) -> dict:
    """N, D and loss of a buildable shape at the budget, and its extra compute against the optimum."""
    if "params" not in made:
        raise FitError(
            f"shape returned {', '.join(made)}; it must give 'params', the shape's own parameter count"
        )
    N = float(made["params"])
    D = float(tokens_for(flops, np.array([N]), budget)[0])
    loss = float(np.squeeze(law.predict(params, {"N": N, "D": D})))
    # the least compute that reaches this loss, against what it takes here
    low, high = -10.0, 0.0
    for _ in range(60):
        middle = 0.5 * (low + high)
        reached = float(np.squeeze(optimum(law, params, budget * math.exp(middle), flops)["loss"]))
        low, high = (middle, high) if reached > loss else (low, middle)
    return {"N": N, "D": D, "loss": loss, "extra_compute": math.exp(-high) - 1.0}
