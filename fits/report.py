"""The report: one HTML file that needs no network, with the answer and the doubts first."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import pandas as pd
from markupsafe import Markup

from fits import plots
from fits import report_questions as questions
from fits import report_study as study_words
from fits import report_tables as words
from fits.errors import FitError
from fits.explorer import embedded, explorer_data, fields, inside
from fits.fit import Fit
from fits.fitfile import read_fit, write_whole
from fits.known import floor_words, known_floor

FRONTIER_POINTS = 7
"""Budgets at which the frontier is computed: exact under C = 6ND, where it is a power law, and under any
other count close to one; each costs a search for every resample."""
QUESTIONS = ("selection", "next")


def write_report(
    study: str | os.PathLike | None,
    fit: Fit | str | os.PathLike,
    *,
    allocation: Any = None,
    approaches: Any = None,
    out: str | os.PathLike = "report.html",
    plots_dir: str | os.PathLike | None = None,
    flops: Callable | None = None,
    title: str | None = None,
    commands: Sequence[str] = (),
    ask: Sequence[str] = QUESTIONS,
    laws: Sequence[str] = (),
    against: Fit | str | os.PathLike | None = None,
    against_flops: Callable | None = None,
    against_name: str = "the other",
    frontiers: Sequence[Mapping] | None = None,
) -> Path:
    """Writes the report of a fit, and its figures as PNG files.

    Args:
      study: the study folder that was fitted; None for a table from elsewhere.
      fit: a ``Fit`` or the path of a fit file.
      allocation: an ``Allocation``, its ``to_dict()``, or several of them.
      approaches: a ``Comparison`` of approaches 1, 2 and 3, or its ``to_dict()``.
      out: the HTML file.
      plots_dir: the PNG files' folder; default ``plots`` in the study, or ``NAME.plots`` beside an
        ``out`` called ``NAME.html``. Figures of an earlier report in it are replaced or removed.
      flops: training FLOPs of (N, D), for the frontier; default 6 N D.
      title: heading; default the study's name, or the table's.
      commands: the command lines that led here, for the checklist.
      ask: further questions, of ``QUESTIONS``: which law forecasts best, and which runs come next. Each
        answer is worked out here, from the fit's own rows and draws.
      laws: forms to forecast with beside the fit's own; default the sums of powers in the same variables,
        since any other must first be compiled, which takes seconds.
      against: a fit of another study, or its file, to compare with; its FLOPs and its name.
      frontiers: exponents of each family beside the truth, as ``scaling fit --by family --json`` prints them.

    Returns:
      The path of the HTML file. The same inputs give the same bytes.

    Raises:
      FitError: a fit, study or allocation that cannot be read, an unknown question or law, or a place that
        cannot be written.
    """
    unknown = set(ask) - set(QUESTIONS)
    if unknown:
        raise FitError(f"ask has {', '.join(sorted(unknown))}; the questions are {', '.join(QUESTIONS)}")
    fit = fit if isinstance(fit, Fit) else read_fit(fit)
    answers = [_plain(a) for a in _several(allocation)]
    compared = None if approaches is None else _plain(approaches)
    manifest, table, curves = _read_study(study)
    own_name, out = (manifest or {}).get("study"), Path(out)
    if plots_dir is None:
        plots_dir = Path(study) / "plots" if study is not None else out.parent / f"{out.stem}.plots"
    points, hidden = words.isoflop_points(compared)
    frontier = _frontier(fit, points, answers, flops)
    further = _further(fit, table, answers, ask, laws, flops)
    if against is not None:
        other = against if isinstance(against, Fit) else read_fit(against)
        names = (own_name or "this study", against_name)
        budgets = [a["budget"] for a in answers]
        further["comparison"] = questions.ask_comparison(
            fit, other, budgets, names=names, flops=flops, other_flops=against_flops
        )
    figures = _figures(fit, compared, points, answers, frontier, table, curves)
    figures |= _further_figures(fit, further, frontier)
    context = _context(fit, compared, points, answers, manifest, table, commands)
    context |= _further_words(further) | _explorer(fit, flops, answers) | _shown(figures)
    context["problems"] = study_words.frontier_table(frontiers) if frontiers else None
    context["warnings"] += study_words.frontier_warnings(frontiers or ())
    if study is not None:
        said, warnings = study_words.bracket_sentences(study)
        context["warnings"] += warnings
        context["checklist"] += said
    context["warnings"] += questions.selection_warnings(further["selection"][0])
    context |= {
        "title": title or own_name or fit.data.get("source") or "Scaling-law fit",
        "hidden_budgets": hidden,
        "own_count": flops is not None,
        "frontier_compute": "C = 6 N D"
        if flops is None
        else getattr(flops, "label", "the study's own FLOP function"),
    }
    page = _environment().get_template("report.html").render(context)
    _write_figures(figures, Path(plots_dir))
    write_whole(out, page.encode())
    return out


def _shown(figures: Mapping[str, Any]) -> dict[str, Any]:
    """The figures as the page holds them, with their captions."""
    shown = {name: Markup(plots.svg(figure, name, CAPTIONS[name])) for name, figure in figures.items()}
    return {"figures": shown, "captions": {name: CAPTIONS[name] for name in figures}}


def _explorer(fit, flops, answers) -> dict[str, Any]:
    """What the page's own calculator needs, or why it has none."""
    explorer, absent = explorer_data(fit, flops, answers[0] if answers else None)
    if explorer is None:
        return {"explorer": None, "explorer_absent": absent}
    script = "".join(_template(name) for name in ("explorer.js", "explorer_page.js"))
    return {
        "explorer": explorer,
        "explorer_absent": absent,
        "explorer_data": Markup(embedded(explorer)),
        "explorer_script": Markup(script),
        "explorer_fields": fields(explorer),
        "explorer_inside": inside(explorer),
    }


