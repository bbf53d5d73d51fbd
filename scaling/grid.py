"""From a study config to a manifest: the resolved list of cells, and the dropped ones with reasons.

Nothing is trained here. The same config on the same data gives the same ids, in the same order.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
from collections.abc import Mapping
from pathlib import Path

from scaling import trainers
from scaling.branches import reference_tokens, with_trunks
from scaling.config import SCHEMA, ConfigError, canonical_json, cell_id, validate_cell, validate_section
from scaling.files import StudyError, read_json, write_json
from scaling.flops import ledger
from scaling.layers import least_vocab, with_vocab
from scaling.recipe import Recipe, batch_sequences, fitted_shape, hparams, recipe_from_config, round4, shape
from scaling.sentinels import sentinel_entries
from scaling.trainers import achieved
from scaling.upcycle import dense_cell, filled, with_shape_of

MANIFEST_SCHEMA = 1

UPCYCLED_TOLERANCE = 0.1
"""How far the N asked for may lie from that of an up-cycled cell, whose shape is the dense cell's."""


@dataclasses.dataclass(frozen=True)
class Target:
    """One wanted cell: N, and either D or C."""

    params: float
    tokens: float | None = None
    flops: float | None = None
    seed: int = 0
    overrides: tuple = ()

    def group(self) -> tuple:
        """Targets that are equal here share a trunk."""
        return self.params, self.seed, self.overrides

    def describe(self) -> dict:
        return {"params": self.params, "tokens": self.tokens, "flops": self.flops, "seed": self.seed}


def _hashable(value):
    return tuple(value) if isinstance(value, list) else value


def targets(study: Mapping) -> list[Target]:
    """The wanted cells of a study, in planned order."""
    grid, seeds = study["grid"], study["seeds"]
    if grid["kind"] == "list":
        return [
            Target(
                c["params"],
                c.get("tokens"),
                c.get("flops"),
                c.get("seed", seed),
                tuple(sorted((k, _hashable(v)) for k, v in c.get("set", {}).items())),
            )
            for c in grid["cells"]
            for seed in ([c["seed"]] if "seed" in c else seeds)
        ]
    if grid["kind"] == "product":
        return [Target(n, tokens=d, seed=s) for n in grid["params"] for d in grid["tokens"] for s in seeds]
    sizes = grid["params"]
    per_budget = sizes if isinstance(sizes[0], list) else [sizes] * len(grid["budgets"])
    return [
        Target(n, flops=c, seed=s)
        for c, ns in zip(grid["budgets"], per_budget, strict=True)
        for n in ns
        for s in seeds
    ]


def plan(study: Mapping, data: Mapping) -> dict:
    """Resolves a study into its manifest.

    Args:
      study: from ``scaling.study.validate_study``.
      data: what is known of the data set: ``fingerprint``, ``vocab``, ``unique_tokens`` (training
        tokens in one pass), ``heldout_tokens``, ``bytes_per_token``. Empty for a trainer's study.

    Returns:
      The manifest, plain JSON: ``study, revision, config, data, flops_convention, cells, dropped``.

    Raises:
      ConfigError: a config that cannot be run, or a grid with no cell left.
    """
    recipe = None
    if "trainer" not in study:
        recipe = recipe_from_config(study["recipe"])
        check_data(study, data)
        study = absolute_path(study)
    cells, dropped, seen = [], [], {}
    wanted = targets(study)
    groups = trunk_groups(study, recipe, wanted, data) if study["grid"]["trunks"] else {}
    for target in wanted:
        try:
            cell = resolve(study, recipe, target, data, groups.get(target.group()))
            reason = why_drop(study["grid"], target, cell, data, study["flops_convention"])
        except ConfigError as error:
            cell, reason = None, str(error)
        if reason is None:
            name = cell_id(cell)
            if name in seen:
                reason = f"resolves to the same cell as params {seen[name]:g}"
            else:
                seen[name] = target.params
                cells.append(entry(name, cell, target.describe()))
                continue
        dropped.append({"target": target.describe(), "reason": reason})
    if not cells:
        reasons = "; ".join(sorted({d["reason"] for d in dropped})[:3])
        raise ConfigError(f"grid leaves no cell to train: all {len(dropped)} were dropped ({reasons})")
    brackets = []
    if study["grid"]["sentinels"] is not None:

        def make(base: dict, field: str, multiple: float) -> dict | None:
            cell = sentinel_cell(recipe, base["config"], field, multiple)
            if cell is None or cell_id(cell) in seen:
                return None
            seen[cell_id(cell)] = base["target"]["params"]
            return entry(cell_id(cell), cell, base["target"])

        brackets = sentinel_entries(study["grid"]["sentinels"], cells, make)
    if study["grid"]["trunks"]:
        cells = with_trunks(cells, entry)
    cells = cells + brackets
    truths = trainers.truths_of([e["config"] for e in cells])
    return {
        "schema": MANIFEST_SCHEMA,
        "study": study["name"],
        "revision": 1,
        "config": study,
        "data": dict(data),
        "flops_convention": study["flops_convention"],
        "cells": cells,
        "dropped": dropped,
        **({"truths": truths} if truths else {}),
    }


