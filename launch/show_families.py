"""A comparison of families as tables, as Markdown and as one self-contained page."""

from __future__ import annotations

import html
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from rich.table import Table

import fits
from fits import plots
from launch.family_costs import UNITS, cost_functions
from scaling.records import collect


def accounts(result: Mapping) -> tuple[list[str], list[list[str]]]:
    """What each family is at the tuned size: head and rows."""
    head = ["family", "shape", "N", "active", "FLOPs/token", "cache and state", "of it state"]
    head += ["rate x", "lost", "runs", "a", "fit"]
    rows = []
    for name, own in result["families"].items():
        tuned, a = own["tuned"], own["a"]
        rows.append([
            name, own["shape"], f"{own['params']:,}", f"{own['params_active']:,}",
            f"{own['flops_per_token']:.4g}", f"{own['decode_bytes']:.3g} B", f"{own['state_bytes']:.3g} B",
            f"{tuned['best']:.2g}" + (" (end)" if tuned["edge"] else ""), f"{tuned['excess']:.2%}",
            str(own["runs"]), interval(a), own["status"],
        ])  # fmt: skip
    return head, rows


def interval(found: Mapping | None) -> str:
    """An estimate with its 95 % interval."""
    if not found or found.get("estimate") is None:
        return "none"
    ends = found.get("95")
    return number(found["estimate"]) + (f" ({number(ends[0])} to {number(ends[1])})" if ends else "")


def number(value) -> str:
    """A number as a table has it, or the word in its place ("infinite")."""
    return f"{value:.3g}" if isinstance(value, (int, float)) else str(value)


def multipliers(result: Mapping, axis: str) -> tuple[list[str], list[list[str]], list[str]]:
    """Multipliers by one cost: head, rows and notes."""
    unit = UNITS[axis].format(chip=result["chip"])
    found = [m for m in result["multipliers"] if m["axis"] == axis]
    budgets = next((m["budgets"] for m in found if "budgets" in m), [])
    head = ["family", *(f"at {b['budget']:.3g}" for b in budgets), "crossover"]
    rows, notes = [], [f"{unit}; above 1: the family reaches {result['reference']}'s loss with less"]
    for m in found:
        if "why_not" in m:
            rows.append([m["family"], *("-" for _ in budgets), "-"])
            notes.append(f"{m['family']}: cannot be compared: {m['why_not']}")
            continue
        at = m["crossover"]["budgets"]
        crossing = " and ".join(f"{c:.3g}" for c in at) if at else "none in the grid"
        rows.append([m["family"], *(told(b) for b in m["budgets"]), crossing])
        notes += [f"{m['family']}: {text}" for text in m["flags"]]
    return head, rows, notes


def told(row: Mapping) -> str:
    """A multiplier with its interval, and in plain words where it tells nothing."""
    value, ends = row["multiplier"], row["interval"]
    text = "no answer" if value is None else number(value)
    text += f" ({number(ends[0])} to {number(ends[1])})" if ends else ", no interval"
    return text if row["apart"] else text + ", cannot be told apart"


def warnings(result: Mapping) -> list[str]:
    """What is to be doubted, first."""
    out = []
    for name, own in result["families"].items():
        if own["status"] != "converged":
            out.append(f"{name}: its fit is {own['status']}" + "".join(f"; {r}" for r in own["reasons"]))
        out += [f"{name}: {text}" for text in own["flags"]]
        if own["tuned"]["edge"] and own["tuned"]["best"] != 1:
            out.append(f"{name}: the best learning rate lies at the end of the bracket; widen tune.lr")
    return out


def show(console, result: Mapping, paths) -> None:
    """Prints the comparison."""
    for line in warnings(result):
        console.print(f"[yellow]warning:[/] {line}", soft_wrap=True)
    head, rows = accounts(result)
    _table(console, f"Families of {result['config']} at the tuned size", head, rows)
    for axis in result["axes"]:
        head, rows, notes = multipliers(result, axis)
        _table(console, f"Multiplier over {result['reference']} by {axis}", head, rows)
        for note in notes:
            console.print(f"  {note}", soft_wrap=True)
    console.print("written: " + ", ".join(map(str, paths)), soft_wrap=True)


def _table(console, title, head, rows) -> None:
    table = Table(title=title, title_justify="left")
    for i, name in enumerate(head):
        table.add_column(name, justify="left" if i == 0 else "right")
    for row in rows:
        table.add_row(*row)
    console.print(table)


