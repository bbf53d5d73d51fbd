"""What a cell's attempts came to, and its two budgets: preemptions are many, failures are few."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from scaling.claims import FolderStore, outcome, read_attempts
from scaling.files import CellFolder, read_json, write_json

MAX_FAILURES = 2
"""Failed attempts that a cell may have before it is left as failed."""
MAX_PREEMPTIONS = 50
"""Attempts of a cell that may be cut off from outside before it is left."""
LAST_LINES = 20
"""Of a failed attempt's log, kept in its record."""


@dataclasses.dataclass(frozen=True)
class Budgets:
    """How often a cell is tried again."""

    failures: int = MAX_FAILURES
    preemptions: int = MAX_PREEMPTIONS


@dataclasses.dataclass(frozen=True)
class Tally:
    """Attempts since the budgets were last renewed.

    Attributes:
      last: outcome of the last attempt that has ended, None before it. reason: why it failed.
      final: it failed in a way that would come again.
    """

    failures: int = 0
    preemptions: int = 0
    last: str | None = None
    reason: str | None = None
    final: bool = False

    def spent(self, budgets: Budgets) -> bool:
        """Whether the cell is not to be tried again."""
        return self.final or self.failures >= budgets.failures or self.preemptions >= budgets.preemptions


def attempts_of(folder: CellFolder) -> list[dict]:
    """The attempts at training a cell, in order (docs/launch.md has the fields)."""
    return [a for a in read_attempts(FolderStore(folder.attempts)) if a["purpose"] == "train"]


def attempts_begun(folder: CellFolder) -> int:
    """How often a cell's training was begun."""
    return sum(a["outcome"] != "released" for a in attempts_of(folder))


def tally(folder: CellFolder, attempts: Sequence[dict] | None = None) -> Tally:
    """What counts against a cell's budgets. ``attempts``: where they were read already."""
    attempts = attempts_of(folder) if attempts is None else attempts
    since = read_json(folder.renewed)["after"] if attempts and folder.renewed.exists() else 0
    counted = [a for a in attempts if a["attempt"] > since and outcome(a) not in (None, "released")]
    if not counted:
        return Tally()
    outcomes, last = list(map(outcome, counted)), counted[-1]
    final = any(a.get("final", False) for a in counted)
    failures, preemptions = outcomes.count("failed"), outcomes.count("preempted")
    return Tally(failures, preemptions, outcomes[-1], last.get("reason"), final)


def renew(folder: CellFolder, budgets: Budgets) -> None:
    """Gives a cell that was left its budgets again; its log of attempts stays."""
    attempts = attempts_of(folder)
    if attempts and tally(folder, attempts).spent(budgets):
        write_json(folder.renewed, {"after": attempts[-1]["attempt"]})


def cancel_file(study: Path | str) -> Path:
    return Path(study) / "cancelled"


def is_cancelled(study: Path | str) -> bool:
    """Whether somebody asked all workers of the study to save and stop."""
    return cancel_file(study).exists()
