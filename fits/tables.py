"""Results as tables to paste: Markdown, LaTeX (booktabs), CSV and HTML, doubts first.

Printed tables round to what the intervals can bear; CSV keeps every digit. A law's own parameters are
printed to six digits in every format, because rounded to their intervals they predict another loss.
"""

from __future__ import annotations

import csv
import html
import io
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from fits.errors import FitError

DIGITS = 6  # of a value without an interval, and of a law's parameters
NO_ESTIMATE = ("not identified", "unconverged")
NOT_ESTIMATES = "The values are where the solver stopped, not estimates."
QUANTITIES = {"N": "N*", "D": "D*", "tokens_per_param": "D*/N*", "loss": "loss"}


class Value(NamedTuple):
    """A number, and the power of ten of its last printed digit (None: ``DIGITS`` digits)."""

    x: float | None
    place: int | None = None


class Interval(NamedTuple):
    """Both ends of an interval, or None."""

    ends: Sequence[float] | None
    place: int | None = None


class Symbol(NamedTuple):
    """The name of a quantity."""

    name: str


class Sheet(NamedTuple):
    """A table for print and the same for machines; cells are strings, numbers, ``Value`` and the like."""

    doubts: list[str]
    head: list
    rows: list[list]
    plain_head: list[str]
    plain_rows: list[list]


def parameters(fit: Any, format: str = "markdown") -> str:
    """The law's parameters and the exponents a and b, with their 95 % intervals.

    Args:
      fit: a ``Fit``.
      format: markdown, latex (a booktabs ``tabular``), csv (every digit, 80 and 95 % intervals) or html.

    Raises:
      FitError: another format, or another object.
    """
    if not hasattr(fit, "intervals") or not hasattr(fit, "law") or not hasattr(fit, "reasons"):
        raise FitError(f"parameters was given a {type(fit).__name__}; it needs a Fit")
    return _render(_parameters(fit), format)


def allocations(answers: Any, format: str = "markdown") -> str:
    """Best N, D, D/N and loss by budget, with 95 % intervals: one row for each ``Allocation``.

    Args:
      answers: an ``Allocation``, its ``to_dict()``, or several of them.
      format: as in ``parameters``.
    """
    if isinstance(answers, Mapping) or not isinstance(answers, Sequence):
        answers = [answers]
    answers = [_plain(a, ("budget", "intervals", "extrapolation"), "an Allocation") for a in answers]
    if not answers:
        raise FitError("allocations was given none; it needs at least one Allocation")
    return _render(_allocations(answers), format)


def approaches(comparison: Any, format: str = "markdown") -> str:
    """The exponents a and b by approaches 1, 2 and 3, with 95 % intervals, status and reasons.

    Args:
      comparison: what ``fits.approaches`` returned, or its ``to_dict()``.
      format: as in ``parameters``.
    """
    return _render(_approaches(_plain(comparison, ("approaches", "conventions"), "a Comparison")), format)


def conventions(comparison: Any, format: str = "markdown") -> str:
    """The exponent a under each way to count parameters and FLOPs, by parabolas and by the surface.

    Args:
      comparison: what ``fits.approaches`` returned, or its ``to_dict()``.
      format: as in ``parameters``.
    """
    got = _plain(comparison, ("approaches", "conventions"), "a Comparison")
    plain = [[c["convention"], c["approach_2_a"], c["a"], c["status"]] for c in got["conventions"]]
    rows = [[name, Value(a2, -4), Value(a3, -4), status] for name, a2, a3, status in plain]
    head = ["counted as", "a by parabolas", "a by the surface", "status of the surface"]
    doubts = (
        [] if rows else ["The table gives one count of parameters and FLOPs, so there is none to compare."]
    )
    return _render(
        Sheet(doubts, head, rows, ["convention", "a_parabolas", "a_surface", "status"], plain), format
    )


