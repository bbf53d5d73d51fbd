"""Preflight of ``experiments/isoflop.py`` for v5e-256 and v5p-128: cold, then from the cache, as one page.

Each run is a process of its own, with a cache folder that the first finds empty. Needs libtpu (the extra
``tpu``) and takes about an hour and a half on two cores.

    python benchmarks/preflight_isoflop.py [--targets v5e-256 v5p-128] [--out benchmarks/results]
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from launch.show_preflight import as_markdown

CONFIG = "experiments/isoflop.py"
CODE = "from launch.cli import main; main()"


def run(target: str, cache: Path) -> dict:
    """One preflight: the report, the wall time of its whole process and the load before and after."""
    before, began = os.getloadavg()[0], time.perf_counter()
    command = [
        sys.executable,
        "-c",
        CODE,
        "preflight",
        CONFIG,
        "--target",
        target,
        "--cache",
        str(cache),
        "--json",
    ]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode not in (0, 1):
        sys.exit(f"preflight for {target} ended with code {done.returncode}")
    wall = time.perf_counter() - began
    return {"report": json.loads(done.stdout), "wall_seconds": wall, "load": [before, os.getloadavg()[0]]}


def measured(name: str, found: dict) -> str:
    """One line on what a run took."""
    report = found["report"]
    return (
        f"| {report['target'].partition(':')[0]} | {name} | {report['compiled']} | {report['from_cache']} | "
        f"{found['wall_seconds'] / 60:.1f} min | {report['peak_rss_bytes'] / 2**30:.1f} GiB | "
        f"{found['load'][0]:.1f} to {found['load'][1]:.1f} |"
    )


def page(found: dict[str, dict]) -> str:
    """The page: what the runs took, then the tables of the runs from the cache."""
    lines = [
        f"# Preflight of {CONFIG}",
        "",
        f"`python benchmarks/preflight_isoflop.py` on a {os.cpu_count()}-core CPU machine that others used "
        "too. Cold: with an empty cache; cache: the same command again.",
        "",
        "| target | run | compiled | from cache | wall | peak host memory | load |",
        "|---|---|---:|---:|---:|---:|---|",
    ]
    lines += [measured(name, run) for runs in found.values() for name, run in runs.items()]
    for runs in found.values():
        text = as_markdown(list(runs.values())[-1]["report"], CONFIG)
        lines += ["", text.replace("## ", "### ").replace("# Preflight", "## Preflight", 1).rstrip()]
    return "\n".join([*lines, ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--targets", nargs="+", default=["v5e-256", "v5p-128"])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args()
    found: dict[str, dict] = {}
    with tempfile.TemporaryDirectory() as folder:
        for target in args.targets:
            cache = Path(folder) / target
            found[target] = {"cold": run(target, cache), "cache": run(target, cache)}
    (args.out / "preflight_isoflop.json").write_text(json.dumps(found, indent=1) + "\n")
    (args.out / "preflight_isoflop.md").write_text(page(found))


if __name__ == "__main__":
    main()
