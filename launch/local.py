"""Runs a study's cells on this machine: worker processes that claim cells, and their progress.

A worker walks the whole list, most expensive cell first, and takes each cell whose lock it gets;
the lock dies with its process, so a killed worker leaves nothing behind but its checkpoints.
"""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path

from scaling.config import ConfigError
from scaling.files import CellFolder, StorageError, StudyError, claim, explain_os_error, read_json, write_json
from scaling.records import RESULTS, check_cells, progress, read_manifest

MAX_FAILURES = 2
"""Unexpected errors a cell may have in one `scaling run` before it is left as failed."""
STORAGE_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM)


def run_cell(study: Path, entry: dict, execution, on_metrics=None) -> str:
    """Trains one cell if it is free and unfinished.

    Returns:
      ``busy``, or the status in its result.
    """
    from scaling.train import train

    folder = CellFolder(study, entry["id"])
    with claim(folder.lock) as free:
        if not free:
            return "busy"
        if not folder.result.exists():
            with open(folder.starts, "a") as starts:
                starts.write(f"{time.strftime('%Y-%m-%dT%H:%M:%SZ', time.gmtime())} pid {os.getpid()}\n")
        return train(entry["config"], folder, execution, on_metrics)["status"]


def work(study: Path, execution, only: list[str] | None = None) -> None:
    """The life of one worker: walks the list until every cell is done or has failed.

    Raises:
      StorageError: the study cannot be written; no cell could go on.
    """
    entries = sorted(read_manifest(study)["cells"], key=lambda e: -e["achieved"]["flops"])
    waiting = [e for e in entries if only is None or e["id"] in only]
    while waiting:
        still = [e for e in waiting if try_cell(study, e, execution) == "busy"]
        if len(still) == len(waiting):
            time.sleep(0.5)  # others have them; stay until they are done, to take over what they drop
        waiting = still


def try_cell(study: Path, entry: dict, execution) -> str:
    """Trains a cell, with a second try after an unexpected error: ``busy``, ``done`` or ``failed``."""
    folder = CellFolder(study, entry["id"])
    while failures(folder) < MAX_FAILURES:
        if folder.result.exists():
            return "done"
        try:
            return "busy" if run_cell(study, entry, execution) == "busy" else "done"
        except StorageError:
            raise
        except (ConfigError, StudyError) as error:  # the same again would end the same
            note_failure(folder, str(error), MAX_FAILURES)
        except Exception as error:
            if isinstance(error, OSError) and error.errno in STORAGE_ERRORS:
                raise StorageError(explain_os_error(error, error.filename or folder.path)) from error
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            note_failure(folder, reason, failures(folder) + 1)
    return "failed"


def failures(folder: CellFolder) -> int:
    """Unexpected errors of the cell since `scaling run` began."""
    return read_json(folder.failure)["attempts"] if folder.failure.exists() else 0


def note_failure(folder: CellFolder, reason: str, attempts: int) -> None:
    """Keeps the reason and the traceback beside the cell."""
    folder.log.write_text(traceback.format_exc())
    write_json(folder.failure, {"reason": reason, "attempts": attempts})


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


def start_worker(study: Path, options: list[str], cores: int) -> tuple[subprocess.Popen, object]:
    """Starts one worker process; returns it and the file of its words, which is not on the study's disk.

    XLA's CPU backend splits its sums by the number of cores it sees, so that the last bits of a
    result depend on it: one core a worker, by default, gives the same numbers on every machine
    whatever the number of workers.
    """
    command = [sys.executable, "-m", "launch.worker", str(study), *options, "--parent", str(os.getpid())]
    if not has_accelerator():
        command += ["--cores", str(cores)]
    words = tempfile.TemporaryFile()  # noqa: SIM115 (read after the process has ended)
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=words)
    return process, words


def run_study(
    study: Path, count: int, options: list[str], on_poll, only: list[str] = (), cores_per_worker: int = 1
) -> int:
    """Runs workers until every cell that can be done is done.

    Args:
      study: the study folder.
      count: number of worker processes.
      options: command-line options passed to the workers.
      on_poll: called about twice a second while workers live.
      only: the cells to train; all where empty.
      cores_per_worker: CPU cores that each worker is bound to (without an accelerator).

    Returns:
      0 where every cell has a result, else 1.

    Raises:
      StudyError: a worker stopped at something that every cell would meet, or died; its words are passed on.
    """
    check_cells(study)
    for entry in read_manifest(study)["cells"]:
        CellFolder(study, entry["id"]).failure.unlink(missing_ok=True)
    workers = [start_worker(study, options, cores_per_worker) for _ in range(count)]
    try:
        while any(process.poll() is None for process, _ in workers):
            on_poll()
            time.sleep(0.3)
    except BaseException:
        for process, _ in workers:
            process.terminate()
        raise
    on_poll()
    done = all(r["status"] in RESULTS for r in progress(study) if not only or r["cell"] in only)
    for process, words in workers:
        if process.returncode and not done:
            words.seek(0)
            raise StudyError(last_words(process.returncode, words.read().decode(errors="replace")))
    return 0 if done else 1


def last_words(code: int, text: str) -> str:
    """One sentence about a worker that stopped."""
    lines = text.strip().splitlines()
    if lines and lines[-1].startswith("error: "):
        return lines[-1].removeprefix("error: ")
    how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
    why = " (out of memory?)" if code == -signal.SIGKILL else ""
    said = f"; its last words: {lines[-1]}" if lines else ""
    return f"a worker {how}{why}{said}; what is done is kept, run the same command again to go on"
