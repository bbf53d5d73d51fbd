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
import turns

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


ABOUT = """# Kernels

`python benchmarks/kernels.py --write`

A section says on which device it ran. Tables of what was compiled ahead of time need none: they are what
the compilers for TPU (libtpu) and for H100 (ptxas) say of registers, spills, temporary memory and static
schedules, and the bytes that the kernels move by their own account. Where no section names a TPU or a GPU as
the device that it ran on, no kernel was timed there. Ratios are medians over turns of both sides in one
process; `load` is how many processes ran or waited on the machine."""


def render(results: dict) -> str:
    parts = [ABOUT]
    for name, one in sorted(results.items()):
        where = (
            f"{one['device']}, {one['cores']} cores, jax {one['jax']}, load at the start {one['load']:.1f}."
        )
        parts += [f"## {name}", f"{one['about']} {where}"]
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
    for name in args.only or known:
        load = os.getloadavg()[0]
        tables = {title: rows for title, rows in known[name].measure(args.quick).items() if rows}
        if not tables:  # what another machine or environment measured stays
            continue
        platform = jax.default_backend()
        key = name if platform == "cpu" else f"{name} on {platform}"
        about = " ".join(known[name].__doc__.split("\n\n")[0].split())
        found = {"about": about, "device": turns.device(), "jax": jax.__version__, "cores": os.cpu_count()}
        found |= {"load": load, "tables": tables}
        print(render({key: found}), flush=True)
        if args.write:
            results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
            results[key] = found
            RESULTS.write_text(json.dumps(results, indent=1) + "\n")
            RESULTS.with_suffix(".md").write_text(render(results))


if __name__ == "__main__":
    main()
