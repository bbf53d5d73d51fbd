"""A search under way: the cells that it has asked for, what they cost, what was decided on their losses."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from scaling.attempts import is_cancelled
from scaling.branches import spent_flops
from scaling.config import ConfigError
from scaling.files import CellFolder, write_json
from scaling.grid import MANIFEST_SCHEMA, Target, absolute_path, epochs_of, resolve, write_manifest
from scaling.recipe import recipe_from_config
from scaling.records import read_manifest, read_result


class Waiting(Exception):
    """Cells that were asked for have no result yet."""


class OverBudget(Exception):
    """The next cells would cost more than is left; none of them is started."""

    def __init__(self, price: float):
        super().__init__(price)
        self.price = price


class Session:
    """One run of a search from its beginning.

    Args:
      settings: of the study, with ``search``. data: what the manifest keeps of the data set.
      loss_of: cell id to its held-out loss; infinite where it diverged, None where it has no result.
      memo: kept from one run of the search to the next in one process, for what is costly to compute.

    Attributes:
      entries: of the manifest, by id, in the order asked for. spent: FLOPs of all of them.
      rounds: what was asked for and decided, for ``search.json``. seen: (point, D, loss, cell) of every
        configuration measured. answer: of the search, as far as it is known.
    """

    def __init__(self, settings: Mapping, data: Mapping, loss_of: Callable, memo: dict | None = None):
        self.settings, self.data, self.loss_of = absolute_path(settings), dict(data), loss_of
        self.search = self.settings["search"]
        # a trainer's study has no recipe
        self.recipe = None if "trainer" in settings else recipe_from_config(self.settings["recipe"])
        self.memo = {} if memo is None else memo
        self.entries: dict[str, dict] = {}
        self.spent, self.rounds, self.seen, self.answer = 0.0, [], [], None

    def price(self, entries: Sequence[Mapping]) -> float:
        """FLOPs of the entries that are not there yet."""
        return sum(
            spent_flops(e) for e in {e["id"]: e for e in entries if e["id"] not in self.entries}.values()
        )

    def ask(self, entries: Sequence[dict], wanted: Sequence[str], **about) -> list[float]:
        """The losses of the wanted cells, once all entries are trained.

        Args:
          entries: with every trunk that they need. about: what the round's record tells.

        Raises:
          OverBudget: they would cost more than is left. Waiting: not all of the wanted have a result.
        """
        price = self.price(entries)
        if self.spent + price > self.search["budget"]:
            raise OverBudget(price)
        for e in entries:
            self.entries.setdefault(e["id"], {**e, "round": len(self.rounds)})
        self.spent += price
        losses = [self.loss_of(name) for name in wanted]
        record = {**about, "flops": price, "spent": self.spent, "cells": list(wanted)}
        self.rounds.append(record)
        if any(loss is None for loss in losses):
            raise Waiting
        record["losses"] = [loss if math.isfinite(loss) else None for loss in losses]
        return losses

    def decide(self, **what) -> None:
        """Adds to the record of the last round what was concluded from it."""
        self.rounds[-1] |= what

    def cell(self, point: Mapping, tokens: float, span: tuple[float, float]) -> dict:
        """The WSD cell of a point at a D; batch and rates do not depend on the D (``grid.trunk_tokens``).

        Args:
          span: the shortest and the longest D that a point may ever be trained for.

        Raises:
          ConfigError: it cannot be built, or passes over the data more often than ``grid.max_epochs``.
        """
        fields = {k: v for k, v in point.items() if k != "params"}
        target = Target(
            point.get("params", self.search["params"]), tokens, overrides=tuple(sorted(fields.items()))
        )
        cell = resolve(self.settings, self.recipe, target, self.data, list(span))
        epochs, most = epochs_of(cell, tokens, self.data), self.settings["grid"]["max_epochs"]
        if epochs > most:
            raise ConfigError(
                f"search.tokens of {tokens:g} is {epochs:.3g} epochs, more than grid.max_epochs = {most:g}"
            )
        return cell

    def target(self, point: Mapping) -> dict:
        """What the manifest keeps of a point beside its D."""
        return {"params": point.get("params", self.search["params"]), "seed": 0, "point": dict(point)}

    def manifest(self) -> dict:
        return {
            "schema": MANIFEST_SCHEMA,
            "study": self.settings["name"],
            "revision": 1,
            "config": self.settings,
            "data": self.data,
            "flops_convention": self.settings["flops_convention"],
            "cells": list(self.entries.values()),
            "dropped": [],
        }

    def alone(self) -> float | None:
        """FLOPs of the same cells each trained from its beginning; None where a cell has none of its own."""
        cells = [e for e in self.entries.values() if e["role"] != "trunk"]
        if any(e["config"]["train"].get("parent") for e in self.entries.values()):
            return None
        return sum(e["achieved"]["flops"] for e in cells)

    def record(self, status: str) -> dict:
        """What ``search.json`` holds."""
        alone = self.alone()
        return {
            "kind": self.search["kind"],
            "status": status,
            "budget": self.search["budget"],
            "spent": self.spent,
            "left": self.search["budget"] - self.spent,
            "alone": alone,
            "saved": None if alone is None else alone - self.spent,
            "cells": len(self.entries),
            "rounds": self.rounds,
            "answer": self.answer,
        }


def loss_on_disk(study: Path) -> Callable[[str], float | None]:
    """``Session``'s ``loss_of`` for a study folder."""

    def loss_of(cell: str) -> float | None:
        folder = CellFolder(study, cell)
        if not folder.result.exists():
            return None
        result = read_result(folder)
        return math.inf if result["status"] == "diverged" else result["loss"]

    return loss_of


