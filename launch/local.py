"""Runs a study's cells on this machine: worker processes that claim cells, and their progress.

A worker walks the whole list, most expensive cell first, and takes each cell whose lock it gets;
the lock dies with its process, so a killed worker leaves nothing behind but its checkpoints.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator
from pathlib import Path

from scaling.config import ConfigError
from scaling.files import CellFolder, StudyError, explain_os_error, write_json
from scaling.records import check_cells, read_manifest

MAX_FAILURES = 2
"""Unexpected errors a cell may have in one `scaling run` before it is left as failed."""


@contextlib.contextmanager
def claim(folder: CellFolder) -> Iterator[bool]:
    """Holds the cell's lock for the block; yields False where another process has it.

    Raises:
      StudyError: the study folder cannot be written.
    """
    try:
        folder.path.mkdir(parents=True, exist_ok=True)
        file = open(folder.lock, "a")  # noqa: SIM115 (closed below, after the block)
    except OSError as error:
        raise StudyError(explain_os_error(error, folder.path)) from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield True


def is_claimed(folder: CellFolder) -> bool:
    """Whether a living process on this machine is training the cell."""
    if not folder.lock.exists():
        return False
    with claim(folder) as free:
        return not free


def run_cell(study: Path, entry: dict, execution, on_metrics=None) -> str:
    """Trains one cell if it is free and unfinished.

    Returns:
      ``busy``, or the status in its result.
    """
    from scaling.train import train

    folder = CellFolder(study, entry["id"])
    with claim(folder) as free:
        if not free:
            return "busy"
        if not folder.result.exists():
            with open(folder.starts, "a") as starts:
                starts.write(f"{time.strftime('%Y-%m-%dT%H:%M:%SZ', time.gmtime())} pid {os.getpid()}\n")
        return train(entry["config"], folder, execution, on_metrics)["status"]


def work(study: Path, execution, only: list[str] | None = None) -> int:
    """The life of one worker: walks the list until every cell is done or has failed.

    Returns:
      The number of cells that this worker saw fail.
    """
    entries = sorted(read_manifest(study)["cells"], key=lambda e: -e["achieved"]["flops"])
    entries = [e for e in entries if only is None or e["id"] in only]
    attempts = dict.fromkeys((e["id"] for e in entries), 0)
    waiting = entries
    while waiting:
        still = [e for e in waiting if try_cell(study, e, execution, attempts) == "busy"]
        if len(still) == len(waiting):
            time.sleep(0.5)  # others have them; stay until they are done, to take over what they drop
        waiting = still
    return sum(n >= MAX_FAILURES for n in attempts.values())


def try_cell(study: Path, entry: dict, execution, attempts: dict) -> str:
    """Trains a cell, with a second try after an unexpected error: ``busy``, ``done`` or ``failed``."""
    folder = CellFolder(study, entry["id"])
    while attempts[entry["id"]] < MAX_FAILURES:
        if folder.result.exists():
            return "done"
        try:
            return "busy" if run_cell(study, entry, execution) == "busy" else "done"
        except (ConfigError, StudyError):
            raise  # the next cell would meet the same
        except Exception as error:
            attempts[entry["id"]] += 1
            folder.log.write_text(traceback.format_exc())
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            write_json(folder.failure, {"reason": reason, "attempts": attempts[entry["id"]]})
    return "failed"


def has_accelerator() -> bool:
    """Whether a GPU or TPU is here to be used; asks no driver, so that no process claims it."""
    if os.environ.get("JAX_PLATFORMS", "") == "cpu":
        return False
    patterns = ("nvidia[0-9]*", "accel*", "vfio/[0-9]*")
    return any(any(Path("/dev").glob(p)) for p in patterns)


def default_workers(cells: int, cores_per_worker: int = 1) -> int:
    """Workers for this machine: as many as its CPU cores hold, or one where an accelerator is present."""
    if has_accelerator():
        return 1
    return max(1, min(cells, len(os.sched_getaffinity(0)) // cores_per_worker))


def start_workers(
    study: Path, count: int, options: list[str], cores_per_worker: int
) -> list[subprocess.Popen]:
    """Starts worker processes; on a CPU each is bound to its own cores.

    XLA's CPU backend splits its sums by the number of cores it sees, so that the last bits of a
    result depend on it: one core a worker, by default, gives the same numbers on every machine
    whatever the number of workers.
    """
    cores = sorted(os.sched_getaffinity(0))
    workers = []
    for i in range(count):
        command = [sys.executable, "-m", "launch.worker", str(study), *options, "--parent", str(os.getpid())]
        if not has_accelerator():
            mine = [cores[(i * cores_per_worker + k) % len(cores)] for k in range(cores_per_worker)]
            command += ["--cores", ",".join(map(str, mine))]
        with open(study / f"worker-{i}.log", "wb") as log:
            workers.append(
                subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=log)
            )
    return workers


def run_study(study: Path, count: int, options: list[str], on_poll, cores_per_worker: int = 1) -> int:
    """Runs workers until every cell that can be done is done.

    Args:
      study: the study folder.
      count: number of worker processes.
      options: command-line options passed to the workers.
      on_poll: called about twice a second while workers live.
      cores_per_worker: CPU cores that each worker is bound to (without an accelerator).

    Returns:
      0 where all workers ended well, else 1.

    Raises:
      StudyError: a worker stopped at something that every cell would meet; its words are passed on.
    """
    check_cells(study)
    workers = start_workers(study, count, options, cores_per_worker)
    try:
        while any(w.poll() is None for w in workers):
            on_poll()
            time.sleep(0.3)
    except BaseException:
        for w in workers:
            w.terminate()
        raise
    on_poll()
    for i, worker in enumerate(workers):
        if worker.returncode == 2:
            last = (study / f"worker-{i}.log").read_text(errors="replace").strip().splitlines()
            raise StudyError(last[-1].removeprefix("error: ") if last else "a worker stopped")
    return int(any(w.returncode for w in workers))