def notebook(result: Any) -> str:
    """A result as HTML for a notebook: doubts, table, and the rest in its own printed words."""
    lines = str(result).splitlines()
    name = type(result).__name__
    if name == "Fit":
        quantities = len(result.intervals)
        heads = (i for i, line in enumerate(lines) if line.split()[:2] == ["estimate", "sd"])
        at = next(heads, len(lines))
        title = f"{result.law.name}: {result.law.formula} [{result.law.source}]"
        body, after = _parameters(result), lines[at + 1 + quantities :]
    elif name == "Allocation":
        title = f"{result.budget:.4g} FLOPs ({result.compute}), {result.law}"
        body, after = _allocations([result.to_dict()]), lines[len(result.flags) + 1 + len(QUANTITIES) :]
        after = [line for line in after if line.strip() != result.extrapolation["text"]]  # stands above
    elif name == "Comparison":
        title, after = "Approaches to the frontier", []
        body = _approaches(result.to_dict())
        if result.conventions:
            return _render(body, "html", title) + conventions(result, "html")
    else:
        return f"<pre>{html.escape(str(result))}</pre>"
    return _render(body, "html", title) + "".join(f"<p>{html.escape(line.strip())}</p>" for line in after)


def _plain(result: Any, needs: Sequence[str], what: str) -> Mapping:
    got = result if isinstance(result, Mapping) else getattr(result, "to_dict", dict)()
    missing = [k for k in needs if k not in got]
    if missing:
        raise FitError(f"a {type(result).__name__} without {', '.join(missing)} was given; it must be {what}")
    return got


def _parameters(fit: Any) -> Sheet:
    doubts = [_sentence(f["text"]) for f in fit.flags]
    if fit.status != "converged":
        stopped = [NOT_ESTIMATES] if fit.status in NO_ESTIMATE else []
        doubts.insert(0, " ".join([_sentence(f"{fit.status}: {'; '.join(fit.reasons)}"), *stopped]))
    rows, plain = [], []
    for name, got in fit.intervals.items():
        place = _place(got["estimate"], got["95"])
        value = Value(got["estimate"], None if name in fit.params else place)
        ends = "fixed" if name in fit.fixed else Interval(got["95"], place)
        rows.append([Symbol(name), value, ends])
        status = "fixed" if name in fit.fixed else fit.status
        plain.append([name, got["estimate"], got["sd"], *_ends(got), status])
    head = ["", "last value" if fit.status in NO_ESTIMATE else "estimate", "95 % interval"]
    return Sheet(doubts, head, rows, ["name", "estimate", "sd", *_names(""), "status"], plain)


def _allocations(answers: Sequence[Mapping]) -> Sheet:
    doubts, rows, plain = [], [], []
    for answer in answers:
        at = f"At {_text(answer['budget'], None)} FLOPs: " if len(answers) > 1 else ""
        said = [f["text"] for f in answer["flags"]]
        far = answer["extrapolation"]
        if max(far[k] for k in ("budget_ratio", "N_ratio", "D_ratio")) > 1:
            said.append(far["text"])
        doubts += [at + _sentence(text) for text in said]
        row, line = [Value(answer["budget"])], [answer["budget"]]
        for name in QUANTITIES:
            got = answer["intervals"][name]
            place = _place(got["estimate"], got["95"])
            row += [Value(got["estimate"], place), Interval(got["95"], place)]
            line += [got["estimate"], got["sd"], *_ends(got)]
        rows.append(row)
        plain.append([*line, "; ".join(said)])
    head, plain_head = ["C (FLOPs)"], ["budget"]
    for name, words in QUANTITIES.items():
        head += [Symbol(words) if name != "loss" else words, "95 % interval"]
        plain_head += [name, f"{name}_sd", *_names(f"{name}_")]
    return Sheet(list(dict.fromkeys(doubts)), head, rows, [*plain_head, "doubts"], plain)


