"""A study on a real Slurm of two nodes while everything that can break is broken, against an undisturbed one.

Cells of one process and a cell of two nodes, in one study on a small tmpfs. Events hit it, each time the kind
that has hit least often and finds something: SIGKILL of a worker and of one process of the cell of two,
``scontrol requeue``, preemption by a job of high priority, a time limit, slurmd and slurmctld killed and
started again, a full disk, a torn checkpoint, a second launcher. The clock of the workers of the second node
is an hour ahead all the while. The same study then runs without events, and the records are compared to the
byte. A launcher that ends is started again, as its message asks.

    python benchmarks/chaos.py [--events 30] [--cells 9] [--tokens 6e5] [--seconds 2700] [--write]

Needs root and Debian's Slurm (tests/slurm_cluster.py). ``--write`` keeps benchmarks/results/chaos.md.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import json
import os
import platform
import random
import runpy
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from launch.planning import manifest_of
from scaling.attempts import attempts_of
from scaling.files import CellFolder, read_json
from scaling.grid import write_manifest
from scaling.study import validate_study

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "chaos.md"
TESTS = ROOT / "tests"
files = runpy.run_path(str(TESTS / "kills.py"))["files"]
tiny_study = runpy.run_path(str(TESTS / "tiny_study.py"))["tiny_study"]
slurm_cluster = runpy.run_path(str(TESTS / "slurm_cluster.py"))
Cluster, missing = slurm_cluster["Cluster"], slurm_cluster["missing"]

DISK_BYTES = 96 << 20
SKEW_SECONDS = 3600
SKEWED = f"""import os, time
if os.environ.get("SLURMD_NODENAME", "").endswith("x2"):
    own = time.time
    time.time = lambda: own() + {SKEW_SECONDS}
"""
PAUSE_SECONDS = 6.0
"""Between events."""
PAIR_SHARE = 0.1
"""Tokens of the cell of two nodes, of another's: its steps take many times as long on one machine."""


class Study:
    """A planned study, its launchers and what is under way."""

    def __init__(self, cluster: Cluster, folder: Path, manifest: dict, aside: Path):
        self.cluster, self.path, self.aside = cluster, folder, aside
        write_manifest(folder, manifest, False)
        entries = sorted(manifest["cells"], key=lambda entry: entry["config"]["train"]["steps"])
        names = [entry["id"] for entry in entries]
        self.pair, self.singles = names[0], names[1:]
        self.cells = {name: CellFolder(folder, name) for name in names}
        self.launchers: dict[str, subprocess.Popen] = {}
        self.ends: collections.Counter = collections.Counter()

    def launch(self, which: str) -> None:
        """Starts a launcher for the cell of two nodes (``pair``) or for the others."""
        of_pair = which == "pair"
        settings = self.aside / f"{self.path.name}-{which}.toml"
        setup = f"export PYTHONPATH={self.aside}/skewed:$PYTHONPATH"
        settings.write_text(
            f'[slurm]\npartition = "low"\ntime = 30\npoll_seconds = 2\nstop_seconds = 60\n'
            f'setup = ["{setup}"]\n'
            f"nodes = {2 if of_pair else 1}\n"
        )
        command = [sys.executable, "-m", "launch.cli", "launch", self.path, "--on", "slurm"]
        command += ["--settings", settings, "--checkpoint-steps", "50", "--max-failures", "4", "--json"]
        for name in [self.pair] if of_pair else self.singles:
            command += ["--cell", name]
        with open(self.aside / f"{self.path.name}-{which}.log", "ab") as log:
            self.launchers[which] = subprocess.Popen(
                command, env={**self.cluster.environment, "PYTHONPATH": str(ROOT)}, stdout=log, stderr=log
            )

    def look(self) -> None:
        """Starts launchers again that have ended before their cells."""
        for which, process in list(self.launchers.items()):
            if process.poll() is not None:
                del self.launchers[which]
                self.ends[process.returncode] += 1
                mine = [self.pair] if which == "pair" else self.singles
                if not which.startswith("second") and not all(self.cells[n].result.exists() for n in mine):
                    self.launch(which)

    def done(self) -> bool:
        return all(folder.result.exists() for folder in self.cells.values())

    def under_way(self, names) -> list[tuple[CellFolder, dict]]:
        """Cells that train, each with its attempt."""
        found = []
        for name in names:
            with contextlib.suppress(OSError, ValueError, IndexError, KeyError, TypeError):
                last = attempts_of(self.cells[name])[-1]
                if last["outcome"] is None and Path(f"/proc/{last['pid']}").exists():
                    found.append((self.cells[name], last))
        return found

    def jobs_of(self, names) -> list[str]:
        running = [job for job, state in self.cluster.jobs().items() if state == "RUNNING"]
        return [a["job"].split()[-1] for _, a in self.under_way(names) if a["job"].split()[-1] in running]


