"""Questions that a law answers beyond its loss: of a fit, with intervals, or of published constants."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from fits.errors import FitError
from fits.fit import Fit
from fits.laws import Law, Question, get_law
from fits.printed import Printed

STEP = 1e-3  # of slopes: an answer may come from a search, which is exact to about 1e-6


@dataclasses.dataclass
class Answer(Printed):
    """What a law answers.

    Attributes:
      values: quantity -> {"estimate", "sd", "80", "95"}; of published constants the last three are None.
      units: quantity -> what it is. given: what was asked with, defaults included.
      source: where the constants come from, in words. flags: doubts, {"code", "text"}.
    """

    law: str
    question: str
    asks: str
    given: dict[str, Any]
    values: dict[str, dict]
    units: dict[str, str]
    source: str
    flags: list[dict[str, str]]

    def __getitem__(self, quantity: str) -> float:
        return self.values[quantity]["estimate"]

    def to_dict(self) -> dict:
        return dataclasses.asdict(self)

    def __str__(self) -> str:
        lines = [f"flag: {f['text']}" for f in self.flags]
        given = ", ".join(f"{k} {_short(v)}" for k, v in self.given.items())
        lines.append(f"{self.law}, {self.question}: {self.asks}")
        lines.append(f"  given {given}; {self.source}")
        for name, got in self.values.items():
            estimate = "never" if got["estimate"] is None else f"{got['estimate']:.5g}"
            text = f"  {name:20}{estimate:<12}{self.units[name]}"
            if got["95"]:
                (l80, h80), (l95, h95) = got["80"], got["95"]
                text += f"; 80 %: {l80:.4g} to {h80:.4g}; 95 %: {l95:.4g} to {h95:.4g}"
            lines.append(text)
        return "\n".join(lines)


def _short(value) -> str:
    return ",".join(f"{v:g}" for v in value) if isinstance(value, list) else f"{value:g}"


def describe(law: str | Law) -> str:
    """The questions of a law with what each needs and gives."""
    law = get_law(law)
    if not law.questions:
        return f"{law.name} has no questions of its own; predict, allocate and profile read its fits"
    lines = [f"{law.name}: {law.formula}   [{law.source}]"]
    for name, q in law.questions.items():
        lines.append(f"{name}: {q.asks}")
        lines += [f"  needs {k}: {what}" for k, what in q.needs.items()]
        lines += [f"  takes {k}: {what} (default {_short(d)})" for k, (d, what) in q.takes.items()]
        lines += [f"  gives {k}: {what}" for k, what in q.gives.items()]
    return "\n".join(lines)


def ask(subject: Fit | Law | str, question: str, **given: float | Sequence[float]) -> Answer:
    """Answers one of the questions that the law lists (``describe``).

    Args:
      subject: a fit, for an answer with intervals, or a law (or its name), for its published constants.
      given: what the question needs and takes, each a positive number, or a list of them where the question
        reads one (``Question.many``).

    Raises:
      FitError: a question or name that the law does not know, something missing, not positive or a list
        where one number is read, a law without published constants, or a fit whose status forbids numbers.
    """
    fit = subject if isinstance(subject, Fit) else None
    law = fit.law if fit else get_law(subject)
    if question not in law.questions:
        known = ", ".join(law.questions) or "none"
        raise FitError(f"question is {question!r}; the law {law.name} answers {known}")
    asked = law.questions[question]
    values = _read(asked, question, given)
    if fit is None:
        if law.PUBLISHED is None:
            raise FitError(f"the law {law.name} has no published constants; ask a fit of it")
        point, source = dict(law.PUBLISHED), f"published constants [{law.source}]"
    else:
        if fit.status not in ("converged", "boundary"):
            raise FitError(f"the fit is {fit.status}, so it answers nothing: {'; '.join(fit.reasons)}")
        point, source = fit.params, f"a fit to {fit.diagnostics['rows_used']} rows"

    def answer(params: Mapping[str, Any]) -> dict[str, np.ndarray]:
        params = {k: np.atleast_1d(np.asarray(v, float)) for k, v in params.items()}
        with np.errstate(all="ignore"):  # no answer is a NaN, and is said
            got = asked.answer(law, params, values)
        lanes = np.shape(next(iter(params.values())))
        return {k: np.broadcast_to(np.asarray(v, float), lanes) for k, v in got.items()}

    try:
        estimates = {k: float(v[0]) for k, v in answer(point).items()}
    except KeyError as error:
        if fit is not None or set(law.parameters) <= set(law.PUBLISHED):
            raise
        known = ", ".join(law.PUBLISHED)
        raise FitError(
            f"of {law.name} only {known} is published, and {question} needs more; ask a fit of it"
        ) from error
    flags = _impossible(asked, estimates) + ([] if fit is None else _flags(fit, values))
    if fit is None or not len(fit.draws):
        none = {"sd": None, "80": None, "95": None}
        intervals = {k: {"estimate": _number(v), **none} for k, v in estimates.items()}
    else:
        drawn = answer(fit.draw_params())
        intervals = {}
        for k, estimate in estimates.items():
            log = bool(estimate > 0 and not (drawn[k] <= 0).any())
            got = fit.interval_of(drawn[k], estimate, lambda p, k=k: answer(p)[k], log, STEP)
            intervals[k] = _unless_flat(got) | {"estimate": _number(estimate)}
    return Answer(law.name, question, asked.asks, values, intervals, dict(asked.gives), source, flags)


def _unless_flat(got: dict) -> dict:
    """The draws' own ends where slopes see nothing: at an end of what may be, or of a count."""
    if got["method"] == "few clusters" and got["95"][0] == got["95"][1]:
        return {**got, **got["percentile"], "method": "percentile"}
    return got


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _read(asked: Question, question: str, given: Mapping[str, Any]) -> dict[str, Any]:
    unknown = set(given) - set(asked.needs) - set(asked.takes)
    names = ", ".join([*asked.needs, *asked.takes])
    if unknown:
        raise FitError(f"{question} does not know {', '.join(sorted(unknown))}; it reads {names}")
    missing = [k for k in asked.needs if k not in given]
    if missing:
        raise FitError(f"{question} lacks {', '.join(f'{k} ({asked.needs[k]})' for k in missing)}")
    out = {k: default for k, (default, _) in asked.takes.items()} | dict(given)
    for name, value in out.items():
        many = isinstance(value, Sequence | np.ndarray) and not isinstance(value, str)
        if many and name not in asked.many:
            raise FitError(f"{name} is {list(value)!r}; {question} reads one number for it")
        parts = list(value) if many else [value]
        for part in parts:
            if isinstance(part, bool) or not (
                isinstance(part, int | float | np.number) and math.isfinite(part) and part > 0
            ):
                raise FitError(f"{name} is {part!r}; it must be a positive number")
        out[name] = [float(p) for p in parts] if many else float(value)
    return out


def _impossible(asked: Question, estimates: Mapping[str, float]) -> list[dict[str, str]]:
    """Answers that nothing can have: the law does not hold where it was asked."""
    return [
        {
            "code": "impossible",
            "text": f"{k} is {estimates[k]:.4g}, beyond {low:g} to {high:g}: the law does not hold there",
        }
        for k, (low, high) in asked.ranges.items()
        if not low <= estimates[k] <= high and math.isfinite(estimates[k])
    ]


def _flags(fit: Fit, values: Mapping[str, Any]) -> list[dict[str, str]]:
    """The fit's own doubts about its numbers, and what lies outside its rows."""
    flags = [f for f in fit.flags if f["code"] in ("boundary", "uncertain", "no_intervals")]
    used = [r for r in fit.rows if r["outcome"] == "used"]
    for name, value in values.items():
        column = [r[name] for r in used if r.get(name)]
        if not column or isinstance(value, list):
            continue
        low, high = min(column), max(column)
        if not low <= value <= high:
            far = value / high if value > high else low / value
            text = f"{name} is {far:.3g} times outside the rows: that the law holds there is assumed"
            flags.append({"code": "far_extrapolation", "text": text})
    return flags
