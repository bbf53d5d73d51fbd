"""What to train: the best N and D for a budget under a law, with intervals and the near-optimal band."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from fits.budget import Budget, positive
from fits.choices import (
    build,
    compare_sizes,
    follow_policy,
    least_budget,
    near_optimal,
    read_sizes,
    trained_at,
)  # fmt: skip
from fits.constraints import (
    AtUnique,
    Limits,
    limit_words,
    limited_optimum,
    marginal_values,
    tokens_within,
    with_inference,
)  # fmt: skip
from fits.errors import FitError
from fits.printed import Printed, open_ends, word
from fits.search import REACH, Flops, optimum, six_nd, tokens_for

if TYPE_CHECKING:
    from fits.fit import Fit

SEARCH_STEP = 1e-3  # of slopes of a searched optimum, which is exact to about 1e-6

__all__ = ["REACH", "Allocation", "Flops", "allocate", "optimum", "six_nd", "tokens_for"]


@dataclasses.dataclass
class Allocation(Printed):
    """The answer for one budget. N in parameters, D in tokens, loss in the table's unit.

    Attributes:
      intervals: N, D, loss, tokens_per_param -> {"estimate", "sd", "80", "95"}.
      band: {"within", "N": [low, high], "D": [low, high]}: the sizes that reach the same loss with at
        most (1 + within) times the budget inside the limits, and the tokens that each end needs for it
        (None: no end found).
      extrapolation: budget, N and D over the largest in the table, and the same in words.
      shape: what the ``shape`` callback returned for N, or for the nearest size whose shape keeps the limits;
        with ``sizes`` the best of them. buildable: N, D and loss of that shape at this budget, and
        extra_compute, the share of compute that it costs against the least that reaches its loss.
      sizes: the given sizes, best first (``choices.compare_sizes``).
      target: of a loss that was asked for: loss, budget {"estimate", "80", "95"} (an end may be "infinite"),
        and never, the share of draws in which no budget reaches it.
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
    limits: dict[str, float | str] = dataclasses.field(default_factory=dict)
    marginal: list[dict] = dataclasses.field(default_factory=list)
    policy: dict | None = None
    regret: dict | None = None
    sizes: list[dict] = dataclasses.field(default_factory=list)
    target: dict | None = None

    def to_dict(self) -> dict:
        return dataclasses.asdict(self)

    def __str__(self) -> str:
        lines = [f"flag: {f['text']}" for f in self.flags]
        if self.target:
            lines += _target_lines(self.target, self.compute, self.limits)
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
            f"  same loss within {100 * self.band['within']:g} % of the compute"
            + (", inside the limits" if self.limits else "")
            + f": N {ends[0]} to {ends[1]}"
        )
        lines.append("  " + self.extrapolation["text"])
        if self.buildable:
            b = self.buildable
            lines.append(f"  buildable: N {b['N']:.5g}, D {b['D']:.5g}, loss {b['loss']:.5g}, "
                         f"{100 * b['extra_compute']:.2g} % more compute than the optimum")  # fmt: skip
        lines += [_size_line(s) for s in self.sizes]
        if self.limits:
            lines.append("  limits: " + limit_words(self.limits))
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


def _target_lines(target: Mapping, compute: str, limits: Mapping) -> list[str]:
    got = target["budget"]
    text = f"Loss {target['loss']:.5g} takes at least {got['estimate']:.4g} FLOPs ({compute})"
    text += " inside the limits" if limits else ""
    for level in ("80", "95"):
        if got[level]:
            text += f"; {level} %: " + " to ".join(
                v if isinstance(v, str) else f"{v:.4g}" for v in got[level]
            )
    if target["never"]:
        text += f"; no budget reaches it in {100 * target['never']:.2g} % of the draws"
    return [text]


def _size_line(size: Mapping) -> str:
    if size["loss"] is None:
        return f"  size {size['N']:.5g}: the limits forbid it"
    text = f"  size {size['N']:.5g}: D {size['D']:.5g}, loss {size['loss']:.5g}, "
    text += f"{size['loss_above']:.2g} above the optimum, {100 * size['extra_compute']:.2g} % more compute"
    if size["best_share"] is not None:
        text += (
            f"; regret {size['regret']:.2g}, the best size in {100 * size['best_share']:.3g} % of the draws"
        )
    return text


