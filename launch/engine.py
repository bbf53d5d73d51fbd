"""Where cells run, behind three verbs: submit a group of cells, poll it, cancel it.

An engine starts ``python -m launch.worker STUDY [--cell ID ...] OPTIONS`` somewhere that sees the study's
folder, and says when it has ended. All else is the same everywhere: workers claim cells from the folder,
so that a group may be given to several jobs, a job may be started twice, and one that is lost is submitted
again. What a job did is read from the folder, never from the engine.
"""

from __future__ import annotations

import dataclasses
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

from scaling.attempts import LAST_LINES, Budgets, cancel_file, is_cancelled, renew, tally
from scaling.claims import FolderStore, close_for, numbers
from scaling.files import CellFolder, StudyError
from scaling.records import check_cells, read_manifest

BAD_INPUT, PREEMPTED = 2, 75
"""Exit codes of a worker: what every cell would meet, said in its last line; asked to stop, all is saved."""
PEER_IS_GONE = "JAX distributed service detected fatal errors"
"""What JAX says when it ends a process because another of its job was not heard of."""
MOST_IDLE_CRASHES = 3
"""Workers that may die one after another without having taken a cell, before the launch is given up."""


@dataclasses.dataclass(frozen=True)
class Group:
    """Cells for one job.

    Attributes:
      study: the study's folder. cells: ids, in any order; empty: all. options: further words of the worker's
        command line.
    """

    study: Path
    cells: tuple[str, ...] = ()
    options: tuple[str, ...] = ()

    def arguments(self) -> list[str]:
        """Of the worker's command line."""
        return [str(self.study), *self.options, *(x for c in self.cells for x in ("--cell", c))]


@dataclasses.dataclass(frozen=True)
class Ended:
    """How a job ended.

    Attributes:
      code: its exit code, or minus a signal's number. words: the end of what it wrote to stderr.
      settled: attempts at cells that the engine closed on its behalf, as it knew that nobody was left.
      unwanted: a person took it out of the queue: it is not submitted again.
    """

    code: int
    words: str = ""
    settled: int = 0
    unwanted: bool = False


class Engine(Protocol):
    """What ``drive`` asks of a place to run.

    Attributes:
      every: seconds between two looks at its jobs.
    """

    every: float

    def submit(self, groups: Sequence[Group]) -> list[str]:
        """Starts a job on each group of cells; returns their names, good for ``poll`` and ``cancel``.

        Raises:
          StudyError: the engine refuses; the message says what to do.
        """
        ...

    def poll(self, job: str) -> Ended | None:
        """How a job ended; None while it waits or runs. Called for each job every so often: be quick."""
        ...

    def cancel(self, jobs: Sequence[str]) -> None:
        """Asks jobs to save and end (SIGTERM), and makes them end; nothing for those that have ended."""
        ...


def drive(
    engine: Engine,
    groups: Sequence[Group],
    on_poll: Callable[[], None] = lambda: None,
    budgets: Budgets | None = None,
) -> None:
    """Submits each group to a job, and again whenever that is lost, until its cells are done or given up.

    Raises:
      StudyError: a job met what every cell would meet, or jobs die without taking a cell; its words.
    """
    budgets = budgets or Budgets()
    began = {group: attempts(group) for group in set(groups)}
    running = dict(zip(engine.submit(groups), groups, strict=True))
    idle_crashes = 0
    try:
        while running:
            on_poll()
            time.sleep(engine.every)
            lost = []
            for job, group in list(running.items()):
                if (ended := engine.poll(job)) is None:
                    continue
                del running[job]
                left = unfinished(group, budgets)
                if ended.code == BAD_INPUT and left:
                    raise StudyError(last_words(ended))
                if ended.code == 0 or ended.unwanted or not left or is_cancelled(group.study):
                    continue
                took, began[group] = attempts(group) > began[group], attempts(group)
                idle_crashes = 0 if took or ended.settled else idle_crashes + 1
                if idle_crashes >= MOST_IDLE_CRASHES:
                    raise StudyError(last_words(ended))
                lost.append(group)
            if lost:
                running |= zip(engine.submit(lost), lost, strict=True)
    except BaseException:
        engine.cancel(list(running))
        raise
    on_poll()