def replay(algorithm: Callable[[Session], None], session: Session) -> str:
    """Runs a search as far as its results go: ``done``, ``waiting`` or ``out of budget``.

    Raises:
      ConfigError: the budget does not pay for the first round.
    """
    try:
        algorithm(session)
    except Waiting:
        return "waiting"
    except OverBudget as stop:
        if not session.entries:
            raise ConfigError(
                f"search.budget is {session.search['budget']:g} FLOPs and the first round alone costs "
                f"{stop.price:.4g}; raise it, or begin with fewer or shorter cells"
            ) from stop
        session.rounds.append({"refused": True, "flops": stop.price, "spent": session.spent, "cells": []})
        return "out of budget"
    return "done"


def run_search(
    study: Path, algorithm, make_session: Callable[[], Session], train: Callable[[], None]
) -> dict:
    """Asks, trains and decides until the search is done or its budget is spent.

    Args:
      study: the folder. make_session: a fresh session on the folder's results.
      train: trains what the manifest lacks; it may leave cells untrained (failed, cancelled).

    Returns:
      The record, also in ``search.json``: its status is ``done``, ``out of budget`` or ``stopped`` (cells
      that were asked for have no result).

    Raises:
      StudyError: the folder holds another study or search.
    """
    asked: list[str] = []
    while True:
        session = make_session()
        status = replay(algorithm, session)
        lacking = [name for name in session.entries if session.loss_of(name) is None]
        given_up = [name for name in lacking if name in asked]
        if status == "waiting" and (given_up or (asked and is_cancelled(study))):
            status = "stopped"
        write_grown(study, session.manifest())
        record = session.record(status) | {"lacking": lacking if status == "stopped" else []}
        write_json(study / "search.json", record)
        if status != "waiting":
            return record
        asked = lacking
        train()


def write_grown(study: Path, manifest: dict) -> None:
    """The manifest with what is new; the same cells again change nothing."""
    if (study / "manifest.json").exists():
        old = read_manifest(study)
        before, now = ({e["id"] for e in m["cells"]} for m in (old, manifest))
        if old["study"] == manifest["study"] and before == now:
            return
    write_manifest(study, manifest, grow=True)
