"""Which law to trust for extrapolation: rolling forecasts of the largest runs from the smaller ones.

A law that fits best inside the table need not forecast best outside it. So the largest groups of
runs (budgets, sizes or token counts) are held out, a few at a time, and every candidate is fitted
to the rest and judged by its error on exactly the same held-out rows.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from fits import checks, uncertainty
from fits.errors import FitError
from fits.laws import COLUMN_OF, Law, get_law
from fits.printed import Printed
from fits.solve import solve
from fits.table import Table, _apply_rule, clean, find_budgets, group_close

ORDERS = ("flops", "params", "tokens")
MOST_FOLDS = 6
OPTIONS = ("loss", "delta", "space", "fixed", "bounds", "exclude")
# A difference in mean error below a tenth of the scatter of the rows about the surface is no reason to
# prefer a form, however often it recurs.
NOISE_SHARE = 0.1
# If two forms were equally good, each cluster would favour the one or the other like a coin: all of G agree
# with probability 2^(1 - G), which is below 5 % only from six clusters on.
LEAST_CLUSTERS = 6


@dataclasses.dataclass
class Candidate:
    """One form with its options, and how it forecast.

    Attributes:
      folds: per fold: status, reasons, training rows and the typical (median) training residual.
      ranked: whether it could be fitted on every fold; only then are its errors comparable.
      mean_error, max_error: of |log predicted - log observed| over all held-out rows of all folds.
      difference: mean |error| less that of the best candidate, {"estimate", "sd", "80", "95"}.
      verdict: best, "cannot be told from the best", worse, or not ranked (with the reason).
    """

    name: str
    law: str
    options: dict[str, Any]
    free: int
    folds: list[dict]
    ranked: bool
    mean_error: float | None = None
    max_error: float | None = None
    difference: dict | None = None
    verdict: str = ""


@dataclasses.dataclass
class Selection(Printed):
    """Forecast errors of every candidate and the recommendation, which may be that none stands out.

    Attributes:
      by: what orders the runs. folds: per fold the largest trained value, training and held-out rows.
      errors: one dict per fold, candidate and held-out row: log error (predicted less observed), error in
        per cent of the loss, and the extrapolation factor (held-out value over the largest trained one).
      recommended: a candidate's name, or None where no candidate could be fitted on every fold.
      noise: typical residual about the best candidate's surface, in log loss.
    """

    by: str
    folds: list[dict]
    candidates: list[Candidate]
    errors: list[dict]
    recommended: str | None
    text: str
    noise: float | None
    clusters: int
    cluster: str
    flags: list[dict]
    rows: list[dict]

    def to_dict(self) -> dict:
        return dataclasses.asdict(self)

    def __str__(self) -> str:
        lines = [f"flag: {f['text']}" for f in self.flags]
        lines.append(self.text)
        lines.append(f"{len(self.folds)} forecasts of the largest runs by {self.by}:")
        for fold in self.folds:
            lines.append(
                f"  {fold['train_rows']} rows up to {fold['trained_to']:.3g} forecast "
                f"{fold['held_out_rows']} rows up to {fold['largest_factor']:.3g} times as large"
            )
        width = max(len(c.name) for c in self.candidates)
        lines.append(f"  {'':{width}}  {'parameters':>10}  {'mean error':>10}  {'largest':>8}  verdict")
        for c in sorted(self.candidates, key=lambda c: (not c.ranked, c.mean_error or 0.0)):
            mean, top = (
                ("", "") if not c.ranked else (f"{100 * c.mean_error:.3g} %", f"{100 * c.max_error:.3g} %")
            )
            lines.append(f"  {c.name:{width}}  {c.free:>10}  {mean:>10}  {top:>8}  {c.verdict}")
        return "\n".join(lines)


def select(
    table: Any,
    laws: Sequence[str | Law | tuple] = ("chinchilla", "tied", "kaplan", "product"),
    *,
    by: str = "flops",
    holdouts: int | None = None,
    loss: str = "huber",
    delta: float = 1e-3,
    space: str = "log",
    columns: Mapping[str, str] | None = None,
    token_unit: float = 1.0,
    param_unit: float = 1.0,
    exclude: Sequence[str] = (),
    cluster: str = "auto",
    resamples: int = 2000,
    seed: int = 0,
) -> Selection:
    """Compares laws by rolling forecasts of the largest runs.

    Args:
      table, columns, token_unit, param_unit, exclude: see ``table.clean``; excluded rows are neither
        trained on nor forecast.
      laws: each a law or its name, or a pair (law, options) with options among loss, delta, space, fixed,
        bounds and exclude. A candidate's own ``exclude`` leaves rows out of its training only, so that
        all candidates are judged on the same rows.
      by: what orders the runs: "flops" (groups are budgets), "params" or "tokens".
      holdouts: number of forecasts, default at most 6. The training set of the first is the smaller half of
        the groups, that of the last all groups but the largest.
      cluster: what is resampled together for the intervals of differences, see ``find_clusters``.

    Raises:
      FitError: a table or option that cannot be used, or fewer than three groups to order.
    """
    if by not in ORDERS:
        raise FitError(f"by is {by!r}; it must be one of {', '.join(ORDERS)}")
    defaults = {"loss": loss, "delta": delta, "space": space}
    forms = _read_forms(laws, defaults)
    needs = [*dict.fromkeys(COLUMN_OF[v] for f in forms for v in f[1].variables), "loss"]
    needs = needs if by in needs else [by, *needs]
    rows = clean(
        table, needs=needs, columns=columns, token_unit=token_unit, param_unit=param_unit, exclude=exclude
    )
    groups = find_budgets(rows)[0] if by == "flops" else group_close(getattr(rows, by))
    cuts = _cuts(int(groups.max()) + 1, by, holdouts)
    ids, cluster_name = uncertainty.find_clusters(rows, cluster)
    if ids.ndim == 2:
        raise FitError(f"cluster is {cluster!r}; forecasts are compared over one kind of cluster, not two")
    value = getattr(rows, by)
    folds, errors_FxR, results = [], [], []
    for cut in cuts:
        held = groups >= cut
        top = float(value[~held].max())
        folds.append({
            "trained_to": top, "train_rows": int((~held).sum()), "held_out_rows": int(held.sum()),
            "largest_factor": float(value.max() / top),
        })  # fmt: skip
    for _, law, options in forms:
        results.append([_forecast(law, rows, groups < cut, groups >= cut, options) for cut in cuts])
    candidates, records = [], []
    for (name, law, options), got in zip(forms, results, strict=True):
        plain = {k: v for k, v in options.items() if defaults.get(k, ()) != v}
        free = len(law.parameters) - len(options.get("fixed") or {})
        made = Candidate(name, law.name, plain, free, [g[0] for g in got], all(g[1] is not None for g in got))
        candidates.append(made)
        for k, (cut, (_, error_H)) in enumerate(zip(cuts, got, strict=True)):
            if error_H is None:
                continue
            for i, error in zip(np.flatnonzero(groups >= cut), error_H, strict=True):
                records.append({
                    "fold": k, "candidate": name, "row": int(rows.index[i]), "error": float(error),
                    "percent": float(100 * np.expm1(error)),
                    "factor": float(value[i] / folds[k]["trained_to"]),
                })  # fmt: skip
        errors_FxR.append(None if not made.ranked else np.concatenate([np.abs(g[1]) for g in got]))
    held_ids = np.concatenate([ids[groups >= cut] for cut in cuts])
    noise, recommended, text = _judge(candidates, errors_FxR, held_ids, resamples, seed)
    flags = []
    count = len(np.unique(held_ids))
    if count < checks.FEW_CLUSTERS:
        words = f"the held-out rows form only {count} clusters by {cluster_name}"
        flags.append(checks.flag("few_clusters", words + ": intervals of the differences are rough"))
    for c in candidates:
        if not c.ranked:
            flags.append(checks.flag("not_ranked", f"{c.name} is not ranked: {c.verdict}"))
    return Selection(by, folds, candidates, records, recommended, text, noise, count, cluster_name, flags,
                     rows.rows)  # fmt: skip


def _read_forms(laws, defaults) -> list[tuple[str, Law, dict]]:
    """Name, law and options of each candidate."""
    if isinstance(laws, str | Law) or not len(laws):
        raise FitError(f"laws is {laws!r}; it must be a list of laws, such as ('chinchilla', 'tied')")
    forms: list[tuple[str, Law, dict]] = []
    for entry in laws:
        law, own = entry if isinstance(entry, tuple) else (entry, {})
        law = get_law(law)
        unknown = sorted(set(own) - set(OPTIONS))
        if unknown:
            raise FitError(
                f"laws gives {law.name} the option {unknown[0]!r}; it must be one of {', '.join(OPTIONS)}"
            )
        if isinstance(own.get("exclude"), str):
            own = {**own, "exclude": [own["exclude"]]}
        said = "; ".join(f"{k} {_said(v)}" for k, v in own.items())
        name = f"{law.name} ({said})" if said else law.name
        if name in [f[0] for f in forms]:
            raise FitError(f"laws names {name} twice; each candidate must be different")
        forms.append((name, law, {**defaults, **own}))
    return forms


def _said(value) -> str:
    """An option's value in a candidate's name."""
    if isinstance(value, Mapping):
        return ", ".join(f"{k} = {_said(v)}" for k, v in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value))
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _cuts(count: int, by: str, holdouts: int | None) -> list[int]:
    """First held-out group of each fold, rising: from half of the groups to all but the largest."""
    if count < 3:
        raise FitError(
            f"the table has {count} groups by {by}; at least 3 are needed: two to train on, one held out"
        )
    low, high = max(2, (count + 1) // 2), count - 1
    most = high - low + 1
    if holdouts is None:
        holdouts = min(MOST_FOLDS, most)
    if isinstance(holdouts, bool) or not (
        isinstance(holdouts, int | np.integer) and 1 <= holdouts <= count - 2
    ):
        raise FitError(
            f"holdouts is {holdouts!r}; it must be from 1 to {count - 2} for {count} groups by {by}"
        )
    low = min(low, high - holdouts + 1)
    # the last fold comes first: one forecast means the one that leaves out the largest group alone
    return sorted({round(c) for c in np.linspace(high, low, holdouts)})


def _forecast(law: Law, rows: Table, train: np.ndarray, held: np.ndarray, options: Mapping):
    """Fits the training rows; returns the record of the fold and log errors of the held-out rows, or None."""
    options = dict(options)
    for rule in options.pop("exclude", None) or ():
        train = train & ~_apply_rule(rows.extra, rule, len(rows))
    part = _subset(rows, train)
    record = {
        "train_rows": int(train.sum()),
        "status": "unfitted",
        "reasons": [],
        "params": {},
        "residual": None,
    }
    if not train.any():
        return record | {"reasons": ["no row is left to train on"]}, None
    x = rows.log_x()
    try:
        problem, point = solve(law, {v: x[v][train] for v in law.variables}, rows.loss[train], **options)
    except FitError as error:
        if train.sum() >= len(law.parameters):  # an option that no fold could use is the caller's mistake
            raise
        return record | {"reasons": [str(error)]}, None
    doubts = checks.structure(law, part, problem.fixed)
    status = "not identified" if doubts else point.status
    residual = float(np.median(np.abs(problem.residuals(point.p_K[None])[0])))
    record |= {
        "status": status,
        "reasons": doubts + point.reasons,
        "params": point.params,
        "residual": residual,
    }
    if status not in ("converged", "boundary"):
        return record, None
    with np.errstate(all="ignore"):
        predicted = law.predict(point.params, {v: np.exp(x[v][held]) for v in law.variables})
        error_H = np.log(predicted) - np.log(rows.loss[held])
    if not np.isfinite(error_H).all():
        record |= {"status": "no forecast", "reasons": ["the forecast is not a positive finite loss"]}
        return record, None
    return record, error_H


def _subset(rows: Table, keep: np.ndarray) -> Table:
    arrays = {c: getattr(rows, c)[keep] for c in ("params", "tokens", "flops", "loss", "index")}
    return dataclasses.replace(rows, **arrays, extra={k: v[keep] for k, v in rows.extra.items()})


def _judge(candidates, errors, held_ids, resamples: int, seed: int):
    """Fills in differences and verdicts; returns the noise, the recommended name and the words for it."""
    for c in candidates:
        if not c.ranked:
            bad = [(k, f) for k, f in enumerate(c.folds) if f["status"] not in ("converged", "boundary")]
            k, fold = bad[0] if bad else (0, c.folds[0])
            why = "; ".join(fold["reasons"]) or "no usable forecast"
            c.verdict = f"{fold['status']} in forecast {k + 1} of {len(c.folds)} ({why})"
    ranked = [i for i, c in enumerate(candidates) if c.ranked]
    if not ranked:
        return None, None, "No candidate could be fitted on every forecast, so none is recommended."
    for i in ranked:
        candidates[i].mean_error, candidates[i].max_error = float(errors[i].mean()), float(errors[i].max())
    best = min(ranked, key=lambda i: candidates[i].mean_error)
    noise = candidates[best].folds[-1]["residual"]
    labels = np.unique(held_ids, return_inverse=True)[1]
    weights_BxH = uncertainty.resample_weights(labels, resamples, "pairs", seed)
    total_B = np.maximum(weights_BxH.sum(1), 1e-300)
    alike = [best]
    candidates[best].verdict = "lowest mean error"
    for i in ranked:
        if i == best:
            continue
        difference_H = errors[i] - errors[best]
        draws = (weights_BxH @ difference_H) / total_B
        got = uncertainty.interval(draws, float(difference_H.mean()))
        candidates[i].difference = got
        c = candidates[i]
        groups = int(labels.max()) + 1
        if groups < LEAST_CLUSTERS:
            c.verdict = f"cannot be told from the best (only {groups} clusters of held-out rows)"
        elif got["95"] is None or got["95"][0] <= 0:
            c.verdict = "cannot be told from the best (the interval of the difference includes zero)"
        elif got["estimate"] < max(NOISE_SHARE * noise, checks.ROUNDING):
            c.verdict = "cannot be told from the best (the difference is below the noise)"
        else:
            low, high = (100 * end for end in got["95"])
            c.verdict = f"worse by {100 * got['estimate']:.2g} % (95 %: {low:.2g} to {high:.2g})"
            continue
        alike.append(i)
    chosen = min(alike, key=lambda i: (candidates[i].free, candidates[i].mean_error))
    name = candidates[chosen].name
    if len(alike) == 1:
        others = ("; the other is worse", f"; the {len(ranked) - 1} others are worse")[len(ranked) > 2]
        others = others if len(ranked) > 1 else " (the only one ranked)"
        return noise, name, f"Recommended: {name}{others}."
    names = [candidates[i].name for i in alike]
    names = f"{', '.join(names[:-1])} and {names[-1]}"
    text = f"By their forecasts {names} cannot be told apart. Recommended: {name}, "
    fewest = [i for i in alike if candidates[i].free == candidates[chosen].free]
    text += f"with the fewest parameters ({candidates[chosen].free})"
    return noise, name, text + (" and the lowest mean error among these." if len(fewest) > 1 else ".")
