"""The three approaches of Hoffmann et al. 2022 side by side: envelope, isoFLOP parabolas, surface.

Each ends in N* = k_N C^a and D* = k_D C^b. They should agree; where they do not, the table does not
determine the exponents as well as any one of them pretends.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from fits import uncertainty
from fits.errors import FitError
from fits.estimate import fit_table
from fits.fit import Fit
from fits.printed import Printed
from fits.table import Table, clean, find_budgets, group_close

LEAST_BUDGETS = 3  # a straight line through two points has no error to show
LEAST_SIZES = 4  # a parabola through three points has none either
CURVATURE = 1e-6  # in log loss per squared e-fold of N: flatter than this is rounding, not a minimum
CONVENTIONS = {  # N and C counted alike
    "exact": ("params_total", "flops"),
    "full attention": ("params_total", "flops_full"),
    "6 N_total D": ("params_total", "flops_6N_total"),
    "6 N_active D": ("params_active", "flops_6N_active"),
    "6 N_nonembedding D": ("params_nonembedding", "flops_6N_nonembedding"),
    "Kaplan": ("params_nonembedding", "flops_kaplan"),
}


@dataclasses.dataclass
class Approach:
    """One approach's frontier: N* = coefficient_N C^a, D* = coefficient_D C^b.

    Attributes:
      status: "ok", "refused", or the status of the surface fit. reasons: in words.
      intervals: "a", "b" -> {"estimate", "sd", "80", "95"}.
      points: one dict per budget: budget, N, D, flops, loss (None where refused), accepted, reason; the
        lines go through N and D over flops, the FLOPs counted at that N; for approach 2 also parabola
        ([c0, c1, c2] of loss over natural log N), N_range and rows (input rows).
      bias: for approach 2, what parabolas read off the fitted surface on this very grid: {"a": their
        exponent less the surface's, "N_ratio": their N* over the surface's, per accepted budget}.
    """

    name: str
    status: str
    reasons: list[str]
    a: float | None = None
    b: float | None = None
    coefficient_N: float | None = None
    coefficient_D: float | None = None
    intervals: dict[str, dict] = dataclasses.field(default_factory=dict)
    points: list[dict] = dataclasses.field(default_factory=list)
    bias: dict[str, Any] | None = None

    def N(self, budget) -> np.ndarray:
        """Optimal parameters at each budget; NaN where refused."""
        return self._power(budget, self.coefficient_N, self.a)

    def D(self, budget) -> np.ndarray:
        """Optimal tokens at each budget; NaN where refused."""
        return self._power(budget, self.coefficient_D, self.b)

    @staticmethod
    def _power(budget, coefficient, exponent):
        budget = np.asarray(budget, float)
        return np.full(budget.shape, np.nan) if coefficient is None else coefficient * budget**exponent


@dataclasses.dataclass
class Comparison(Printed):
    """Approaches by number ("1", "2", "3") and the exponent a under each counting convention."""

    approaches: dict[str, Approach]
    conventions: list[dict]

    def to_dict(self) -> dict:
        return dataclasses.asdict(self)

    def __str__(self) -> str:
        lines = []
        for key, way in self.approaches.items():
            for reason in way.reasons if way.status != "converged" else []:
                lines.append(f"approach {key}: {reason}")
        lines.append(f"  {'':28}{'a':>8}  {'95 %':>18}  {'b':>8}  status")
        for key, way in self.approaches.items():
            a, b = ("-" if v is None else f"{v:.4f}" for v in (way.a, way.b))
            ends = (way.intervals.get("a") or {}).get("95")
            text = "" if not ends else f"{ends[0]:.4f} to {ends[1]:.4f}"
            lines.append(f"  {key + ' ' + way.name:28}{a:>8}  {text:>18}  {b:>8}  {way.status}")
            if way.bias and way.bias["a"] is not None:
                text = f"on this grid parabolas read the fitted surface's a off by {way.bias['a']:+.4f}"
                lines.append(f"  {'':28}{text}")
        for row in self.conventions:
            a2 = "-" if row["approach_2_a"] is None else f"{row['approach_2_a']:.4f}"
            a3 = "-" if row["a"] is None else f"{row['a']:.4f}"
            lines.append(
                f"  counted as {row['convention']:20} a: parabolas {a2}, surface {a3} ({row['status']})"
            )
        return "\n".join(lines)


def approaches(
    table: Any,
    *,
    fit: Fit | None = None,
    columns: Mapping[str, str] | None = None,
    token_unit: float = 1.0,
    param_unit: float = 1.0,
    exclude=(),
    bootstraps: int = 1000,
    cluster: str = "auto",
    seed: int = 0,
    **fit_options,
) -> Comparison:
    """Fits the frontier in three ways to one table.

    Args:
      table, columns, token_unit, param_unit, exclude, cluster: see ``fit_table``.
      fit: a fit of the same table to use as approach 3; else one is made with ``fit_options``.
      bootstraps: resamples for the intervals of approach 1 (whole clusters, as in ``fit_table``), simulated
        tables for approach 2 (see ``parabolas``), and resamples for approach 3 where it is made here.

    Raises:
      FitError: as ``fit_table``. An approach that the table cannot carry comes back "refused".
    """
    reading = {"columns": columns, "token_unit": token_unit, "param_unit": param_unit, "exclude": exclude}
    rows = clean(table, needs=("params", "tokens", "loss"), **reading)
    if fit is None:
        options = {"sensitivity": False, **fit_options}
        fit = fit_table(table, bootstraps=bootstraps, cluster=cluster, seed=seed, **reading, **options)
    ids, _ = uncertainty.find_clusters(rows, cluster)
    pairs = uncertainty.resample_weights(ids, bootstraps, "pairs", seed)
    results = {"1": envelope(rows, pairs), "2": parabolas(rows, bootstraps, seed), "3": surface(fit)}
    if results["2"].status == "ok" and results["3"].a is not None:
        results["2"].bias = parabola_bias(rows, fit)
    return Comparison(results, conventions(table, rows, reading, fit_options))


def _frontier(name: str, points: list[dict], draws: Mapping[str, np.ndarray], reasons: list[str]) -> Approach:
    """Straight lines of log N and log D over log C through the accepted points."""
    good = [p for p in points if p["accepted"]]
    if len(good) < LEAST_BUDGETS:
        reasons = [f"refused: {len(good)} usable budgets, and a frontier needs {LEAST_BUDGETS}", *reasons]
        return Approach(name, "refused", reasons, points=points)
    log_c = np.log([p["flops"] for p in good])
    if np.ptp(log_c) < np.log(2.0):
        reasons = ["refused: the usable budgets span less than a factor of two", *reasons]
        return Approach(name, "refused", reasons, points=points)
    (a, k_n), (b, k_d) = (np.polyfit(log_c, np.log([p[key] for p in good]), 1) for key in "ND")
    intervals = {}
    for key, value in (("a", a), ("b", b)):
        finite = draws[key][np.isfinite(draws[key])]
        share = len(finite) / max(len(draws[key]), 1)
        intervals[key] = uncertainty.interval(finite if share >= 0.9 else finite[:0], value)
        if key == "a" and share < 0.9 and len(draws[key]):
            reasons.append(f"no interval: only {100 * share:.0f} % of the resamples keep a frontier")
    return Approach(
        name, "ok", reasons, float(a), float(b), float(np.exp(k_n)), float(np.exp(k_d)), intervals, points
    )


def _slopes(log_c_BxG, log_y_BxG, use_BxG) -> np.ndarray:
    """Slope of each lane's straight line through its usable points; NaN with fewer than ``LEAST_BUDGETS``."""
    w = use_BxG.astype(float)
    x, y = np.where(use_BxG, log_c_BxG, 0.0), np.where(use_BxG, log_y_BxG, 0.0)
    dx = x - ((w * x).sum(1) / np.maximum(w.sum(1), 1.0))[:, None]
    spread = (w * dx**2).sum(1)
    with np.errstate(all="ignore"):
        slope = (w * dx * y).sum(1) / spread
    return np.where((w.sum(1) >= LEAST_BUDGETS) & (spread > 0), slope, np.nan)


