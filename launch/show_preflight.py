"""What ``scaling preflight`` prints: the same tables for a terminal and as Markdown."""

from __future__ import annotations

import contextlib
import resource
import sys
import time
from collections.abc import Mapping, Sequence

from rich.console import Console
from rich.markup import escape
from rich.progress import Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from launch.preflight.cache import Cache, versions
from launch.preflight.hardware import Target
from launch.preflight.prices import Prices
from launch.preflight.run import study_totals
from launch.preflight.traffic import KINDS
from launch.show import duration, si


@contextlib.contextmanager
def progress(console: Console):
    """Yields a function that shows what is being compiled: on one line of a terminal, else a line each."""
    if not console.is_terminal:
        yield lambda text: console.print(text, markup=False, soft_wrap=True)
        return
    with Progress(
        TextColumn("{task.description}"), TimeElapsedColumn(), console=console, transient=True
    ) as bar:
        task = bar.add_task("lowering", total=None)
        yield lambda text: bar.update(task, description=escape(text))


def report(
    rows: Sequence[dict], target: Target, prices: Prices, note: str | None, cache: Cache, began: float
) -> dict:
    """Everything that is printed, plain JSON: ``rows`` and what they have in common.

    Args:
      began: when the command began, by ``time.perf_counter``.
    """
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return {
        "target": str(target),
        "certainty": CERTAINTY[target.platform],
        "note": note,
        "rows": list(rows),
        "totals": study_totals(rows, target),
        "prices": {"dated": prices.dated, "currency": prices.currency,
                   "chip_hour": prices.chip_hour.get(target.generation)},
        "versions": versions(),
        "compiled": cache.misses,
        "from_cache": cache.hits,
        "seconds": time.perf_counter() - began,
        "peak_rss_bytes": peak,
    }  # fmt: skip


CERTAINTY = {
    "tpu": "Memory, products, collectives and kernels are read off the program that the TPU compiler made. "
    "What is headed by ~ is an estimate: the slowest of products, memory and network at the chip's published "
    "figures, all at once; no run is faster, most are slower. The last column has nothing at once.",
    "cuda": "Nothing was compiled for these GPUs: the step was lowered for CUDA, and everything headed by ~, "
    "memory and network included, is estimated from shapes and published figures. Less certain than a TPU's.",
}


SHARED = (
    "Cells that differ only in the number of parts of a batch share one compiled program: what a trip of its "
    "loop does is multiplied by the parts."
)


def tables(console: Console, report: Mapping) -> None:
    """Prints a report."""
    for title, columns, lines in (compiled_table(report), network_table(report), estimate_table(report)):
        if not lines:
            continue
        table = Table(title=title, header_style="bold")
        for name in columns:
            table.add_column(name, justify="left" if name in LEFT else "right", no_wrap=name == "fits")
        for line in lines:
            table.add_row(*map(escape, line))
        console.print(table)
    for line in remarks(report):
        console.print(escape(line), soft_wrap=True)


def as_markdown(report: Mapping, study: str) -> str:
    """A report as one Markdown page."""
    out = [f"# Preflight of {study} for {report['target']}", ""]
    for title, columns, lines in (compiled_table(report), network_table(report), estimate_table(report)):
        if lines:
            out += [f"## {title}", "", "| " + " | ".join(columns) + " |"]
            out += ["|" + "|".join("---" if c in LEFT else "---:" for c in columns) + "|"]
            out += ["| " + " | ".join(line) + " |" for line in lines] + [""]
    return "\n".join([*out, *(f"- {line}" for line in remarks(report)), ""])


LEFT = ("slice", "remat", "fits", "bound by")


def _gib(x: float | None) -> str:
    return "-" if x is None else f"{x / 2**30:.2f}"


def _name(row: Mapping) -> list[str]:
    return [str(len(row["cells"])), si(row["params"]), f"{row['layers']}x{row['d_model']}", str(row["batch"])]


