"""The engine of this machine: worker processes over its cores or its GPUs, as many as its memory holds."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from launch.engine import Ended, Group, prepare, run_to_the_end, settle
from scaling.attempts import Budgets
from scaling.claims import of_process
from scaling.flops import memory_bytes

WORKER = (sys.executable, "-m", "launch.worker")
MOST_WORDS = 1 << 16
"""Bytes of a worker's stderr that are looked at: its end."""
GRACE_SECONDS = 20.0
"""After SIGTERM, before SIGKILL: time for a checkpoint."""
PROCESS_BYTES = 0.5e9
"""What a worker takes on a CPU beside its cell: JAX, its programs and the data's index."""
MEMORY_SHARE = 0.8
"""Of the memory that is free, for workers."""


class Local:
    """Worker processes of this machine.

    XLA's CPU backend splits its sums by the number of cores it sees, so that the last bits of a
    result depend on it: one core a worker, by default, gives the same numbers on every machine
    whatever the number of workers. With several GPUs each worker has one.

    Args:
      cores: CPU cores that each worker is bound to (without an accelerator).
      gpus: names for CUDA_VISIBLE_DEVICES, given to workers in turn; none: they see all.
      worker: the command of a worker.
    """

    def __init__(self, cores: int = 1, gpus: tuple[str, ...] = (), worker: tuple[str, ...] = WORKER):
        self.cores, self.gpus, self.worker = cores, gpus, worker
        self.jobs: dict[str, tuple] = {}

    every = 0.3

    def submit(self, groups: Sequence[Group]) -> list[str]:
        return [self.start(group) for group in groups]

    def start(self, group: Group) -> str:
        """Starts one worker; returns its process id."""
        command = [*self.worker, *group.arguments(), "--parent", str(os.getpid())]
        environment, gpu = dict(os.environ), None
        if self.gpus:
            used = [job[3] for job in self.jobs.values()]
            gpu = min(self.gpus, key=used.count)
            environment["CUDA_VISIBLE_DEVICES"] = gpu
        elif not has_accelerator():
            command += ["--cores", str(self.cores)]
        words = tempfile.TemporaryFile()  # noqa: SIM115 (read after the process has ended; not on the study's disk)
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=words, env=environment
        )
        self.jobs[str(process.pid)] = (process, words, group, gpu, oom_kills())
        return str(process.pid)

    def poll(self, job: str) -> Ended | None:
        process, words, group, _, ooms = self.jobs[job]
        if process.poll() is None:
            return None
        del self.jobs[job]
        with words:
            words.seek(max(0, words.seek(0, os.SEEK_END) - MOST_WORDS))
            ended = Ended(process.returncode, words.read().decode(errors="replace"))
        if ended.code == 0:
            return ended
        settled = settle(group, of_process(process.pid), ended, oom_kills() > ooms)
        return Ended(ended.code, ended.words, settled)

    def cancel(self, jobs: Sequence[str]) -> None:
        jobs = [job for job in jobs if job in self.jobs]
        for job in jobs:
            self.jobs[job][0].terminate()
        end = time.monotonic() + GRACE_SECONDS
        for job in jobs:
            process = self.jobs[job][0]
            try:
                process.wait(max(0.0, end - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            self.poll(job)


def oom_kills() -> int:
    """Processes that the kernel of this machine has killed for their memory; 0 where it does not tell."""
    try:
        found = re.search(r"^oom_kill (\d+)$", Path("/proc/vmstat").read_text(), re.MULTILINE)
    except OSError:
        return 0
    return int(found.group(1)) if found else 0


def has_accelerator() -> bool:
    """Whether a GPU or TPU is here to be used; asks no driver, so that no process claims it."""
    if os.environ.get("JAX_PLATFORMS", "") == "cpu":
        return False
    patterns = ("nvidia[0-9]*", "accel*", "vfio/[0-9]*")
    return any(any(Path("/dev").glob(p)) for p in patterns)


def visible_gpus() -> tuple[str, ...]:
    """The NVIDIA GPUs that workers may have, as CUDA_VISIBLE_DEVICES names them."""
    if os.environ.get("JAX_PLATFORMS", "") == "cpu":
        return ()
    said = os.environ.get("CUDA_VISIBLE_DEVICES")
    if said is not None:
        return tuple(name for name in said.split(",") if name.strip())
    count = sum(bool(re.fullmatch(r"nvidia\d+", p.name)) for p in Path("/dev").glob("nvidia*"))
    return tuple(map(str, range(count)))


def default_workers(cells: int, cores_per_worker: int = 1, cell_bytes: float = 0.0) -> int:
    """Workers for this machine: one a GPU, one for a TPU, else as many as its cores and free memory hold.

    Args:
      cells: how many there are to train. cell_bytes: what the largest needs (``largest_cell``).
    """
    if gpus := visible_gpus():
        return max(1, min(cells, len(gpus)))
    if has_accelerator():
        return 1
    by_memory = MEMORY_SHARE * available_bytes() / (PROCESS_BYTES + cell_bytes)
    cores = len(os.sched_getaffinity(0)) // cores_per_worker
    return max(1, int(min(cells, cores, by_memory)))


def available_bytes() -> float:
    """Memory that is free on this machine or in its container; infinite where neither tells."""
    free = float("inf")
    try:
        found = re.search(r"^MemAvailable:\s+(\d+) kB$", Path("/proc/meminfo").read_text(), re.MULTILINE)
        free = 1024.0 * int(found.group(1)) if found else free
        most, used = (Path(f"/sys/fs/cgroup/memory.{n}").read_text().strip() for n in ("max", "current"))
        return free if most == "max" else min(free, float(most) - float(used))
    except OSError:
        return free


def largest_cell(entries: list[dict]) -> float:
    """Bytes of the largest cell's step, by the estimate of ``scaling.flops.memory_bytes``."""
    models = (e["config"] for e in entries if "model" in e["config"])  # other cells: no estimate
    shapes = ((c["model"], c["train"]["batch"], c["data"]["seq"]) for c in models)
    return max((float(memory_bytes(*shape).total) for shape in shapes), default=0.0)


def run_study(
    study: Path,
    count: int,
    options: list[str],
    on_poll,
    only: list[str] = (),
    cores_per_worker: int = 1,
    budgets: Budgets | None = None,
    engine: Local | None = None,
) -> int:
    """Runs workers until every cell that can be done is done.

    Args:
      study: the study folder.
      count: number of worker processes.
      options: command-line options passed to the workers.
      on_poll: called about three times a second while workers live.
      only: the cells to train; all where empty.
      cores_per_worker: CPU cores that each worker is bound to (without an accelerator).
      budgets: how often a cell is tried again; cells that had used theirs up get them anew.
      engine: another than one made for this machine.

    Returns:
      0 where every cell has a result, else 1.

    Raises:
      StudyError: a worker stopped at something that every cell would meet; its words are passed on.
    """
    prepare(study, budgets or Budgets())
    gpus = visible_gpus()
    engine = engine or Local(cores_per_worker, gpus if len(gpus) > 1 and count > 1 else ())
    groups = [Group(Path(study), tuple(only), tuple(options))] * count
    return run_to_the_end(engine, groups, on_poll, budgets)