def envelope(rows: Table, weights_BxR: np.ndarray) -> Approach:
    """Approach 1: the best run of each budget, where no cheaper budget has done as well.

    The winner can only be one of the sizes trained, so N* moves in steps; where the winner is the
    smallest or largest size of its budget the true optimum may lie outside, and the reasons say so.
    """
    groups, budgets = find_budgets(rows)

    def winners(loss_R):
        best, floor = {}, np.inf
        for g in range(len(budgets)):
            members = np.flatnonzero(groups == g)
            if not len(members):
                continue
            i = members[np.argmin(loss_R[members])]
            if loss_R[i] < floor:
                best[g], floor = int(i), loss_R[i]
        return best

    chosen, points, edge = winners(rows.loss), [], 0
    for g, c in enumerate(budgets):
        members = np.flatnonzero(groups == g)
        point = {
            "budget": float(c),
            "N": None,
            "D": None,
            "loss": None,
            "accepted": g in chosen,
            "reason": "",
        }
        if g in chosen:
            i = chosen[g]
            ends = rows.params[members].min(), rows.params[members].max()
            at_edge = len(members) > 1 and rows.params[i] in ends
            edge += at_edge
            point |= {"N": float(rows.params[i]), "D": float(rows.tokens[i]), "loss": float(rows.loss[i])}
            point["flops"] = float(rows.flops[i])
            point["reason"] = "the winner is the smallest or largest size of its budget" if at_edge else ""
            point["row"] = int(rows.index[i])
        else:
            point["reason"] = "a cheaper budget reached a lower loss"
        points.append(point)
    reasons = [f"{edge} of {len(chosen)} winners are at an end of their budget's sizes"] if edge else []
    draws = {key: np.full(len(weights_BxR), np.nan) for key in "ab"}
    for lane, w in enumerate(weights_BxR):
        best = winners(np.where(w > 0, rows.loss, np.inf))
        use = np.array([g in best for g in range(len(budgets))])
        at = np.array([best.get(g, 0) for g in range(len(budgets))])
        for key, column in (("a", rows.params), ("b", rows.tokens)):
            draws[key][lane] = _slopes(np.log(rows.flops[at])[None], np.log(column[at])[None], use[None])[0]
    return _frontier("envelope", points, draws, reasons)