def absolute_path(study: Mapping) -> dict:
    """A copy whose folders do not depend on where the command was typed."""
    config = copy.deepcopy(dict(study))
    for section, key in (("data", "path"), ("upcycle", "dense")):
        path = config.get(section, {}).get(key)
        if path and "://" not in path:
            config[section][key] = str(Path(path).absolute())
    return config


def check_data(study: Mapping, data: Mapping) -> None:
    """What every cell would meet at its start.

    Raises:
      ConfigError: a vocabulary smaller than the data's, or more held-out sequences than there are.
    """
    needed = least_vocab(study["model"], data["vocab"])
    vocab = study["model"].get("vocab", needed)
    if vocab < needed:
        raise ConfigError(
            f"model.vocab is {vocab} but the data has token ids up to {data['vocab'] - 1}; "
            f"it must be at least {needed}"
        )
    wanted = study["eval"].get("sequences", SCHEMA["eval"]["sequences"].default)
    seq = study["data"].get("seq", SCHEMA["data"]["seq"].default)
    there = (data["heldout_tokens"] - 1) // seq
    if wanted > there:
        raise ConfigError(
            f"eval.sequences is {wanted} but the held-out documents hold {there} of {seq} tokens; "
            f"it must be at most {there}"
        )


def sized(study: Mapping, recipe: Recipe, target: Target, data: Mapping) -> tuple[dict, int, float]:
    """A target's model section, its N and its D."""
    seq = study["data"].get("seq", 128)
    base = with_vocab(study["model"], data["vocab"])
    dense = {**study.get("upcycle", {}), **upcycle_of(target)}.get("dense")
    within = study["grid"].get("params_tolerance")
    if dense is not None:
        model = with_shape_of(dense_cell(dense)["model"], base)
    elif within is None:
        model = shape(recipe, base, target.params, seq)
    else:
        model = fitted_shape(recipe, base, target.params, seq, within)
    account = ledger(validate_section("model", model), seq)
    if dense is not None and abs(account.params_total / target.params - 1) > UPCYCLED_TOLERANCE:
        raise ConfigError(
            f"params is {target.params:g}; the dense cell of {dense} with these experts has "
            f"{account.params_total:,}, which is what must be asked for"
        )
    tokens = target.tokens
    if tokens is None:
        tokens = target.flops / account.train_flops_per_token(study["flops_convention"])
    return model, account.params_total, tokens


def upcycle_of(target: Target) -> dict:
    """Fields of ``upcycle`` that a listed cell sets for itself."""
    return {name.partition(".")[2]: value for name, value in target.overrides if name.startswith("upcycle.")}


def trunk_groups(study: Mapping, recipe: Recipe, wanted: list[Target], data: Mapping) -> dict[tuple, list]:
    """Every D of each trunk, by ``Target.group``."""
    groups: dict[tuple, list[float]] = {}
    for target in wanted:
        with contextlib.suppress(ConfigError):  # said where the target itself is resolved
            groups.setdefault(target.group(), []).append(sized(study, recipe, target, data)[2])
    return groups


def resolve(
    study: Mapping, recipe: Recipe | None, target: Target, data: Mapping, trunk: list[float] | None = None
) -> dict:
    """One target as a whole, validated cell config; ``trunk``: every D of the trunk that it shares."""
    if recipe is None:
        wanted = (target.params, target.tokens, target.flops, target.seed, target.overrides)
        return trainers.resolve(study, *wanted)
    seq = study["data"].get("seq", 128)
    model, params, tokens = sized(study, recipe, target, data)
    shared = trunk is not None and len(trunk) > 1
    reference = reference_tokens(study["grid"], trunk) if shared else tokens
    batch = batch_sequences(recipe, reference, seq)
    steps = max(1, round(tokens / (batch * seq)))
    hp = hparams(recipe, params, reference if shared else steps * batch * seq, batch * seq)
    if shared:  # the shortest branch must have warmed up too
        hp["warmup_steps"] = hparams(recipe, params, min(trunk), batch * seq)["warmup_steps"]
    cell = {
        "model": model,
        "data": {**study["data"], "seq": seq, "fingerprint": data["fingerprint"]},
        "optim": {**study["optim"], **{k: hp[k] for k in ("lr", "beta2", "weight_decay")}},
        "schedule": {**study["schedule"], "warmup_steps": hp["warmup_steps"]},
        "train": {**study["train"], "batch": batch, "steps": steps, "seed": target.seed},
        "eval": dict(study["eval"]),
        "precision": dict(study.get("precision", {})),
        "upcycle": dict(study.get("upcycle", {})),
    }
    for name, value in target.overrides:
        section, _, key = name.partition(".")
        cell[section][key] = list(value) if isinstance(value, tuple) else value
    return filled(cell) if cell["upcycle"].get("dense") else validate_cell(cell)