def _approaches(comparison: Mapping) -> Sheet:
    doubts, rows, plain = [], [], []
    for key in sorted(comparison["approaches"]):
        way = comparison["approaches"][key]
        doubts += [f"Approach {key}: {_sentence(reason)}" for reason in way["reasons"] if way["a"] is None]
        row, line = [f"{key}: {way['name']}"], [key, way["name"], way["status"]]
        for name in ("a", "b"):
            got = (way["intervals"] or {}).get(name) or {"95": None, "80": None}
            place = -4 if got["95"] is None else _place(way[name], got["95"])
            row += [Value(way[name], place), Interval(got["95"], place)]
            line += [way[name], got.get("sd"), *_ends(got)]
        rows.append([*row, way["status"]])
        bias = (way.get("bias") or {}).get("a")
        if bias is not None:
            doubts.append(
                f"Approach {key}: on this grid parabolas read the fitted surface's a off by {bias:+.4f}."
            )
        plain.append([*line, bias, "; ".join(way["reasons"])])
    head = ["approach", Symbol("a"), "95 % interval", Symbol("b"), "95 % interval", "status"]
    quantities = [c for n in "ab" for c in (n, f"{n}_sd", *_names(f"{n}_"))]
    return Sheet(
        doubts, head, rows, ["approach", "name", "status", *quantities, "bias_of_a", "reasons"], plain
    )


def _ends(got: Mapping) -> list:
    return [end for level in ("80", "95") for end in (got[level] or (None, None))]


def _names(prefix: str) -> list[str]:
    return [f"{prefix}{end}_{level}" for level in ("80", "95") for end in ("low", "high")]


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:] + ("" if text.endswith((".", "!", "?")) else ".")


def _place(value: float | None, ends: Sequence[float] | None) -> int | None:
    """Power of ten of the second digit of the shorter arm of an interval, or of a tenth of its width."""
    if value is None or ends is None or not all(map(math.isfinite, (value, *ends))):
        return None
    arm = max(min(value - ends[0], ends[1] - value), 0.1 * (ends[1] - ends[0]))
    return math.floor(math.log10(arm)) - 1 if arm > 0 else None


def _text(x: float | None, place: int | None) -> str:
    """``x`` rounded at 10^place; scientific from a million on and below a ten-thousandth."""
    if x is None:
        return "–"
    if not math.isfinite(x):
        return "not finite"
    if x == 0:
        return "0"
    kept = DIGITS if place is None else min(max(math.floor(math.log10(abs(x))) - place + 1, 1), 15)
    rounded = f"{x:.{kept - 1}e}"
    mantissa, power = rounded.split("e")
    if not -4 <= int(power) < 6:
        return f"{_short(mantissa, place)}e{int(power)}"
    return _short(f"{float(rounded):.{max(0, kept - 1 - int(power))}f}", place)


def _short(text: str, place: int | None) -> str:
    """Without trailing zeros after the point, unless they tell how exact the number is."""
    return text.rstrip("0").rstrip(".") if place is None and "." in text else text


def _words(cell: Any) -> str:
    """A cell in plain characters."""
    if isinstance(cell, Value):
        return _text(cell.x, cell.place)
    if isinstance(cell, Interval):
        return "–" if cell.ends is None else " to ".join(_text(end, cell.place) for end in cell.ends)
    return cell.name if isinstance(cell, Symbol) else str(cell)


def _markdown_words(cell: Any) -> str:
    text = re.sub(r"\s+", " ", _words(cell))
    return re.sub(r"([\\`*_|<>\[\]])", r"\\\1", text)


def _markdown(sheet: Sheet, title: str) -> str:
    lines = [f"> {_markdown_words(doubt)}\n>" for doubt in sheet.doubts]
    if lines:
        lines[-1] = lines[-1].removesuffix("\n>") + "\n"
    marks = (
        ["---:" if isinstance(c, Value | Interval) else "---" for c in sheet.rows[0]] if sheet.rows else []
    )
    marks = marks or ["---"] * len(sheet.head)
    for row in (sheet.head, marks, *sheet.rows):
        cells = row if row is marks else map(_markdown_words, row)
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


