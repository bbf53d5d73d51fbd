"""Uncertainty by refitting: thousands of re-weighted fits, whole clusters of rows at a time.

Runs that share a size (or are branches of one trunk) share what is peculiar to it, so their
residuals are correlated and resampling them one by one gives intervals that are too narrow.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from fits.errors import FitError
from fits.laws import Law, PowerSum
from fits.objective import NARROWED, PowerSumProblem, Problem
from fits.solve import exponent_grid, minimise, profile
from fits.table import Table, find_budgets, group_close

SCHEMES = ("pairs", "bayesian")
FEW = 60  # clusters: with more, percentiles of whole clusters hold the truth as often as they say
LEVELS = {"80": (0.10, 0.90), "95": (0.025, 0.975)}
CHUNK = 256  # lanes refitted together: their working arrays stay in a core's cache


def find_clusters(table: Table, cluster: str | Sequence[str] = "auto") -> tuple[np.ndarray, str]:
    """Which rows are resampled together.

    Args:
      cluster: "auto" (by model size where sizes repeat, which also joins the branches of a trunk and
        the evaluations of a run; else every row alone), "size", "budget" (``table.find_budgets``),
        "compute" (half decades: floor(2 log10 C)), "run" (the column run, else trunk, else as auto), "row"
        (or "none"), or a column.
        Or two of them, crossed: "size+budget" or ("size", "budget").

    Returns:
      Cluster number per used row, int [R] ([2, R] for two ways), and what a cluster is, in words.

    Raises:
      FitError: ``cluster`` is none of these, or names two ways that cannot be crossed.
    """
    plain = isinstance(cluster, str)
    if plain and (cluster in table.extra or "+" not in cluster):  # a column's own name may hold a +
        return _one_way(table, cluster)
    names = [c.strip() for c in cluster.split("+")] if plain else cluster
    if not isinstance(names, Sequence) or len(names) != 2 or names[0] == names[1]:
        raise FitError(
            f"cluster is {cluster!r}; it must be a name, or two different ones such as size+budget"
        )
    ways = [_one_way(table, name) for name in names]
    for name, (_, words) in zip(names, ways, strict=True):
        if words == "row":
            raise FitError(
                f"cluster is {cluster!r}; to be crossed, each way must group rows, and {name} does not"
            )
    if np.array_equal(*(np.unique(ids, return_inverse=True)[1] for ids, _ in ways)):
        raise FitError(f"cluster is {cluster!r}; both ways group the rows alike, so give only one")
    return np.stack([ids for ids, _ in ways]), f"{ways[0][1]} and {ways[1][1]}"


def _one_way(table: Table, cluster: str) -> tuple[np.ndarray, str]:
    n = len(table)
    if cluster in ("row", "none"):
        return np.arange(n), "row"
    if cluster == "run":
        cluster = next((c for c in ("run", "trunk") if c in table.extra), "auto")
    if cluster in ("auto", "size"):
        sized = np.isfinite(table.params).all()
        ids = group_close(table.params) if sized else np.arange(n)
        return (ids, "model size") if len(np.unique(ids)) < n or cluster == "size" else (np.arange(n), "row")
    if cluster in ("budget", "compute"):
        if not np.isfinite(table.flops).all():
            raise FitError(f"cluster is {cluster!r}, but some rows have neither flops nor params and tokens")
        if cluster == "budget":
            return find_budgets(table)[0], "budget"
        # a power of ten opens its own bin, rounded or not
        halves = np.floor(2 * np.log10(table.flops) + 1e-9)
        return np.unique(halves, return_inverse=True)[1], "half decade of compute"
    if not isinstance(cluster, str) or cluster not in table.extra:
        raise FitError(
            f"cluster is {cluster!r}; it must be auto, size, budget, compute, run, row or a column: "
            f"{', '.join(table.extra)}, or two of these joined by +"
        )
    labels = [_key(v, i) for i, v in enumerate(table.extra[cluster])]
    return np.unique(labels, return_inverse=True)[1], cluster


def _key(value: Any, row: int) -> str:
    """A label; a blank one is a cluster of its own."""
    blank = value is None or value != value or value == ""
    return f"blank {row}" if blank else f"= {value}"


def resample_weights(cluster_R: np.ndarray, count: int, scheme: str, seed: int) -> np.ndarray:
    """Row weights [count, R] of resamples of whole clusters.

    ``pairs``: as many clusters as there are, drawn with replacement (Efron 1979); ``bayesian``:
    independent exponential weights scaled to the number of clusters (Rubin 1981), smoother where
    clusters are few. With cluster numbers [2, R] the two ways are drawn independently and a row has the
    product of its two weights (the pigeonhole bootstrap, Owen 2007): right for effects of either way,
    too wide, never too narrow, for what is peculiar to a row (up to three times its variance).
    """
    if scheme not in SCHEMES:
        raise FitError(f"scheme is {scheme!r}; it must be one of {', '.join(SCHEMES)}")
    if not isinstance(count, int | np.integer) or count < 0:
        raise FitError(f"bootstraps is {count!r}; it must be zero or a positive integer")
    if not isinstance(seed, int | np.integer) or isinstance(seed, bool) or seed < 0:
        raise FitError(f"seed is {seed!r}; it must be zero or a positive integer")
    rng = np.random.default_rng(seed)
    out = np.ones((1, 1))
    for ids_R in np.atleast_2d(cluster_R):
        groups = int(ids_R.max()) + 1
        if scheme == "pairs":
            weights = rng.multinomial(groups, np.full(groups, 1.0 / groups), size=count).astype(float)
        else:
            weights = rng.standard_exponential((count, groups))
            weights *= groups / weights.sum(1, keepdims=True)
        out = out * weights[:, ids_R]
    return out


def refit(problem: Problem, p_K, weights_BxR, loss: str, delta: float | None, tau: float = 0.5):
    """Refits under every row of weights, each from the better of the point fit and its own profile.

    Args:
      p_K: solver coordinates of the point fit. weights_BxR: resampled times the rows' own weights.
      delta: Huber's width in the unit of the residual, the point fit's; any for another loss.

    Returns:
      p_BxK and converged_B.
    """
    p_out, converged = np.empty((len(weights_BxR), len(p_K))), np.zeros(len(weights_BxR), bool)
    profiled = isinstance(problem, PowerSumProblem)
    if profiled:
        grid = exponent_grid(problem, 12 if len(problem.exponents) < 3 else 6)
        width = delta if loss == "huber" else 1e-3 if loss in NARROWED else np.inf
        robust_R = np.minimum(1.0, width / np.maximum(np.abs(problem.residuals(p_K[None])[0]), 1e-300))
    for begin in range(0, len(weights_BxR), CHUNK):
        weights = weights_BxR[begin : begin + CHUNK]
        start = np.repeat(p_K[None], len(weights), 0)
        if profiled:
            rss, p = profile(problem, weights, grid, robust_R)
            best = np.argmin(rss, 1)
            lanes = np.arange(len(weights))
            own_rss = (weights * robust_R * _profile_residual(problem, p_K) ** 2).sum(1)
            take = np.isfinite(rss[lanes, best]) & (rss[lanes, best] < own_rss)
            start = np.where(take[:, None], p[lanes, best], start)
        solution = minimise(problem, start, weights, loss, delta or 1.0, tau)
        p_out[begin : begin + CHUNK] = solution.p_BxK
        converged[begin : begin + CHUNK] = solution.converged_B & np.isfinite(solution.value_B)
    return p_out, converged


def _profile_residual(problem: PowerSumProblem, p_K) -> np.ndarray:
    scale = problem.y_R if problem.space == "log" else problem.y_R.mean()
    return (problem.predict(p_K[None])[0] - problem.y_R) / scale


def interval(draws: np.ndarray, estimate: float) -> dict[str, Any]:
    """Standard deviation and percentile intervals (80 % and 95 %) of draws of one quantity."""
    draws = np.asarray(draws, float)
    if not len(draws) or not np.isfinite(draws).all():
        draws = (
            draws[np.isfinite(draws)] if np.isfinite(draws).sum() >= 0.99 * max(len(draws), 1) else draws[:0]
        )
    out: dict[str, Any] = {"estimate": float(estimate), "sd": None, "80": None, "95": None}
    if len(draws) >= 20:  # below that no 95 % interval can be read off
        scale = float(np.abs(draws).max()) or 1.0  # a coefficient's tail may overflow when squared
        out["sd"] = scale * float((draws / scale).std(ddof=1))
        for level, ends in LEVELS.items():
            out[level] = [float(q) for q in np.quantile(draws, ends)]
    return out


def intraclass(residual_R: np.ndarray, cluster_R: np.ndarray) -> dict[str, Any]:
    """Correlation of residuals within clusters, and the number of independent rows that they amount to.

    The one-way analysis-of-variance estimator (Donner 1986) on residuals cut at three robust standard
    deviations (one outlier would hide the correlation of all others), itself cut to [0, 1]; rows are
    divided by the design effect 1 + (m - 1) icc, m the cluster size that a row meets (Kish 1965).
    Of two ways, [2, R], design effects add, icc is the larger, clusters the fewer; ``ways`` has both.
    """
    if np.ndim(cluster_R) == 2:
        ways = [intraclass(residual_R, ids_R) for ids_R in cluster_R]
        effect = 1 + sum(len(residual_R) / w["effective_rows"] - 1 for w in ways)
        return {
            "icc": max(w["icc"] for w in ways),
            "effective_rows": len(residual_R) / effect,
            "clusters": min(w["clusters"] for w in ways),
            "ways": ways,
        }
    middle = np.median(residual_R)
    spread = 3 * 1.4826 * np.median(np.abs(residual_R - middle))
    if spread > 0:
        residual_R = np.clip(residual_R, middle - spread, middle + spread)
    n, counts = len(residual_R), np.bincount(cluster_R).astype(float)
    groups = len(counts)
    if groups == n or groups < 2:
        return {"icc": 0.0, "effective_rows": float(n if groups == n else 1), "clusters": groups}
    means = np.bincount(cluster_R, residual_R) / counts
    between = (counts * (means - residual_R.mean()) ** 2).sum() / (groups - 1)
    within = ((residual_R - means[cluster_R]) ** 2).sum() / (n - groups)
    typical = (n - (counts**2).sum() / n) / (groups - 1)
    total = between + (typical - 1) * within
    icc = float(np.clip((between - within) / total, 0.0, 1.0)) if total > 0 else 0.0
    met = (counts**2).sum() / n
    return {"icc": icc, "effective_rows": float(n / (1 + (met - 1) * icc)), "clusters": groups}


def few_clusters(problem: Problem, p_K, cluster_R, row_loss, weights_R, status: str):
    """``FewClusters`` of a fit, or None where percentiles of its draws serve better.

    That is with more than ``FEW`` clusters, which a bootstrap knows well, at a bound, and where
    ``FewClusters`` refuses.
    """
    from fits.few_clusters import FewClusters

    if status != "converged" or np.ndim(cluster_R) != 1 or len(np.unique(cluster_R)) > FEW:
        return None
    try:
        return FewClusters(problem, p_K, cluster_R, row_loss, weights_R)
    except FitError:
        return None


def with_few_clusters(
    got: dict, few, quantity: Callable | None, log: bool, bounds=None, step: float | None = None
) -> dict:
    """``interval``'s result with the ends of the few-cluster interval; percentiles stay where it fails.

    Args:
      few: ``FewClusters`` or None. quantity, log, step: see ``Fit.interval_of``. bounds: (low, high) of one
        that is not taken by its log.
    """
    out = {**got, "method": "percentile"}
    if few is None or quantity is None or got["95"] is None or (log and not got["estimate"] > 0):
        return out

    def measured(params):
        values = np.asarray(quantity(params), float)
        return np.log(values) if log else values

    try:
        with np.errstate(all="ignore"):
            found = few.interval(measured, step)
    except FitError:
        return out
    low, high = bounds or (-np.inf, np.inf)
    back = np.exp if log else lambda v: np.clip(v, low, high)
    with np.errstate(over="ignore"):  # an end may lie beyond every float
        ends = {level: [float(v) for v in back(np.array(found[level]))] for level in LEVELS}
    percentile = {level: got[level] for level in LEVELS}
    return out | ends | {"method": "few clusters", "freedom": found["freedom"], "percentile": percentile}


def summarise(params: Mapping[str, float], draws: Mapping[str, np.ndarray]) -> dict[str, dict]:
    """``interval`` of every quantity in ``params``."""
    return {k: interval(draws.get(k, np.empty(0)), v) for k, v in params.items()}


def summarise_fit(
    law: Law, params: Mapping[str, float], draws: Mapping[str, np.ndarray], few, bounds: Mapping[str, tuple]
) -> dict[str, dict]:
    """Intervals of every parameter, and of the exponents a and b where the law has them.

    Args:
      draws: of the parameters, arrays [draws]. few: ``FewClusters`` or None. bounds: of the parameters.
    """
    out = {}
    for name, value in params.items():
        got = interval(draws.get(name, np.empty(0)), value)
        log = acts_by_its_log(law, name)
        out[name] = with_few_clusters(got, few, lambda p, n=name: p[n], log, bounds.get(name))
    exponent_draws = law.compute_exponents(draws)
    for name, value in law.compute_exponents(params).items():
        got = interval(exponent_draws.get(name, np.empty(0)), value)
        out[name] = with_few_clusters(got, few, lambda p, n=name: law.compute_exponents(p)[n], False)
    return out


def acts_by_its_log(law: Law, name: str) -> bool:
    """Whether a parameter's log, rather than itself, is about linear in the rows."""
    if isinstance(law, PowerSum):
        return any(t.coefficient == name and t.powers for t in law.terms)
    return name != "E" and law._positive(name)
