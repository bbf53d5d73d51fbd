"""Sparse up-cycling, what a plan knows of it: a mixture of experts that starts from a dense cell.

Komatsuzaki et al. 2022 (arXiv 2212.05055, section 3.1): every expert is a copy of the dense feed-forward, the
router is new, all else is the dense model's. The arrays are made in ``scaling.models.upcycled``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path

from scaling import layers
from scaling.config import SCHEMA, ConfigError, cell_id, validate_cell, validate_section
from scaling.files import read_json
from scaling.flops import ledger

SHAPE = ("d_model", "layers", "heads", "kv_heads", "ffn_dim")
"""Fields of ``model`` that the recipe decides, and of an up-cycled cell the dense one."""

BASE = ("base_d_model", "base_layers", "base_ffn_dim", "base_head_dim")
OWN = ("family", "pattern", *(key for key, readers in layers.READ.items() if "moe" in readers))
"""Fields of ``model`` in which the two may differ, but for those that a layer of the dense one reads."""


def dense_cell(folder: Path | str) -> dict:
    """The config of a cell's folder, ``STUDY/cells/ID``.

    Raises:
      ConfigError: it has none.
    """
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise ConfigError(
            f"upcycle.dense is {str(folder)!r}, which has no config.json; it must be the folder of a cell "
            "that was trained, STUDY/cells/ID"
        )
    return validate_cell(read_json(path))


def kept_steps(folder: Path | str) -> list[int]:
    """Steps whose checkpoints are there."""
    found = Path(folder) / "checkpoints"
    return sorted(int(p.name) for p in found.iterdir() if p.name.isdigit()) if found.is_dir() else []


def step_of(folder: Path | str, dense: Mapping, step: int | None) -> int:
    """The step to start from: that asked for, or the dense cell's last.

    Raises:
      ConfigError: no checkpoint of it is there.
    """
    kept = kept_steps(folder)
    wanted = dense["train"]["steps"] if step is None else step
    if wanted not in kept:
        there = ", ".join(map(str, kept)) if kept else "none"
        raise ConfigError(
            f"upcycle.step is {step!r} and cell {cell_id(dense)} has no checkpoint of step {wanted}; it must "
            f"be one of those kept in {folder} ({there})"
        )
    return wanted


def filled(cell: Mapping) -> dict:
    """A cell config whose ``upcycle`` section knows what its ``dense`` folder holds.

    Args:
      cell: whole but for ``upcycle``, where ``dense`` (and ``step``) suffice; the data's fingerprint known.

    Returns:
      The validated cell: ``dense`` absolute, ``cell`` and ``step`` as found, ``tokens`` and ``flops`` (exact
      ledger) that the dense cell had spent there, ``first_row`` where its data go on: behind the rows that
      the dense cell read, where both take the same data in the same order, else 0.

    Raises:
      ConfigError: no such cell or checkpoint, another cell than ``cell`` says, or a model that is not the
        dense one with experts.
    """
    given = dict(cell["upcycle"])
    folder = given["dense"]
    dense = dense_cell(folder)
    name = cell_id(dense)
    if given.get("cell") not in (None, name):
        raise ConfigError(f"upcycle.cell is {given['cell']!r}; {folder} holds cell {name}")
    step = step_of(folder, dense, given.get("step"))
    seq, rows = dense["data"]["seq"], step * dense["train"]["batch"]
    check_same(dense["model"], validate_section("model", cell["model"]), name)
    out = {
        "dense": folder if "://" in folder else str(Path(folder).absolute()),
        "cell": name,
        "step": step,
        "tokens": rows * seq,
        "flops": ledger(dense["model"], seq).train_flops(rows * seq, "exact"),
        "first_row": rows if _goes_on(dense, cell) else 0,
    }
    return validate_cell({**cell, "upcycle": out})


def _goes_on(dense: Mapping, cell: Mapping) -> bool:
    """Whether both read the same rows in the same order."""

    def order(data, seed):
        content = {k: f.content or (lambda x: x) for k, f in SCHEMA["data"].items() if f.hashed}
        return {key: of(data[key]) for key, of in content.items()}, seed

    data = validate_section("data", cell["data"])
    if data["fingerprint"] is None:  # not known to be the same
        return False
    return order(dense["data"], dense["train"]["seed"]) == order(data, cell["train"]["seed"])


def check_same(dense: Mapping, model: Mapping, name: str) -> None:
    """Raises ``ConfigError`` where a ``model`` section is not the dense cell's (``name``) with experts."""
    for key in SCHEMA["model"]:
        own = key in OWN and not layers.has(dense, *layers.READ.get(key, ()))
        if not own and dense[key] != model[key]:
            raise ConfigError(
                f"model.{key} is {model[key]!r}; the dense cell {name} has {dense[key]!r}, and an up-cycled "
                "one must have the same"
            )
    pairs = zip(layers.layers(dense), layers.layers(model), strict=True)
    for i, (old, new) in enumerate(pairs):
        becomes = dataclasses.replace(old, ffn="moe") == new and old.ffn == "swiglu"
        if old.ffn == "moe" or (old != new and not becomes):
            raise ConfigError(
                f"layer {i} is {str(new)!r}; the dense cell {name} has {str(old)!r} there: a layer stays "
                "what it is, or its 'swiglu' becomes 'moe'"
            )


def with_shape_of(dense: Mapping, model: Mapping) -> dict:
    """A ``model`` section without a shape, with the dense one's."""
    return {**model, **{key: dense[key] for key in (*SHAPE, *BASE)}}