def prepare(study: Path, budgets: Budgets) -> None:
    """Before a launch: checks the cells, takes back a cancel, renews the budgets of cells that were left."""
    check_cells(study)
    cancel_file(study).unlink(missing_ok=True)
    for entry in read_manifest(study)["cells"]:
        if not CellFolder(study, entry["id"]).result.exists():
            renew(CellFolder(study, entry["id"]), budgets)


def ids(group: Group) -> list[str]:
    return list(group.cells) or [e["id"] for e in read_manifest(group.study)["cells"]]


def unfinished(group: Group, budgets: Budgets) -> list[str]:
    """The group's cells that have no result and may be tried again."""
    folders = {name: CellFolder(group.study, name) for name in ids(group)}
    return [n for n, f in folders.items() if not f.result.exists() and not tally(f).spent(budgets)]


def attempts(group: Group) -> int:
    """Attempts at the group's cells, ever."""
    return sum(len(numbers(FolderStore(CellFolder(group.study, name).attempts))) for name in ids(group))


def last_words(ended: Ended) -> str:
    """One sentence for a person about a job that stopped."""
    reason = reason_of(ended)
    if ended.words.strip().splitlines()[-1:] == [f"error: {reason}"]:
        return reason
    return f"{reason}; what is done is kept, run the same command again to go on"


def reason_of(ended: Ended) -> str:
    """Why a job stopped: its own clear error, or how its process ended."""
    lines = ended.words.strip().splitlines()
    if lines and lines[-1].startswith("error: "):
        return lines[-1].removeprefix("error: ")
    how = f"was killed by {signal.Signals(-ended.code).name}" if ended.code < 0 else (
        f"ended with exit code {ended.code}"
    )  # fmt: skip
    why = " (out of memory?)" if ended.code == -signal.SIGKILL else ""
    said = f"; its last words: {lines[-1]}" if lines else ""
    return f"a worker {how}{why}{said}"


def outcome_of(ended: Ended, out_of_memory: bool) -> tuple[str, str]:
    """What a worker's end means for the cell it had: (``failed`` or ``preempted``, the reason in words).

    A stop from outside is a preemption; a process that ends itself has failed, and so has one that the
    kernel killed for its memory.
    """
    if any(line.startswith("Timeout (") for line in ended.words.splitlines()):
        return "failed", "no step ended within --watchdog-seconds; the log has every thread's stack"
    if ended.code == -signal.SIGKILL and out_of_memory:
        return "failed", "out of memory: the kernel killed the worker"
    if ended.code == -signal.SIGABRT and PEER_IS_GONE in ended.words:
        return "preempted", "another process of the job is gone"
    if ended.code in (PREEMPTED, -signal.SIGKILL, -signal.SIGTERM, -signal.SIGINT, -signal.SIGHUP):
        return "preempted", "stopped from outside"
    return "failed", reason_of(ended)


def settle(group: Group, is_theirs: Callable[[Mapping], bool], ended: Ended, out_of_memory: bool) -> int:
    """Closes the attempts that a dead worker left open; returns their number.

    Args:
      is_theirs: whether an attempt is the worker's (``scaling.claims.of_process``, ``of_job``).
      out_of_memory: whether the kernel killed for memory meanwhile.
    """
    outcome, reason = outcome_of(ended, out_of_memory)
    log, count = ended.words.splitlines()[-LAST_LINES:], 0
    for entry in read_manifest(group.study)["cells"]:  # a branch brings its trunk: not the group's alone
        folder = CellFolder(group.study, entry["id"])
        how = (outcome, reason)
        if folder.result.exists():
            how = ("released", "it had its result")
        if close_for(FolderStore(folder.attempts), is_theirs, how[0], reason=how[1], log=log):
            count += 1
            if how[0] == "failed":
                folder.log.write_text(ended.words)
    return count


def run_to_the_end(engine: Engine, groups: Sequence[Group], on_poll, budgets: Budgets | None = None) -> int:
    """``drive``; returns 0 where every cell has a result, else 1."""
    drive(engine, groups, on_poll, budgets)
    names = {(group.study, name) for group in set(groups) for name in ids(group)}
    return 0 if all(CellFolder(*name).result.exists() for name in names) else 1
