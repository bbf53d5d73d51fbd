"""`scaling families`: several families on one grid at equal tuning budget, compared by what they cost.

Every family goes the same way: the same bracket of learning rates at one (N, D), then the same grid at the
best of them, then a fit. Each step is one of the other commands, so that a second call does what is missing.
With ``equal`` the grid's cells are matched instead, and nothing is fitted (``launch.equal_resources``).
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np

import fits
from fits.search import optimum
from launch import equal_resources
from launch.family_costs import AXES, UNITS, cost_functions
from scaling.config import ConfigError, check_keys
from scaling.files import CellFolder, write_json, write_whole
from scaling.flops import ledger
from scaling.recipe import round4
from scaling.records import read_manifest, read_result
from scaling.sentinels import brackets
from scaling.study import read_config, validate_study

KEYS = ("name", "study", "families", "reference", "tune", "context", "chip", "equal", "params_tolerance")


def load(path: Path) -> dict:
    """A comparison's config, checked: ``study``, which all share, ``families``, each on top, and ``tune``.

    Raises:
      ConfigError: naming the field, the value and what would be valid.
    """
    config = read_config(path)
    check_keys("the comparison", config, list(KEYS))
    families = config.get("families")
    if not isinstance(families, Mapping) or len(families) < 2:
        raise ConfigError(
            f"families is {families!r}; it must map two names or more to sections of a study, such as "
            "{'transformer': {}, 'griffin': {'model': {'family': 'griffin'}}}"
        )
    # a ConfigDict keeps no order, so the reference has to be named
    if config.get("reference") not in families:
        known = ", ".join(map(repr, families))
        raise ConfigError(
            f"reference is {config.get('reference')!r}; it must be one of the families: {known}"
        )
    tune = config.get("tune")
    check_keys("tune", tune if isinstance(tune, Mapping) else {}, ["params", "tokens", "lr"])
    if not isinstance(tune, Mapping) or len(tune) < 3:
        raise ConfigError(f"tune is {tune!r}; it must have params, tokens and lr, a list of multiples")
    config = {"context": 32_768, "chip": "v5e", "equal": None, **config}
    for name in families:
        study_of(config, name)
        tuning_study(config, name)
    equal_resources.check(config)
    return config


def study_of(config: Mapping, family: str, lr: float = 1.0, grid: Mapping | None = None) -> dict:
    """The study of one family, its recipe's learning rate times ``lr``; ``grid``: another than the shared."""
    study = copy.deepcopy(config["study"])
    for section, fields in config["families"][family].items():
        study[section] = {**study.get(section, {}), **fields} if isinstance(fields, Mapping) else fields
    study["name"] = f"{config['name']}-{family}"
    study["recipe"] = {**study["recipe"], "lr": round4(study["recipe"]["lr"] * lr)}
    if grid is not None:
        study["grid"] = dict(grid)
    return validate_study(study)


def tuning_study(config: Mapping, family: str, grid: Mapping | None = None) -> dict:
    """One cell and its bracket of learning rates; ``grid``: of that cell, where it is matched."""
    tune, study = config["tune"], study_of(config, family)
    cells = [{"params": tune["params"], "tokens": tune["tokens"]}]
    multiples = [x for x in tune["lr"] if x != 1]
    shared = {key: study["grid"][key] for key in ("tolerance", "max_epochs")}
    grid = grid or {"kind": "list", "cells": cells, **shared}
    grid = {**grid, "sentinels": {"lr": multiples, "cells": "all"}}
    return validate_study({**study, "name": study["name"] + "-tune", "grid": grid})


def train(config: Mapping, folder: Path, family: str, call, grids: Mapping | None = None) -> dict:
    """Tunes, trains and fits one family; does nothing where that is done.

    Args:
      call: runs a command of the command line, given as words.
      grids: ``tune`` and ``grid`` of the family where cells are matched: then nothing is fitted.

    Returns:
      The bracket's row (``scaling.sentinels.brackets``).
    """
    own = {"tune": None, "grid": None} if grids is None else grids
    tuned = planned(folder / f"{family}-tune", tuning_study(config, family, own["tune"]), call)
    row = bracket(tuned)
    study = planned(folder / family, study_of(config, family, row["best"], own["grid"]), call)
    if grids is None and not (study / "fits" / "chinchilla.json").exists():
        call("fit", str(study))
    return row


def planned(folder: Path, study: Mapping, call) -> Path:
    """The study planned and trained in ``folder``."""
    file = folder.with_suffix(".json")
    write_json(file, dict(study))
    call("plan", str(file), "--study", str(folder), "--no-estimate")
    call("run", str(folder))
    return folder


def bracket(study: Path) -> dict:
    """What the bracket says: the best multiple by a parabola, the multiples and their losses."""

    def loss_of(cell: str):
        result = read_result(CellFolder(study, cell))
        return (result["loss"], result["loss_stderr"]) if result["status"] == "finished" else None

    rows = brackets(read_manifest(study), loss_of)
    if not rows:
        raise ConfigError(f"tune.lr: too few cells of {study} finished to choose a learning rate among")
    return rows[0]


