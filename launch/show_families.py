"""A comparison of families as tables, as Markdown and as one self-contained page."""

from __future__ import annotations

import html
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from rich.table import Table

import fits
from fits import plots
from fits.search import optimum
from launch.family_costs import UNITS, cost_functions
from scaling.records import collect


def accounts(result: Mapping) -> tuple[list[str], list[list[str]]]:
    """What each family is at the tuned size: head and rows."""
    fitted = "equal" not in result
    head = ["family", "shape", "N", "active", "FLOPs/token", "cache and state", "of it state"]
    head += ["rate x", "lost", "runs", *(("a", "fit") if fitted else ())]
    rows = []
    for name, own in result["families"].items():
        tuned = own["tuned"]
        rows.append([
            name, own["shape"], f"{own['params']:,}", f"{own['params_active']:,}",
            f"{own['flops_per_token']:.4g}", f"{own['decode_bytes']:.3g} B", f"{own['state_bytes']:.3g} B",
            f"{tuned['best']:.2g}" + (" (end)" if tuned["edge"] else ""), f"{tuned['excess']:.2%}",
            str(own["runs"]), *((interval(own["a"]), own["status"]) if fitted else ()),
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


def matched(result: Mapping) -> tuple[list[str], list[list[str]], list[str]]:
    """Families at equal N, C and unique tokens: head, rows and notes."""
    head = ["family", "N total", "N active", "C", "tokens seen", "unique", "epochs", "loss", "less reference"]
    rows = []
    for triple in result["triples"]:
        for name, own in triple.items():
            done = own["loss"] is not None
            rows.append([
                name, f"{own['params_total']:,}", f"{own['params_active']:,}", f"{own['flops']:.4g}",
                f"{own['tokens']:,}", f"{own['unique_tokens']:,}" if done else "-",
                f"{own['epochs']:.2f}" if done else "-", f"{own['loss']:.4f}" if done else "none finished",
                told_difference(own["difference"]) if "difference" in own else "",
            ])  # fmt: skip
    notes = [
        f"{name}: over all {found['pairs']} cells {told_difference(found)}"
        for name, found in result["overall"].items()
    ]
    notes.append(
        "a cell's difference is the mean over seeds, its interval of them; over all, of the cells' means. "
        f"Below zero: better than {result['reference']}"
    )
    notes += [left_out(d) for d in result["dropped"]]
    return head, rows, notes


def left_out(dropped: Mapping) -> str:
    """A cell that could not be matched, and why."""
    target = dropped["target"]
    at = f"C {target['flops']:.3g}" if target.get("flops") else f"D {target['tokens']:.3g}"
    return f"left out: N {target['params']:.3g}, {at}: {dropped['family']}: {dropped['reason']}"


def told_difference(found: Mapping) -> str:
    """A difference of losses with its interval, and in plain words where it tells nothing."""
    if found["mean"] is None:
        return "no pair of finished runs"
    text, ends = f"{found['mean']:+.4f}", found["interval"]
    text += f" ({ends[0]:+.4f} to {ends[1]:+.4f})" if ends else ", no interval"
    return text if found["apart"] else text + ", cannot be told apart"


def warnings(result: Mapping) -> list[str]:
    """What is to be doubted, first."""
    out = []
    for name, own in result["families"].items():
        if own.get("status", "converged") != "converged":
            out.append(f"{name}: its fit is {own['status']}" + "".join(f"; {r}" for r in own["reasons"]))
        out += [f"{name}: {text}" for text in own.get("flags", ())]
        if own["tuned"]["edge"] and own["tuned"]["best"] != 1:
            out.append(f"{name}: the best learning rate lies at the end of the bracket; widen tune.lr")
    return out


def show(console, result: Mapping, paths) -> None:
    """Prints the comparison."""
    for line in warnings(result):
        console.print(f"[yellow]warning:[/] {line}", soft_wrap=True)
    head, rows = accounts(result)
    _table(console, f"Families of {result['config']} at the tuned size", head, rows)
    for axis, title in sections(result).items():
        head, rows, notes = section(result, axis)
        _table(console, title, head, rows)
        for note in notes:
            console.print(f"  {note}", soft_wrap=True)
    console.print("written: " + ", ".join(map(str, paths)), soft_wrap=True)


def sections(result: Mapping) -> dict[str | None, str]:
    """Costs that multipliers are by, or None for the matched cells, to the title."""
    if "equal" in result:
        return {None: "At equal total N, C and unique tokens"}
    return {axis: f"Multiplier over {result['reference']} by {axis}" for axis in result["axes"]}


def section(result: Mapping, axis: str | None) -> tuple[list[str], list[list[str]], list[str]]:
    """Head, rows and notes of one of ``sections``."""
    return matched(result) if axis is None else multipliers(result, axis)


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
    for axis, title in sections(result).items():
        head, rows, notes = section(result, axis)
        lines += ["", f"## {title}", ""]
        if axis is not None:
            what = result["axes"][axis]
            lines += [f"{what[0].upper()}{what[1:]}.", ""]
        lines += [*_markdown(head, rows), "", *(f"- {n}" for n in notes)]
    return "\n".join([*lines, ""])


def preface(result: Mapping, config: Mapping) -> str:
    """How the comparison was made, in words."""
    tune = config["tune"]
    rates = ", ".join(f"{x:g}" for x in tune["lr"])
    if "equal" in result:
        return (
            "Every cell of the reference's grid is a triple: its total N, its training FLOPs C, and U, the "
            "fewest tokens that any family sees at them. Each family has the same N (by the width of its "
            "feed-forward), the same C and the same U tokens, which it repeats where C asks for more. The "
            f"bracket of learning rates ({rates} times the recipe's) is at such a triple too. 'lost' is what "
            "the recipe's own rate loses to the best. Cache and state: what decoding keeps at "
            f"{config['context']:,} tokens. Intervals are 95 % (Student's t)."
        )
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
    for axis, title in sections(result).items():
        head, rows, notes = section(result, axis)
        if axis is None:
            parts += [f"<h2>{title}</h2>", _html(head, rows), _list(notes)]
            continue
        what = result["axes"][axis]
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
            loss = np.array([optimum(fit.law, fit.params, c, cost)["loss"][0] for c in grid])
            if np.isfinite(loss).all():  # else it has no optimum at some budget
                own |= {"cost": grid, "loss": loss}
        frontiers[name] = own
    found = {m["family"]: m["budgets"] for m in result["multipliers"] if m["axis"] == axis and "budgets" in m}
    return plots.plot_families(frontiers, found, UNITS[axis].format(chip=result["chip"]))
