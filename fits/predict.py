"""What a new run will lose: the surface's interval, and the wider one of a single run about it."""

from __future__ import annotations

import dataclasses

import numpy as np

from fits.errors import FitError
from fits.few_clusters import row_slopes
from fits.fit import Fit
from fits.laws import COLUMN_OF
from fits.printed import Printed
from fits.profile import rebuild

LEVELS = ("80", "95")
RESAMPLES = 20_000  # of the residual; the 95 % end is then known to about 1 % of its distance
LEAST_DRAWS = 20


@dataclasses.dataclass
class Prediction(Printed):
    """Loss of one run that was not made.

    Attributes:
      at: the run's columns. surface, run: level -> [low, high], of the law's loss there and of a run's.
      noise: standard deviation of a run's log loss about the surface, corrected for the fitted parameters.
      notes: doubts, first in print.
    """

    at: dict[str, float]
    estimate: float
    surface: dict[str, list[float]]
    run: dict[str, list[float]]
    noise: float
    notes: list[str]

    def to_dict(self) -> dict:
        return dataclasses.asdict(self)

    def __str__(self) -> str:
        where = ", ".join(f"{k} {v:.4g}" for k, v in self.at.items())
        lines = [f"doubt: {n}" for n in self.notes] + [f"loss at {where}: {self.estimate:.5g}"]
        for name, ends in (("the surface", self.surface), ("a new run", self.run)):
            text = ", ".join(f"{k} % {low:.5g} to {high:.5g}" for k, (low, high) in ends.items())
            lines.append(f"  {name}: {text}")
        return "\n".join(lines)


def predict_run(fit: Fit, *, seed: int = 0, **columns: float) -> Prediction:
    """The loss of a new run, with intervals for the surface and for the run.

    The run's log loss is the surface's plus a residual drawn from the fit's own, centred and enlarged for
    the parameters that were fitted to them and for how well so few tell the noise. A residual has its
    size's error as well as its own, so this holds for a run of a new size; for one of the grid's sizes it
    is somewhat wide. The surface's error is
    Student's t of the fit's ``few_clusters`` where that applies; else the fit's draws.

    Args:
      columns: params=, tokens= (and what else the law reads), a number each.

    Raises:
      FitError: a column is missing or no positive number, or the fit has no noise, no draws or no minimum.
    """
    names = [COLUMN_OF[v] for v in fit.law.variables]
    for name in names:
        value = columns.get(name)
        if not isinstance(value, int | float | np.number) or not (np.isfinite(value) and value > 0):
            raise FitError(f"{name} is {value!r}; it must be a positive number")
    if set(columns) - set(names):
        raise FitError(
            f"{', '.join(sorted(set(columns) - set(names)))}: {fit.law.name} reads {', '.join(names)}"
        )
    if fit.status not in ("converged", "boundary"):
        raise FitError(f"the fit is {fit.status}, so it predicts nothing: {'; '.join(fit.reasons)}")
    at = {k: float(columns[k]) for k in names}
    estimate = float(np.squeeze(fit.predict(**at)))
    problem = rebuild(fit)[0]
    p_K = problem.from_params(fit.params)[0]
    used = [r for r in fit.rows if r["outcome"] == "used"]
    residual_R, kinds = np.array([r["residual"] for r in used]), [r["cluster"] for r in used]
    notes = []
    ways = np.array(kinds).T
    cluster_R = np.unique(ways[0] if ways.ndim == 2 else ways, return_inverse=True)[1]
    left, freedom = _freedom(problem, p_K, residual_R, cluster_R)
    if not left > 1e-6:
        raise FitError("the fit has no degree of freedom left, so a run's noise is unknown")
    off_R = (residual_R - residual_R.mean()) / np.sqrt(left)
    rng = np.random.default_rng(seed)
    point = {v: at[COLUMN_OF[v]] for v in fit.law.variables}
    try:
        if fit.few_clusters is None:
            raise FitError("")
        got = fit.few_clusters.interval(lambda p: np.log(fit.law.predict(p, point)))
        surface = got["sd"] * rng.standard_t(got["freedom"], RESAMPLES)
    except FitError as error:
        if len(fit.draws) < LEAST_DRAWS:
            raise FitError(f"the fit has {len(fit.draws)} draws; refit it with bootstraps=1000") from error
        with np.errstate(all="ignore"):
            draws = np.log(fit.predict_draws(**at)[:, 0] / estimate)
        draws = draws[np.isfinite(draws)]
        if len(draws) < max(LEAST_DRAWS, 0.99 * len(fit.draws)):
            raise FitError("the fit's draws have no finite loss there") from error
        surface = rng.choice(draws, RESAMPLES)
        if len(np.unique(cluster_R)) < 15:
            notes.append("percentiles of so few clusters hold the truth too seldom at the edge of the grid")
    for name in names:
        low, high = fit.diagnostics["range"].get(name, (None, None))
        if low is not None and not low <= at[name] <= high:
            far = at[name] / high if at[name] > high else low / at[name]
            notes.append(f"{name} is {far:.3g} times outside the rows: that the law holds there is assumed")
    # the noise is known by its own degrees of freedom only: Student's t in place of a normal
    scale = np.sqrt(freedom / rng.chisquare(freedom, RESAMPLES))
    run = surface + scale * rng.choice(off_R, RESAMPLES)
    return Prediction(
        at, estimate, _ends(estimate, surface), _ends(estimate, run), float(off_R.std(ddof=1)), notes
    )


def _freedom(problem, p_K, residual_R, cluster_R) -> tuple[float, float]:
    """Variance of the residuals over that of the errors, which are correlated in clusters; its freedom.

    The freedom is that of the sum of squared residuals (Satterthwaite), given the correlation.
    """
    J_RxK, _, _ = row_slopes(problem, p_K)
    scale = np.linalg.norm(J_RxK, axis=0)
    Q_RxK = np.linalg.qr(J_RxK / np.where(scale > 0, scale, 1.0))[0]
    together = (cluster_R[:, None] == cluster_R).astype(float)
    M = np.eye(len(residual_R)) - Q_RxK @ Q_RxK.T
    # rows' and clusters' variances from two sums of squares, each expected under the fitted parameters:
    # the residuals' own correlation would be too low, since the parameters follow the clusters' errors
    kinds = (np.eye(len(residual_R)), together)
    expected = [[np.sum((M @ sums @ M) * errors) for errors in kinds] for sums in kinds]
    off_R = residual_R - residual_R.mean()
    own, shared = np.linalg.lstsq(expected, [off_R @ sums @ off_R for sums in kinds], rcond=None)[0]
    icc = (
        float(np.clip(shared / (own + shared), 0.0, 1.0)) if own > 0 and own + shared > 0 else float(own <= 0)
    )
    left = M @ (icc * together + (1 - icc) * np.eye(len(residual_R))) @ M
    trace = float(np.trace(left))
    return trace / len(residual_R), max(trace**2 / max(float((left**2).sum()), 1e-300), 1.0)


def _ends(estimate: float, off: np.ndarray) -> dict[str, list[float]]:
    tails = {k: 0.5 - int(k) / 200 for k in LEVELS}
    return {k: [float(v) for v in estimate * np.exp(np.quantile(off, [q, 1 - q]))] for k, q in tails.items()}
