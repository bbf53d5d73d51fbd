"""What a person at a terminal sees: the plan's table, progress bars, the status table."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from scaling.branches import saving, spent_flops
from scaling.records import RESULTS, bracket_words, progress

STATUS_STYLE = {"finished": "green", "running": "cyan", "diverged": "yellow", "failed": "red"}
LEAST_NEEDED = ("memory", "C", "N non-emb", "batch", "steps", "cell")
"""Columns of the plan that a narrow terminal goes without, first to go first."""


def si(x: float | None) -> str:
    """A number with an SI suffix and three digits: 12.3k, 4.56M."""
    if x is None:
        return "-"
    for limit, suffix in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(x) >= limit * 0.9995:
            return f"{x / limit:.3g}{suffix}"
    return f"{x:.3g}"


def gigabytes(x: float) -> str:
    """Bytes with an SI suffix: 4.5MB, 17.2GB."""
    return si(x).replace("B", "G") + "B"


def duration(seconds: float | None) -> str:
    """Seconds as 12 s, 3.4 min or 5.6 h."""
    if seconds is None:
        return "-"
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.1f} min"
    return f"{seconds / 3600:.1f} h"


def plan_rows(manifest: dict, estimate: dict | None) -> list[dict[str, str]]:
    """The cells as printed: column to text."""
    rows = []
    for i, cell in enumerate(manifest["cells"]):
        got, target, config = cell["achieved"], cell["target"], cell["config"]
        c = got["flops_by_convention"][manifest["flops_convention"]]
        guess = estimate["cells"][i] if estimate else {"seconds": None, "bytes": None}
        rows.append(
            {
                "cell": cell["id"][:8],
                "C target": f"{target['flops']:.3g}" if target["flops"] else "-",
                "C": f"{c:.4g}",
                "off": f"{c / target['flops'] - 1:+.2%}" if target["flops"] else "-",
                "N": si(got["params_total"]),
                "N non-emb": si(got["params_nonembedding"]),
                "D": si(got["tokens"]),
                "D/N": f"{got['ratio']:.3g}",
                "shape": "-" if "trainer" in config else "{layers}x{d_model}".format(**config["model"]),
                "batch": str(config["train"]["batch"]),
                "steps": str(config["train"]["steps"]),
                "LR": "-" if "trainer" in config else f"{config['optim']['lr']:.3g}",
                "memory": f"{guess['bytes'] / 2**20:.0f} MB" if guess["bytes"] else "-",
                "time": duration(guess["seconds"]),
                "role": role_words(cell),
            }
        )
    if all(r["role"] == "" for r in rows):
        for r in rows:
            del r["role"]
    return rows


def role_words(cell: dict) -> str:
    """What a manifest's entry is besides a cell of its own."""
    role = cell.get("role", "cell")
    if role == "branch":
        return f"from {cell['trunk'][:8]} at {cell['fork']}"
    if role == "sentinel":
        about = cell["sentinel"]
        return f"{about['of'][:8]} at {about['multiple']:g} x {about['field']}"
    return "" if role == "cell" else role


def plan_table(title: str, rows: list[dict[str, str]], left_out: set[str]) -> Table:
    """The plan as a table, a rule between budgets."""
    table = Table(title=title, header_style="bold", padding=(0, 1))
    columns = [c for c in rows[0] if c not in left_out]
    for column in columns:
        table.add_column(column, justify="left" if column in ("cell", "role") else "right", no_wrap=True)
    for before, row in zip([None, *rows], rows, strict=False):
        new = before is not None and before["C target"] != row["C target"]
        if new or (before is not None and row.get("role") == "trunk"):
            table.add_section()
        table.add_row(*[row[c] for c in columns])
    return table


