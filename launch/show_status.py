"""The status table of a study, once or again and again."""

from __future__ import annotations

import time
from pathlib import Path

from rich.console import Console, Group
from rich.live import Live
from rich.markup import escape
from rich.table import Table

from launch.show import duration, si
from launch.status import study_status

STYLES = {
    "finished": "green",
    "training": "cyan",
    "starting": "blue",
    "stalled": "red",
    "silent": "red",
    "failed": "red",
    "diverged": "yellow",
    "preempted": "yellow",
}
QUIET = ("finished", "waiting")
"""States of cells that a long table leaves out."""
LONG = 60
"""Cells above which the table has only those that need a look (``--all`` has all)."""


def table(study: Path, status: dict, everything: bool) -> Group:
    """The table and the lines below it."""
    rows = status["cells"]
    shown = rows if everything or len(rows) <= LONG else [r for r in rows if r["state"] not in QUIET]
    grid = Table(title=str(study), header_style="bold")
    for name in ("cell", "state"):
        grid.add_column(name)
    for name in (
        "step",
        "of",
        "durable",
        "tokens/s",
        "MFU",
        "tries",
        "preempted",
        "left",
        "device-h",
        "loss",
    ):
        grid.add_column(name, justify="right")
    grid.add_column("note")
    for r in shown:
        style = STYLES.get(r["state"], "dim")
        grid.add_row(
            r["cell"][:8],
            f"[{style}]{r['state']}[/]",
            str(r["step"]),
            str(r["steps"]),
            "-" if r["durable_step"] is None else str(r["durable_step"]),
            si(r["tokens_per_second"]),
            "-" if r["mfu"] is None else f"{r['mfu']:.1%}",
            str(r["attempts"]),
            str(r["preemptions"]),
            duration(r["eta_seconds"]),
            f"{r['device_seconds'] / 3600:.3g}",
            "-" if r["loss"] is None else f"{r['loss']:.4f}",
            escape(r["reason"] or ""),
        )
    left_out = len(rows) - len(shown)
    more = (
        [f"{left_out} cells that are finished or waiting are left out (--all has them)"] if left_out else []
    )
    return Group(grid, *more, *failures(rows), total(status["study"], len(rows)))


def failures(rows: list[dict]) -> list[str]:
    """The last line of the log of each failed cell."""
    found = [(r["cell"][:8], r["log"][-1]) for r in rows if r["log"]]
    return [f"[red]{cell}[/] last words: {escape(line)}" for cell, line in found]


def total(whole: dict, cells: int) -> str:
    """One line about the study."""
    said = ", ".join(f"{n} {state}" for state, n in whole["states"].items())
    hours, planned = whole["device_hours"]["spent"], whole["device_hours"]["planned"]
    parts = [f"{cells} cells: {said}", f"{whole['done']:.0%} of the FLOPs done"]
    parts.append(f"{hours:.3g} device-hours spent" + ("" if planned is None else f" of about {planned:.3g}"))
    if whole["eta_seconds"] is not None:
        parts.append(f"about {duration(whole['eta_seconds'])} left")
    if whole["cost"] is not None:
        spent, at_end = whole["cost"]["spent"], whole["cost"]["planned"]
        parts.append(f"cost {spent:.4g}" + ("" if at_end is None else f" of about {at_end:.4g}"))
    return "; ".join(parts)


def watch(console: Console, study: Path, price: float | None, everything: bool, every: float = 2.0) -> None:
    """Draws the table again and again until nothing is under way or left to wait for."""
    with Live(console=console, auto_refresh=False) as live:
        while True:
            status = study_status(study, price)
            live.update(table(study, status, everything), refresh=True)
            if set(status["study"]["states"]) <= {"finished", "diverged", "failed"}:
                return
            time.sleep(every)
