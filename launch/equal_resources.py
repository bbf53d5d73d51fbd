"""Families at equal memory, compute and data: the same total N, the same FLOPs C, the same unique tokens U.

At equal N a mixture of experts spends fewer FLOPs a token than the dense model, so that at equal C it sees
more tokens, and at equal U it sees them more often (Li et al. 2025, "Can Mixture-of-Experts Surpass Dense
LLMs Under Strictly Equal Resources?", arXiv 2506.12119). Every cell of the reference's grid gives one triple:
its N and C as they came out, and U, the fewest tokens that any of the families sees there, which that one
passes over once. The tuning cell is such a triple too.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from launch.planning import facts_of
from scaling.config import ConfigError
from scaling.grid import plan
from scaling.records import collect, read_manifest
from scaling.study import validate_grid

EQUAL = ("total",)
"""What ``equal`` may be: 'total', all parameters, which memory holds."""

ANY_EPOCHS = 1e6
"""Passes over U that a cell may take where the study's grid has no ``max_epochs``."""


def check(config: Mapping) -> None:
    """Raises ``ConfigError`` where a comparison's config cannot be matched."""
    equal, study = config["equal"], config["study"]
    if equal is None:
        if "params_tolerance" in config:
            raise ConfigError(
                f"params_tolerance is {config['params_tolerance']!r} without equal; set equal = 'total'"
            )
        return
    if equal not in EQUAL:
        raise ConfigError(f"equal is {equal!r}; it must be 'total' or left out")
    for name in config["families"]:
        for section in ("grid", "data", "flops_convention"):
            if section in config["families"][name]:
                raise ConfigError(
                    f"families.{name} has a {section} of its own; with equal = {equal!r} all share the "
                    "study's"
                )
    if study["grid"].get("trunks"):
        raise ConfigError(
            f"study.grid.trunks is True with equal = {equal!r}, where cells of one N have data of different "
            "size and share no trunk; it must be False"
        )
    if study["data"].get("source") == "mixture":
        raise ConfigError(
            f"study.data.source is 'mixture' with equal = {equal!r}, which cuts data.unique_tokens cell by "
            "cell; it must be one corpus"
        )
    within = config.get("params_tolerance", 0.02)
    if isinstance(within, bool) or not isinstance(within, (int, float)) or not 0 < within < 1:
        raise ConfigError(f"params_tolerance is {within!r}; it must be a number between 0 and 1")


def in_order(config: Mapping) -> list[str]:
    """The families' names, the reference first."""
    return [config["reference"], *(f for f in config["families"] if f != config["reference"])]


def grids(config: Mapping, studies: Mapping[str, dict], facts: Mapping | None = None):
    """Every family's grid of matched cells, and of its tuning cell.

    Args:
      config: a comparison's, checked. studies: each family's study at the recipe's own rate.
      facts: of the data, as ``scaling.grid.plan`` takes them; by default the data is opened.

    Returns:
      (grids, dropped): family to {``grid``, ``tune``}, both ``grid`` sections of kind 'list' whose cells
      stand in the same order for every family; and {target, family, reason} of what could not be matched.

    Raises:
      ConfigError: no cell of the grid, or not the tuning cell, can be matched.
    """
    reference = studies[config["reference"]]
    facts = facts or facts_of(reference)
    own_grid = {**reference["grid"], "sentinels": None}
    if "max_epochs" not in config["study"]["grid"]:
        own_grid["max_epochs"] = ANY_EPOCHS
    tune = {"params": config["tune"]["params"], "tokens": config["tune"]["tokens"]}
    shared = {
        k: own_grid[k] for k in ("tolerance", "min_steps", "max_epochs", "params_tolerance") if k in own_grid
    }
    tune_grid = {k: shared[k] for k in shared if k != "min_steps"}
    tune_grid = validate_grid({"kind": "list", "cells": [tune], **tune_grid})
    cells, dropped = match(config, studies, own_grid, facts)
    tuned, lost = match(config, studies, tune_grid, facts)
    for what, found, why in (("cell of the grid", cells, dropped), ("tuning cell", tuned, lost)):
        if not found[config["reference"]]:
            reasons = "; ".join(f"{d['family']}: {d['reason']}" for d in why[:3])
            raise ConfigError(f"equal is {config['equal']!r}: no {what} could be matched ({reasons})")
    out = {}
    for family in studies:
        fitted = {} if family == config["reference"] else {"params_tolerance": tolerance(config)}
        out[family] = {
            "grid": {"kind": "list", "cells": cells[family], **shared, **fitted},
            "tune": {**tune_grid, "cells": tuned[family], **fitted},
        }
    return out, dropped


def tolerance(config: Mapping) -> float:
    """How far a family's N may lie from the reference's, relative."""
    return config.get("params_tolerance", 0.02)


