"""From a table to a fit: clean, solve, resample, doubt, record."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np

from fits import checks, uncertainty
from fits.fit import Fit
from fits.laws import COLUMN_OF, Law, get_law
from fits.noise import noise_flags, seed_noise
from fits.objective import ASYMMETRIC, PowerSumProblem, Problem, RowLoss
from fits.rowweights import row_column
from fits.solve import PointFit, solve
from fits.table import Table, clean, find_budgets, group_close

SENSITIVITY_DELTAS = (1e-4, 1e-2)
SENSITIVITY_BUDGETS = (3, 12)  # fewer leave too little when one goes; more and one hardly matters
SENSITIVITY_SIZES = 12  # where there are more, neighbouring ones are dropped together
# shares of the runs, by compute, that leave the window where budgets are not found
WINDOWS = (1 / 8, 1 / 4, 1 / 2)
SENSITIVITY_STARTS = 4


def fit_table(
    table: Any,
    law: str | Law = "chinchilla",
    *,
    loss: str = "huber",
    delta: float = 1e-3,
    delta_unit: str = "absolute",
    tau: float = 0.5,
    weights: Any = None,
    stderr: Any = None,
    space: str = "log",
    bootstraps: int = 1000,
    scheme: str = "pairs",
    cluster: str | Sequence[str] = "auto",
    fixed: Mapping[str, float] | None = None,
    bounds: Mapping[str, tuple] | None = None,
    columns: Mapping[str, str] | None = None,
    token_unit: float = 1.0,
    param_unit: float = 1.0,
    exclude: Sequence[str] = (),
    sensitivity: bool = True,
    seed: int = 0,
    source: str | None = None,
) -> Fit:
    """Fits a law to a run table.

    Args:
      table: DataFrame or mapping of columns with params, tokens (or flops, as the law needs) and loss.
      loss: "huber", "lad", "least_squares", "quantile" or "expectile"; summed over rows.
      delta: Huber's width, in the residual's own unit or (``delta_unit="scale"``) in robust standard
        deviations of a lad fit. tau: of quantile and expectile. See ``solve.solve``.
      weights: a weight per row: a column's name, or one value per row of the table.
      stderr: the standard error of each row's loss, likewise, in the unit of the loss; rows are weighted
        by 1 / (s^2 + excess^2), where the excess scatter is estimated. See ``solve.solve``.
      space: residuals of "log" or "raw" loss.
      bootstraps, scheme, cluster, seed: see ``uncertainty.resample_weights`` and ``find_clusters``.
      fixed: parameters pinned to a value. bounds: name -> (lower, upper), None for unbounded.
      columns, token_unit, param_unit, exclude: see ``table.clean``.
      sensitivity: refit under other deltas, without each budget, without each size, over narrower windows.
      source: where the table came from, for the record.

    Raises:
      FitError: a table or option that cannot be used, or fewer rows than free parameters. A table that
        does not determine the law is no error: the fit comes back with status "not identified".
    """
    law = get_law(law)
    needs = [COLUMN_OF[v] for v in law.variables] + ["loss"]
    rows = clean(
        table, needs=needs, columns=columns, token_unit=token_unit, param_unit=param_unit, exclude=exclude
    )
    options = {
        "loss": loss, "delta": delta, "delta_unit": delta_unit, "tau": tau, "space": space,
        "fixed": fixed, "bounds": bounds,
        "weights": row_column(rows, weights, "weights", columns),
        "stderr": row_column(rows, stderr, "stderr", columns),
    }  # fmt: skip
    ids, cluster_name = uncertainty.find_clusters(rows, cluster)
    resamples_BxR = uncertainty.resample_weights(ids, bootstraps, scheme, seed)
    problem, point = solve(law, {v: rows.log_x()[v] for v in law.variables}, rows.loss, **options)
    doubts = checks.structure(law, rows, problem.fixed)
    if doubts:
        point.status, point.reasons = "not identified", doubts + point.reasons
    sound = point.status in ("converged", "boundary")
    p_BxK, converged = np.empty((0, len(law.parameters))), np.zeros(0, bool)
    if sound and bootstraps:
        p_BxK, converged = uncertainty.refit(
            problem, point.p_K, resamples_BxR * point.weights_R, loss, point.delta, tau
        )
    kept = problem.to_params(p_BxK[converged])
    few = uncertainty.few_clusters(
        problem, point.p_K, ids, RowLoss(loss, point.delta or 1.0, tau), point.weights_R, point.status
    )
    intervals = uncertainty.summarise_fit(law, point.params, kept, few, problem.bounds)
    draws = np.stack([kept[k] for k in law.parameters], 1)
    residual = problem.residuals(point.p_K[None])[0]
    dependence = _dependence(rows, residual, ids)
    row_flags = checks.row_flags(rows, residual)
    flags = checks.fit_flags(
        law, rows, point, cluster_name, dependence, converged, _bound_share(problem, p_BxK[converged]),
        {k: v["sd"] for k, v in intervals.items()}, point.delta, residual, row_flags, problem.fixed,
    )  # fmt: skip
    _write_rows(rows, problem, residual, ids, row_flags, point.weights_R)
    log_residual_R = np.array([rows.rows[i]["residual"] for i in rows.index])
    noise = seed_noise(rows, law.variables, log_residual_R, int(problem.free_K.sum()))
    flags += noise_flags(noise) + [checks.flag("text_numbers", note) for note in rows.notes]
    with np.errstate(all="ignore"):  # what overflows is written as null
        covariance = np.cov(draws.T).tolist() if len(draws) > len(law.parameters) else None
    data = {"hash": rows.hash, "rows": len(rows.rows), "columns": rows.columns, "units": rows.units}
    fit = Fit(
        law=law, params=point.params, status=point.status, reasons=point.reasons, flags=flags,
        intervals=intervals, covariance=covariance, draws=draws, objective=point.objective,
        fixed=problem.fixed,
        method=_method(problem, rows, options) | _weighting(point, options, weights, stderr) | {
            "bootstraps": int(bootstraps), "scheme": scheme, "cluster": cluster_name, "seed": int(seed),
        },
        diagnostics=_diagnostics(rows, problem, point, residual) | dependence
        | {"resamples_converged": int(converged.sum()), "seed_noise": noise},
        sensitivity=[], rows=rows.rows, data=data | {"source": source}, versions=versions(),
    )  # fmt: skip
    if sensitivity and sound:
        fit.sensitivity = sensitivity_strip(
            law, rows, options | {"delta": point.delta or delta, "delta_unit": "absolute"}
        )
        fit.flags += checks.sensitivity_flags(fit)
    return fit


def _dependence(rows: Table, residual, ids) -> dict[str, float]:
    """``intraclass`` of the clusters; rows resampled alone are still counted by their size's correlation."""
    got = uncertainty.intraclass(residual, ids)
    if got["clusters"] == len(rows) and np.isfinite(rows.params).all():
        by_size = uncertainty.intraclass(residual, group_close(rows.params))
        if by_size["clusters"] < len(rows):
            got |= {"icc": by_size["icc"], "effective_rows": by_size["effective_rows"]}
    return got