def compiled_table(report: Mapping):
    """Where each program fits, and how: by the compiler."""
    columns = ["cells", "N", "shape", "batch", "slice", "mesh", "remat", "micro-batch", "memory GiB", "of",
               "fits", "FLOPs a step", "FLOPs of the program"]  # fmt: skip
    lines = []
    for row in report["rows"]:
        fits = "yes" if row["fits"] else _why_not(row)
        micro = f"{row['rows']} x {row['accumulate']}" if "rows" in row else "-"
        program = row.get("program_flops")
        lines.append(
            [*_name(row), row["target"], row.get("mesh", "-"), row.get("remat", "-"), micro,
             _gib(row.get("needed_bytes")), _gib(row["device_bytes"]), fits, f"{row['flops_per_step']:.3g}",
             "-" if program is None else f"{program * row['devices']:.3g}"]
        )  # fmt: skip
    if "GPU" in report["target"]:
        columns = [f"~{c}" if c in ("memory GiB", "fits", "FLOPs of the program") else c for c in columns]
        return (
            "Lowered for CUDA, not compiled: the fewest GPUs that hold each cell, by estimate",
            columns,
            lines,
        )
    return "By the compiler: the smallest slice that holds each cell", columns, lines


def _why_not(row: Mapping) -> str:
    needed = row.get("needed_bytes")
    if needed is not None and needed > row["device_bytes"]:
        return f"no: {_gib(needed - row['device_bytes'])} GiB too much"
    return "no: " + (row.get("error") or (row["tried"][-1]["why"] if row["tried"] else "not compiled"))


def network_table(report: Mapping):
    """Bytes a step of each kind of collective, on one device."""
    lines = [
        [*_name(row), row["target"], *(si(row["collectives"].get(k, 0)) for k in KINDS)]
        for row in report["rows"]
        if row.get("collectives")
    ]
    by = "By estimate" if "GPU" in report["target"] else "By the compiler"
    title = f"{by}: bytes of collectives a step, on each device"
    return title, ["cells", "N", "shape", "batch", "slice", *KINDS], lines


def estimate_table(report: Mapping):
    """Time and money, all estimated."""
    currency = report["prices"]["currency"]
    columns = ["cells", "N", "shape", "batch", "slice", "steps", "~step", "bound by", "~MFU", "~time",
               "~chip-hours", f"~{currency}", "~step, in turn"]  # fmt: skip
    lines = []
    for row in report["rows"]:
        e = row["estimate"]
        if e is None:
            continue
        money = "-" if e["money"] is None else f"{e['money']:,.0f}"
        days = duration(e["days"] * 86400) if e["days"] < 3 else f"{e['days']:.1f} days"
        lines.append(
            [*_name(row), row["target"], str(row["steps"]), f"{1000 * e['step_seconds']:.0f} ms", e["bound"],
             f"{100 * e['mfu']:.0f} %", days, f"{e['chip_hours']:,.0f}", money,
             f"{1000 * e['in_turn_seconds']:.0f} ms"]
        )  # fmt: skip
    return "Estimates: time and money of all steps of the cells", columns, lines


def remarks(report: Mapping) -> list[str]:
    """The sentences below the tables."""
    totals, prices, rows = report["totals"], report["prices"], report["rows"]
    money = "" if totals["money"] is None else f", ~{totals['money']:,.0f} {prices['currency']}"
    price = f"{prices['chip_hour']:g} {prices['currency']} a chip-hour (list prices of {prices['dated']})"
    out = [
        report["target"],
        f"The study on these slices: ~{totals['chip_hours']:,.0f} chip-hours{money}; ~{totals['days']:.1f} "
        f"days where the target is kept full, ~{totals['longest_days']:.1f} days for the longest cell alone."
        + (f" At {price}." if prices["chip_hour"] else ""),
        report["certainty"],
    ]
    kernels = sorted({k for row in rows for k in row.get("kernels", ())})
    out.append("Pallas kernels in the programs: " + (", ".join(kernels) or "none"))
    tried: dict[tuple, list[str]] = {}
    for row in rows:
        for t in row["tried"]:
            tried.setdefault((si(row["params"]), t["slice"], t["why"]), []).append(str(row["batch"]))
    out += [
        f"Did not fit: {n} on {where}, batch {', '.join(b)}: {why}" for (n, where, why), b in tried.items()
    ]
    if any(r.get("compiled_parts", 0) < r.get("accumulate", 0) for r in rows):
        out.append(SHARED)
    unknown = sum(len(r.get("unknown_loops", ())) for r in rows)
    if unknown:
        out.append(f"{unknown} loops do not say how often they run and count once: estimates are too low.")
    if report["note"]:
        out.append(report["note"][0].upper() + report["note"][1:] + ".")
    made = ", ".join(f"{k} {v}" for k, v in report["versions"].items() if v)
    out.append(
        f"{report['compiled']} programs compiled and {report['from_cache']} found in the cache in "
        f"{duration(report['seconds'])}, with {_gib(report['peak_rss_bytes'])} GiB of host memory at most; "
        f"{made}."
    )
    return out