def allocate(
    fit: Fit,
    budget: float | Budget | None = None,
    *,
    target_loss: float | None = None,
    flops: Flops | None = None,
    within: float = 0.10,
    shape: Callable[[float], Mapping] | None = None,
    sizes: Sequence | None = None,
    policy: float = 20.0,
    **limits: float | str | None,
) -> Allocation:
    """The compute-optimal N and D for a budget, with intervals from the fit's draws.

    Args:
      budget: FLOPs, or a ``Budget``. With ``inference_tokens`` it pays for training and for serving.
      target_loss: in place of a budget: the least budget is found that reaches this loss inside the limits.
      flops: training FLOPs of (N, D) on arrays, rising in both; default 6 N D.
      within: how much more compute the near-optimal band may cost (0.10: ten per cent).
      shape: gives a buildable shape for N: a mapping with at least ``params``.
      sizes: sizes that can be built, as numbers of parameters or as shapes with ``params``; ranked, and the
        best one given as ``buildable``.
      policy: tokens a parameter of the rule to compare with.
      limits: ``min_params``, ``max_params``, ``max_tokens``, ``unique_tokens`` (with ``max_epochs``, or for a
        law in U), ``tokens_per_param`` (held), ``inference_tokens`` (served, at 2 N FLOPs each),
        ``max_memory_bytes`` with ``bytes_per_param``, ``max_latency`` (seconds a decoded token) with
        ``bytes_per_param``, ``inference_chip`` and ``inference_devices``. None: no limit.

    Raises:
      FitError: limits that collide, a bad budget, a loss that is never reached, a fit whose status forbids
      numbers, or a law with no optimum in N and D.
    """
    bounds = _read_limits(limits)
    policy = positive("policy", policy)
    if budget is not None and target_loss is not None:
        raise FitError("budget and target_loss are both given; give one, and the other is the answer")
    if not (math.isfinite(within) and within > 0):
        raise FitError(f"within is {within!r}; it must be a positive share of compute, such as 0.1")
    shapes = None if sizes is None else read_sizes(sizes)
    cost = flops or six_nd
    if bounds.inference_tokens is not None:
        cost = with_inference(cost, bounds.inference_tokens)
    target = None
    if target_loss is None:
        budget = _read_budget(budget)
        law = _law_of(fit, bounds)
    else:
        law = _law_of(fit, bounds)
        target = _reach(law, fit, positive("target_loss", target_loss), cost, bounds)
        budget = target["budget"]["estimate"]
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
    flags = _flags(fit, law, point, budget, cost, bounds)
    ranked = []
    if shapes is not None:
        ranked = compare_sizes(law, fit, draws["loss"], shapes, budget, point, cost, bounds)
        made = next(s for s in shapes if s["params"] == ranked[0]["N"])
    else:
        made = _make(shape, point["N"], budget, cost, bounds, flags) if shape else None
    built = None
    if made is not None:
        N = float(made["params"])
        got = trained_at(law, fit.params, np.array([N]), budget, cost, bounds)
        built = {"N": N, **{k: float(v[0]) for k, v in got.items()}}
    return Allocation(
        budget, point["N"], point["D"], point["loss"], point["tokens_per_param"],
        _intervals(fit, law, point, draws, budget, flops, bounds),
        near_optimal(law, fit.params, budget, point, within, cost, bounds),
        _extrapolation(fit, budget, point["N"], point["D"]),
        "C = 6 N D" if flops is None else getattr(flops, "label", "the given FLOP function"),
        f"{fit.law.name}: {fit.law.formula}", made, built, flags,
        {k: v if isinstance(v, str) else float(v) for k, v in bounds.given().items()},
        marginal_values(law, fit.params, budget, flops, bounds, point),
        follow_policy(law, fit.params, budget, cost, policy, point["loss"], bounds),
        _regret(law, fit, point, draws["loss"]), ranked, target,
    )  # fmt: skip


