"""The study config: what a file in ``experiments/`` returns from ``get_config()``.

It holds what the cells share; ``scaling.grid`` and ``scaling.recipe`` fill in the rest. A study
config never names a device.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Mapping
from pathlib import Path

from scaling import trainers
from scaling.config import SCHEMA, ConfigError, check_field, check_keys, to_plain
from scaling.flops import CONVENTIONS
from scaling.recipe import for_parametrization, recipe_from_config
from scaling.sentinels import validate_sentinels

# Fields of a cell that the recipe decides; a study config may not set them, a listed cell may.
FROM_RECIPE = {
    "model": {"d_model", "layers", "heads", "kv_heads", "ffn_dim"},
    "data": {"fingerprint"},
    "optim": {"lr", "beta2", "weight_decay"},
    "schedule": {"warmup_steps"},
    "train": {"batch", "steps", "seed", "parent"},
    "eval": set(),
    "upcycle": {"cell", "tokens", "flops", "first_row"},
}

GRID_KEYS = {
    "kind": "'isoflop' (budgets x sizes), 'product' (sizes x tokens) or 'list' (cells)",
    "budgets": "isoflop: list of training FLOPs",
    "params": "isoflop, product: list of target N; isoflop may have one list a budget",
    "tokens": "product: list of D",
    "cells": "list: list of {params, tokens or flops, seed, set}",
    "tolerance": "drop a cell whose achieved FLOPs miss the target by more than this share (0.01)",
    "params_tolerance": "fit the feed-forward's width until N is within this share of its target (10 %, by "
    "width and depth alone)",
    "min_steps": "drop a cell of fewer updates (50)",
    "tokens_per_param": "drop a cell outside [low, high] D/N (no bounds)",
    "max_epochs": "drop a cell that passes over its data more often (1)",
    "trunks": "True: one constant-LR trunk a size and seed, every cell a cooldown that leaves it (False)",
    "trunk_tokens": "D that a trunk's hyper-parameters are taken for (the geometric mean of its D)",
    "sentinels": "brackets: {lr: multiples, batch: multiples, cells: 'cheapest', 'sizes' or 'all'} (none)",
}
GRID_DEFAULTS = {
    "tolerance": 0.01,
    "min_steps": 50,
    "max_epochs": 1.0,
    "tokens_per_param": None,
    "trunks": False,
    "trunk_tokens": None,
    "sentinels": None,
}
STUDY_KEYS = ("name", "grid", "recipe", "flops_convention", "seeds", *SCHEMA)
TRAINER_KEYS = ("name", "grid", "flops_convention", "seeds", "trainer", "train")
"""Of a study of a trainer's cells (``scaling.trainers``)."""


def load_study(path: Path | str, overrides: list[str] = ()) -> dict:
    """Reads a study config: a Python file with ``get_config()``, or a JSON file.

    Args:
      path: the file.
      overrides: ``section.key=value`` with a JSON value, applied on top.

    Raises:
      ConfigError: no such file, no ``get_config``, an error inside it, or a bad override.
    """
    config = read_config(path)
    for item in overrides:
        _override(config, item)
    return validate_study(config)


def read_config(path: Path | str) -> dict:
    """What a Python file's ``get_config()`` returns, or a JSON file holds, as plain values; not checked.

    Raises:
      ConfigError: no such file, no ``get_config``, an error inside it, or no mapping.
    """
    path = Path(path)
    if not path.exists():
        raise ConfigError(
            f"config {str(path)!r} does not exist; give a Python file with get_config(), or JSON"
        )
    if path.suffix == ".json":
        try:
            config = json.loads(path.read_text())
        except (ValueError, OSError) as error:  # not JSON, not UTF-8, a folder
            raise ConfigError(f"config {str(path)!r} is not valid JSON ({error})") from error
    else:
        config = _run_config(path)
    if not isinstance(config, Mapping):
        raise ConfigError(f"config {str(path)!r} holds a {type(config).__name__}; it must hold a mapping")
    return config


