"""A fit: a law with estimated parameters, intervals, diagnostics and provenance; and how one is made."""

from __future__ import annotations

import dataclasses
import platform
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from fits import allocate as _allocate
from fits import checks, uncertainty
from fits.errors import FitError
from fits.laws import COLUMN_OF, Law, get_law
from fits.objective import Problem
from fits.solve import PointFit, solve
from fits.table import Table, clean, group_close

SENSITIVITY_DELTAS = (1e-4, 1e-2)


@dataclasses.dataclass
class Fit:
    """A law fitted to a table. Lengths of ``params``, ``draws`` and ``covariance`` follow ``law.parameters``.

    Attributes:
      status: converged, boundary, not identified or unconverged; ``reasons`` says why.
      intervals: quantity -> {"estimate", "sd", "80", "95"} for parameters and the exponents a and b.
      covariance: of the bootstrap draws, [K, K], or None without draws.
      draws: parameters of the resamples that converged, float64 [draws, K].
      rows: one dict per input row: outcome, reason, flags, values, fitted loss, log residual, cluster.
      method, diagnostics, data, versions: how it was made, on what.
      sensitivity: refits under other choices: {"what", "status", "params", "a"}.
    """

    law: Law
    params: dict[str, float]
    status: str
    reasons: list[str]
    flags: list[dict[str, str]]
    intervals: dict[str, dict]
    covariance: list[list[float]] | None
    draws: np.ndarray
    objective: float
    fixed: dict[str, float]
    method: dict[str, Any]
    diagnostics: dict[str, Any]
    sensitivity: list[dict]
    rows: list[dict]
    data: dict[str, Any]
    versions: dict[str, str]

    def predict(self, **columns) -> np.ndarray:
        """Loss at ``params=``, ``tokens=`` (and ``flops=`` where the law is in C)."""
        return np.asarray(self.law.predict(self.params, self._x(columns)))

    def predict_draws(self, **columns) -> np.ndarray:
        """Loss of every draw at every point, [draws, points]."""
        x = {k: np.atleast_1d(v)[None] for k, v in self._x(columns).items()}
        return np.asarray(self.law.predict({k: v[:, None] for k, v in self.draw_params().items()}, x))

    def draw_params(self) -> dict[str, np.ndarray]:
        """Draws by name, arrays [draws]."""
        return dict(zip(self.law.parameters, self.draws.T, strict=True))

    def interval_of(self, draws: np.ndarray, estimate: float) -> dict:
        """Standard deviation, 80 % and 95 % interval of any quantity computed per draw."""
        return uncertainty.interval(draws, estimate)

    def optimum(self, budget: Any, flops: Callable | None = None) -> dict[str, np.ndarray]:
        """N*, D* and loss of the point estimate at each budget, arrays [C]."""
        points = [_allocate.optimum(self.law, self.params, float(c), flops) for c in np.atleast_1d(budget)]
        return {k: np.array([float(np.squeeze(p[k])) for p in points]) for k in ("N", "D", "loss")}

    def optimum_draws(self, budget: Any, flops: Callable | None = None) -> dict[str, np.ndarray]:
        """N*, D* and loss of every draw at each budget, arrays [draws, C]."""
        draws = self.draw_params()
        points = [_allocate.optimum(self.law, draws, float(c), flops) for c in np.atleast_1d(budget)]
        return {k: np.stack([p[k] for p in points], 1) for k in ("N", "D", "loss")}

    def _x(self, columns: Mapping[str, Any]) -> dict[str, np.ndarray]:
        missing = [COLUMN_OF[v] for v in self.law.variables if COLUMN_OF[v] not in columns]
        if missing:
            raise FitError(f"predict lacks {', '.join(missing)}; {self.law.name} is {self.law.formula}")
        return {v: np.asarray(columns[COLUMN_OF[v]], float) for v in self.law.variables}

    def to_dict(self) -> dict:
        from fits.fitfile import to_dict

        return to_dict(self)

    @staticmethod
    def from_dict(data: Mapping) -> Fit:
        from fits.fitfile import from_dict

        return from_dict(data)

    def __str__(self) -> str:
        lines = [f"flag: {f['text']}" for f in self.flags]
        lines.append(f"{self.law.name}: {self.law.formula}   [{self.law.source}]")
        lines.append(f"status: {self.status} ({'; '.join(self.reasons)})")
        if self.status in ("not identified", "unconverged"):
            lines.append("The values below are where the solver stopped, not estimates.")
        lines.append(f"  {'':7}{'estimate':>12}  {'sd':>9}  {'80 %':>22}  {'95 %':>22}")
        for name, got in self.intervals.items():
            ends = ["" if got[k] is None else f"{got[k][0]:.5g} to {got[k][1]:.5g}" for k in ("80", "95")]
            sd = "fixed" if name in self.fixed else "" if got["sd"] is None else f"{got['sd']:.3g}"
            lines.append(f"  {name:7}{got['estimate']:>12.6g}  {sd:>9}  {ends[0]:>22}  {ends[1]:>22}")
        m, d = self.method, self.diagnostics
        width = f", delta {m['delta']:g}" if m["loss"] == "huber" else ""
        lines.append(
            f"{d['rows_used']} of {d['rows']} rows; {m['loss']}{width} on {m['space']} loss, summed: {self.objective:.10g}; "
            f"rms residual {d['rms_residual']:.3g}"
        )
        if self.draws.size:
            lines.append(
                f"{len(self.draws)} of {m['bootstraps']} resamples ({m['scheme']}) of {d['clusters']} clusters by {m['cluster']}"
            )
        for reason, count in excluded_counts(self.rows).items():
            lines.append(f"excluded: {count} because {reason}")
        return "\n".join(lines)

    def __rich__(self):
        from rich.console import Group
        from rich.table import Table as RichTable

        head, *rest = str(self).split(f"  {'':7}{'estimate':>12}", 1)
        table = RichTable("", "estimate", "sd", "80 %", "95 %")
        for name, got in self.intervals.items():
            ends = ["" if got[k] is None else f"{got[k][0]:.5g} to {got[k][1]:.5g}" for k in ("80", "95")]
            sd = "fixed" if name in self.fixed else "" if got["sd"] is None else f"{got['sd']:.3g}"
            table.add_row(name, f"{got['estimate']:.6g}", sd, *ends)
        tail = rest[0].splitlines()[1 + len(self.intervals) :]
        return Group(head.rstrip(), table, "\n".join(tail))


