"""From anybody's run table to clean rows: every row gets an outcome, and none vanishes silently."""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from fits.errors import FitError
from fits.laws.base import COLUMN_OF
from fits.reading import counts, likely_columns, say_mapping
from fits.reading import numbers as as_numbers

CORE = ("params", "tokens", "flops", "loss")
MORE = {v: c for v, c in COLUMN_OF.items() if c not in CORE}  # read only for a law that needs them
IN_TOKENS = ("tokens", "unique_tokens", "batch_tokens", "dense_tokens")
IN_PARAMS = ("params", "average_params", "recurrent_params")
# Nobody trains a language model on a thousandth of a token a parameter, nor on a million times more
# tokens than parameters; a table that says so has its columns in other units.
TOKENS_PER_PARAM = (1e-3, 1e6)
SMALLEST_PARAMS = 100.0
FLOPS_RATIO = (1e-3, 1e3)  # flops over 6 params tokens; sparse models and attention stay well inside
BUDGET_WIDTH = 0.10  # steps and shapes are rounded, so runs of one budget differ by a few per cent
FINISHED = ("finished", "completed", "complete", "done", "success", "succeeded")  # as other tools say it
NOT_FOR_A_FIT = {
    "trunk": "a trunk: its learning rate has not decayed",
    "sentinel": "a sentinel: off the recipe on purpose",
}
SAME_VALUE = 0.005  # two sizes (or budgets) closer than half a per cent count as one


@dataclasses.dataclass
class Table:
    """The rows that a fit uses, as float64 arrays [R], and the outcome of every input row.

    Attributes:
      params, tokens, flops, loss: used rows. index: their positions in the input.
      more: further columns that the law needs, float64 [R], by our name.
      notes: in words, what was read from text that is no plain number.
      extra: the other columns, used rows only. rows: one dict per input row, in input order.
      flops_from: "column flops" or "6 params tokens".
      hash: sha256 over the core columns of all input rows and which of them are used.
    """

    params: np.ndarray
    tokens: np.ndarray
    flops: np.ndarray
    loss: np.ndarray
    index: np.ndarray
    extra: dict[str, np.ndarray]
    rows: list[dict]
    flops_from: str
    hash: str
    columns: dict[str, str]
    units: dict[str, float]
    more: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)
    notes: list[str] = dataclasses.field(default_factory=list)

    def __len__(self) -> int:
        return len(self.loss)

    def log_x(self) -> dict[str, np.ndarray]:
        """Natural logs of N, D and C, and of the further variables that were asked for."""
        core = {"N": np.log(self.params), "D": np.log(self.tokens), "C": np.log(self.flops)}
        return core | {v: np.log(self.more[c]) for v, c in MORE.items() if c in self.more}

    def excluded(self) -> list[dict]:
        return [r for r in self.rows if r["outcome"] == "excluded"]


def read_table(path: str | pathlib.Path):
    """Reads a study folder, or a CSV, Parquet or JSON-lines file, as a DataFrame.

    Raises:
      FitError: the path is missing, unreadable, empty, or of another kind.
    """
    from scaling.records import StudyError
    from scaling.records import read_table as read

    try:
        return read(path)
    except StudyError as error:
        raise FitError(str(error)) from error


