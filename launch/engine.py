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
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from scaling.attempts import Budgets, is_cancelled, tally
from scaling.claims import FolderStore, numbers
from scaling.files import CellFolder, StudyError
from scaling.records import read_manifest

BAD_INPUT, PREEMPTED = 2, 75
"""Exit codes of a worker: what every cell would meet, said in its last line; asked to stop, all is saved."""
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
    """

    code: int
    words: str = ""
    settled: int = 0


class Engine(Protocol):
    """What ``drive`` asks of a place to run."""

    def submit(self, group: Group) -> str:
        """Starts a job on a group of cells; returns its name, good for ``poll`` and ``cancel``.

        Raises:
          StudyError: the engine refuses; the message says what to do.
        """
        ...

    def poll(self, job: str) -> Ended | None:
        """How a job ended; None while it waits or runs. Called about three times a second: be quick."""
        ...

    def cancel(self, job: str) -> None:
        """Asks a job to save and end (SIGTERM), and makes it end; nothing where it has ended already."""
        ...


def drive(
    engine: Engine,
    group: Group,
    jobs: int,
    on_poll: Callable[[], None] = lambda: None,
    budgets: Budgets | None = None,
    every: float = 0.3,
) -> None:
    """Submits a group to so many jobs and again whenever one is lost, until its cells are done or given up.

    Raises:
      StudyError: a job met what every cell would meet, or jobs die without taking a cell; its words.
    """
    budgets = budgets or Budgets()
    running = [engine.submit(group) for _ in range(jobs)]
    idle_crashes, began = 0, attempts(group)
    try:
        while running:
            on_poll()
            time.sleep(every)
            for job in list(running):
                if (ended := engine.poll(job)) is None:
                    continue
                running.remove(job)
                left = unfinished(group, budgets)
                if ended.code == BAD_INPUT and left:
                    raise StudyError(last_words(ended))
                if ended.code == 0 or not left or is_cancelled(group.study):
                    continue
                took, began = attempts(group) > began, attempts(group)
                idle_crashes = 0 if took or ended.settled else idle_crashes + 1
                if idle_crashes >= MOST_IDLE_CRASHES:
                    raise StudyError(last_words(ended))
                running.append(engine.submit(group))
    except BaseException:
        for job in running:
            engine.cancel(job)
        raise
    on_poll()


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
    if ended.code in (PREEMPTED, -signal.SIGKILL, -signal.SIGTERM, -signal.SIGINT, -signal.SIGHUP):
        return "preempted", "stopped from outside"
    return "failed", reason_of(ended)


def run_to_the_end(engine: Engine, group: Group, jobs: int, on_poll, budgets: Budgets | None = None) -> int:
    """``drive``; returns 0 where every cell has a result, else 1."""
    drive(engine, group, jobs, on_poll, budgets)
    return 0 if all(CellFolder(group.study, name).result.exists() for name in ids(group)) else 1