def match(config: Mapping, studies: Mapping[str, dict], grid: Mapping, facts: Mapping):
    """The reference's grid as triples (N, C, U): family to its listed cells, and what was dropped."""
    name = config["reference"]
    base = plan({**studies[name], "grid": grid}, facts)
    dropped = [{"family": name, **d} for d in base["dropped"]]
    seed = base["cells"][0]["target"]["seed"]
    triples = [e for e in base["cells"] if e["target"]["seed"] == seed]
    convention = studies[name]["flops_convention"]
    asked = {name: [wanted(e["target"]) for e in triples]}
    matched = [
        {"params": e["achieved"]["params_total"], "flops": e["achieved"]["flops_by_convention"][convention]}
        for e in triples
    ]
    seen = {name: {i: e["achieved"]["tokens"] for i, e in enumerate(triples)}}
    for family in studies:
        if family == name:
            continue
        asked[family], seen[family] = matched, {}
        limits = {"tokens_per_param": None, "params_tolerance": tolerance(config)}
        for i, cell in enumerate(matched):
            try:
                listed = {**grid, **limits, "kind": "list", "cells": [cell]}
                one = plan({**studies[family], "grid": listed}, facts)
            except ConfigError as error:
                dropped.append({"family": family, "target": cell, "reason": str(error)})
                continue
            seen[family][i] = one["cells"][0]["achieved"]["tokens"]
    out = {family: [] for family in studies}
    for i in range(len(triples)):
        if not all(i in tokens for tokens in seen.values()):
            continue
        unique = min(facts["unique_tokens"], *(tokens[i] for tokens in seen.values()))
        most = max(seen, key=lambda family, i=i: seen[family][i])
        if seen[most][i] > grid["max_epochs"] * unique:
            reason = (
                f"{seen[most][i] / unique:.3g} epochs, more than grid.max_epochs = {grid['max_epochs']:g}"
            )
            dropped.append({"family": most, "target": asked[most][i], "reason": reason})
            continue
        # one more than are targets: the last row's last target
        cut = {"data.unique_tokens": unique + 1}
        for family in studies:
            out[family].append({**asked[family][i], "set": cut})
    return out, dropped


def wanted(target: Mapping) -> dict:
    """A manifest's target as a listed cell."""
    return {k: target[k] for k in ("params", "tokens", "flops") if target.get(k) is not None}


def compare(config: Mapping, folder: Path, cells: Mapping[str, list]) -> dict:
    """What came of the matched cells, and how the families differ from the reference at each.

    Args:
      cells: family to its listed cells, in the same order.

    Returns:
      Plain JSON: ``triples``, a list of family to {params_total, params_active, flops, tokens,
      unique_tokens, epochs, losses (seed to loss), loss, difference}, and ``overall``, family to a difference
      over all triples. A difference is {mean, interval (95 %, or None), apart, pairs}.
    """
    runs = {family: read_runs(folder / family, own) for family, own in cells.items()}
    reference = config["reference"]
    triples = []
    for i in range(len(cells[reference])):
        triples.append({family: dict(runs[family][i]) for family in cells})
        base = triples[-1][reference]["losses"]
        for family, row in triples[-1].items():
            row["loss"] = float(np.mean(list(row["losses"].values()))) if row["losses"] else None
            if family != reference:
                both = [s for s in row["losses"] if s in base]
                row["difference"] = difference([row["losses"][s] - base[s] for s in both])
    means = {
        family: [t[family]["difference"]["mean"] for t in triples if t[family]["difference"]["pairs"]]
        for family in cells
        if family != reference
    }
    return {"triples": triples, "overall": {family: difference(m) for family, m in means.items()}}


def read_runs(study: Path, cells: list) -> list[dict]:
    """What a family's study has of every listed cell, in their order; losses of finished runs by seed."""
    table, manifest = collect(study), read_manifest(study)
    table = table[(table["final"]) & (table["role"] == "cell")].set_index("cell")
    out = [{"losses": {}} for _ in cells]
    places = {tuple(sorted(wanted(c).items())): i for i, c in enumerate(cells)}
    for entry in manifest["cells"]:
        if entry.get("role", "cell") != "cell":
            continue
        run, row = table.loc[entry["id"]], out[places[tuple(sorted(wanted(entry["target"]).items()))]]
        row |= {k: entry["achieved"][k] for k in ("params_total", "params_active", "tokens")}
        row["flops"] = entry["achieved"]["flops_by_convention"][manifest["flops_convention"]]
        if run["status"] == "finished":
            row |= {"unique_tokens": int(run["unique_tokens"]), "epochs": float(run["epochs"])}
            row["losses"][str(entry["target"]["seed"])] = float(run["loss"])
    return out


def difference(pairs: list[float]) -> dict:
    """The mean of paired differences of loss (family less reference) with Student's 95 % interval.

    No interval below two pairs; "apart" only where one leaves zero out.
    """
    from scipy import stats

    if not pairs:
        return {"mean": None, "interval": None, "apart": False, "pairs": 0}
    mean, interval = float(np.mean(pairs)), None
    if len(pairs) > 1:
        half = stats.t.ppf(0.975, len(pairs) - 1) * np.std(pairs, ddof=1) / np.sqrt(len(pairs))
        interval = [mean - float(half), mean + float(half)]
    apart = interval is not None and not interval[0] <= 0 <= interval[1]
    return {"mean": mean, "interval": interval, "apart": apart, "pairs": len(pairs)}