def _run_config(path: Path) -> dict:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None:
        raise ConfigError(f"config {str(path)!r} must end in .py or .json")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        raise ConfigError(f"config {str(path)!r} cannot be run: {type(error).__name__}: {error}") from error
    if not callable(getattr(module, "get_config", None)):
        raise ConfigError(f"config {str(path)!r} has no function get_config()")
    try:
        return to_plain(module.get_config())
    except (Exception, SystemExit) as error:
        raise ConfigError(f"get_config() of {str(path)!r} failed: {type(error).__name__}: {error}") from error


def _override(config: dict, item: str) -> None:
    name, equals, text = item.partition("=")
    if not equals:
        raise ConfigError(f"--set {item!r} must look like section.key=value")
    try:
        value = json.loads(text)
    except json.JSONDecodeError:
        value = text
    *sections, key = name.split(".")
    for section in sections:
        config = config.setdefault(section, {})
        if not isinstance(config, dict):
            raise ConfigError(f"--set {item!r}: {section!r} is not a section")
    config[key] = value


def validate_study(config: Mapping) -> dict:
    """Checks a study config and fills in its defaults.

    Raises:
      ConfigError: naming the field, the value and what would be valid.
    """
    if not isinstance(config, Mapping):
        raise ConfigError(
            f"get_config() returned {type(config).__name__}; it must return a ConfigDict or a dict"
        )
    config = to_plain(config)
    trainer = trainers.of(config)
    check_keys("the study", config, list(STUDY_KEYS if trainer is None else TRAINER_KEYS))
    name = config.get("name")
    if not isinstance(name, str) or not name or "/" in name:
        raise ConfigError(f"name is {name!r}; it must be a non-empty string without slashes")
    convention = config.setdefault("flops_convention", "exact")
    if convention not in CONVENTIONS:
        raise ConfigError(f"flops_convention is {convention!r}; it must be one of {', '.join(CONVENTIONS)}")
    seeds = config.setdefault("seeds", [0])
    if not isinstance(seeds, list) or not seeds or not all(_is_count(s) for s in seeds):
        raise ConfigError(f"seeds is {seeds!r}; it must be a non-empty list of integers from 0 to 2^31 - 1")
    if len(set(seeds)) < len(seeds):
        raise ConfigError(f"seeds is {seeds!r}; a seed is listed twice")
    if trainer is not None:
        sections = {"trainer": trainer.fields, "train": trainers.TRAIN}
        config["grid"] = validate_grid(config.get("grid"), sections)
        return trainers.validate_study(config)
    for section, fields in SCHEMA.items():
        _check_section(config, section, fields)
    config["grid"] = validate_grid(config.get("grid"))
    if not isinstance(config.get("recipe"), Mapping):
        raise ConfigError(
            "recipe is missing; it must hold the reference cell: params, tokens, lr, batch_tokens"
        )
    parametrization = config["model"].get("parametrization", "standard")
    config["recipe"] = for_parametrization(config["recipe"], parametrization)
    recipe_from_config(config["recipe"])
    schedule = config["schedule"].get("name", SCHEMA["schedule"]["name"].default)
    if config["grid"]["trunks"] and schedule != "wsd":
        raise ConfigError(
            f"grid.trunks is True with schedule.name = {schedule!r}; only 'wsd' cells share a trunk: any "
            "other schedule depends on its own D from the first step on"
        )
    return config


def _check_section(config: dict, section: str, fields: Mapping) -> None:
    if section not in config and all(field.later for field in fields.values()):
        return  # an older study's config stays as it was
    given = config.setdefault(section, {})
    if not isinstance(given, Mapping):
        raise ConfigError(f"{section} is {given!r}; it must be a mapping")
    check_keys(section, given, fields)
    for key, value in given.items():
        if key in FROM_RECIPE.get(section, ()):
            raise ConfigError(
                f"{section}.{key} is set for the whole study; it comes from the recipe or what it names "
                "(to pin it in one cell, use grid.kind = 'list' with set)"
            )
        given[key] = check_field(f"{section}.{key}", fields[key], value)
    if section == "model" and "head_dim" not in given:
        raise ConfigError("model.head_dim is missing; it must be a positive even integer")