def _write_figures(figures: Mapping[str, Any], folder: Path) -> None:
    for name in CAPTIONS:
        path = folder / f"{name}.png"
        if name in figures:
            write_whole(path, plots.png(figures[name]))
        else:
            _remove(path)  # a picture of an earlier fit would be taken for one of this


def _further(fit, table, answers, ask, laws, flops) -> dict[str, tuple[Any, str]]:
    """Answer and reason why not, by section."""
    left_out = (None, "It was not asked for.")
    further = dict.fromkeys(QUESTIONS, left_out)
    if "selection" in ask:
        fitted = None if table is None else study_words.fitted_rows(fit, table)
        further["selection"] = questions.ask_selection(fit, fitted, laws)
    if "next" in ask:
        further["next"] = questions.ask_next(fit, answers[0]["budget"] if answers else None, flops)
    return further


def _further_figures(fit, further, frontier) -> dict[str, Any]:
    figures = {}
    selection, comparison = further["selection"][0], further.get("comparison", (None, ""))[0]
    if selection and any(c["ranked"] for c in selection["candidates"]):
        figures["forecasts"] = plots.plot_forecasts(selection)
    if further["next"][0]:
        figures["next_runs"] = plots.plot_next_runs(fit, further["next"][0], frontier)
    if comparison:
        shown = {**comparison, "speedups": comparison["curve"]}
        figures["comparison"] = plots.plot_comparison(shown, comparison["frontiers"], comparison["ranges"])
    return figures


def _further_words(further) -> dict[str, Any]:
    """Per section its words, or None, and the reason; a comparison is no section where none was asked for."""
    words_of = {
        "selection": questions.selection_words,
        "next": questions.next_words,
        "comparison": questions.comparison_words,
    }
    out: dict[str, Any] = {"compared_with_other": "comparison" in further}
    for name, make in words_of.items():
        answer, why = further.get(name, (None, ""))
        out[name], out[f"{name}_absent"] = None if answer is None else make(answer), why
    return out


CAPTIONS = {
    "isoflop": "Loss against model size at each budget: the bottom of each curve is the best N for that "
    "budget, and a curve without an orange mark has no minimum among its runs.",
    "surface": "The fitted loss over N and D, with the runs coloured by their measured loss on the same "
    "scale: a dot whose colour differs from the lines around it is badly fitted.",
    "frontier": "The best N and D against the budget: the shaded strip holds the budgets that were run; all "
    "outside it is extrapolation, and the bands show its doubt only if the law keeps its form.",
    "loss_curves": "Training loss of every cell against tokens seen, coloured by N: at equal tokens larger "
    "models should lie lower, and no curve should turn upward.",
    "residuals": "What the law leaves unexplained: a trend or a bend against N, D or the fitted loss means "
    "that the law has the wrong form, and points off the line in the last panel are outliers.",
    "forecasts": "How far off each form was on runs larger than all that it was fitted to: a form whose dots "
    "leave the zero line as the factor grows has the wrong shape, whatever its fit inside the table.",
    "next_runs": "The runs so far and the proposed ones, numbered in the order in which they pay: the star "
    "is the optimum to be decided.",
    "comparison": "The lowest loss of each study at a budget, and the compute that the second saves (a "
    "factor): a green line marks a crossover.",
    "sensitivity": "The exponent a when one choice is made otherwise: marks outside the bands are choices "
    "that matter more than the noise; hollow marks did not converge.",
}


def _several(allocation: Any) -> list:
    if allocation is None:
        return []
    return list(allocation) if isinstance(allocation, list | tuple) else [allocation]


def _plain(result: Any) -> Mapping:
    return result if isinstance(result, Mapping) else result.to_dict()


def _read_study(study) -> tuple[Mapping | None, pd.DataFrame | None, Mapping]:
    if study is None:
        return None, None, {}
    from scaling import records  # here, so that a table from elsewhere needs nothing of scaling

    return records.read_manifest(study), records.collect(study), records.curves(study)


