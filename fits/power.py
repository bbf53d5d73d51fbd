"""What a planned grid will tell, before it is trained: simulated studies of a planted law."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from fits.allocate import optimum
from fits.errors import FitError
from fits.laws import Law, get_law
from fits.objective import RowLoss, make_problem
from fits.printed import Printed
from fits.simulate import refit_outcomes
from fits.table import group_close

QUANTITIES = ("N*", "D*", "loss", "a")
LEAST_SIMULATIONS = 20  # below that no 95 % range can be read off


@dataclasses.dataclass
class Power(Printed):
    """Where the estimate of a quantity falls over simulated studies.

    Attributes:
      truth: under the planted law. estimate: median over the studies.
      range_95: 2.5 and 97.5 % points of the estimates. half_width: half of it; of the natural log for N*,
        D* and loss, so that 0.1 is about ten per cent; of the value itself for a.
      failed: share of studies whose fit ended nowhere. flops: what the grid costs.
    """

    quantity: str
    budget_target: float
    truth: float
    estimate: float
    range_95: list[float]
    half_width: float
    failed: float
    simulations: int
    runs: int
    flops: float
    flags: list[dict]

    def to_dict(self) -> dict:
        return dataclasses.asdict(self)

    def __str__(self) -> str:
        lines = [f"flag: {f['text']}" for f in self.flags]
        unit = "" if self.quantity == "a" else " (natural log)"
        lines.append(
            f"{self.runs} runs, {self.flops:.4g} FLOPs: {self.quantity} at {self.budget_target:.4g} FLOPs is "
            f"{self.truth:.5g}; 95 % of {self.simulations} simulated studies estimate "
            f"{self.range_95[0]:.5g} to {self.range_95[1]:.5g}, half-width {self.half_width:.3g}{unit}"
        )
        return "\n".join(lines)


def power(
    law: str | Law,
    params: Mapping[str, float],
    noise: float,
    grid: Sequence[tuple[float, float]],
    *,
    budget_target: float,
    quantity: str = "N*",
    size_effect: float = 0.0,
    simulations: int = 400,
    loss: str = "huber",
    delta: float = 1e-3,
    seed: int = 0,
) -> Power:
    """Simulates studies of a planned grid and refits each.

    Args:
      law, params: the law that is planted, in N and D.
      noise: standard deviation of log loss from run to run. size_effect: of what runs of one size share.
      grid: (N, D) of each run.
      budget_target: where N*, D* or loss is wanted, FLOPs (C = 6ND).
      loss, delta: how the studies will be fitted.

    Raises:
      FitError: an unknown quantity, a bad number, or a grid with fewer runs than parameters.
    """
    law = get_law(law)
    if quantity not in QUANTITIES:
        raise FitError(f"quantity is {quantity!r}; it must be one of {', '.join(QUANTITIES)}")
    if set(law.variables) != {"N", "D"}:
        raise FitError(f"the law {law.name} is in {', '.join(law.variables)}; power needs one in N and D")
    for name, value, least in (("noise", noise, 0.0), ("size_effect", size_effect, 0.0)):
        if not (np.isfinite(value) and value >= least):
            raise FitError(f"{name} is {value!r}; it must be a standard deviation of log loss, 0 or more")
    if not isinstance(simulations, int | np.integer) or simulations < LEAST_SIMULATIONS:
        raise FitError(f"simulations is {simulations!r}; it must be {LEAST_SIMULATIONS} or more")
    missing = [k for k in law.parameters if k not in params]
    if missing:
        raise FitError(f"params lacks {', '.join(missing)}; {law.name} is {law.formula}")
    points = np.asarray(grid, float)
    if points.ndim != 2 or points.shape[1] != 2 or not (np.isfinite(points) & (points > 0)).all():
        raise FitError("grid must be (N, D) pairs of positive numbers, one a run")
    if len(points) < len(law.parameters):
        raise FitError(f"grid has {len(points)} runs; {law.name} has {len(law.parameters)} parameters")
    truth = {k: float(params[k]) for k in law.parameters}
    N, D = points.T
    clean_R = np.log(law.predict(truth, {"N": N, "D": D}))
    sizes = group_close(N)
    rng = np.random.default_rng(seed)
    shared = size_effect * rng.standard_normal((simulations, sizes.max() + 1))
    log_loss = clean_R + noise * rng.standard_normal((simulations, len(N))) + shared[:, sizes]
    problem = make_problem(law, {"N": np.log(N), "D": np.log(D)}, np.exp(clean_R))
    start = problem.from_params(truth)[0]
    found, good = refit_outcomes(problem, start, np.ones(len(N)), np.exp(log_loss), RowLoss(loss, delta))
    found, kept = {k: v[good] for k, v in found.items()}, int(good.sum())
    if kept < LEAST_SIMULATIONS:
        raise FitError(
            f"only {kept} of {simulations} simulated studies could be fitted: the grid is too small"
        )
    values = _quantity(law, found, quantity, budget_target)
    exact = float(_quantity(law, {k: np.array([v]) for k, v in truth.items()}, quantity, budget_target)[0])
    good = values[np.isfinite(values)]
    low, middle, high = (float(q) for q in np.quantile(good, (0.025, 0.5, 0.975)))
    width = 0.5 * (high - low) if quantity == "a" else 0.5 * float(np.log(high / low))
    failed = 1.0 - len(good) / simulations
    flags = []
    if failed > 0.01:
        text = f"{100 * failed:.2g} % of the simulated studies had no fit; the range leaves them out"
        flags.append({"code": "failed_simulations", "text": text})
    return Power(
        quantity, float(budget_target), exact, middle, [low, high], width, failed, int(simulations),
        len(points), float((6 * N * D).sum()), flags,
    )  # fmt: skip


def _quantity(law: Law, params: Mapping[str, Any], quantity: str, budget: float) -> np.ndarray:
    if quantity == "a":
        a = law.compute_exponents(params).get("a")
        if a is None:
            raise FitError(f"the law {law.name} has no exponent a")
        return np.asarray(a) * np.ones(len(next(iter(params.values()))))
    return np.asarray(optimum(law, params, float(budget))[quantity.rstrip("*")], float)