def parabolas(rows: Table, draws: int, seed: int = 0, loss_R: np.ndarray | None = None) -> Approach:
    """Approach 2: at each budget a least-squares parabola of loss over log N; its vertex is N*.

    D* and the FLOPs at N* are read between the neighbouring runs. A budget is refused with a reason where
    it has too few sizes, where the parabola is concave, or where its vertex lies outside the sizes trained.
    Intervals are from ``draws`` simulated tables: the parabolas plus Student-t noise with the residual
    variance of all of them, degrees of freedom taken off (a handful of points is too few to resample).
    """
    loss = rows.loss if loss_R is None else loss_R
    groups, budgets = find_budgets(rows)
    points, curves = [], {}
    for g, c in enumerate(budgets):
        members = np.flatnonzero(groups == g)
        log_n = np.log(rows.params[members])
        point = {"budget": float(c), "N": None, "D": None, "loss": None, "accepted": False, "reason": ""}
        point |= {"flops": None, "parabola": None, "rows": [int(i) for i in rows.index[members]]}
        point["N_range"] = [float(np.exp(log_n.min())), float(np.exp(log_n.max()))]
        points.append(point)
        sizes = len(np.unique(group_close(rows.params[members])))
        if sizes < LEAST_SIZES:
            point["reason"] = f"{sizes} sizes, and a parabola with an error to show needs {LEAST_SIZES}"
            continue
        c_3 = np.polyfit(log_n, loss[members], 2)[::-1]
        point["parabola"] = [float(v) for v in c_3]
        point["reason"], vertex = _judge_parabola(c_3, log_n, float(np.median(loss[members])))
        curves[g] = (log_n, np.polyval(c_3[::-1], log_n), loss[members])
        if not point["reason"]:
            log_d, log_c = _between_runs(rows, members, np.array([vertex]))
            point |= {
                "N": float(np.exp(vertex)),
                "D": float(np.exp(log_d[0])),
                "flops": float(np.exp(log_c[0])),
            }
            point |= {"loss": float(np.polyval(c_3[::-1], vertex)), "accepted": True}
    refused = [p for p in points if not p["accepted"]]
    if len(refused) > 12:
        reasons = [f"{len(refused)} of {len(points)} groups of equal compute have no usable parabola"]
    else:
        reasons = [f"no minimum at {p['budget']:.3g} FLOPs: {p['reason']}" for p in refused]
    log_n_BxG = _simulated_vertices(curves, len(budgets), draws, seed)
    log_d_BxG, log_c_BxG = np.full_like(log_n_BxG, np.nan), np.full_like(log_n_BxG, np.nan)
    for g in curves:
        members = np.flatnonzero(groups == g)
        log_d_BxG[:, g], log_c_BxG[:, g] = _between_runs(rows, members, log_n_BxG[:, g])
    use = np.isfinite(log_n_BxG)
    slopes = {k: _slopes(log_c_BxG, v, use) for k, v in (("a", log_n_BxG), ("b", log_d_BxG))}
    return _frontier("isoFLOP parabolas", points, slopes, reasons)


