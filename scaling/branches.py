"""Trunk and branch: one constant-LR run a size, and the cooldowns that leave it at every D.

A warm-up, stable, decay (WSD) cell of D tokens is, up to the start of its cooldown, the same run as
every other WSD cell with its N, seed and hyper-parameters (Hu et al. 2024; Haegele et al. 2024). So a
study trains that part once, the trunk, and each cell of it is a branch: it forks from the trunk's
checkpoint (parameters, optimizer state, data position) and only its cooldown is its own. A branch is
the very cell that trained alone would give the same numbers, bit for bit on CPU; no branch ever
passes through another's cooldown. m values of D cost the largest one's stable part and m cooldowns, in
place of the sum of all D.

All cells of a trunk share one batch and one set of hyper-parameters, those of the recipe at
``grid.trunk_tokens`` (by default the geometric mean of the trunk's D).

A study that grows (``scaling search``) does not know how long its trunks will become: there a trunk is a
chain of segments, each a trunk that goes on from the end of a shorter one. Each is still the very cell of its
config.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence

from scaling.config import ConfigError, cell_id, validate_cell


def reference_tokens(grid: Mapping, tokens: Sequence[float]) -> float:
    """D that a trunk's batch and hyper-parameters are taken for."""
    if grid["trunk_tokens"] is not None:
        return float(grid["trunk_tokens"])
    return math.exp(sum(map(math.log, tokens)) / len(tokens))


def fork_step(cell: Mapping) -> int:
    """Updates that a WSD cell does at the constant rate: where its cooldown may leave the trunk."""
    steps = cell["train"]["steps"]
    return max(0, math.floor(steps - max(1.0, cell["schedule"]["decay_fraction"] * steps)))


def trunk_of(cells: Sequence[Mapping]) -> dict:
    """The trunk of some WSD cells that differ in length alone: constant LR to the last fork.

    Raises:
      ConfigError: they differ in more, or a cooldown would begin before the warm-up has ended.
    """
    trunk = copy.deepcopy(dict(cells[0]))
    for cell in cells:
        same = copy.deepcopy(dict(cell))
        same["train"]["steps"] = trunk["train"]["steps"]
        if same != trunk:
            raise ConfigError(
                f"cell {cell_id(cell)} differs from {cell_id(cells[0])} in more than its steps; "
                "cells of one trunk must not"
            )
        if fork_step(cell) <= cell["schedule"]["warmup_steps"]:
            raise ConfigError(
                f"schedule.decay_fraction is {cell['schedule']['decay_fraction']}: the cooldown of a cell of "
                f"{cell['train']['steps']} steps would begin at step {fork_step(cell)}, within the warm-up "
                f"of {cell['schedule']['warmup_steps']}; it must begin after it"
            )
    trunk["schedule"]["name"] = "constant"
    trunk["train"]["steps"] = max(map(fork_step, cells))
    trunk["eval"]["points"] = 1
    return validate_cell(trunk)


def with_trunks(entries: Sequence[dict], make_entry) -> list[dict]:
    """The manifest's entries with their trunks added, each before the branches that leave it.

    Entries that differ in their steps alone share a trunk; one without such a companion stays a cell.

    Args:
      entries: of the manifest, all cells of their own.
      make_entry: (id, cell, target) to an entry.

    Returns:
      Entries with ``role`` trunk or branch; a trunk has ``forks``, a branch ``trunk`` and ``fork``.
    """
    groups: dict[str, list[dict]] = {}
    for entry in entries:
        cell = copy.deepcopy(entry["config"])
        cell["train"]["steps"] = 1 + cell["schedule"]["warmup_steps"]
        groups.setdefault(cell_id(cell), []).append(entry)
    out = []
    for group in groups.values():
        if len(group) == 1:
            out += group
            continue
        cell = trunk_of([e["config"] for e in group])
        name, longest = cell_id(cell), max(group, key=lambda e: e["config"]["train"]["steps"])
        forks = sorted({fork_step(e["config"]) for e in group})
        target = {**longest["target"], "tokens": None, "flops": None}
        out.append({**make_entry(name, cell, target), "role": "trunk", "forks": forks})
        out += [{**e, "role": "branch", "trunk": name, "fork": fork_step(e["config"])} for e in group]
    return out


class Chain:
    """The manifest's entries of one configuration's trunk, which grows segment by segment.

    Args:
      make_entry: (id, cell, target) to an entry. target: the configuration's, without a D.
      forks: steps of this trunk where cooldowns may leave later, whose checkpoints are kept.
    """

    def __init__(self, make_entry, target: Mapping, forks: Sequence[int] = ()):
        self.make_entry, self.target, self.forks = make_entry, dict(target), sorted(forks)
        self.segments: list[tuple[str, tuple[int, ...]]] = []
        self.end = 0

    def add(self, cell: Mapping) -> list[dict]:
        """A WSD cell that differs from the others in its steps alone, and the segment that it needs first.

        Raises:
          ConfigError: as ``trunk_of``; or its fork was passed without a checkpoint, as it is not of
            ``forks``.
        """
        out, fork = [], fork_step(cell)
        if fork > self.end:
            trunk = trunk_of([cell])
            kept = tuple(sorted({fork, *(f for f in self.forks if self.end < f < fork)}))
            entry = self.make_entry(cell_id(trunk), trunk, {**self.target, "tokens": None, "flops": None})
            entry |= {"role": "trunk", "forks": list(kept)}
            if self.segments:
                entry |= {"trunk": self.segments[-1][0], "fork": self.end}
            self.segments.append((entry["id"], kept))
            self.end = fork
            out.append(entry)
        home = next((name for name, kept in self.segments if fork in kept), None)
        if home is None:
            raise ConfigError(
                f"cell {cell_id(cell)} would leave its trunk at step {fork}, of which no checkpoint is kept; "
                f"there are those of {', '.join(str(f) for _, kept in self.segments for f in kept)}"
            )
        tokens = cell["train"]["steps"] * cell["train"]["batch"] * cell["data"]["seq"]
        branch = self.make_entry(cell_id(cell), cell, {**self.target, "tokens": tokens, "flops": None})
        return [*out, {**branch, "role": "branch", "trunk": home, "fork": fork}]


def spent_flops(entry: Mapping, convention: str = "exact") -> float:
    """Training FLOPs that a manifest's entry costs: of a branch or segment, those of its own steps alone."""
    share = 1 - entry.get("fork", 0) / entry["config"]["train"]["steps"]
    return entry["achieved"]["flops_by_convention"][convention] * share


def saving(entries: Sequence[Mapping]) -> dict | None:
    """What trunks save: FLOPs spent, FLOPs of the same cells each trained alone, their ratio; None without.

    Both in the exact count; sentinels and cells without a trunk count on both sides.
    """
    if not any(e.get("role") == "trunk" for e in entries):
        return None
    spent = sum(map(spent_flops, entries))
    alone = sum(e["achieved"]["flops"] for e in entries if e.get("role") != "trunk")
    return {"spent": spent, "alone": alone, "ratio": alone / spent}