class Chaos:
    """The events; each returns whether it could hit anything."""

    def __init__(self, cluster: Cluster, study: Study, seed: int = 0):
        self.cluster, self.study, self.random = cluster, study, random.Random(seed)

    def pick(self, names):
        found = self.study.under_way(names)
        return self.random.choice(found) if found else None

    def sigkill_of_a_worker(self) -> bool:
        hit = self.pick(self.study.singles)
        return hit is not None and kill(hit[1]["pid"])

    def sigkill_of_one_process_of_two(self) -> bool:
        hit = self.pick([self.study.pair])
        return hit is not None and any(kill(pid) for pid in peers_of(hit[1]["pid"]))

    def requeue(self) -> bool:
        jobs = self.study.jobs_of(self.study.cells)
        return bool(jobs) and self.says("scontrol", "requeue", self.random.choice(jobs))

    def preemption(self) -> bool:
        wrap = ("--wrap", "sleep 3", "--output", "/dev/null", "--exclusive")
        return bool(self.study.jobs_of(self.study.cells)) and self.says("sbatch", "--partition=high", *wrap)

    def time_limit(self) -> bool:
        jobs = self.study.jobs_of(self.study.cells)
        if not jobs:
            return False
        job = self.random.choice(jobs)
        elapsed = int(self.cluster.command("squeue", "-h", "-j", job, "-o", "%M").split(":")[-2])
        hit = self.says("scontrol", "update", f"JobId={job}", f"TimeLimit={elapsed + 1}")
        time.sleep(35)  # Slurm looks at the limits of jobs twice a minute
        self.says("scontrol", "update", f"JobId={job}", "TimeLimit=30")  # of its next run
        return hit

    def slurmd_killed_and_restarted(self) -> bool:
        if self.pick(self.study.cells) is None:
            return False
        node = self.random.choice(self.cluster.nodes)
        self.cluster.kill(node)
        time.sleep(1)
        self.cluster.start_node(node)
        return True

    def slurmctld_killed_and_restarted(self) -> bool:
        if self.pick(self.study.cells) is None:
            return False
        self.cluster.kill("slurmctld")
        time.sleep(1)
        self.cluster.start_controller()
        return True

    def full_disk(self) -> bool:
        if self.pick(self.study.cells) is None:
            return False
        filler = self.study.path.parent / "filler"
        with contextlib.suppress(OSError), open(filler, "wb", buffering=0) as file:
            while True:
                file.write(bytes(1 << 16))
        time.sleep(5)
        filler.unlink()
        return True

    def torn_checkpoint(self) -> bool:
        for folder, attempt in self.study.under_way(self.study.singles):
            steps = [p for p in folder.checkpoints.glob("[0-9]*") if p.name.isdigit()]
            if len(steps) < 2:
                continue
            kill(attempt["pid"])
            newest = max(steps, key=lambda p: int(p.name))
            largest = max((p for p in newest.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
            os.truncate(largest, largest.stat().st_size // 2)
            return True
        return False

    def second_launcher(self) -> bool:
        if "second" in self.study.launchers or not self.study.under_way(self.study.singles):
            return False
        self.study.launch("second")
        return True

    def says(self, *command: str) -> bool:
        return subprocess.run(command, env=self.cluster.environment, capture_output=True).returncode == 0

    def all(self) -> list:
        return [
            self.sigkill_of_a_worker, self.requeue, self.sigkill_of_one_process_of_two, self.preemption,
            self.second_launcher, self.torn_checkpoint, self.slurmd_killed_and_restarted, self.time_limit,
            self.slurmctld_killed_and_restarted, self.full_disk,
        ]  # fmt: skip


def kill(pid: int) -> bool:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
        return True
    return False


def peers_of(pid: int) -> list[int]:
    """Workers with the same command line but for their parent's id."""
    own, found = words_of(pid), []
    for folder in Path("/proc").glob("[0-9]*"):
        if own and words_of(folder.name)[:-1] == own[:-1] and folder.name != str(pid):
            found.append(int(folder.name))
    return found


def words_of(pid) -> list[str]:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().decode().rstrip("\0").split("\0")
    except OSError:
        return []


@contextlib.contextmanager
def small_disk(folder: Path):
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs", folder], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


def planned(folder: Path, cells: int, tokens: float) -> dict:
    """A manifest of cells that differ in their seed alone, but for the one of two nodes, which is short."""
    corpus = folder / "corpus"
    corpus.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for i in range(40):
        (corpus / f"{i}.txt").write_bytes(rng.integers(97, 107, 40000, dtype=np.uint8).tobytes())
    each = [tokens * PAIR_SHARE, *[tokens] * (cells - 1)]
    grid = [{"params": 3e3, "tokens": d, "seed": s} for s, d in enumerate(each)]
    manifest = manifest_of(
        validate_study(tiny_study(corpus, grid={"kind": "list", "cells": grid, "min_steps": 10}))
    )
    assert len(manifest["cells"]) == cells, manifest["dropped"]
    return manifest


def to_the_end(study: Study, seconds: float, events=(), wanted: int = 0) -> collections.Counter:
    """Launches and waits, with an event every so often; what hit, by kind."""
    for which in ("pair", "others"):
        study.launch(which)
    hits: collections.Counter = collections.Counter()
    end, following = time.monotonic() + seconds, time.monotonic() + 15
    while not study.done():
        assert time.monotonic() < end, f"not done within {seconds} s; events so far: {dict(hits)}"
        time.sleep(0.5)
        study.look()
        if sum(hits.values()) < wanted and time.monotonic() > following:
            for event in sorted(events, key=lambda e: hits[e.__name__]):  # the rarest that finds something
                if event():
                    hits[event.__name__] += 1
                    print(f"{time.strftime('%H:%M:%S')} {event.__name__}", flush=True)
                    following = time.monotonic() + PAUSE_SECONDS
                    break
    for process in study.launchers.values():
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(60)
        process.terminate()
    return hits


def held_seconds(study: Study) -> tuple[float, float]:
    """Device-seconds that attempts held (by their heartbeats where they ended without a word), and those that
    the results stand on."""
    held = used = 0.0
    for folder in study.cells.values():
        used += read_json(folder.timing)["device_seconds"]
        for a in attempts_of(folder):
            skew = SKEW_SECONDS if a.get("ended") and a["ended"] - a["began"] > SKEW_SECONDS / 2 else 0
            seconds = a["ended"] - a["began"] - skew if a.get("ended") else a["beat"] * a["heartbeat"]
            held += a.get("devices", 1) * max(0.0, seconds)
    return held, used


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--events", type=int, default=30)
    parser.add_argument("--cells", type=int, default=9)
    parser.add_argument("--tokens", type=float, default=6e5)
    parser.add_argument("--seconds", type=float, default=2700.0)
    parser.add_argument("--write", action="store_true")
    args = parser.parse_args()
    if why := missing():
        sys.exit(f"error: {why}")
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    with tempfile.TemporaryDirectory(prefix="chaos-") as name:
        aside = Path(name)
        (aside / "skewed").mkdir()
        (aside / "skewed" / "sitecustomize.py").write_text(SKEWED)
        manifest = planned(aside, args.cells, args.tokens)
        with small_disk(aside / "disk") as disk, Cluster() as cluster:
            broken = Study(cluster, disk / "broken", manifest, aside)
            chaos, began = Chaos(cluster, broken), time.monotonic()
            hits = to_the_end(broken, args.seconds, chaos.all(), args.events)
            took = time.monotonic() - began
            whole, began = Study(cluster, aside / "whole", manifest, aside), time.monotonic()
            to_the_end(whole, args.seconds)
            undisturbed = time.monotonic() - began
            report = judge(broken, whole, hits, took, undisturbed)
    print(json.dumps(report, indent=1))
    if args.write:
        RESULTS.write_text(page(report, args))
    good = report["same records"] == report["cells"] and not report["trained twice to the end"]
    return 0 if good and report["events"] >= args.events else 1


def judge(broken: Study, whole: Study, hits: collections.Counter, took: float, undisturbed: float) -> dict:
    """What came of it."""
    same = twice = skewed = 0
    ends: collections.Counter = collections.Counter()
    for name, folder in broken.cells.items():
        same += files(folder) == files(whole.cells[name])
        attempts = attempts_of(folder)
        ends.update(a["outcome"] for a in attempts)
        twice += sum(a["outcome"] == "finished" for a in attempts) > 1
        skewed += sum(a["began"] > time.time() + SKEW_SECONDS / 2 for a in attempts)
    held, used = held_seconds(broken)
    held_whole, used_whole = held_seconds(whole)
    return {
        "events": sum(hits.values()),
        "by kind": dict(hits),
        "cells": len(broken.cells),
        "same records": same,
        "trained twice to the end": twice,
        "attempts": dict(ends),
        "attempts by a clock an hour ahead": skewed,
        "launchers' exit codes": {str(code): n for code, n in broken.ends.items()},
        "seconds": round(took),
        "seconds undisturbed": round(undisturbed),
        "device-seconds held": round(held),
        "device-seconds in results": round(used),
        "wasted": round(1 - used / held, 3),
        "wasted undisturbed": round(1 - used_whole / held_whole, 3),
    }


def page(report: dict, args) -> str:
    import jax
    from turns import device

    slurmctld = shutil.which("slurmctld", path=slurm_cluster["SEARCHED"])
    version = subprocess.run([slurmctld, "-V"], capture_output=True, text=True).stdout.strip()
    rows = "".join(f"| {key} | {value} |\n" for key, value in report.items() if key != "by kind")
    kinds = "".join(f"| {k.replace('_', ' ')} | {n} |\n" for k, n in report["by kind"].items())
    return (
        "# Chaos\n\n"
        f"`python benchmarks/chaos.py --events {args.events} --cells {args.cells} --tokens {args.tokens:g} "
        "--write`: a study on a Slurm of two emulated nodes of two CPUs on one machine; one cell, with a "
        "tenth of the tokens, is of two nodes. The same records: `result.json`, `metrics.jsonl` and "
        "`config.json` equal to the byte with the undisturbed run. Held: from each claim to its end, start "
        "and compilation included; in results: the training seconds that the final records stand on. A "
        "launcher that met the full disk ends with exit code 2 and is started again.\n\n"
        f"{device()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.0f}, {version}, "
        f"Python {platform.python_version()}, jax {jax.__version__}, {time.strftime('%Y-%m-%d')}.\n\n"
        f"| | |\n|---|---|\n{rows}\n| event | hits |\n|---|---|\n{kinds}"
    )


if __name__ == "__main__":
    sys.exit(main())
