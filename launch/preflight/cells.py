"""The cells of a study, read without its data, and which of them are one program."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from pathlib import Path

from scaling.config import SCHEMA, validate_cell
from scaling.flops import ledger
from scaling.grid import plan
from scaling.layers import least_vocab
from scaling.program import Static, program_key
from scaling.records import read_manifest
from scaling.study import load_study
from scaling.trainers import refuse

UNSEEN = (
    "the data was not looked at: vocabulary and sequence length are the config's, no cell is dropped for "
    "want of data, and cell ids are not yet the study's"
)


@dataclasses.dataclass(frozen=True)
class Program:
    """What cells share that take the same step: one compiled part, batch and sequence length.

    Attributes:
      static: see ``scaling.program``. batch: rows. seq: tokens of a row. cells: manifest entries.
    """

    static: Static
    batch: int
    seq: int
    cells: tuple[dict, ...]

    @property
    def model(self) -> dict:
        return dict(self.static.model)

    @property
    def params(self) -> int:
        """N, all parameters."""
        return ledger(self.model, self.seq).params_total

    @property
    def flops(self) -> float:
        """Training FLOPs of a step, by the exact ledger."""
        return ledger(self.model, self.seq).train_flops(self.batch * self.seq)

    @property
    def steps(self) -> int:
        """Of all its cells."""
        return sum(cell["config"]["train"]["steps"] for cell in self.cells)


def read_cells(study: Path, overrides: Iterable[str] = ()) -> tuple[list[dict], str | None]:
    """Cells of a study folder's manifest, or those that a config file resolves into, and what to say of them.

    A config that names ``model.vocab`` is planned without its data; another one needs it opened.

    Raises:
      ConfigError, StudyError: no such study or config, or data that is needed and not there.
    """
    if study.is_dir():
        manifest = read_manifest(study)
        refuse(manifest["config"], "scaling preflight")
        return manifest["cells"], None
    settings = load_study(study, list(overrides))
    refuse(settings, "scaling preflight")
    if "vocab" in settings["model"]:
        return plan(settings, unseen_facts(settings))["cells"], UNSEEN
    from launch.planning import manifest_of

    return manifest_of(settings)["cells"], None


def unseen_facts(settings: Mapping) -> dict:
    """What ``plan`` asks of a data set, for one that nobody has opened: enough of everything."""
    return {
        "fingerprint": settings["data"].get("fingerprint") or SCHEMA["data"]["fingerprint"].default,
        "vocab": settings["model"]["vocab"] - least_vocab(settings["model"], 0),
        "unique_tokens": math.inf,
        "heldout_tokens": math.inf,
        "bytes_per_token": None,
    }


def programs(cells: Iterable[Mapping]) -> list[Program]:
    """The distinct programs of some cells, smallest model first, then smallest batch."""
    groups: dict[tuple, list[dict]] = {}
    for cell in cells:
        cell = {**cell, "config": validate_cell(cell["config"])}  # an earlier version's lacks later fields
        groups.setdefault(program_key(cell["config"]), []).append(cell)
    found = [Program(*key, tuple(group)) for key, group in groups.items()]
    return sorted(found, key=lambda p: (p.params, p.batch * p.seq))