def _read_limits(limits: Mapping) -> Limits:
    unknown = set(limits) - {f.name for f in dataclasses.fields(Limits)}
    if unknown:
        known = ", ".join(f.name for f in dataclasses.fields(Limits))
        raise FitError(f"allocate does not know {', '.join(sorted(unknown))}; the limits are {known}")
    return Limits(**limits)


def _read_budget(budget) -> float:
    if isinstance(budget, Budget):
        return budget.total
    if isinstance(budget, bool) or not (
        isinstance(budget, int | float | np.number) and math.isfinite(budget) and budget > 0
    ):
        raise FitError(f"budget is {budget!r}; it must be a positive number of FLOPs")
    return float(budget)


def _law_of(fit: Fit, bounds: Limits):
    """The fit's law in N and D alone."""
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
    return law


def _reach(law, fit: Fit, loss: float, cost: Flops, bounds: Limits) -> dict:
    """The least budget for a loss, its interval over the draws, and the share of them that never reach it."""
    point = {k: np.atleast_1d(v) for k, v in fit.params.items()}
    least = float(least_budget(law, point, loss, cost, bounds)["budget"][0])
    if not math.isfinite(least):
        where = "inside the limits" if bounds.given() else "at any budget"
        raise FitError(f"target_loss is {loss:g}, which {law.name} as fitted does not reach {where}")
    drawn = np.empty(0)
    if len(fit.draws):
        drawn = least_budget(law, fit.draw_params(), loss, cost, bounds)["budget"]
    never = float(np.isinf(drawn).mean()) if len(drawn) else None
    return {"loss": loss, "budget": {"estimate": word(least), **open_ends(drawn)}, "never": never}


def _make(shape, N: float, budget: float, cost: Flops, bounds: Limits, flags: list) -> dict | None:
    """The shape to suggest; a flag where none near N keeps the limits, or where it had to move."""

    def allowed(params) -> bool:
        return bool(np.isfinite(tokens_within(cost, np.array([float(params)]), budget, bounds))[0])

    made = build(shape, N, allowed)
    if made is None:
        text = "no shape within a factor of four of N keeps the limits, so none is suggested"
        flags.append({"code": "no_shape", "text": text})
    return made


def _flags(fit: Fit, law, point: Mapping, budget: float, cost: Flops, bounds: Limits) -> list[dict]:
    flags = [f for f in fit.flags if f["code"] in ("boundary", "uncertain", "no_intervals")]
    if bounds.unique_tokens is not None and law is fit.law and point["D"] > bounds.unique_tokens:
        text = f"the law {law.name} knows nothing of repeated tokens: each epoch counts as new data"
        flags.append({"code": "repetition", "text": text})
    spent = float(np.asarray(cost(np.array([point["N"]]), np.array([point["D"]])))[0])
    if spent < (1 - 1e-6) * budget:
        text = f"the limits leave {100 * (1 - spent / budget):.3g} % of the budget unspent"
        flags.append({"code": "unspent", "text": text})
    ratio = budget / fit.diagnostics["range"]["flops"][1]
    if ratio > 100:
        far = f"the budget is {ratio:.3g} times the largest in the table"
        text = far + "; the intervals assume that the law's form still holds there"
        flags.append({"code": "far_extrapolation", "text": text})
    return flags


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


def _compute_words(extra: float | None) -> str:
    if extra is None:
        return "cannot reach the loss above"
    which = "more" if extra >= 0 else "less"
    return f"needs {100 * abs(extra):.2g} % {which} compute to reach the loss above"


def _regret(law, fit: Fit, point: Mapping, best_B: np.ndarray) -> dict | None:
    """Mean over the draws of the loss of this N and D above the draw's own (limited) optimum."""
    if not len(best_B):
        return None
    x = {"N": np.array([point["N"]]), "D": np.array([point["D"]])}
    above = np.asarray(law.predict(fit.draw_params(), x)) - best_B
    above = above[np.isfinite(above)]
    return {"loss": float(above.mean())} if len(above) else None


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