def _between_runs(rows: Table, members: np.ndarray, log_n: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """log D and log C at log N of one budget, straight lines between its runs (exact where C = 6ND)."""
    order = members[np.argsort(rows.params[members], kind="stable")]
    at = np.log(rows.params[order])
    return np.interp(log_n, at, np.log(rows.tokens[order])), np.interp(log_n, at, np.log(rows.flops[order]))


def _simulated_vertices(curves: Mapping[int, tuple], budgets: int, draws: int, seed: int) -> np.ndarray:
    """log N of the vertex per simulated table and budget, [draws, budgets]; NaN where it would be refused.

    ``curves``: per budget log N, the parabola there, and the losses, [rows] each.
    """
    out = np.full((draws, budgets), np.nan)
    freedom = sum(len(loss) - 3 for _, _, loss in curves.values())
    if not draws or freedom < 1:
        return out[:0]
    rng = np.random.default_rng(seed)
    variance = sum(float(((loss - line) ** 2).sum()) for _, line, loss in curves.values()) / freedom
    sigma_B = np.sqrt(variance * freedom / rng.chisquare(freedom, draws))
    for g, (log_n, line, _) in curves.items():
        loss_BxR = line + sigma_B[:, None] * rng.standard_normal((draws, len(line)))
        c2, c1, _ = np.polyfit(log_n, loss_BxR.T, 2)
        with np.errstate(all="ignore"):
            vertex = -c1 / (2 * c2)
        inside = (c2 > 0) & (vertex > log_n.min()) & (vertex < log_n.max())
        out[:, g] = np.where(inside, vertex, np.nan)
    return out


def _judge_parabola(c_3, log_n, typical: float) -> tuple[str, float]:
    """Why a parabola has no usable minimum (empty where it has), and its vertex in log N."""
    if not c_3[2] > CURVATURE * typical:
        return "the losses bend downwards or not at all (no minimum)", float(log_n[len(log_n) // 2])
    vertex = float(-c_3[1] / (2 * c_3[2]))
    if not log_n.min() < vertex < log_n.max():
        side = "below the smallest" if vertex <= log_n.min() else "above the largest"
        return f"the minimum lies {side} size trained", float(np.clip(vertex, log_n.min(), log_n.max()))
    return "", vertex


def surface(fit: Fit) -> Approach:
    """Approach 3: the frontier of a fitted surface, N* and D* at 6ND = C."""
    name = "surface (" + fit.law.name + ")"
    exponents = fit.law.compute_exponents(fit.params)
    if fit.status not in ("converged", "boundary") or not exponents:
        why = f"the fit is {fit.status}" if exponents else f"{fit.law.name} has no frontier of powers of C"
        return Approach(name, "refused", [f"refused: {why}", *fit.reasons])
    low, high = fit.diagnostics["range"]["flops"]
    budgets = np.geomspace(low, high, 9)
    best = fit.optimum(budgets)
    points = [
        {"budget": c, "flops": c, "N": n, "D": d, "loss": l, "accepted": True, "reason": ""}
        for c, n, d, l in zip(
            *(v.tolist() for v in (budgets, best["N"], best["D"], best["loss"])), strict=True
        )
    ]
    a, b = float(exponents["a"]), float(exponents["b"])
    k_n, k_d = best["N"][0] / budgets[0] ** a, best["D"][0] / budgets[0] ** b
    intervals = {k: fit.intervals[k] for k in ("a", "b")}
    return Approach(name, fit.status, list(fit.reasons), a, b, float(k_n), float(k_d), intervals, points)


def parabola_bias(rows: Table, fit: Fit) -> dict:
    """What approach 2 reads off the fitted surface itself, noise-free, at this grid's own points."""
    smooth = fit.predict(params=rows.params, tokens=rows.tokens)
    read = parabolas(rows, 0, loss_R=smooth)
    exact = fit.law.compute_exponents(fit.params)["a"]
    good = [p for p in read.points if p["accepted"]]
    truth = fit.optimum([6 * p["N"] * p["D"] for p in good])["N"] if good else np.empty(0)
    ratio = [p["N"] / float(n) for p, n in zip(good, truth, strict=True)]
    return {"a": None if read.a is None else read.a - float(exact), "N_ratio": ratio}


def conventions(table: Any, rows: Table, reading: Mapping, fit_options: Mapping) -> list[dict]:
    """The exponents under each counting convention whose columns the table has.

    Parabolas are drawn over that N and lined up over that count of FLOPs; the surface is fitted in that
    N, and its exponents are under C = 6 N D with it.
    """
    out = []
    renamed = dict(reading["columns"] or {})
    for name, (n_column, c_column) in CONVENTIONS.items():
        if n_column not in rows.extra or c_column not in rows.extra:
            continue
        columns = {**renamed, "params": n_column, "flops": c_column}
        row = {"convention": name, "params_column": n_column, "flops_column": c_column}
        row |= {"a": None, "b": None, "alpha": None, "beta": None, "approach_2_a": None, "status": "refused"}
        try:
            counted = clean(table, **{**reading, "columns": columns})
            row["approach_2_a"] = parabolas(counted, 0).a
            options = {**reading, "columns": columns, **fit_options, "sensitivity": False}
            fit = fit_table(table, bootstraps=0, **options)
        except FitError as error:
            row["status"] = f"refused: {error}"
            out.append(row)
            continue
        row["status"] = fit.status
        if fit.status in ("converged", "boundary"):
            row |= {k: float(v) for k, v in fit.law.compute_exponents(fit.params).items()}
            row |= {k: fit.params.get(k) for k in ("alpha", "beta")}
        out.append(row)
    return out