def _frontier(fit: Fit, points, answers, flops) -> dict | None:
    """The law's optimum, point and draws, over the budgets of the rows and of the answers."""
    if fit.status in words.NO_ESTIMATE or set(fit.law.variables) != {"N", "D"}:
        return None
    low, high = fit.diagnostics["range"]["flops"]
    budgets = [low, high, *(p["budget"] for p in points), *(a["budget"] for a in answers)]
    C = np.geomspace(min(budgets), max(max(budgets), 10 * high), FRONTIER_POINTS)
    best = fit.optimum(C, flops)
    if not np.isfinite([best["N"], best["D"]]).all():
        return None
    draws = fit.optimum_draws(C, flops) if len(fit.draws) else {"N": None, "D": None}
    return {"C": C, "N": best["N"], "D": best["D"], "draws_N": draws["N"], "draws_D": draws["D"]}


def _figures(fit, compared, points, answers, frontier, table, curves) -> dict[str, Any]:
    """The figures that these inputs allow, by name, in the order of the page."""
    figures = {}
    usable = fit.status not in words.NO_ESTIMATE
    if points:
        figures["isoflop"] = plots.plot_isoflop(plots.rows_of(fit), points)
    if usable and set(fit.law.variables) == {"N", "D"}:
        figures["surface"] = plots.plot_surface(fit, frontier)
    if frontier is not None:
        own = (
            {k: compared["approaches"][k]["points"] for k in ("1", "2") if k in compared["approaches"]}
            if compared
            else {}
        )
        ends = tuple(fit.diagnostics["range"]["flops"])
        figures["frontier"] = plots.plot_frontier(frontier, own, answers, ends)
    if curves:
        params = dict(zip(table["cell"], table["params"], strict=True))
        diverged = sorted(set(table["cell"][table["status"] == "diverged"]))
        figures["loss_curves"] = plots.plot_loss_curves(curves, params, diverged)
    if usable:
        figures["residuals"] = plots.plot_residuals(fit)
    if usable and any(s.get("a") is not None for s in fit.sensitivity):
        figures["sensitivity"] = plots.plot_sensitivity(fit)
    return figures


def _context(fit, compared, points, answers, manifest, table, commands) -> dict[str, Any]:
    """Everything that the template prints."""
    context = {
        "fit": fit,
        "headline": words.headline(fit, answers),
        "warnings": words.warnings(fit, answers, points),
        "status_words": words.STATUS_WORDS[fit.status],
        "estimated": fit.status not in words.NO_ESTIMATE,
        "law": words.law_table(fit),
        "allocations": [words.allocation_table(a) for a in answers],
        "approaches": words.approach_table(compared),
        "isoflop": words.isoflop_table(points) if points else None,
        "published": plots.PUBLISHED,
        "flops_ratio": words.flops_ratio(fit),
        "exponents": study_words.exponents_table(compared),
        "sensitivity": words.sensitivity_table(fit),
        "checklist": words.fit_checklist(fit),
        "commands": list(commands),
        "number": words.number,
        "sizes": None,
        "dropped": None,
        "runs": None,
        "settings": None,
    }
    cells = None
    if manifest is not None:
        dropped = manifest["dropped"]
        fitted = study_words.fitted_rows(fit, table)
        cells = None if fitted is None else list(fitted["cell"])
        context["warnings"] += study_words.study_warnings(fit, table, dropped)
        context["checklist"] += study_words.study_checklist(manifest, table)
        truth = known_floor(manifest, fit)
        context["checklist"] += [["Known floor", floor_words(truth)]] if truth else []
        context |= {
            "sizes": study_words.sizes_table(table),
            "dropped": study_words.dropped_table(dropped) if dropped else None,
            "runs": study_words.run_table(table),
            "settings": study_words.settings_table(manifest),
        }
    context["rows"] = words.row_tables(fit, cells)
    return context


def _template(name: str) -> str:
    return (files("fits") / "templates" / name).read_text(encoding="utf-8")


def _environment() -> jinja2.Environment:
    loader = jinja2.FunctionLoader(_template)
    environment = jinja2.Environment(
        loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    environment.filters["say"] = say
    return environment


def say(value: Any) -> Markup:
    """A string, a ``Number``, or a list of them, as HTML; a number carries its full value."""
    if isinstance(value, words.Number):
        return Markup('<data value="{}">{}</data>').format(repr(value.value), value.text)
    if isinstance(value, list):
        text = Markup(" ").join(say(v) for v in value)
        for mark in (",", ".", ";", ")"):
            text = text.replace(f" {mark}", mark)
        return Markup(text.replace("( ", "("))
    return Markup.escape(value)


def _remove(path: Path) -> None:
    try:
        path.unlink(missing_ok=True)
    except NotADirectoryError:
        return  # then nothing of that name is there
    except OSError as error:
        raise FitError(f"{path} cannot be removed: {error.strerror or error}") from error
