"""What the launcher costs a cell, and what it makes of cells that crash.

First a study of many trivial cells is trained twice, by ``scaling.train.train`` in a bare loop of one process
and by one worker of the local engine: the difference, a cell, is the launcher's (claim, heartbeat, outcome,
looking for the next cell). Meanwhile the memory of launcher and worker is read; in the end ``scaling status``
is timed, interpreter and imports included. Then five kinds of crash, ten cells each, and ten healthy ones.

    python benchmarks/launcher.py [--cells 1000] [--each 10] [--write]

``--write`` keeps the figures in benchmarks/results/launcher.md.
"""

from __future__ import annotations

import argparse
import json
import os
import runpy
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "launcher.md"
TESTS = ROOT / "tests"
CRASHING = TESTS / "launch" / "crashing_worker.py"
SCALING = (sys.executable, "-m", "launch.cli")
KINDS = ("import", "memory", "data", "hang", "nan")
WATCHDOG_SECONDS = 4
BARE = """
import json, sys, time
from pathlib import Path
from launch.worker import bind_to_cores, configure_jax
held = bind_to_cores(1)
from scaling.files import CellFolder
from scaling.train import train
configure_jax()
study, stamps = Path(sys.argv[1]), []
for entry in json.loads((study / "manifest.json").read_text())["cells"]:
    train(entry["config"], CellFolder(study, entry["id"]))
    stamps.append(time.time())
print(json.dumps(stamps))
"""


def plan(folder: Path, name: str, cells: int) -> Path:
    """A study of cells that differ in their seed alone: 3,000 parameters, ten steps."""
    corpus, file, study = folder / "corpus", folder / f"{name}.json", folder / name
    corpus.mkdir(exist_ok=True)
    rng = np.random.default_rng(0)
    for i in range(20):
        (corpus / f"{i}.txt").write_bytes(rng.integers(97, 107, 4000, dtype=np.uint8).tobytes())
    tiny_study = runpy.run_path(str(TESTS / "tiny_study.py"))["tiny_study"]
    cells = [{"params": 3e3, "tokens": 640, "seed": s} for s in range(cells)]
    grid = {"kind": "list", "cells": cells, "min_steps": 5, "tolerance": 0.5}
    config = tiny_study(corpus, batch_tokens=64, name=name, grid=grid, eval={"sequences": 8})
    file.write_text(json.dumps(config))
    subprocess.run(
        [*SCALING, "plan", str(file), "--study", str(study), "--no-estimate"],
        check=True,
        stdout=subprocess.DEVNULL,
    )
    return study


def resident(pid: int) -> float:
    """Megabytes of a process."""
    try:
        words = Path(f"/proc/{pid}/status").read_text().split()
        return int(words[words.index("VmRSS:") + 1]) / 1e3
    except (OSError, ValueError):
        return 0.0