def validate_grid(grid, sections: Mapping = SCHEMA) -> dict:
    """Checks the ``grid`` section; ``sections``: of a cell, whose fields a listed one may set.

    Raises:
      ConfigError: naming the field, the value and what would be valid.
    """
    if not isinstance(grid, Mapping):
        raise ConfigError(f"grid is {grid!r}; it must be a mapping with keys {', '.join(GRID_KEYS)}")
    check_keys("grid", grid, GRID_KEYS)
    grid = {**GRID_DEFAULTS, **grid}
    needs = {"isoflop": ("budgets", "params"), "product": ("params", "tokens"), "list": ("cells",)}
    if not isinstance(grid.get("kind"), str) or grid["kind"] not in needs:
        raise ConfigError(f"grid.kind is {grid.get('kind')!r}; it must be {GRID_KEYS['kind']}")
    for key in needs[grid["kind"]]:
        if not isinstance(grid.get(key), list) or not grid[key]:
            raise ConfigError(f"grid.{key} is {grid.get(key)!r}; it must be a non-empty {GRID_KEYS[key]}")
    for key in ("budgets", "tokens"):
        _check_numbers(f"grid.{key}", grid.get(key, []))
    params = grid.get("params", [])
    if params and all(isinstance(p, list) for p in params):
        if grid["kind"] != "isoflop":
            raise ConfigError(f"grid.params is {params!r}; one list a budget is for grid.kind = 'isoflop'")
        if not all(params) or len(params) != len(grid["budgets"]):
            raise ConfigError(
                f"grid.params has {len(params)} lists; it must have one for each of the "
                f"{len(grid['budgets'])} budgets, none of them empty"
            )
        for i, sizes in enumerate(params):
            _check_numbers(f"grid.params[{i}]", sizes)
    else:
        _check_numbers("grid.params", params)
    for key in ("tolerance", "max_epochs", "min_steps", "params_tolerance"):
        _check_numbers(f"grid.{key}", [grid[key]] if key in grid else [])
    bounds = grid["tokens_per_param"]
    if bounds is not None:
        if not isinstance(bounds, list) or len(bounds) != 2:
            raise ConfigError(f"grid.tokens_per_param is {bounds!r}; it must be [low, high] or None")
        _check_numbers("grid.tokens_per_param", bounds)
        if bounds[0] >= bounds[1]:
            raise ConfigError(f"grid.tokens_per_param is {bounds!r}; low must be below high")
    for i, cell in enumerate(grid.get("cells", [])):
        _check_listed(i, cell, sections)
    if not isinstance(grid["trunks"], bool):
        raise ConfigError(f"grid.trunks is {grid['trunks']!r}; it must be True or False")
    if grid["trunk_tokens"] is not None:
        _check_numbers("grid.trunk_tokens", [grid["trunk_tokens"]])
        if not grid["trunks"]:
            raise ConfigError(
                f"grid.trunk_tokens is {grid['trunk_tokens']!r} without grid.trunks; set grid.trunks = True"
            )
    grid["sentinels"] = validate_sentinels(grid["sentinels"])
    return grid


def _check_listed(i: int, cell, sections: Mapping) -> None:
    if not isinstance(cell, Mapping):
        raise ConfigError(f"grid.cells[{i}] is {cell!r}; it must be a mapping")
    check_keys(f"grid.cells[{i}]", cell, ["params", "tokens", "flops", "seed", "set"])
    if "params" not in cell or ("tokens" in cell) == ("flops" in cell):
        raise ConfigError(f"grid.cells[{i}] is {dict(cell)!r}; it needs params and one of tokens, flops")
    if not isinstance(cell.get("set", {}), Mapping):
        raise ConfigError(
            f"grid.cells[{i}].set is {cell['set']!r}; it must be a mapping such as {{'optim.lr': 0.01}}"
        )
    for name in cell.get("set", {}):
        section, _, key = str(name).partition(".")
        if key not in sections.get(section, ()):
            raise ConfigError(
                f"grid.cells[{i}].set has {name!r}; it must name a field of the cell, such as 'optim.lr'"
            )
    for key in ("params", "tokens", "flops"):
        if key in cell:
            _check_numbers(f"grid.cells[{i}].{key}", [cell[key]])


def _check_numbers(name: str, values) -> None:
    for value in values:
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not number or not 0 < value < 1e30:
            raise ConfigError(f"{name} holds {value!r}; every entry must be a positive number below 1e30")


def _is_count(x) -> bool:
    return isinstance(x, int) and not isinstance(x, bool) and 0 <= x < 2**31
