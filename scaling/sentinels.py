"""Sentinel brackets: small sweeps around the recipe's learning rate (and batch) at a few cells.

A law fitted to badly tuned cells is a law of the bad tuning. A bracket trains a chosen cell again at
multiples of its learning rate, or of its batch (with the recipe's hyper-parameters for that batch); what the
best of them gains over the cell says how far the rule is from the optimum there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from scaling.config import ConfigError

CELLS = ("cheapest", "sizes", "all")


def validate_sentinels(given) -> dict | None:
    """Checks ``grid.sentinels``: {lr: multiples, batch: multiples, cells: 'sizes'}; None for none.

    Raises:
      ConfigError: naming the field, the value and what would be valid.
    """
    if given is None:
        return None
    if not isinstance(given, Mapping) or not set(given) <= {"lr", "batch", "cells"}:
        raise ConfigError(f"grid.sentinels is {given!r}; it must be a mapping with keys lr, batch, cells")
    out = {"lr": [], "batch": [], "cells": "sizes", **given}
    for key in ("lr", "batch"):
        right = isinstance(out[key], list) and all(
            isinstance(x, (int, float)) and not isinstance(x, bool) and 0 < x < math.inf and x != 1
            for x in out[key]
        )
        if not right or len(set(out[key])) < len(out[key]):
            raise ConfigError(
                f"grid.sentinels.{key} is {out[key]!r}; it must be a list of different positive multiples, "
                "none of them 1, such as [0.5, 2]"
            )
    if not out["lr"] and not out["batch"]:
        raise ConfigError("grid.sentinels has neither lr nor batch; it must have at least one multiple")
    if out["cells"] not in CELLS:
        raise ConfigError(
            f"grid.sentinels.cells is {out['cells']!r}; it must be 'cheapest' (one cell), 'sizes' (the "
            "cheapest cell of every size) or 'all'"
        )
    return out


def bracketed(sentinels: Mapping, entries: Sequence[dict]) -> list[dict]:
    """The entries whose learning rate or batch is checked; those of the lowest seed alone."""
    lowest = min(e["config"]["train"]["seed"] for e in entries)
    cells = [e for e in entries if e["config"]["train"]["seed"] == lowest]
    cells.sort(key=lambda e: e["achieved"]["flops"])
    if sentinels["cells"] == "cheapest":
        return cells[:1]
    if sentinels["cells"] == "all":
        return cells
    first: dict[int, dict] = {}
    for entry in cells:
        first.setdefault(entry["achieved"]["params_total"], entry)
    return list(first.values())


def sentinel_entries(sentinels: Mapping, entries: Sequence[dict], make: Callable) -> list[dict]:
    """The bracket's cells.

    Args:
      sentinels: from ``validate_sentinels``. entries: the study's own cells.
      make: (entry, field, multiple) to a new entry, or None where it cannot be built.
    """
    out = []
    for entry in bracketed(sentinels, entries):
        for field in ("lr", "batch"):
            for multiple in sentinels[field]:
                made = make(entry, field, multiple)
                if made is not None:
                    about = {"of": entry["id"], "field": field, "multiple": multiple}
                    out.append({**made, "role": "sentinel", "sentinel": about})
    return out


def brackets(manifest: Mapping, loss_of: Callable[[str], tuple[float, float] | None]) -> list[dict]:
    """What the brackets of a study say.

    With two finished sides the optimum is the vertex of the parabola through losses against log multiple
    (least squares where there are more), held within the bracket; with one side, the better of the two.

    Args:
      manifest: of the study.
      loss_of: cell id to (loss, its standard error), or None where it has not finished.

    Returns:
      One dict a bracket: ``cell, params, tokens, field, multiples, losses, best`` (multiple of the rule's
      value at the optimum), ``excess`` (loss of the rule over the optimum's, as a share of it), ``stderr``
      (of that share, from the losses' own standard errors), ``edge`` (whether the optimum lies at the
      bracket's end, so that the rule may be further off than said).
    """
    by_id = {e["id"]: e for e in manifest["cells"]}
    groups: dict[tuple[str, str], list[dict]] = {}
    for entry in manifest["cells"]:
        if entry.get("role") == "sentinel":
            groups.setdefault((entry["sentinel"]["of"], entry["sentinel"]["field"]), []).append(entry)
    out = []
    for (base, field), members in groups.items():
        got = {1.0: loss_of(base)} | {m["sentinel"]["multiple"]: loss_of(m["id"]) for m in members}
        known = sorted((x, *v) for x, v in got.items() if v is not None)
        if got[1.0] is None or len(known) < 2:
            continue
        achieved = by_id[base]["achieved"]
        row = {"cell": base, "params": achieved["params_total"], "tokens": achieved["tokens"], "field": field}
        out.append(row | judge(*map(np.array, zip(*known, strict=True))))
    return out


GOOD_ENOUGH = 0.01
"""A rule that loses more than this share of the loss to a bracket's optimum is warned of: a law's own
residuals are of this size."""


def words(row: Mapping) -> tuple[str, bool]:
    """One bracket as a sentence, and whether it is a warning."""
    name = {"lr": "learning rate", "batch": "batch"}[row["field"]]
    where = f"N {row['params']:.3g}, D {row['tokens']:.3g}"
    excess, noise = f"{row['excess']:.2%}", f"± {row['stderr']:.2%}"
    tried = ", ".join(f"{m:g}" for m in row["multiples"])
    if row["edge"] and row["best"] != 1:
        return (
            f"at {where} the best of {tried} x the rule's {name} is {row['best']:g} x, the bracket's end: "
            f"the rule loses at least {excess} ({noise}) of the loss; widen the bracket, or tune the "
            "reference cell again"
        ), row["excess"] > max(GOOD_ENOUGH, 2 * row["stderr"])
    return (
        f"at {where} the rule's {name} is within {excess} ({noise}) of the bracket's optimum, which lies at "
        f"{row['best']:.2g} x of it (tried: {tried} x)"
    ), row["excess"] > max(GOOD_ENOUGH, 2 * row["stderr"])


def judge(multiples: np.ndarray, losses: np.ndarray, stderrs: np.ndarray) -> dict:
    """Where the optimum of one bracket lies and what the rule (multiple 1) loses to it."""
    x = np.log(multiples)
    rule = float(losses[multiples == 1][0])
    best, least = float(multiples[np.argmin(losses)]), float(losses.min())
    edge = bool(np.argmin(losses) in (0, len(losses) - 1))
    if len(x) > 2 and not edge:
        a, b, c = np.polyfit(x, losses, 2)
        vertex = -b / (2 * a) if a > 0 else x[np.argmin(losses)]
        if a > 0 and x[0] <= vertex <= x[-1]:
            best, least = float(np.exp(vertex)), min(float(c - b * b / (4 * a)), rule)
    return {
        "multiples": multiples.tolist(),
        "losses": losses.tolist(),
        "best": best,
        "excess": rule / least - 1,
        "stderr": float(math.sqrt(2) * np.mean(stderrs) / least),
        "edge": edge,
    }
