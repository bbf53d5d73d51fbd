"""The ``search`` section of a study config: what is searched, how, and for how many FLOPs."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Mapping

from scaling.config import SCHEMA, ConfigError, check_keys
from scaling.halving import STRATEGIES, levels
from scaling.study import read_config, validate_study

KINDS = {
    "halving": "successive halving",
    "hyperband": "Hyperband",
    "deepening": "iterative-deepening Hyperband",
    "population": "population-based training",
    "law": "cells of a grid that narrow a law's exponent",
}
NUMBER, LIST = (int, float), (list, tuple)
KEYS = {
    "kind": "one of " + ", ".join(KINDS),
    "budget": "training FLOPs in all",
    "seed": "of what is drawn (0)",
    "params": "target N, unless the space has it",
    "tokens": "D of the longest run; deepening: a list, each eta times the one before",
    "least_tokens": "D at which configurations are first compared",
    "eta": "1/eta of them go on, eta times as long (2)",
    "configs": "halving: how many begin",
    "strategy": "deepening: " + ", ".join(STRATEGIES) + " (efficient)",
    "sampler": "random, grid or tpe (random)",
    "space": "{'optim': {'lr': {'low': .., 'high': .., 'log': True, 'points': of a grid} or [values]}}",
    "members": "population: how many train side by side",
    "generations": "population: how often they are compared",
    "share": "population: of the members that copy, and that are copied (0.25)",
    "factors": "population: by which what is copied is changed ([0.8, 1.25])",
    "quantity": "law: a, or N* (a)",
    "at": "law: FLOPs at which N* is wanted",
    "within": "law: half of the 95 % interval at which to stop (of log N*); None: spend the budget",
    "law": "law: its name (chinchilla)",
    "growth": "law: a round costs this share of what was spent before it (0.6)",
}
TUNING = ("params", "tokens", "least_tokens", "eta", "space", "sampler")
OF_KIND = {
    "halving": (*TUNING, "configs"),
    "hyperband": TUNING,
    "deepening": (*TUNING, "strategy"),
    "population": ("params", "tokens", "space", "members", "generations", "share", "factors"),
    "law": ("quantity", "at", "within", "law", "growth"),
}
DEFAULTS = {
    "seed": 0, "eta": 2, "sampler": "random", "strategy": "efficient", "share": 0.25, "factors": [0.8, 1.25],
    "quantity": "a", "at": None, "within": None, "law": "chinchilla", "growth": 0.6, "params": None,
}  # fmt: skip
SAMPLERS = ("random", "grid", "tpe")


def load_search(path, overrides=()) -> dict:
    """A study's settings with its ``search`` section, both checked.

    Raises:
      ConfigError: no such section, or a field of it or of the study; the message says what is valid.
    """
    config = read_config(path)
    if not isinstance(config.get("search"), Mapping):
        raise ConfigError(f"{path} has no section search; it must be a mapping with {', '.join(KEYS)}")
    search = validate_search(with_overrides(dict(config.pop("search")), overrides))
    if search["kind"] != "law":
        if "trainer" in config:
            raise ConfigError(
                f"search.kind is {search['kind']!r} for a study of a trainer, which has no recipe to vary; "
                "it must be 'law'"
            )
        grid = config.get("grid", {})
        if not isinstance(grid, Mapping) or set(grid) - {"max_epochs"}:
            raise ConfigError(
                f"grid is {grid!r} with search.kind = {search['kind']!r}; only 'law' searches a grid; the "
                "others read grid.max_epochs alone"
            )
        tokens = longest(search)
        config["grid"] = {
            **grid,
            "kind": "list",
            "cells": [{"params": search["params"] or 1.0, "tokens": tokens}],
            "trunks": True,
            # the recipe's rules are those at the first D called longest: a longer one later changes no cell
            "trunk_tokens": longest(search, first=True),
        }
    return {**validate_study(config), "search": search}


def with_overrides(search: dict, overrides) -> dict:
    """``search`` with ``key=value`` items (JSON values) on top."""
    for item in overrides:
        key, equals, text = item.partition("=")
        if not equals:
            raise ConfigError(f"--set {item!r} must look like key=value, a key of search")
        try:
            search[key.removeprefix("search.")] = json.loads(text)
        except json.JSONDecodeError:
            search[key.removeprefix("search.")] = text
    return search


def longest(search: Mapping, first: bool = False) -> float:
    """The largest D; ``first``: that of deepening's first pass."""
    tokens = search["tokens"]
    return float(tokens if isinstance(tokens, NUMBER) else tokens[0 if first else -1])


def validate_search(given: Mapping) -> dict:
    """Checks the section and fills in its defaults.

    Raises:
      ConfigError: naming the field, the value and what would be valid.
    """
    check_keys("search", given, KEYS)
    kind = given.get("kind")
    if kind not in KINDS:
        raise ConfigError(f"search.kind is {kind!r}; it must be {KEYS['kind']}")
    reads = ("kind", "budget", "seed", *OF_KIND[kind])
    for key in given:
        if key not in reads:
            raise ConfigError(f"search.{key} is given with search.kind = {kind!r}, which does not read it")
    out = {key: given.get(key, DEFAULTS.get(key)) for key in reads}
    optional = {"params", "at", "within"}
    for key in reads:
        if out[key] is None and key not in optional:
            raise ConfigError(f"search.{key} is missing; it must be {KEYS[key]}")
    for key in ("budget", "least_tokens", "eta", "growth", "share", "params", "at", "within"):
        if out.get(key) is not None:
            _positive(key, out[key])
    for key, least in (("configs", 1), ("members", 2), ("generations", 1), ("seed", 0)):
        if key in out and (isinstance(out[key], bool) or not isinstance(out[key], int) or out[key] < least):
            raise ConfigError(f"search.{key} is {out[key]!r}; it must be an integer of at least {least}")
    if kind == "law":
        return _check_law(out)
    _check_space(out)
    if kind == "population":
        return _check_population(out)
    return _check_tuning(out)


