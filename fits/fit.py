"""A fit: a law with estimated parameters, intervals, diagnostics and provenance."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from fits import allocate as _allocate
from fits import uncertainty
from fits.errors import FitError
from fits.laws import COLUMN_OF, Law
from fits.rowweights import describe_loss

SHOWN = 12  # reasons, and rows of one reason, that are printed


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

    def prediction(self, **columns):
        """Loss of a new run with intervals of the surface and of the run; see ``predict.predict_run``."""
        from fits.predict import predict_run

        return predict_run(self, **columns)

    def draw_params(self) -> dict[str, np.ndarray]:
        """Draws by name, arrays [draws]."""
        return dict(zip(self.law.parameters, self.draws.T, strict=True))

    def interval_of(
        self, draws: np.ndarray, estimate: float, quantity: Callable | None = None, log: bool = True,
        step: float | None = None,
    ) -> dict:  # fmt: skip
        """Standard deviation, 80 % and 95 % interval of any quantity.

        Args:
          draws: its value in each draw, [draws]; without draws there are no intervals.
          quantity: it as a function of the law's parameters, arrays [B] to [B]. With it the ends are those of
            ``few_clusters`` where that holds, and percentiles of the draws else.
          log: whether its log, rather than itself, is about linear in the parameters.
          step: relative step of its slopes; a wide one, 1e-3, where it comes from a search.

        Returns:
          {"estimate", "sd", "80", "95", "method"}; ``sd`` is that of the draws; and, where the method is
          "few clusters", "percentile": {"80", "95"} of the draws.
        """
        return uncertainty.with_few_clusters(
            uncertainty.interval(draws, estimate), self.few_clusters, quantity, log, step=step
        )

    @functools.cached_property
    def few_clusters(self):
        """``FewClusters`` of this fit, rebuilt from its rows; None where it does not apply."""
        from fits.profile import rebuild

        try:
            problem, weights_R, row_loss = rebuild(self)
            ids = np.array([r["cluster"] for r in self.rows if r["outcome"] == "used"]).T
            return uncertainty.few_clusters(
                problem, problem.from_params(self.params)[0], ids, row_loss, weights_R, self.status
            )
        except (FitError, KeyError):
            return None

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
            sd = deviation(name, got, self.fixed)
            lines.append(f"  {name:7}{got['estimate']:>12.6g}  {sd:>9}  {ends[0]:>22}  {ends[1]:>22}")
        m, d = self.method, self.diagnostics
        lines.append(
            f"{d['rows_used']} of {d['rows']} rows; {describe_loss(m)} on {m['space']} loss, "
            f"summed: {self.objective:.10g}; rms residual {d['rms_residual']:.3g}"
        )
        if self.draws.size:
            lines.append(
                f"{len(self.draws)} of {m['bootstraps']} resamples ({m['scheme']}) "
                f"of {d['clusters']} clusters by {m['cluster']}"
            )
        if any(got.get("method") == "few clusters" for got in self.intervals.values()):
            lines.append(
                "80 and 95 %: Student's t for few clusters (Bell and McCaffrey 2002); sd: of the resamples"
            )
        if "effective_rows" in d:
            lines.append(f"worth about {d['effective_rows']:.0f} independent rows of {d['rows_used']}")
        if d.get("seed_noise"):
            n = d["seed_noise"]
            low, high = n["interval"]
            lines.append(
                f"seed noise {n['sd']:.2g} in log loss ({100 * n['level']:g} %: {low:.2g} to {high:.2g}), "
                f"from {n['groups']} points run more than once"
            )
        lines += excluded_lines(self.rows)
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        from fits.tables import notebook

        return notebook(self)

    def __rich__(self):
        from rich.console import Group
        from rich.table import Table as RichTable

        head, *rest = str(self).split(f"  {'':7}{'estimate':>12}", 1)
        table = RichTable("", "estimate", "sd", "80 %", "95 %")
        for name, got in self.intervals.items():
            ends = ["" if got[k] is None else f"{got[k][0]:.5g} to {got[k][1]:.5g}" for k in ("80", "95")]
            sd = deviation(name, got, self.fixed)
            table.add_row(name, f"{got['estimate']:.6g}", sd, *ends)
        tail = rest[0].splitlines()[1 + len(self.intervals) :]
        return Group(head.rstrip(), table, "\n".join(tail))


def deviation(name: str, got: Mapping, fixed: Mapping, show: Callable = "{:.3g}".format):
    """A standard deviation for print; one above the estimate itself is a tail's, and says only that."""
    if name in fixed:
        return "fixed"
    if got["sd"] is None:
        return ""
    return show(got["sd"]) if got["sd"] <= abs(got["estimate"]) else f"> {abs(got['estimate']):.3g}"


def excluded_lines(rows: Sequence[Mapping]) -> list[str]:
    """What was left out, by reason, the commonest first, with the rows' numbers (from 0)."""
    at: dict[str, list[int]] = {}
    for row in rows:
        if row["outcome"] == "excluded":
            at.setdefault(row["reason"], []).append(row["row"])
    ordered = sorted(at.items(), key=lambda kv: -len(kv[1]))
    lines = []
    for reason, which in ordered[:SHOWN]:
        listed = ", ".join(map(str, which[:SHOWN])) + (", ..." if len(which) > SHOWN else "")
        lines.append(f"excluded: {len(which)} because {reason} (row{'s' * (len(which) > 1)} {listed})")
    rest = sum(len(which) for _, which in ordered[SHOWN:])
    if rest:
        lines.append(f"excluded: {rest} more for {len(ordered) - SHOWN} other reasons; see the fit's rows")
    return lines