def clean(
    table: Any,
    *,
    needs: Sequence[str] = ("params", "tokens", "loss"),
    columns: Mapping[str, str] | None = None,
    token_unit: float = 1.0,
    param_unit: float = 1.0,
    exclude: Sequence[str] = (),
) -> Table:
    """Takes the usable rows of a run table and says what was done with each of the others.

    Args:
      table: a DataFrame or a mapping of equally long columns.
      needs: the columns without which there is no fit; flops defaults to 6 params tokens.
      columns: our name -> the table's name, where they differ.
      token_unit, param_unit: what one unit of the column is (1e9 for billions).
      exclude: declared rules over the table's columns, each an expression such as
        ``"tokens < 20 * params"``; rows where it holds are left out and listed.

    Raises:
      FitError: a missing column, an unreadable rule, columns in the wrong units, or no usable row.
    """
    source = _as_columns(table)
    columns = {ours: str(theirs).strip() for ours, theirs in (columns or {}).items()}
    _check_columns(source, columns, needs)
    n = len(next(iter(source.values())))
    wanted = [*CORE, *(c for c in MORE.values() if c in needs)]
    raw = {ours: source[columns.get(ours, ours)] for ours in wanted if columns.get(ours, ours) in source}
    units = dict.fromkeys(IN_TOKENS, token_unit) | dict.fromkeys(IN_PARAMS, param_unit)
    for name, unit in units.items():
        if not (isinstance(unit, int | float) and math.isfinite(unit) and unit > 0):
            raise FitError(
                f"the unit of {name} is {unit!r}; it must be a positive number, such as 1e9 for billions"
            )
    numbers, notes = {}, []
    for name, values in raw.items():
        if name == "loss":  # 3,215 may be a decimal comma
            numbers[name] = as_numbers(values)
            continue
        numbers[name], spelled = counts(values, units.get(name, 1.0))
        if spelled:
            what = f"{values[spelled[0]]!r} (row {spelled[0]}) as {numbers[name][spelled[0]]:.6g}"
            notes.append(f"{name}: {len(spelled)} values are text and were read as numbers, such as {what}")
    for name in CORE:
        numbers.setdefault(name, np.full(n, np.nan))
    flops_from = _fill_flops(numbers, columns.get("flops", "flops") if "flops" in raw else None)
    reasons = _exclusions(source, columns, numbers, raw, needs, exclude, n, wanted)
    used = np.array([not r for r in reasons], bool)
    if not used.any():
        raise FitError(f"none of the table's {n} rows can be used; {_count_reasons(reasons)}")
    if not _other_trainer(source, used):
        _check_units(numbers, used, "flops" in raw)
    rows = [
        {"row": i, "outcome": "used" if used[i] else "excluded", "reason": reasons[i], "flags": []}
        | {c: _plain(numbers[c][i]) for c in wanted}
        for i in range(n)
    ]
    extra = {k: v[used] for k, v in source.items()}
    digest = hashlib.sha256()
    for name in wanted:
        digest.update(np.ascontiguousarray(numbers[name], "<f8").tobytes())
    digest.update(used.tobytes())
    core = {c: numbers[c][used] for c in CORE}
    more = {c: numbers[c][used] for c in wanted if c not in CORE}
    names = {c: columns.get(c, c) for c in wanted if c in raw}
    units = {"params": float(param_unit), "tokens": float(token_unit)}
    return Table(**core, index=np.flatnonzero(used), extra=extra, rows=rows, flops_from=flops_from,
                 hash="sha256:" + digest.hexdigest(), columns=names, units=units, more=more,
                 notes=notes)  # fmt: skip


def _fill_flops(numbers: dict[str, np.ndarray], column: str | None) -> str:
    """Puts 6 params tokens where the table gives no FLOPs; returns where they come from, in words."""
    given = numbers["flops"]
    blank = ~(np.isfinite(given) & (given > 0))
    with np.errstate(over="ignore"):
        numbers["flops"] = np.where(blank, 6.0 * numbers["params"] * numbers["tokens"], given)
    if column is None:
        return "6 params tokens"
    return f"column {column}" + (f" ({blank.sum()} blank rows: 6 params tokens)" if blank.any() else "")


def _as_columns(table: Any) -> dict[str, np.ndarray]:
    if hasattr(table, "columns") and hasattr(table, "__getitem__"):
        names = [str(c).strip() for c in table.columns]
        if len(set(names)) < len(names):
            twice = next(c for c in names if names.count(c) > 1)
            raise FitError(f"the table has two columns named {twice!r}; names must be different")
        out = {name: np.asarray(table[c]) for name, c in zip(names, table.columns, strict=True)}
    elif isinstance(table, Mapping):
        out = {str(c).strip(): np.atleast_1d(np.asarray(v)) for c, v in table.items()}
    else:
        raise FitError(
            f"the table is a {type(table).__name__}; it must be a DataFrame or a mapping of columns"
        )
    lengths = {k: len(v) for k, v in out.items()}
    if not out or not max(lengths.values()):
        raise FitError("the table has no rows; a run table has one row a run")
    if len(set(lengths.values())) > 1:
        raise FitError(f"the table's columns have different lengths: {lengths}")
    return out


