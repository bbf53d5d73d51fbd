"""Runs a study's cells on this machine: worker processes that claim cells, and their progress.

A worker walks the whole list, most expensive cell first, and takes each cell whose lock it gets;
the lock dies with its process, so a killed worker leaves nothing behind but its checkpoints.
"""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path

from launch import packs
from scaling.branches import spent_flops
from scaling.chips import peak_flops
from scaling.config import ConfigError, validate_cell
from scaling.files import CellFolder, StorageError, StudyError, claim, explain_os_error, read_json, write_json
from scaling.records import RESULTS, check_cells, progress, read_manifest

MAX_FAILURES = 2
"""Unexpected errors a cell may have in one `scaling run` before it is left as failed."""
STORAGE_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM)


def job_of(study: Path, entry: dict):
    """A manifest's entry as a ``scaling.lane.Job``."""
    from scaling.lane import Job

    return Job(
        entry["config"],
        CellFolder(study, entry["id"]),
        CellFolder(study, entry["trunk"]) if entry.get("trunk") else None,
        entry.get("fork", 0),
        tuple(entry.get("forks", ())),
    )


def run_cells(study: Path, entries: list[dict], execution, on_metrics=None) -> list[str]:
    """Trains the cells that are free, as one pack.

    Returns:
      The ids of the cells that were trained (or found finished); those of others are busy elsewhere.
    """
    from scaling import hosts
    from scaling.train import train_pack

    with contextlib.ExitStack() as locks:
        mine = [entry for entry in entries if locks.enter_context(claim(CellFolder(study, entry["id"]).lock))]
        for entry in mine:
            folder = CellFolder(study, entry["id"])
            if not folder.result.exists():
                with open(folder.starts, "a") as starts:
                    starts.write(f"{time.strftime('%Y-%m-%dT%H:%M:%SZ', time.gmtime())} pid {os.getpid()}\n")
        hosts.agree([entry["id"] for entry in mine])
        if mine:
            train_pack([job_of(study, e) for e in mine], execution, on_metrics)
    return [entry["id"] for entry in mine]


def work(study: Path, execution, only: list[str] | None = None, pack: str = "auto") -> None:
    """The life of one worker: walks the list until every cell is done or has failed.

    Args:
      study: the study folder. execution: how to run. only: the cells to train (and their trunks).
      pack: ``auto``, ``off``, ``turns`` or ``vmap``, see ``launch.packs``.

    Raises:
      StorageError: the study cannot be written; no cell could go on.
    """
    from scaling import hosts

    # a study planned by an earlier version lacks the fields added since
    entries = [{**e, "config": validate_cell(e["config"])} for e in read_manifest(study)["cells"]]
    wanted = with_their_trunks(entries, only)
    # a trunk first, its branches wait for it; then the most expensive
    order = sorted(wanted, key=lambda e: (e.get("role") != "trunk", -spent_flops(e)))
    if not hosts.is_main():
        return follow(study, {e["id"]: e for e in wanted}, execution)
    size_of = pack_size(pack if not hosts.several() else "off")
    while waiting := [e for e in order if not is_over(study, e)]:
        busy: set[str] = set()
        while ready := [e for e in waiting if e["id"] not in busy and is_ready(study, e)]:
            group = packs.form_pack(ready, size_of)
            if any(failures(CellFolder(study, e["id"])) for e in group):
                group = group[:1]  # one that failed in company tries again alone
            done = try_cells(study, group, execution)
            busy |= {e["id"] for e in group} - set(done)
            waiting = [e for e in waiting if not is_over(study, e)]
        if waiting:
            time.sleep(0.5)  # others have them; stay until they are done, to take over what they drop
            hosts.agree([])
    hosts.agree(None)


def follow(study: Path, entries: dict[str, dict], execution) -> None:
    """The life of a worker that is not the first process of its job: it trains what the first one takes."""
    from scaling import hosts
    from scaling.train import train_pack

    while (names := hosts.agree(None)) is not None:
        with contextlib.suppress(ConfigError, StudyError):  # the first process meets the same and notes it
            if names:
                train_pack([job_of(study, entries[name]) for name in names], execution)


def with_their_trunks(entries: list[dict], only: list[str] | None) -> list[dict]:
    """The entries named in ``only`` (all where None) and the trunks that they leave."""
    if only is None:
        return entries
    needed = {*only, *(e["trunk"] for e in entries if e["id"] in only and e.get("trunk"))}
    return [e for e in entries if e["id"] in needed]


def is_over(study: Path, entry: dict) -> bool:
    """Whether a cell has a result, or has failed as often as it may."""
    folder = CellFolder(study, entry["id"])
    return folder.result.exists() or failures(folder) >= MAX_FAILURES


def is_ready(study: Path, entry: dict) -> bool:
    """Whether a cell need not wait for a trunk: it has none, or its fork is saved, or no more will come."""
    if not entry.get("trunk"):
        return True
    trunk = CellFolder(study, entry["trunk"])
    own = CellFolder(study, entry["id"]).checkpoints
    there = (trunk.checkpoints / str(entry["fork"])).exists() or (own.exists() and any(own.iterdir()))
    return there or trunk.result.exists() or failures(trunk) >= MAX_FAILURES


def pack_size(how: str):
    """config to the most cells that this device should train together."""
    import jax

    device = jax.devices()[0]
    memory = (device.memory_stats() or {}).get("bytes_limit") if device.platform != "cpu" else None
    peak = peak_flops(device.device_kind)
    return lambda config: packs.cells_that_fit(config, how, device.platform == "cpu", peak, memory)


def try_cells(study: Path, entries: list[dict], execution) -> list[str]:
    """Trains cells together; an unexpected error is noted at each that has no result.

    Returns:
      The ids that need no further look in this round: trained, or failed.
    """
    try:
        return run_cells(study, entries, execution)
    except StorageError:
        raise
    except (ConfigError, StudyError) as error:  # the same again would end the same
        reason, more = str(error), MAX_FAILURES if len(entries) == 1 else 1
    except Exception as error:
        if isinstance(error, OSError) and error.errno in STORAGE_ERRORS:
            raise StorageError(explain_os_error(error, error.filename or study)) from error
        reason, more = f"{type(error).__name__}: {error}".splitlines()[0], 1
    for entry in entries:
        folder = CellFolder(study, entry["id"])
        if not folder.result.exists():
            note_failure(folder, reason, failures(folder) + more)
    return [entry["id"] for entry in entries]


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