def compare(config: Mapping, folder: Path, tuned: Mapping[str, dict]) -> dict:
    """The comparison of fitted families: accounts, and compute multipliers over the reference by each cost.

    Returns:
      Plain JSON: ``reference``, ``families`` (name to fit, bracket, account), ``multipliers`` (a list of
      {axis, family, budgets: [...]} or {axis, family, why_not}).
    """
    reference = config["reference"]
    names = [reference, *(f for f in config["families"] if f != reference)]
    fitted = {f: fits.read_fit(folder / f / "fits" / "chinchilla.json") for f in names}
    costs = {f: cost_functions(folder / f, config["chip"]) for f in names}
    out = {"reference": reference, "config": config["name"], "chip": config["chip"], "axes": AXES,
           "families": {}, "multipliers": []}  # fmt: skip
    for f in names:
        rows = fitted[f].intervals
        out["families"][f] = {
            "status": fitted[f].status,
            "reasons": fitted[f].reasons,
            "flags": [x["text"] for x in fitted[f].flags],
            "a": rows.get("a"),
            "E": rows.get("E"),
            "tuned": tuned[f],
            "runs": len(read_manifest(folder / f)["cells"]),
            **account(folder / f"{f}-tune", config),
        }
    budgets = grid_budgets(folder / reference)
    for axis in AXES:
        for f in names[1:]:
            row = {"axis": axis, "family": f}
            try:
                at = at_optimum(fitted[reference], costs[reference], budgets, axis)
                got = fits.compare(
                    fitted[reference],
                    fitted[f],
                    at,
                    flops_a=costs[reference][axis],
                    flops_b=costs[f][axis],
                    names=(reference, f),
                    search=(min(at), max(at)),
                    unit=UNITS[axis].format(chip=config["chip"]),
                    tops=tuple(largest(folder / g, costs[g][axis]) for g in (reference, f)),
                )
                row["budgets"] = [
                    {"budget": c, "flops": b, **judged(s)}
                    for c, b, s in zip(at, budgets, got.speedups, strict=True)
                ]
                row["crossover"] = got.crossover
                # those of one fit stand with the families
                own = tuple(f"{name}: " for name in (reference, f))
                row["flags"] = [x["text"] for x in got.flags if not x["text"].startswith(own)]
            except fits.FitError as error:
                row["why_not"] = str(error)
            out["multipliers"].append(row)
    return out


def largest(study: Path, cost) -> float:
    """What the dearest run of a study costs."""
    got = [e["achieved"] for e in read_manifest(study)["cells"]]
    return float(max(cost(np.array(x["params_total"], float), np.array(x["tokens"], float)) for x in got))


def judged(speedup: Mapping) -> dict:
    """A speed-up with its interval, and whether it tells the two apart."""
    got = speedup["speedup"]
    ends = got["95"]
    low, high = (None, None) if ends is None else (np.inf if v == "infinite" else v for v in ends)
    apart = None not in (low, high) and not low <= 1 <= high
    return {"multiplier": got["estimate"], "interval": ends, "apart": apart,
            "loss_reference": speedup["loss_a"], "loss": speedup["loss_b"]}  # fmt: skip


def grid_budgets(study: Path) -> list[float]:
    """The FLOPs that a comparison is read at: the smallest, middle and largest of the reference's grid."""
    flops = sorted({e["target"]["flops"] or e["achieved"]["flops"] for e in read_manifest(study)["cells"]})
    return [float(flops[round(q * (len(flops) - 1))]) for q in (0.0, 0.5, 1.0)]


def at_optimum(fit, costs, budgets, axis: str) -> list[float]:
    """What the reference's compute-optimal runs at ``budgets`` FLOPs cost on an axis."""
    if axis == "flops":
        return budgets
    best = [optimum(fit.law, fit.params, b, costs["flops"]) for b in budgets]
    at = [float(costs[axis](found["N"], found["D"])[0]) for found in best]
    if not np.isfinite(at).all():
        raise fits.FitError("the reference's law has no optimum at some of the budgets")
    return at


def account(tuned: Path, config: Mapping) -> dict:
    """What a model of the tuned size is: parameters, FLOPs a token, what decoding keeps."""
    cell = read_manifest(tuned)["cells"][0]["config"]
    built = cell["model"]
    entries = ledger(built, cell["data"]["seq"])
    return {
        "shape": f"{built['layers']} x {built['d_model']}",
        "params": entries.params_total,
        "params_active": entries.params_active,
        "flops_per_token": entries.train_flops_per_token(),
        "decode_bytes": entries.decode_bytes(config["context"]),
        "state_bytes": entries.state_bytes(),
    }


def save(folder: Path, result: Mapping, config: Mapping) -> list[Path]:
    """Writes comparison.json, .md and .html (one self-contained page); returns their paths."""
    from launch import show_families

    paths = [folder / f"comparison.{kind}" for kind in ("json", "md", "html")]
    write_json(paths[0], dict(result))
    write_whole(paths[1], show_families.as_markdown(result, config))
    write_whole(paths[2], show_families.as_html(result, config, folder))
    return paths


def run(path: Path, folder: Path | None, call) -> tuple[dict, dict, Path]:
    """Everything: (config, comparison, folder)."""
    config = load(path)
    folder = folder or Path("studies") / config["name"]
    folder.mkdir(parents=True, exist_ok=True)
    if config["equal"] is None:
        tuned = {family: train(config, folder, family, call) for family in config["families"]}
        return config, json.loads(json.dumps(compare(config, folder, tuned))), folder
    base = {f: study_of(config, f) for f in config["families"]}
    grids, dropped = equal_resources.grids(config, base)
    tuned = {family: train(config, folder, family, call, grids[family]) for family in config["families"]}
    families = {
        f: {"tuned": tuned[f], "runs": len(read_manifest(folder / f)["cells"])}
        | account(folder / f"{f}-tune", config)
        for f in equal_resources.in_order(config)
    }
    matched = equal_resources.compare(config, folder, {f: grids[f]["grid"]["cells"] for f in families})
    result = {"reference": config["reference"], "config": config["name"], "equal": config["equal"],
              "families": families, **matched, "dropped": dropped}  # fmt: skip
    return config, json.loads(json.dumps(result)), folder