def _check_columns(source, columns, needs):
    known = [*CORE, *MORE.values()]
    for ours, theirs in columns.items():
        if ours not in known:
            raise FitError(
                f"columns maps {ours!r} to {theirs!r}, but nothing reads {ours!r}; "
                f"the name on the left is one of {', '.join(known)}"
            )
        if theirs not in source:
            near = difflib.get_close_matches(theirs, list(source), n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ";"
            raise FitError(
                f"columns maps {ours} to {theirs!r}, which the table lacks{hint} it has {', '.join(source)}"
            )
    missing = [c for c in needs if columns.get(c, c) not in source]
    if "flops" in missing and all(columns.get(c, c) in source for c in ("params", "tokens")):
        missing.remove("flops")
    if missing:
        taken = {columns.get(c, c) for c in needs}
        found = likely_columns(missing, [c for c in source if c not in taken])
        example = say_mapping({c: found.get(c, "ITS_NAME") for c in missing})
        lacks = ", ".join(map(repr, missing[:-1])) + " or " * (len(missing) > 1) + repr(missing[-1])
        which = "one it is" if len(missing) == 1 else "they are"
        hint = ""
        if missing == ["tokens"] and {"steps", "batch_tokens"} <= set(source):
            hint = "; steps times batch_tokens would be the tokens of a run"
        elif missing == ["tokens"] and columns.get("flops", "flops") in source:
            hint = "; under C = 6 N D, flops / (6 params) would be the tokens of a run"
        raise FitError(
            f"the table has no column {lacks}; it has {', '.join(source)}. "
            f"Say which {which}, for example {example}{hint}"
        )


def _exclusions(source, columns, numbers, raw, needs, exclude, n, wanted) -> list[str]:
    """The reason to leave each row out, or an empty string."""
    reasons = [""] * n

    def put(mask, words):
        for i in np.flatnonzero(mask):
            if not reasons[i]:
                reasons[i] = words(i) if callable(words) else words

    if "kept" in source:
        kept = as_numbers(source["kept"])
        put(~(kept > 0), lambda i: f"kept = {source['kept'][i]}")
    status = columns.get("status", "status")
    if status in source:
        bad = np.array([str(s).strip().lower() not in FINISHED for s in source[status]])
        put(bad, lambda i: f"status is {source[status][i]}, not finished")
    if "role" in source:
        roles = [str(r).strip() for r in source["role"]]
        put(np.array([r in NOT_FOR_A_FIT for r in roles]), lambda i: NOT_FOR_A_FIT[roles[i]])
    if "final" in source:  # a run table's other rows are evaluations on the way, before the rate decayed
        put(
            np.array([str(f).lower() in ("false", "0", "0.0") for f in source["final"]]),
            "not the final evaluation",
        )
    for name in needs:
        value = numbers[name]
        said = raw.get(name, value)
        put(~np.isfinite(value), lambda i, name=name, said=said: f"{name} is {said[i]}, not a finite number")
        put(~(value > 0), lambda i, name=name, said=said: f"{name} is {said[i]}, not positive")
    for rule in exclude:
        put(_apply_rule(source, rule, n), f"rule: {rule}")
    seen: dict[tuple, int] = {}
    for i in range(n):
        if reasons[i]:
            continue
        key = tuple(repr(float(numbers[c][i])) for c in wanted)
        if key in seen:
            reasons[i] = f"exact duplicate of row {seen[key]}"
        seen.setdefault(key, i)
    return reasons


def _apply_rule(source, rule: str, n: int) -> np.ndarray:
    import pandas as pd

    try:
        frame = pd.DataFrame({k: v for k, v in source.items()})
        mask = np.asarray(frame.eval(rule, engine="python"))
    except Exception as error:
        raise FitError(
            f"exclude has the rule {rule!r}, which cannot be read over the columns: {error}"
        ) from error
    if mask.shape != (n,) or mask.dtype != bool:
        raise FitError(
            f"exclude has the rule {rule!r}; it must be true or false for each row, such as 'loss > 5'"
        )
    return mask


def _count_reasons(reasons: list[str]) -> str:
    counts: dict[str, int] = {}
    for r in reasons:
        counts[r] = counts.get(r, 0) + 1
    top = sorted(counts.items(), key=lambda kv: -kv[1])[:3]
    return "; ".join(f"{count} because {reason}" for reason, count in top)


def _other_trainer(source, used) -> bool:
    """Whether the rows are no language models: what is usual in N and D says nothing of their units."""
    names = source.get("trainer", np.array([None] * len(used)))[used]
    return any(str(name) not in ("None", "nan", "") for name in names)


def _check_units(numbers, used, has_flops: bool):
    params, tokens, flops = (numbers[c][used] for c in ("params", "tokens", "flops"))
    # a law that needs no params or tokens keeps rows where they are blank or zero
    both = all((np.isfinite(v) & (v > 0)).all() for v in (params, tokens))
    if np.isfinite(params).all() and np.median(params) < SMALLEST_PARAMS:
        raise FitError(
            f"params has a median of {np.median(params):g}, which looks like millions or billions; "
            "state the unit (param_unit=1e9 or --param-unit 1e9 for billions)"
        )
    if both:
        ratio = float(np.median(tokens / params))
        if not TOKENS_PER_PARAM[0] <= ratio <= TOKENS_PER_PARAM[1]:
            which = (
                "tokens look to be in millions or billions"
                if ratio < 1
                else "params look to be in millions or billions"
            )
            unit = "token_unit" if ratio < 1 else "param_unit"
            raise FitError(
                f"tokens has a median of {np.median(tokens):g} against params of {np.median(params):g}, "
                f"{ratio:.2g} tokens a parameter: {which}; state the unit "
                f"({unit}=1e9 or --{unit.replace('_', '-')} 1e9 for billions)"
            )
    if both and has_flops:
        with np.errstate(over="ignore"):
            ratio = float(np.median(flops / (6.0 * params * tokens)))
        if not FLOPS_RATIO[0] <= ratio <= FLOPS_RATIO[1]:
            raise FitError(
                f"flops has a median of {np.median(flops):g}, {ratio:.2g} times 6 params tokens; "
                "it must be in floating-point operations (not exaFLOPs or PF-days), or be left out"
            )


def _plain(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


def find_budgets(table: Table) -> tuple[np.ndarray, np.ndarray]:
    """Groups runs into compute budgets.

    By the column ``budget`` (the planned FLOPs) where every used row has one; else by flops, a group
    spanning at most ``BUDGET_WIDTH``.

    Returns:
      Group number per used row, int [R], rising with compute, and each group's budget, [G].
    """
    planned = as_numbers(table.extra["budget"]) if "budget" in table.extra else np.full(len(table), np.nan)
    if np.isfinite(planned).all() and (planned > 0).all():
        groups = group_close(planned)
        return groups, np.array([planned[groups == g].mean() for g in np.unique(groups)])
    groups, start, at = np.zeros(len(table), int), None, -1
    for i in np.argsort(table.flops, kind="stable"):
        if start is None or not table.flops[i] <= start * (1 + BUDGET_WIDTH):
            start, at = table.flops[i], at + 1
        groups[i] = at
    return groups, np.array([np.exp(np.log(table.flops[groups == g]).mean()) for g in range(at + 1)])


def group_close(values: np.ndarray, tolerance: float = SAME_VALUE) -> np.ndarray:
    """Group numbers (int, from 0, rising) of positive values; neighbours within ``tolerance`` share one."""
    values = np.asarray(values, float)
    order = np.argsort(values, kind="stable")
    starts = np.diff(np.log(values[order]), prepend=np.log(values[order[:1]])) > np.log1p(tolerance)
    groups = np.empty(len(values), int)
    groups[order] = np.cumsum(starts)
    return groups