def _bound_share(problem: Problem, p_BxK: np.ndarray) -> float:
    at_bound = ((p_BxK <= problem.lower_K) | (p_BxK >= problem.upper_K)) & problem.free_K
    return float(at_bound.any(1).mean()) if len(p_BxK) else 0.0


def _write_rows(rows: Table, problem: Problem, residual, ids, row_flags, weights_R):
    """Adds fitted loss, log residual, weight, cluster and flags to the record of each used row."""
    fitted = problem.target_R + residual
    fitted = np.exp(fitted) if problem.space == "log" else fitted
    with np.errstate(all="ignore"):
        log_residual = np.log(rows.loss / fitted)
    for row in rows.rows:
        row |= {"fitted": None, "residual": None, "weight": None, "cluster": None}
    for k, i in enumerate(rows.index):
        rows.rows[i] |= {
            "fitted": float(fitted[k]),
            "residual": float(log_residual[k]),
            "weight": 1.0 if weights_R is None else float(weights_R[k]),
            "cluster": ids[..., k].tolist(),  # a pair where rows are clustered two ways
            "flags": row_flags[k],
        }


def _method(problem: Problem, rows: Table, options: Mapping) -> dict:
    newton = "damped Newton with the exact Hessian"
    profiled = isinstance(problem, PowerSumProblem)
    return {
        "loss": options["loss"],
        "space": options["space"],
        "reduction": "sum",
        "optimiser": f"variable projection over an exponent grid, then {newton}" if profiled else newton,
        "initialisation": "the best points, far apart, of the least-squares profile over an exponent grid"
        if profiled
        else "the best of the law's own starts",
        "bounds": {k: list(v) for k, v in problem.bounds.items()},
        "compute": f"flops from {rows.flops_from}; a, b and allocations under C = 6 N D",
    }


def _weighting(point: PointFit, options: Mapping, weights: Any, stderr: Any) -> dict:
    """How residuals and rows were weighted; ``delta`` is the width used, in the unit of the residual."""

    def named(given):
        return given if given is None or isinstance(given, str) else "given by value"

    huber = options["loss"] == "huber"
    return {
        "delta": point.delta,
        "delta_unit": options["delta_unit"] if huber else None,
        "delta_given": float(options["delta"]) if huber else None,
        "tau": float(options["tau"]) if options["loss"] in ASYMMETRIC else None,
        "weights": named(weights),
        "stderr": named(stderr),
        "excess_scatter": point.excess,
    }


