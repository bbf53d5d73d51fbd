"""What the launcher costs a cell, and what it makes of cells that crash.

First a study of many trivial cells is trained twice, by ``scaling.train.train`` in a bare loop of one process
and by one worker of the local engine: the difference, a cell, is the launcher's (claim, heartbeat, outcome,
looking for the next cell). Both are on one core and run by turns of a few seconds, the other stopped, so that
a load on the machine meets them alike; each two neighbouring turns give a difference of medians. Meanwhile
the memory of launcher and worker is read; in the end ``scaling status`` is timed, interpreter and imports
included. Then five kinds of crash, ten cells each, and ten healthy ones.

    python benchmarks/launcher.py [--cells 1000] [--each 10] [--write]

``--write`` keeps the figures in benchmarks/results/launcher.md.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import runpy
import signal
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
TURN_SECONDS = 3.0
LEAST_CELLS = 4
"""That end in a turn, for its median to count."""
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


class Turns:
    """Two processes on one core, of which one runs at a time.

    Attributes:
      log: (side, began, ended) of each turn, by the wall clock.
    """

    def __init__(self, seconds: float = TURN_SECONDS):
        self.seconds, self.log = seconds, []
        self.side, self.began = None, 0.0

    def look(self, pids: dict[str, int]) -> None:
        """Passes the turn on when it is over. ``pids``: of the sides that have not ended."""
        now = time.time()
        if self.side in pids and now - self.began < self.seconds:
            return
        if self.side is not None:
            self.log.append((self.side, self.began, now))
        self.side = next((side for side in pids if side != self.side), self.side)
        for side, pid in pids.items():
            os.kill(pid, signal.SIGCONT if side == self.side else signal.SIGSTOP)
        self.began = time.time()

    def differences(self, ends: dict[str, list[float]], first: str, second: str) -> tuple[list, list, list]:
        """Medians of each two neighbouring turns, and their differences.

        Args:
          ends: when each cell of a side was done. A cell that a turn's beginning cut is left out.

        Returns:
          Three lists, seconds a cell: of ``first``, of ``second``, ``second`` less ``first``.
        """
        medians = []
        for side, began, ended in self.log:
            mine = [t for t in ends[side] if began <= t < ended]
            if len(mine) > LEAST_CELLS:
                medians.append((side, statistics.median(np.diff(mine))))
        pairs = [dict(two) for two in itertools.pairwise(medians) if len(dict(two)) == 2]
        return [p[first] for p in pairs], [p[second] for p in pairs], [p[second] - p[first] for p in pairs]


def overhead(folder: Path, cells: int) -> dict:
    """Milliseconds a cell, bare and launched; memory over time; the time of ``scaling status``."""
    from launch import local
    from scaling.attempts import attempts_of
    from scaling.files import CellFolder

    studies = {side: plan(folder, side, cells) for side in ("bare", "launched")}
    engine, memory, turns, loads = local.Local(), [], Turns(), []
    everywhere = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {max(everywhere)})  # both sides inherit it
    bare = subprocess.Popen(
        [sys.executable, "-c", BARE, str(studies["bare"])], stdout=subprocess.PIPE, cwd=ROOT
    )

    def on_poll() -> None:
        os.sched_setaffinity(0, everywhere)
        pids = {"bare": bare.pid} if bare.poll() is None else {}
        for job in engine.jobs:
            memory.append((resident(os.getpid()), resident(int(job))))
            pids["launched"] = int(job)
        loads.append(os.getloadavg()[0])
        turns.look(pids)

    try:
        code = local.run_study(studies["launched"], 1, [], on_poll, engine=engine)
        bare.send_signal(signal.SIGCONT)
        stamps = json.loads(bare.communicate()[0].splitlines()[-1])
    finally:
        bare.kill()
    entries = json.loads((studies["launched"] / "manifest.json").read_text())["cells"]
    folders = [CellFolder(studies["launched"], e["id"]) for e in entries]
    ends = {"bare": stamps, "launched": sorted(attempts_of(f)[-1]["ended"] for f in folders)}
    # the first cells, in which programs are compiled or read, are left out on both sides
    ends = {side: times[cells // 20 :] for side, times in ends.items()}
    began = time.perf_counter()
    command = [*SCALING, "status", str(studies["launched"])]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, cwd=ROOT)
    seconds = time.perf_counter() - began
    of_bare, of_launched, differences = ([1e3 * x for x in xs] for xs in turns.differences(ends, *studies))
    low, high = np.percentile(differences, [25, 75])
    half = len(memory) // 2
    return {
        "cells": cells,
        "exit code": code,
        "pairs of turns": len(differences),
        "bare, ms a cell (median of turns)": round(statistics.median(of_bare)),
        "launched, ms a cell (median of turns)": round(statistics.median(of_launched)),
        "overhead, ms a cell (median of differences; quartiles)": (
            f"{statistics.median(differences):.1f}; {low:.1f} to {high:.1f}"
        ),
        "launcher's memory, MB (middle; end)": f"{memory[half][0]:.0f}; {memory[-2][0]:.0f}",
        "worker's memory, MB (middle; end)": f"{memory[half][1]:.0f}; {memory[-2][1]:.0f}",
        "`scaling status`, s": round(seconds, 2),
        "load of the machine (least; median; most)": (
            f"{min(loads):.1f}; {statistics.median(loads):.1f}; {max(loads):.1f}"
        ),
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
