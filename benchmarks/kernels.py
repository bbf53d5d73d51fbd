"""Kernels on the device at hand and compiled for those that are not: one module a kernel, one report.

Each ``benchmarks/kernel_<name>.py`` is a section: its ``measure(quick)`` returns {title: rows of one form},
and no table where this machine cannot fill it.

    python benchmarks/kernels.py [--only attention] [--quick] [--write]

``--write`` puts the tables into benchmarks/results/kernels.json, beside those of other sections and other
devices, and renders kernels.md from all of them.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
from pathlib import Path

os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # compiling only: no device to guard

import jax

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "kernels.json"


def sections() -> dict:
    """The modules by name."""
    found = {}
    for path in sorted(HERE.glob("kernel_*.py")):
        spec = importlib.util.spec_from_file_location(path.stem, path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        found[path.stem.removeprefix("kernel_")] = module
    return found


def table(rows: list[dict]) -> str:
    """Rows as Markdown; a cell is empty where a row lacks the column."""
    head = list(dict.fromkeys(name for row in rows for name in row))
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for row in rows:
        cells = ("" if row.get(name) is None else str(row[name]) for name in head)
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def render(results: dict) -> str:
    parts = ["# Kernels", "`python benchmarks/kernels.py --write`"]
    for key, one in sorted(results.items()):
        parts.append(
            f"## {key}\n\njax {one['jax']}, {one['cores']} cores, load at the start {one['load']:.1f}."
        )
        parts += [f"{title}:\n\n{table(rows)}" for title, rows in one["tables"].items()]
    return "\n\n".join(parts) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", action="append", help="a section; may be repeated")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--write", action="store_true", help="into benchmarks/results/kernels.json and .md")
    args = parser.parse_args()
    known = sections()
    unknown = set(args.only or ()) - set(known)
    if unknown:
        raise SystemExit(f"--only {', '.join(sorted(unknown))}: the sections are {', '.join(known)}")
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for name in args.only or known:
        device = jax.devices()[0].device_kind
        load = os.getloadavg()[0]
        tables = {title: rows for title, rows in known[name].measure(args.quick).items() if rows}
        if not tables:  # what another machine or environment measured stays
            continue
        key = f"{name} on {device}"
        results[key] = {"jax": jax.__version__, "cores": os.cpu_count(), "load": load, "tables": tables}
        print(render({key: results[key]}), flush=True)
        if args.write:
            RESULTS.write_text(json.dumps(results, indent=1) + "\n")
            RESULTS.with_suffix(".md").write_text(render(results))


if __name__ == "__main__":
    main()