def sentinel_cell(recipe: Recipe, base: Mapping, field: str, multiple: float) -> dict | None:
    """A cell again at a multiple of its learning rate or batch (same D); None where it cannot be built."""
    cell = copy.deepcopy(dict(base))
    if field == "lr":
        cell["optim"]["lr"] = round4(base["optim"]["lr"] * multiple)
        return validate_cell(cell)
    seq, batch = base["data"]["seq"], round(base["train"]["batch"] * multiple)
    tokens = base["train"]["steps"] * base["train"]["batch"] * seq
    if batch < 1:
        return None
    steps = round(tokens / (batch * seq))
    hp = hparams(recipe, ledger(base["model"], seq).params_total, tokens, batch * seq)
    cell["train"] |= {"batch": batch, "steps": steps}
    cell["optim"] |= {k: hp[k] for k in ("lr", "beta2", "weight_decay")}
    cell["schedule"]["warmup_steps"] = hp["warmup_steps"]
    try:
        return validate_cell(cell)
    except ConfigError:  # too few steps for its warm-up
        return None


def why_drop(grid: Mapping, target: Target, cell: Mapping, data: Mapping, convention: str) -> str | None:
    """The reason to leave a cell out, or None."""
    got = achieved(cell)
    steps = cell["train"]["steps"]
    if steps < grid["min_steps"]:
        return f"{steps} steps, fewer than grid.min_steps = {grid['min_steps']}"
    for want, have, what in (
        (target.flops, got["flops_by_convention"][convention], "FLOPs"),
        (target.tokens, got["tokens"], "tokens"),
    ):
        if want is not None and abs(have / want - 1) > grid["tolerance"]:
            return (
                f"achieved {have:.4g} {what} for a target of {want:.4g}: "
                f"off by more than grid.tolerance = {grid['tolerance']:g}"
            )
    bounds = grid["tokens_per_param"]
    if bounds is not None and not bounds[0] <= got["ratio"] <= bounds[1]:
        return f"{got['ratio']:.3g} tokens per parameter, outside grid.tokens_per_param = {bounds}"
    epochs = epochs_of(cell, got["tokens"], data) if data else 1.0
    if epochs > grid["max_epochs"]:
        return f"{epochs:.3g} epochs, more than grid.max_epochs = {grid['max_epochs']:g}"
    return None


def epochs_of(cell: Mapping, tokens: float, data: Mapping) -> float:
    """Passes over its data that end with a cell; of an up-cycled one those of the dense cell count too."""
    passed = cell["upcycle"]["first_row"] * cell["data"]["seq"]
    return (passed + tokens) / unique_tokens(cell, data)


def unique_tokens(cell: Mapping, data: Mapping) -> int:
    """Training tokens in one pass of a cell: the data's, or those of its own ``data.unique_tokens``."""
    own, seq = cell["data"]["unique_tokens"], cell["data"]["seq"]
    return data["unique_tokens"] if own is None else min(data["unique_tokens"], (own - 1) // seq * seq)


def entry(name: str, cell: Mapping, target: Mapping) -> dict:
    """One cell of the manifest."""
    return {"id": name, "role": "cell", "target": dict(target), "achieved": achieved(cell), "config": cell}


def comparable(manifest: Mapping) -> str:
    """What is equal of two plans of one study, though the older lacks fields that came later."""
    cells = [{**entry, "config": validate_cell(entry["config"])} for entry in manifest["cells"]]
    return canonical_json({**manifest, "revision": 1, "cells": cells})


def write_manifest(study: Path | str, manifest: dict, grow: bool = False) -> str:
    """Puts a manifest into a study folder, once.

    A folder keeps one study: the same plan again changes nothing; a plan that holds every old cell
    and more becomes a new revision when ``grow`` is set; any other plan is refused.

    Returns:
      ``new``, ``same`` or ``grown``.

    Raises:
      StudyError: the folder holds another study, or cannot be written.
    """
    path = Path(study) / "manifest.json"
    if not path.exists():
        write_json(path, manifest)
        return "new"
    old = read_json(path)
    if comparable(old) == comparable(manifest):
        return "same"
    old_ids, new_ids = ({c["id"] for c in m["cells"]} for m in (old, manifest))
    if old["study"] != manifest["study"] or not old_ids <= new_ids:
        raise StudyError(
            f"{study} holds study {old['study']!r} with {len(old_ids)} cells, {len(old_ids - new_ids)} of "
            "them not in this config; plan into another folder (--study)"
        )
    if old_ids == new_ids:
        raise StudyError(
            f"{study} holds these same {len(old_ids)} cells, planned with other settings or another data "
            "folder; nothing was changed: go on with it, or plan into another folder (--study)"
        )
    if not grow:
        raise StudyError(
            f"{study} holds {len(old_ids)} cells of this study and the config now has {len(new_ids)}; "
            "add --grow to make it a new revision, or plan into another folder (--study)"
        )
    write_json(Path(study) / f"manifest.r{old['revision']}.json", old)
    write_json(path, {**manifest, "revision": old["revision"] + 1})
    return "grown"