def as_markdown(result: Mapping, config: Mapping) -> str:
    """The comparison as Markdown."""
    lines = [f"# Families: {result['config']}", "", *(f"- warning: {w}" for w in warnings(result)), ""]
    lines += [
        preface(result, config),
        "",
        "## What each is at the tuned size",
        "",
        *_markdown(*accounts(result)),
    ]
    for axis, what in result["axes"].items():
        head, rows, notes = multipliers(result, axis)
        lines += [
            "",
            f"## Multiplier over {result['reference']} by {axis}",
            "",
            f"{what[0].upper()}{what[1:]}.",
            "",
        ]
        lines += [*_markdown(head, rows), "", *(f"- {n}" for n in notes)]
    return "\n".join([*lines, ""])


def preface(result: Mapping, config: Mapping) -> str:
    """How the comparison was made, in words."""
    tune = config["tune"]
    rates = ", ".join(f"{x:g}" for x in tune["lr"])
    return (
        f"Each family was tuned by one bracket of learning rates ({rates} times the recipe's, at N "
        f"{tune['params']:.3g} and D {tune['tokens']:.3g}), then trained on the same grid at the best of "
        "them. 'lost' is what the recipe's own rate loses to that. Cache and state: what decoding keeps at "
        f"{config['context']:,} tokens. Intervals are 95 %."
    )


def _markdown(head, rows) -> list[str]:
    line = "|---|" + "---:|" * (len(head) - 1)
    return [f"| {' | '.join(head)} |", line, *(f"| {' | '.join(r)} |" for r in rows)]


def _html(head, rows) -> str:
    cells = lambda kind, row: "".join(f"<{kind}>{html.escape(c)}</{kind}>" for c in row)  # noqa: E731
    body = "".join(f"<tr>{cells('td', row)}</tr>" for row in rows)
    return f"<table><thead><tr>{cells('th', head)}</tr></thead><tbody>{body}</tbody></table>"


def _list(lines) -> str:
    return "<ul>" + "".join(f"<li>{html.escape(x)}</li>" for x in lines) + "</ul>" if lines else ""


def as_html(result: Mapping, config: Mapping, folder: Path) -> str:
    """The comparison as one page with its pictures inside."""
    css = (Path(fits.__file__).parent / "templates" / "report.css").read_text()
    title = f"Families: {html.escape(result['config'])}"
    parts = [f"<h1>{title}</h1>", _list([f"warning: {w}" for w in warnings(result)])]
    parts += [f"<p>{html.escape(preface(result, config))}</p>", "<h2>What each is at the tuned size</h2>"]
    parts.append(_html(*accounts(result)))
    for axis, what in result["axes"].items():
        head, rows, notes = multipliers(result, axis)
        words = f"Loss against {what}, and multipliers by family"
        figure = plots.svg(picture(result, folder, axis), axis, words)
        parts.append(f"<h2>By {axis}: {html.escape(what)}</h2><figure>{figure}</figure>")
        parts += [_html(head, rows), _list(notes)]
    head = f'<head><meta charset="utf-8"><title>{title}</title><style>{css}</style></head>'
    return f'<!doctype html><html lang="en">{head}<body><main>{"".join(parts)}</main></body></html>'


def picture(result: Mapping, folder: Path, axis: str):
    """The runs, frontiers and multipliers of all families by one cost."""
    frontiers = {}
    for name in result["families"]:
        study = folder / name
        fit = fits.read_fit(study / "fits" / "chinchilla.json")
        cost = cost_functions(study, result["chip"])[axis]
        table = collect(study)
        table = table[table["status"] == "finished"]
        spent = np.asarray(cost(table["params"].to_numpy(float), table["tokens"].to_numpy(float)))
        own = {"points": list(zip(spent, table["loss"], strict=True)), "cost": None}
        if fit.status in ("converged", "boundary"):
            grid = np.geomspace(spent.min(), spent.max(), 25)
            try:
                own |= {"cost": grid, "loss": [fits.allocate(fit, c, flops=cost).loss for c in grid]}
            except fits.FitError:
                own["cost"] = None
        frontiers[name] = own
    found = {m["family"]: m["budgets"] for m in result["multipliers"] if m["axis"] == axis and "budgets" in m}
    return plots.plot_families(frontiers, found, UNITS[axis].format(chip=result["chip"]))