LATEX = {
    "\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "–": "--",
    "<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}",
} | {c: "\\" + c for c in "&%$#_{}"}  # fmt: skip
GREEK = re.compile(r"(alpha|beta|gamma|delta|lambda|mu|tau)_?([A-Za-z0-9]?)")


def _latex_text(text: str) -> str:
    return "".join(LATEX.get(c, c) for c in re.sub(r"\s+", " ", text))


def _latex_number(text: str) -> str:
    if text in ("–", "not finite"):
        return _latex_text(text)
    mantissa, _, power = text.partition("e")
    return rf"${mantissa} \times 10^{{{power}}}$" if power else f"${mantissa}$"


def _latex_words(cell: Any) -> str:
    if isinstance(cell, Value):
        return _latex_number(_text(*cell))
    if isinstance(cell, Interval):
        ends = ["–"] if cell.ends is None else [_text(end, cell.place) for end in cell.ends]
        return " to ".join(map(_latex_number, ends))
    if isinstance(cell, Symbol):
        greek = GREEK.fullmatch(cell.name)
        if greek:
            return f"$\\{greek[1]}" + (f"_{{{greek[2]}}}$" if greek[2] else "$")
        if re.fullmatch(r"[A-Za-z]\*?(/[A-Za-z]\*?)?", cell.name):
            return "$" + cell.name.replace("*", "^{*}") + "$"
        return rf"\texttt{{{_latex_text(cell.name)}}}"
    return _latex_text(str(cell))


def _latex(sheet: Sheet, title: str) -> str:
    numeric = [isinstance(c, Value | Interval) for c in sheet.rows[0]] if sheet.rows else []
    columns = "".join("r" if n else "l" for n in numeric) or "l" * len(sheet.head)
    lines = [r"% needs \usepackage{booktabs}", rf"\begin{{tabular}}{{{columns}}}"]
    for doubt in sheet.doubts:  # inside the table, so that they are pasted with it
        lines.append(
            rf"\multicolumn{{{len(sheet.head)}}}{{p{{0.9\linewidth}}}}{{\emph{{{_latex_text(doubt)}}}}} \\"
        )
    lines += [r"\toprule", " & ".join(map(_latex_words, sheet.head)) + r" \\", r"\midrule"]
    lines += [" & ".join(map(_latex_words, row)) + r" \\" for row in sheet.rows]
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}"]) + "\n"


def _csv(sheet: Sheet, title: str) -> str:
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(sheet.plain_head)
    writer.writerows([repr(float(c)) if isinstance(c, float) else c for c in row] for row in sheet.plain_rows)
    return out.getvalue()


def _html(sheet: Sheet, title: str) -> str:
    doubts = "".join(f"<li>{html.escape(doubt)}</li>" for doubt in sheet.doubts)
    head = "".join(f'<th scope="col">{html.escape(_words(c))}</th>' for c in sheet.head)
    rows = ["".join(f"<td>{html.escape(_words(c))}</td>" for c in row) for row in sheet.rows]
    caption = f"<p><strong>{html.escape(title)}</strong></p>" if title else ""
    listed = f"<p>Before you rely on it:</p><ul>{doubts}</ul>" if doubts else ""
    body = "".join(f"<tr>{row}</tr>" for row in rows)
    return f"{caption}{listed}<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


FORMATS: dict[str, Callable[[Sheet, str], str]] = {
    "markdown": _markdown,
    "latex": _latex,
    "csv": _csv,
    "html": _html,
}


def _render(sheet: Sheet, format: str, title: str = "") -> str:
    if format not in FORMATS:
        raise FitError(f"format is {format!r}; it must be one of {', '.join(FORMATS)}")
    return FORMATS[format](sheet, title)