def plan(console: Console, manifest: dict, estimate: dict | None, study: Path, outcome: str) -> None:
    """The table that a person checks before spending."""
    title = f"{manifest['study']}: {len(manifest['cells'])} cells"
    rows = plan_rows(manifest, estimate)
    for n in range(len(LEAST_NEEDED) + 1):
        table = plan_table(title, rows, set(LEAST_NEEDED[:n]))
        widths = [max(map(len, [c, *(r[c] for r in rows)])) for c in rows[0] if c not in LEAST_NEEDED[:n]]
        if sum(widths) + 3 * len(widths) + 1 <= console.width:  # two spaces and a rule a column
            break
    console.print(table)
    if n:
        console.print(f"left out at this width: {', '.join(LEAST_NEEDED[:n])} (--json has all)")
    for dropped in manifest["dropped"]:
        target = dropped["target"]
        at = f"C {target['flops']:.3g}" if target["flops"] else f"D {target['tokens']:.3g}"
        console.print(f"[yellow]dropped[/] N {target['params']:.3g}, {at}: {escape(dropped['reason'])}")
    data = manifest["data"]
    total = sum(map(spent_flops, manifest["cells"]))
    if data:
        console.print(
            f"data: {si(data['unique_tokens'])} training tokens, {si(data['heldout_tokens'])} held out, "
            f"vocabulary {data['vocab']}, fingerprint {data['fingerprint'][:12]}"
        )
    if "ideal_loss" in data:
        console.print(
            f"the source's entropy rate is {data['entropy_rate']:.5f} nats per token; a perfect model's "
            f"expected held-out loss is {data['ideal_loss']:.5f}"
        )
    console.print(f"total: {total:.4g} FLOPs (exact count, forward and backward)")
    saved = saving(manifest["cells"])
    if saved is not None:
        trunks = sum(c["role"] == "trunk" for c in manifest["cells"])
        console.print(
            f"trunk and branch: {trunks} trunks in place of a run a cell save {1 - 1 / saved['ratio']:.0%} "
            f"({saved['alone']:.4g} FLOPs, {saved['ratio']:.2f} times as many, for each cell alone)"
        )
    if estimate:
        console.print(
            f"estimated on this device ({estimate['device']}): {duration(estimate['total_seconds'])} with "
            f"{estimate['workers']} workers (an estimate: {estimate['how']})"
        )
        console.print(estimate["packing"])
    words = {
        "new": f"written to {study}; next: scaling run {study}",
        "same": f"{study} holds this very plan already; next: scaling run {study}",
        "grown": f"{study} has grown to a new revision; next: scaling run {study}",
        "dry run": "dry run: nothing was written",
    }
    console.print(words[outcome], soft_wrap=True)


@contextlib.contextmanager
def progress_bars(console: Console, study: Path, quiet: bool = False) -> Iterator:
    """Yields a function to call often: it redraws the study's bar and one bar a running cell.

    Without a terminal it prints one line whenever a cell ends.
    """
    reporter = _Reporter(console, study)
    if quiet:
        yield lambda: None
    elif not console.is_terminal:
        yield reporter.print_finished
    else:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.percentage:>3.0f}%"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
        )
        with Progress(*columns, console=console) as bars:
            reporter.bars = bars
            yield reporter.redraw


class _Reporter:
    """Keeps what was shown, so that each finished cell is said once."""

    def __init__(self, console: Console, study: Path):
        self.console, self.study, self.bars = console, study, None
        self.tasks: dict = {}
        rows = progress(study)
        self.said = {r["cell"] for r in rows if r["status"] in RESULTS}
        self.done_before = sum(r["flops"] for r in rows if r["cell"] in self.said)
        self.last = 0.0

    def ended(self, rows: list[dict]) -> list[dict]:
        """Cells that ended since the last call."""
        new = [r for r in rows if r["status"] in RESULTS and r["cell"] not in self.said]
        self.said |= {r["cell"] for r in new}
        return new

    def print_finished(self) -> None:
        if time.monotonic() - self.last < 1.0:
            return
        self.last = time.monotonic()
        rows = progress(self.study)
        before = len(self.said)
        for i, row in enumerate(self.ended(rows), before + 1):
            self.console.print(f"[{i}/{len(rows)}] " + cell_line(row), markup=False)

    def redraw(self) -> None:
        if time.monotonic() - self.last < 0.5:
            return
        self.last = time.monotonic()
        rows = progress(self.study)
        total = sum(r["flops"] for r in rows) - self.done_before
        done = sum(r["flops"] * share_done(r) for r in rows) - self.done_before
        ended = len([r for r in rows if r["status"] in RESULTS])
        if "study" not in self.tasks:
            self.tasks["study"] = self.bars.add_task("study", total=total, note="")
        self.bars.update(self.tasks["study"], completed=done, note=f"{ended} of {len(rows)} cells")
        for row in rows:
            name = row["cell"]
            running = row["status"] == "running"
            if running and name not in self.tasks:
                self.tasks[name] = self.bars.add_task(name[:8], total=row["steps"] - row["first"], note="")
            if name in self.tasks:
                note = f"loss {row['loss']:.3f}" if row["loss"] is not None else ""
                self.bars.update(
                    self.tasks[name], completed=row["step"] - row["first"], note=note, visible=running
                )
        for row in self.ended(rows):
            self.bars.console.print(cell_line(row), markup=False)