def overhead(folder: Path, cells: int) -> dict:
    """Seconds a cell, bare and launched; memory over time; the time of ``scaling status``."""
    from launch import local
    from scaling.attempts import attempts_of
    from scaling.files import CellFolder

    bare, launched = plan(folder, "bare", cells), plan(folder, "launched", cells)
    out = subprocess.run(
        [sys.executable, "-c", BARE, str(bare)], check=True, capture_output=True, text=True, cwd=ROOT
    )
    bare_stamps = json.loads(out.stdout.splitlines()[-1])
    engine, memory = local.Local(), []

    def on_poll() -> None:
        for job in engine.jobs:
            memory.append((time.time(), resident(os.getpid()), resident(int(job))))

    code = local.run_study(launched, 1, [], on_poll, engine=engine)
    entries = json.loads((launched / "manifest.json").read_text())["cells"]
    ends = sorted(attempts_of(CellFolder(launched, e["id"]))[-1]["ended"] for e in entries)
    began = time.perf_counter()
    subprocess.run([*SCALING, "status", str(launched)], check=True, stdout=subprocess.DEVNULL, cwd=ROOT)
    seconds = time.perf_counter() - began
    half = len(memory) // 2
    # the first cells, in which programs are compiled or read, are left out on both sides
    per = [1e3 * np.diff(s[cells // 20 :]) for s in (bare_stamps, ends)]
    return {
        "cells": cells,
        "exit code": code,
        "bare, ms a cell (mean; median)": f"{per[0].mean():.0f}; {statistics.median(per[0]):.0f}",
        "launched, ms a cell (mean; median)": f"{per[1].mean():.0f}; {statistics.median(per[1]):.0f}",
        "overhead, ms a cell (of means; of medians)": (
            f"{per[1].mean() - per[0].mean():.1f}; {np.median(per[1]) - np.median(per[0]):.1f}"
        ),
        "launcher's memory, MB (middle; end)": f"{memory[half][1]:.0f}; {memory[-2][1]:.0f}",
        "worker's memory, MB (middle; end)": f"{memory[half][2]:.0f}; {memory[-2][2]:.0f}",
        "`scaling status`, s": round(seconds, 2),
        "load of the machine": round(os.getloadavg()[0], 1),
    }


def crashes(folder: Path, each: int) -> list[dict]:
    """Outcomes of cells by the kind of their crash, and whether each was tried as often as it should be."""
    from launch import local, show_status
    from launch.output import console
    from launch.status import study_status
    from scaling.files import CellFolder

    kinds = (*KINDS, "healthy")
    study = plan(folder, "crashing", each * len(kinds))
    words = [f"{k}={','.join(str(i * each + j) for j in range(each))}" for i, k in enumerate(KINDS)]
    engine = local.Local(worker=(sys.executable, str(CRASHING), *words, "--"))
    began = time.perf_counter()
    options = ["--watchdog-seconds", str(WATCHDOG_SECONDS)]
    code = local.run_study(study, 2, options, lambda: None, engine=engine)
    seconds = time.perf_counter() - began
    status = study_status(study)
    console.print(show_status.table(study, status, True))
    seeds = {
        e["id"]: e["config"]["train"]["seed"]
        for e in json.loads((study / "manifest.json").read_text())["cells"]
    }
    rows = []
    for i, kind in enumerate(kinds):
        mine = [r for r in status["cells"] if seeds[r["cell"]] // each == i]
        rows.append(
            {
                "kind": kind,
                "cells": len(mine),
                "states": ", ".join(sorted({r["state"] for r in mine})),
                "attempts each": ", ".join(sorted({str(r["attempts"]) for r in mine})),
                "failures each": ", ".join(sorted({str(r["failures"]) for r in mine})),
                "with a finished record": sum(
                    CellFolder(study, r["cell"]).result.exists() and r["state"] == "finished" for r in mine
                ),
            }
        )
    return [*rows, {"kind": f"(exit code {code}, {seconds:.0f} s with 2 workers)"}]


def as_table(rows: list[dict]) -> str:
    names = list(rows[0])
    lines = ["| " + " | ".join(names) + " |", "|" + "---|" * len(names)]
    return "\n".join(lines + ["| " + " | ".join(str(r.get(n, "")) for n in names) + " |" for r in rows])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cells", type=int, default=1000)
    parser.add_argument("--each", type=int, default=10, help="cells of each kind of crash")
    parser.add_argument("--write", action="store_true", help=f"keep the figures in {RESULTS.name}")
    args = parser.parse_args()
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    os.environ["PYTHONPATH"] = str(ROOT)
    sys.path.insert(0, str(ROOT))
    with tempfile.TemporaryDirectory() as name:
        figures = overhead(Path(name), args.cells) if args.cells else {}
        rows = [{"": k, "figure": v} for k, v in figures.items()]
        first = as_table(rows) if rows else "(not run)"
        print(first, flush=True)
        second = as_table(crashes(Path(name), args.each)) if args.each else "(not run)"
    print(second)
    if args.write:
        import jax
        from turns import device

        words = __doc__.split("\n\n")[1].replace("\n", " ")
        how = f"`python benchmarks/launcher.py --cells {args.cells} --each {args.each} --write`"
        where = f"{device()}, {os.cpu_count()} cores, jax {jax.__version__}, {time.strftime('%Y-%m-%d')}"
        text = f"# The launcher\n\n{how}\n\n{words}\n\n{where}.\n\n{first}\n\n"
        text += f"Crashes, `--watchdog-seconds {WATCHDOG_SECONDS}`:\n\n{second}\n"
        RESULTS.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
