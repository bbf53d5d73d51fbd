"""The best N and D inside limits on size, tokens and their ratio, for many draws of a law at once.

A law that falls in both N and D spends the whole budget unless limits forbid it, so its optimum lies
on the curve of equal cost, and a limit on D is a limit on N there. Where the loss along that curve has
one minimum (every sum of a power of N and a power of D, at C = 6ND: convex in log N), the constrained
optimum is the free one moved to the nearest allowed N.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

import numpy as np

from fits.budget import positive, seconds_per_token
from fits.errors import FitError
from fits.search import optimum, six_nd, tokens_for

STEP = 1e-3  # of log limit, for marginal values: central differences, so errors are of order STEP squared


NEEDS = (
    ("max_epochs", "unique_tokens"), ("max_memory_bytes", "bytes_per_param"),
    ("max_latency", "bytes_per_param"), ("max_latency", "inference_chip"),
    ("inference_chip", "max_latency"), ("inference_devices", "max_latency"),
)  # fmt: skip
SLACK = 1e-9  # of a limit: what rounding may exceed it by


@dataclasses.dataclass(frozen=True)
class Limits:
    """Bounds on what may be trained, each None where there is none. N in parameters, D in tokens.

    max_latency is in seconds a decoded token, on ``inference_devices`` (default 1) of ``inference_chip``; see
    ``budget.seconds_per_token``. It and max_memory_bytes need bytes_per_param, and cap N.
    """

    min_params: float | None = None
    max_params: float | None = None
    max_tokens: float | None = None
    unique_tokens: float | None = None
    max_epochs: float | None = None
    tokens_per_param: float | None = None
    inference_tokens: float | None = None
    max_memory_bytes: float | None = None
    bytes_per_param: float | None = None
    max_latency: float | None = None
    inference_chip: str | None = None
    inference_devices: float | None = None

    def __post_init__(self):
        for name, value in self.given().items():
            if name != "inference_chip":
                positive(name, value)
        for name, other in NEEDS:
            if getattr(self, name) is not None and getattr(self, other) is None:
                raise FitError(f"{name} is given without {other}, without which it limits nothing")
        if self.inference_chip is not None:
            seconds_per_token(1.0, self.inference_chip)  # refuses a chip that it does not know
        if self.largest_params < self.smallest_params:
            raise FitError(
                f"the limits collide: N at least {self.smallest_params:.4g} (min_params) and at most "
                f"{self.largest_params:.4g} ({self.name_of('N')})"
            )

    @property
    def smallest_params(self) -> float:
        return self.min_params or 0.0

    @property
    def largest_params(self) -> float:
        return min((v for v, _ in self._caps("N")), default=math.inf)

    @property
    def largest_tokens(self) -> float:
        return min((v for v, _ in self._caps("D")), default=math.inf)

    def _caps(self, variable: str):
        if variable == "N":
            caps = [(self.max_params, "max_params")]
            if self.max_memory_bytes is not None:
                caps.append((self.max_memory_bytes / self.bytes_per_param, "max_memory_bytes"))
            if self.max_latency is not None:
                one = seconds_per_token(
                    1.0, self.inference_chip, self.inference_devices or 1.0, self.bytes_per_param
                )
                caps.append((self.max_latency / one, "max_latency"))
        else:
            caps = [(self.max_tokens, "max_tokens")]
            if self.max_epochs is not None:
                caps.append((self.unique_tokens * self.max_epochs, "max_epochs"))
        return [c for c in caps if c[0] is not None]

    def name_of(self, variable: str) -> str:
        """The limit that caps N or D."""
        return min(self._caps(variable))[1]

    def any(self) -> bool:
        """Whether the choice of N and D is bounded (served tokens alone change only the cost)."""
        bounded = self.min_params, self.largest_params < math.inf, self.largest_tokens < math.inf
        return any(bounded) or self.tokens_per_param is not None

    def given(self) -> dict[str, float | str]:
        """The limits that are set."""
        return {k: v for k, v in dataclasses.asdict(self).items() if v is not None}

    def allows(self, N, D):
        """Whether each (N, D) keeps the bounds, to rounding; a held ratio is kept by ``tokens_within``."""
        N, D = np.asarray(N, float), np.asarray(D, float)
        fits = (self.smallest_params * (1 - SLACK) <= N) & (self.largest_params * (1 + SLACK) >= N)
        return fits & (self.largest_tokens * (1 + SLACK) >= D)

    def scaled(self, name: str, factor: float) -> Limits:
        return dataclasses.replace(self, **{name: getattr(self, name) * factor})


class AtUnique:
    """A law in N, D and U (unique tokens) at one U: a law in N and D."""

    variables = ("N", "D")

    def __init__(self, law, unique_tokens: float):
        self.law, self.unique_tokens = law, unique_tokens
        self.name, self.formula = law.name, law.formula

    def predict(self, params, x, xp=np):
        return self.law.predict(params, {**x, "U": np.full(np.shape(x["N"]), self.unique_tokens)}, xp)

    def optimum(self, params, budget):
        return None


def with_inference(flops, tokens: float):
    """Training FLOPs and 2 N a served token (Sardana et al. 2023, arXiv:2401.00448, equation 2)."""

    def total(N, D):
        return flops(N, D) + 2.0 * N * tokens

    return total


def size_for(cost, budget: float, tokens_of) -> float:
    """The largest N for which cost(N, tokens_of(N)) is within the budget, by bisection in log N."""
    low, high = -50.0, 100.0
    for _ in range(100):
        middle = 0.5 * (low + high)
        N = np.array([math.exp(middle)])
        over = float(np.asarray(cost(N, tokens_of(N)))[0]) > budget
        low, high = (low, middle) if over else (middle, high)
    return math.exp(low)


def limit_words(given: Mapping[str, float | str]) -> str:
    """Limits in words, such as "max_params 1e+09, inference_chip h100"."""
    return ", ".join(f"{k} {v if isinstance(v, str) else format(v, '.5g')}" for k, v in given.items())


def tokens_within(cost, N, budget: float, limits: Limits) -> np.ndarray:
    """The most tokens for each N inside budget and limits; NaN where the limits forbid the size."""
    N = np.asarray(N, float)
    D = np.minimum(tokens_for(cost, N, budget), limits.largest_tokens)
    if limits.tokens_per_param is not None:
        D = np.where(limits.tokens_per_param * N <= D * (1 + SLACK), limits.tokens_per_param * N, np.nan)
    return np.where(limits.allows(N, D), D, np.nan)


def limited_optimum(law, params, budget: float, flops, limits: Limits) -> dict[str, np.ndarray]:
    """``allocate.optimum`` inside limits; arrays [B] for parameters [B].

    Args:
      flops: cost of (N, D), or None for 6 N D. Served tokens in ``limits`` are added to it.

    Raises:
      FitError: the limits leave nothing that this budget can train.
    """
    cost = flops or six_nd
    if limits.inference_tokens is not None:
        cost = flops = with_inference(cost, limits.inference_tokens)
    if not limits.any():
        return optimum(law, params, budget, flops)
    params = {k: np.atleast_1d(np.asarray(v, float)) for k, v in params.items()}
    lanes = len(next(iter(params.values())))
    low, high, most = limits.smallest_params, limits.largest_params, limits.largest_tokens
    if low and float(np.asarray(cost(np.array([low]), np.ones(1)))[0]) > budget:
        raise FitError(
            f"the limits collide: min_params {low:.4g} costs more than the budget {budget:.4g} FLOPs"
        )
    ratio = limits.tokens_per_param
    if ratio is not None:
        N = min(size_for(cost, budget, lambda n: ratio * n), high, most / ratio)
        if low > N:
            raise FitError(
                f"the limits collide: tokens_per_param {ratio:g} at {budget:.4g} FLOPs (and the caps) allows "
                f"N up to {N:.4g}, and min_params is {low:.4g}"
            )
        N_B, D_B = np.full(lanes, N), np.full(lanes, ratio * N)
    else:
        # the smallest N that spends the budget on no more than the tokens allowed
        spends = size_for(cost, budget, lambda n: np.full(1, most)) if most < math.inf else 0.0
        low = max(low, min(spends, high))
        free = optimum(law, params, budget, flops)
        N_B = np.clip(free["N"], low or None, high)
        ends = [e for e in (low, high) if 0 < e < math.inf]
        choices = np.stack([N_B, *(np.full(lanes, e) for e in ends)])
        D = np.minimum(tokens_for(cost, choices, budget), most)
        with np.errstate(all="ignore"):
            loss = law.predict({k: v[None] for k, v in params.items()}, {"N": choices, "D": D, "C": budget})
        # a free optimum may not exist (NaN): then the better end of the allowed range, if it has two
        loss = np.where(np.isfinite(loss), loss, np.inf)
        if len(ends) < 2:
            loss = np.where(np.isfinite(choices[:1]), loss, np.nan)
        best = np.argmin(loss, 0)
        N_B, D_B = (np.take_along_axis(a, best[None], 0)[0] for a in (choices, D))
        N_B = np.where(np.isnan(loss).any(0), np.nan, N_B)
    return {"N": N_B, "D": D_B, "loss": law.predict(params, {"N": N_B, "D": D_B, "C": budget})}


def marginal_values(law, params, budget: float, flops, limits: Limits, point) -> list[dict]:
    """What each active limit is worth at the optimum.

    Returns:
      One dict per limit that binds: limit, value, loss_per_log (change of loss as the log of the limit
      grows by one, at the margin) and budget_per_log (the same gain bought by log budget; None
      where more budget buys nothing).
    """

    def loss_at(c, within):
        return float(limited_optimum(law, params, c, flops, within)["loss"][0])

    N, D = point["N"], point["D"]
    active = []
    if limits.min_params and math.isclose(N, limits.min_params, rel_tol=1e-9):
        active.append("min_params")
    if math.isclose(N, limits.largest_params, rel_tol=1e-9):
        active.append(limits.name_of("N"))
    if math.isclose(D, limits.largest_tokens, rel_tol=1e-6):
        active.append(limits.name_of("D"))
    if limits.tokens_per_param is not None:
        active.append("tokens_per_param")
    out = []
    for name in active:
        try:
            up, down = (loss_at(budget, limits.scaled(name, math.exp(s * STEP))) for s in (1, -1))
            more, less = (loss_at(budget * math.exp(s * STEP), limits) for s in (1, -1))
        except FitError:  # the limits meet in one point, which no step leaves
            continue
        slope, of_budget = (up - down) / (2 * STEP), (more - less) / (2 * STEP)
        worth = slope / of_budget if of_budget < -1e-12 else None
        out.append(
            {"limit": name, "value": getattr(limits, name), "loss_per_log": slope, "budget_per_log": worth}
        )
    return out