def excluded_counts(rows: Sequence[Mapping]) -> dict[str, int]:
    """Number of excluded rows by reason, the commonest first."""
    counts: dict[str, int] = {}
    for row in rows:
        if row["outcome"] == "excluded":
            counts[row["reason"]] = counts.get(row["reason"], 0) + 1
    return dict(sorted(counts.items(), key=lambda kv: -kv[1]))


def fit_table(
    table: Any,
    law: str | Law = "chinchilla",
    *,
    loss: str = "huber",
    delta: float = 1e-3,
    space: str = "log",
    bootstraps: int = 1000,
    scheme: str = "pairs",
    cluster: str = "auto",
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
      loss: "huber" (``delta`` in the residual's own unit), "lad" or "least_squares"; summed over rows.
      space: residuals of "log" or "raw" loss.
      bootstraps, scheme, cluster, seed: see ``uncertainty.resample_weights`` and ``find_clusters``.
      fixed: parameters pinned to a value. bounds: name -> (lower, upper), None for unbounded.
      columns, token_unit, param_unit, exclude: see ``table.clean``.
      sensitivity: refit under other deltas and without each budget.
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
    x = {v: rows.log_x()[v] for v in law.variables}
    options = {"loss": loss, "delta": delta, "space": space, "fixed": fixed, "bounds": bounds}
    problem, point = solve(law, x, rows.loss, **options)
    reasons = checks.structure(law, rows) if not problem.fixed else []
    if reasons:
        point.status, point.reasons = "not identified", reasons + point.reasons
    ids, cluster_name = uncertainty.find_clusters(rows, cluster)
    weights = uncertainty.resample_weights(ids, bootstraps, scheme, seed)
    usable = point.status in ("converged", "boundary") and bootstraps > 0
    p_BxK, converged = (
        uncertainty.refit(problem, point.p_K, weights, loss, delta)
        if usable
        else (np.empty((0, 0)), np.empty(0))
    )
    kept = {k: v[converged] for k, v in problem.to_params(p_BxK).items()} if usable else {}
    draws = np.stack([kept[k] for k in law.parameters], 1) if usable else np.empty((0, len(law.parameters)))
    quantities = {**point.params, **law.compute_exponents(point.params)}
    intervals = uncertainty.summarise(quantities, {**kept, **(law.compute_exponents(kept) if usable else {})})
    residual = problem.residuals(point.p_K[None])[0]
    dependence = uncertainty.intraclass(residual, ids)
    row_flags = checks.row_flags(rows, residual)
    flags = checks.fit_flags(law, rows, point, cluster_name, dependence,
                             {"converged": converged, "sd": {k: v["sd"] for k, v in intervals.items()}}, row_flags)  # fmt: skip
    _write_rows(rows, problem, point, residual, ids, row_flags)
    fit = Fit(
        law=law, params=point.params, status=point.status, reasons=point.reasons, flags=flags, intervals=intervals,
        covariance=np.cov(draws.T).tolist() if len(draws) > len(law.parameters) else None, draws=draws,
        objective=point.objective, fixed=problem.fixed,
        method=_method(problem, rows, loss, delta, space, bootstraps, scheme, cluster_name, seed),
        diagnostics=_diagnostics(rows, problem, point, residual, dependence, converged), sensitivity=[], rows=rows.rows,
        data={"hash": rows.hash, "rows": len(rows.rows), "columns": rows.columns, "units": rows.units, "source": source},
        versions=versions(),
    )  # fmt: skip
    if sensitivity and usable:
        fit.sensitivity = sensitivity_strip(law, rows, options)
        fit.flags += checks.sensitivity_flags(fit)
    return fit


def _write_rows(rows: Table, problem: Problem, point: PointFit, residual, ids, row_flags):
    """Adds fitted loss, log residual, cluster and flags to the record of each used row."""
    fitted = problem.target_R + residual
    fitted = np.exp(fitted) if problem.space == "log" else fitted
    with np.errstate(invalid="ignore"):
        log_residual = np.log(rows.loss / fitted)
    for row in rows.rows:
        row |= {"fitted": None, "residual": None, "cluster": None}
    for k, i in enumerate(rows.index):
        rows.rows[i] |= {
            "fitted": float(fitted[k]), "residual": float(log_residual[k]) if np.isfinite(log_residual[k]) else None,
            "cluster": int(ids[k]), "flags": row_flags[k],
        }  # fmt: skip


def _method(problem: Problem, rows: Table, loss, delta, space, bootstraps, scheme, cluster, seed) -> dict:
    return {
        "loss": loss, "delta": float(delta) if loss == "huber" else None, "space": space, "reduction": "sum",
        "optimiser": "variable projection over an exponent grid, then damped Newton with the exact Hessian"
        if hasattr(problem, "exponents") else "damped Newton with the exact Hessian from many starts",
        "initialisation": "best and mutually distant points of the least-squares profile over a grid of exponents"
        if hasattr(problem, "exponents") else "the law's own grid of starts",
        "bootstraps": int(bootstraps), "scheme": scheme, "cluster": cluster, "seed": int(seed),
        "compute": f"flops from {rows.flops_from}; a, b and allocations under C = 6 N D",
    }  # fmt: skip


def _diagnostics(
    rows: Table, problem: Problem, point: PointFit, residual, dependence: dict, converged
) -> dict:
    def ends(values):
        finite = values[np.isfinite(values)]
        return [float(finite.min()), float(finite.max())] if len(finite) else [None, None]

    return {
        "rows": len(rows.rows), "rows_used": len(rows), "rows_excluded": len(rows.rows) - len(rows),
        "degrees_of_freedom": len(rows) - int(problem.free_K.sum()),
        "rms_residual": float(np.sqrt(np.mean(residual**2))), "median_abs_residual": float(np.median(np.abs(residual))),
        **dependence, "condition": point.condition if np.isfinite(point.condition) else None,
        "scaled_gradient": point.scaled_gradient if np.isfinite(point.scaled_gradient) else None,
        "starts": point.starts, "starts_agreeing": point.agreeing, "iterations": point.iterations,
        "at_bound": point.at_bound, "resamples_converged": int(np.sum(converged)),
        "range": {"params": ends(rows.params), "tokens": ends(rows.tokens), "flops": ends(rows.flops), "loss": ends(rows.loss)},
        "sizes": len(np.unique(group_close(rows.params))) if np.isfinite(rows.params).all() else None,
    }  # fmt: skip


def sensitivity_strip(law: Law, rows: Table, options: Mapping) -> list[dict]:
    """Refits under other Huber widths, without robustness, and without each budget (where budgets repeat)."""
    cases: list[tuple[str, np.ndarray, dict]] = []
    everything = np.ones(len(rows), bool)
    if options["loss"] == "huber":
        cases += [
            (f"delta {d:g}", everything, {"delta": d}) for d in SENSITIVITY_DELTAS if d != options["delta"]
        ]
        cases.append(("least squares", everything, {"loss": "least_squares"}))
    budgets = (
        group_close(rows.flops, checks.BUDGET_TOLERANCE)
        if np.isfinite(rows.flops).all()
        else np.arange(len(rows))
    )
    values = np.unique(budgets)
    if 3 <= len(values) <= 12:
        for g in values:
            cases.append(
                (
                    f"without the runs near {np.exp(np.log(rows.flops[budgets == g]).mean()):.3g} FLOPs",
                    budgets != g,
                    {},
                )
            )
    out = []
    for what, keep, change in cases:
        if keep.sum() <= len(law.parameters):
            continue
        x = {v: rows.log_x()[v][keep] for v in law.variables}
        _, point = solve(law, x, rows.loss[keep], **{**options, **change}, starts=4)
        exponents = law.compute_exponents(point.params)
        a = exponents.get("a")
        out.append({"what": what, "rows": int(keep.sum()), "status": point.status, "params": point.params,
                    "a": None if a is None else float(a)})  # fmt: skip
    return out


def versions() -> dict[str, str]:
    """Versions of what decides the numbers."""
    from importlib.metadata import PackageNotFoundError, version

    out = {"python": platform.python_version(), "numpy": np.__version__}
    for package in ("jax", "scaling"):
        try:
            out[package] = version(package)
        except PackageNotFoundError:
            out[package] = "not installed"
    return out