def _positive(key: str, value) -> None:
    if isinstance(value, bool) or not isinstance(value, NUMBER) or not 0 < value < math.inf:
        raise ConfigError(f"search.{key} is {value!r}; it must be a positive number")


def _check_law(out: dict) -> dict:
    if out["quantity"] not in ("a", "N*"):
        raise ConfigError(f"search.quantity is {out['quantity']!r}; it must be a or N*")
    if out["quantity"] == "N*" and out["at"] is None:
        raise ConfigError(
            "search.at is missing; search.quantity = 'N*' needs the FLOPs at which N* is wanted"
        )
    import fits  # here: the other kinds fit nothing
    from fits.adaptive import value_of

    try:
        law = fits.get_law(out["law"])
        value_of(law, out["quantity"], out["at"])
    except fits.FitError as error:
        raise ConfigError(f"search.law is {out['law']!r}: {error}") from error
    if set(law.variables) != {"N", "D"}:
        raise ConfigError(
            f"search.law is {out['law']!r}, in {', '.join(law.variables)}; it must be a law in N and D"
        )
    return out


def _check_tuning(out: dict) -> dict:
    tokens, eta = out["tokens"], out["eta"]
    if out["kind"] == "deepening":
        right = isinstance(tokens, LIST) and tokens
        for key, value in enumerate(tokens) if right else ():
            _positive(f"tokens[{key}]", value)
        pairs = itertools.pairwise(tokens) if right else ()
        if not right or any(abs(b / a / eta - 1) > 1e-6 for a, b in pairs):
            raise ConfigError(
                f"search.tokens is {tokens!r}; it must be a list in which each is search.eta = {eta} times "
                "the one before (append one to deepen)"
            )
        out["tokens"] = list(tokens)
    else:
        _positive("tokens", tokens)
    try:
        levels(out["least_tokens"], longest(out, first=True), eta)
    except ValueError as error:
        raise ConfigError(f"search.eta, search.least_tokens and search.tokens do not fit: {error}") from error
    if out["sampler"] not in SAMPLERS:
        raise ConfigError(f"search.sampler is {out['sampler']!r}; it must be one of {', '.join(SAMPLERS)}")
    if out.get("strategy", "efficient") not in STRATEGIES:
        raise ConfigError(
            f"search.strategy is {out['strategy']!r}; it must be one of {', '.join(STRATEGIES)}"
        )
    if out["sampler"] == "grid":
        for name, values in out["space"].items():
            if isinstance(values, Mapping) and values.get("points") is None:
                raise ConfigError(f"search.space[{name!r}] has no points; search.sampler = 'grid' needs them")
    return out


def _check_population(out: dict) -> dict:
    _positive("tokens", out["tokens"])
    if out["share"] > 0.5:
        raise ConfigError(f"search.share is {out['share']}; it must be at most 0.5")
    factors = out["factors"]
    if not isinstance(factors, LIST) or not factors:
        raise ConfigError(f"search.factors is {factors!r}; it must be a list of positive numbers")
    for value in factors:
        _positive("factors", value)
    for name in out["space"]:
        if not name.startswith("optim.") or name == "optim.name":
            raise ConfigError(
                f"search.space has {name!r}; with search.kind = 'population' only numbers of optim can "
                "change during training"
            )
    if out["params"] is None:
        raise ConfigError("search.params is missing; it must be the target N of every member")
    return out


def _flat(space) -> dict:
    """``{'optim': {'lr': ..}}`` as ``{'optim.lr': ..}``, which is taken too."""
    out = {}
    for name, values in space.items() if isinstance(space, Mapping) else ():
        nested = name in SCHEMA and isinstance(values, Mapping)
        out |= {f"{name}.{key}": v for key, v in values.items()} if nested else {name: values}
    return out


def _check_space(out: dict) -> None:
    space = out["space"] = _flat(out["space"])
    if not isinstance(space, Mapping) or not space:
        raise ConfigError(f"search.space is {space!r}; it must be {KEYS['space']}")
    for name, values in space.items():
        section, _, key = str(name).partition(".")
        field = SCHEMA.get(section, {}).get(key)
        if name != "params" and (section not in ("optim", "schedule", "train") or field is None):
            raise ConfigError(
                f"search.space has {name!r}; it must be params, or a field of optim, schedule or train"
            )
        if name in ("train.steps", "train.seed", "train.parent", "train.batch", "schedule.name"):
            raise ConfigError(f"search.space has {name!r}, which the search itself sets")
        if isinstance(values, LIST):
            if not values:
                raise ConfigError(f"search.space[{name!r}] is empty; it must hold at least one value")
            continue
        if not isinstance(values, Mapping) or not {"low", "high"} <= set(values):
            raise ConfigError(
                f"search.space[{name!r}] is {values!r}; it must be a list, or have low and high"
            )
        check_keys(f"search.space[{name!r}]", values, ["low", "high", "log", "points"])
        for end in ("low", "high"):
            _positive(f"space[{name!r}].{end}", values[end])
        if values["low"] >= values["high"]:
            raise ConfigError(f"search.space[{name!r}] is {dict(values)!r}; low must be below high")
    if out["params"] is None and "params" not in space:
        raise ConfigError("search.params is missing; it must be the target N, or be in search.space")
    if out["params"] is not None and "params" in space:
        raise ConfigError("search.params is given and search.space has params; it must be one of them")