def _diagnostics(rows: Table, problem: Problem, point: PointFit, residual) -> dict:
    def ends(values):
        finite = values[np.isfinite(values)]
        return [float(finite.min()), float(finite.max())] if len(finite) else [None, None]

    return {
        "rows": len(rows.rows),
        "rows_used": len(rows),
        "rows_excluded": len(rows.rows) - len(rows),
        "degrees_of_freedom": len(rows) - int(problem.free_K.sum()),
        "sizes": len(np.unique(group_close(rows.params))) if np.isfinite(rows.params).all() else None,
        "rms_residual": float(np.sqrt(np.mean(residual**2))),
        "median_abs_residual": float(np.median(np.abs(residual))),
        "condition": point.condition,
        "scaled_gradient": point.scaled_gradient,
        "starts": point.starts,
        "starts_agreeing": point.agreeing,
        "iterations": point.iterations,
        "at_bound": point.at_bound,
        "range": {c: ends(getattr(rows, c)) for c in ("params", "tokens", "flops", "loss")},
    }


def sensitivity_strip(law: Law, rows: Table, options: Mapping) -> list[dict]:
    """Refits under other choices of Huber width, of loss, and of the rows that count.

    Each budget is dropped in turn (where budgets repeat), each size (or group of neighbouring sizes), and
    then ever more of the smallest budgets (or of the least compute), as a window that begins higher.
    """
    cases: list[tuple[str, np.ndarray, dict]] = []
    everything = np.ones(len(rows), bool)
    if options["loss"] == "huber":
        widths = [d for d in SENSITIVITY_DELTAS if d != options["delta"]]
        cases += [(f"delta {d:g}", everything, {"delta": d}) for d in widths]
        cases.append(("least squares", everything, {"loss": "least_squares"}))
    if np.isfinite(rows.flops).all():
        groups, budgets = find_budgets(rows)
        if SENSITIVITY_BUDGETS[0] <= len(budgets) <= SENSITIVITY_BUDGETS[1]:
            cases += [(f"without the runs at {c:.3g} FLOPs", groups != g, {}) for g, c in enumerate(budgets)]
    cases += [(what, keep, {}) for what, keep in _drops(rows)]
    out = []
    for what, keep, change in cases:
        if (keep & (options.get("weights") is None or options["weights"] > 0)).sum() <= len(law.parameters):
            continue
        x = {v: rows.log_x()[v][keep] for v in law.variables}
        change = change | {k: options[k][keep] for k in ("weights", "stderr") if options.get(k) is not None}
        _, point = solve(law, x, rows.loss[keep], **{**options, **change}, starts=SENSITIVITY_STARTS)
        a = law.compute_exponents(point.params).get("a")
        a = float(a) if a is not None and point.status in ("converged", "boundary") else None
        out.append(
            {"what": what, "rows": int(keep.sum()), "status": point.status, "params": point.params, "a": a}
        )
    return out


def _drops(rows: Table) -> list[tuple[str, np.ndarray]]:
    """What is dropped, in words, and the rows that stay: sizes in turn, then the low end of compute."""
    out = []
    if np.isfinite(rows.params).all():
        ids = group_close(rows.params)
        sizes = np.array([np.exp(np.log(rows.params[ids == g]).mean()) for g in range(ids.max() + 1)])
        if len(sizes) >= 3:
            for part in np.array_split(np.arange(len(sizes)), min(len(sizes), SENSITIVITY_SIZES)):
                low, high = sizes[part[0]], sizes[part[-1]]
                name = f"{low:.3g}" if len(part) == 1 else f"{low:.3g} to {high:.3g}"
                out.append((f"without the size{'s' * (len(part) > 1)} {name}", ~np.isin(ids, part)))
    if np.isfinite(rows.flops).all():
        groups, budgets = find_budgets(rows)
        if SENSITIVITY_BUDGETS[0] <= len(budgets) <= SENSITIVITY_BUDGETS[1]:
            starts = [budgets[k] for k in range(2, len(budgets) // 2 + 1)]
            windows = [(start, groups >= k + 2) for k, start in enumerate(starts)]
        else:
            starts = [float(np.quantile(rows.flops, share)) for share in WINDOWS]
            windows = [(start, rows.flops >= start) for start in starts]
        out += [(f"only the runs from {start:.3g} FLOPs", keep) for start, keep in windows if not keep.all()]
    return out


def versions() -> dict[str, str]:
    """Versions of what decides the numbers."""
    out = {"python": platform.python_version(), "numpy": np.__version__}
    for package in ("jax", "scaling"):
        try:
            out[package] = version(package)
        except PackageNotFoundError:
            out[package] = "not installed"
    return out