def share_done(row: dict) -> float:
    """How much of its own steps a cell has done."""
    return max(0, row["step"] - row["first"]) / max(1, row["steps"] - row["first"])


def cell_line(row: dict) -> str:
    """One line about a cell that has ended."""
    if row["status"] != "finished":
        return f"{row['cell'][:8]} {row['status']}: {row['reason']}"
    return f"{row['cell'][:8]} finished: loss {row['loss']:.4f} in {duration(row['seconds'])}"


def status(console: Console, study: Path, rows: list[dict]) -> None:
    """The status table of a study."""
    table = Table(title=str(study), header_style="bold")
    for column in ("cell", "status", "step", "of", "loss", "time", "note"):
        table.add_column(column, justify="left" if column in ("cell", "status", "note") else "right")
    for r in rows:
        style = STATUS_STYLE.get(r["status"], "dim")
        note = {"finished": "held-out loss", "running": "training loss", "planned": ""}.get(r["status"])
        note = str(r["reason"]) if note is None else note
        loss = "-" if r["loss"] is None else f"{r['loss']:.4f}"
        row = (r["cell"], f"[{style}]{r['status']}[/]", r["step"], r["steps"], loss, duration(r["seconds"]))
        table.add_row(*map(str, row), escape(note))
    console.print(table)
    console.print(counts(rows))


def counts(rows: list[dict]) -> str:
    """How many cells have each status."""
    seen = [r["status"] for r in rows]
    return f"{len(rows)} cells: " + ", ".join(f"{seen.count(s)} {s}" for s in dict.fromkeys(seen))


def run_summary(console: Console, study: Path) -> None:
    """The last lines of ``scaling run``."""
    rows = progress(study)
    for r in rows:
        if r["status"] not in ("finished", "planned", "running"):
            console.print(f"[yellow]{escape(cell_line(r))}[/]", soft_wrap=True)
    sentinels(console, study)
    whole = all(r["status"] in RESULTS for r in rows)
    console.print(f"{counts(rows)}; next: scaling {'fit' if whole else 'run'} {study}", soft_wrap=True)


def sentinels(console: Console, study: Path) -> None:
    """What the study's brackets say of its learning rates and batches."""
    for said, warning in bracket_words(study):
        console.print(("[yellow]warning:[/] " if warning else "") + escape(said), soft_wrap=True)


def estimate(manifest: dict) -> dict | None:
    """Time and memory of every cell on this device; None for cells that are no language models."""
    if "trainer" in manifest["config"]:
        return None
    # these load jax
    from launch.local import default_workers
    from launch.packs import describe
    from launch.work import pack_size
    from scaling.estimate import estimate_cells

    cells = manifest["cells"]
    return {
        **estimate_cells(cells, default_workers(len(cells))),
        "packing": describe(cells, pack_size("auto")),
    }


def slurm_script(console, found: dict) -> None:
    """What ``scaling launch --on slurm --dry-run`` would submit."""
    console.print(found["script"], markup=False, highlight=False, soft_wrap=True)
    for number, cells in enumerate(found["jobs"]):
        console.print(f"# element {number}: {' '.join(cells)}", markup=False, highlight=False, soft_wrap=True)
    console.print(f"# each runs: {found['worker']}", markup=False, highlight=False, soft_wrap=True)
