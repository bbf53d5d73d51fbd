"""Cells that are not language models: a trainer names what is trained, and brings its own fields.

A cell of a trainer has the sections ``trainer`` (``name`` and the trainer's fields) and ``train`` (batch,
steps, seed). Everything else is shared: ids, manifests, claims, run table, fits. A trainer registers here
what the planner and the run table ask of it; what trains is imported by the worker alone. One sample counts
as one token.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable, Mapping
from typing import Any

from scaling.flops import CONVENTIONS, ledger
from scaling.formats import bits
from scaling.schema import REQUIRED, SCHEMA, ConfigError, Field, check_field, check_keys

TRAIN = {key: SCHEMA["train"][key] for key in ("batch", "steps", "seed")}


@dataclasses.dataclass(frozen=True)
class Account:
    """Parameters and training FLOPs of a trainer's cell, in the words of ``scaling.flops.Ledger``.

    Attributes:
      params: N. flops_per_token: of one sample, forward and backward; every convention is this one count.
    """

    params: int
    flops_per_token: float

    params_total = params_active = params_nonembedding = property(lambda self: self.params)
    params_embedding = 0

    def train_flops_per_token(self, convention: str = "exact") -> float:
        return self.flops_per_token

    def train_flops(self, tokens: float, convention: str = "exact") -> float:
        return self.flops_per_token * tokens


@dataclasses.dataclass(frozen=True)
class Trainer:
    """What the planner and the run table need to know of a trainer; light to import.

    Attributes:
      fields: of its section ``trainer``, ``name`` apart. size: the integer field that a target N sets.
      account, family: of a validated cell. check: raises ``ConfigError`` where fields cannot go together.
      run: "module:function", called with (cell, on_step, keep) -> list of evaluations {step, loss,
        loss_stderr}, or None where ``on_step(step)`` returned true. ``keep`` is a ``run_trainer.Keep``: what
        is saved of a long cell comes back when the cell is run again. Results depend on the cell alone.
      truths: "module:function", called with the validated cells of one family -> what is known of its law
        (see ``launch.frontiers``), or None.
    """

    fields: Mapping[str, Field]
    size: str
    account: Callable[[Mapping], Account]
    family: Callable[[Mapping], str]
    check: Callable[[Mapping], None]
    run: str
    truths: str | None = None


def _number(low: float, high: float, default: Any = REQUIRED) -> Field:
    return Field(float, lambda x: low < x < high, f"a number above {low:g} and below {high:g}", default)


def _check_plrf(cell: Mapping) -> None:
    own = cell["trainer"]
    if own["alpha"] + own["beta"] <= 0.5:
        raise ConfigError(
            f"trainer.beta is {own['beta']!r} with trainer.alpha = {own['alpha']!r}; their sum must be above "
            "1/2, or the loss has no limit as the dimension grows"
        )
    if own["dynamics"] == "equivalent" and own["draws"] != 1:
        raise ConfigError(
            f"trainer.draws is {own['draws']} with trainer.dynamics = 'equivalent', which has no draws; it "
            "must be 1"
        )


TRAINERS: dict[str, Trainer] = {
    "plrf": Trainer(
        fields={
            "alpha": _number(0, 4),
            "beta": _number(-1, 8),
            "d": Field(int, lambda x: x > 1, "an integer above 1"),
            "ambient": Field(float, lambda x: x >= 1, "a number of at least 1", 4.0),
            "rate": _number(0, 1, 0.5),
            "dynamics": Field(
                str,
                lambda x: x in ("sgd", "moments", "equivalent"),
                "one of 'sgd', 'moments', 'equivalent'",
                "sgd",
            ),
            "draws": Field(int, lambda x: 0 < x <= 4096, "an integer from 1 to 4096", 1),
        },
        size="d",
        # the paper's count is d a sample; six times that is C = 6 N D, as elsewhere
        account=lambda cell: Account(cell["trainer"]["d"], 6.0 * cell["trainer"]["d"]),
        family=lambda cell: "{dynamics} {alpha:g} {beta:g}".format(**cell["trainer"]),
        check=_check_plrf,
        run="scaling.theory.cells:run_plrf",
        truths="scaling.theory.cells:plrf_truths",
    ),
    "structured": Trainer(
        fields={
            "decay": _number(1, 8),
            "target": _number(1, 8),
            "modes": Field(int, lambda x: x > 0, "a positive integer"),
            "rate": _number(0, 1, 0.1),
            "noise": Field(float, lambda x: x >= 0, "zero or a positive number", 0.1),
            "dynamics": Field(str, lambda x: x in ("sgd", "moments"), "one of 'sgd', 'moments'", "sgd"),
            "draws": Field(int, lambda x: 0 < x <= 4096, "an integer from 1 to 4096", 1),
        },
        size="modes",
        account=lambda cell: Account(cell["trainer"]["modes"], 6.0 * cell["trainer"]["modes"]),
        family=lambda cell: "{dynamics} {decay:g} {target:g}".format(**cell["trainer"]),
        check=lambda cell: None,
        run="scaling.theory.cells:run_structured",
        truths="scaling.theory.cells:structured_truths",
    ),
}
"""By name; ``docs/theory.md`` says what each is."""


def of(cell: Mapping) -> Trainer | None:
    """The trainer of a cell or study; None for language models.

    Raises:
      ConfigError: an unknown name.
    """
    if "trainer" not in cell:
        return None
    section = cell["trainer"]
    name = section.get("name") if isinstance(section, Mapping) else None
    if name not in TRAINERS:
        known = ", ".join(map(repr, TRAINERS))
        raise ConfigError(f"trainer.name is {name!r}; it must be one of {known}")
    return TRAINERS[name]


def validate(cell: Mapping) -> dict:
    """A trainer's cell, checked, its defaults filled in.

    Raises:
      ConfigError: naming the field, the value and what would be valid.
    """
    trainer = of(cell)
    check_keys("the cell", cell, ["trainer", "train"])
    out = {"trainer": {"name": cell["trainer"]["name"]}, "train": {}}
    known = {"trainer": trainer.fields, "train": TRAIN}
    for section, fields in known.items():
        given = cell.get(section, {})
        check_keys(section, given, [*(["name"] if section == "trainer" else []), *fields])
        for key, field in fields.items():
            value = given.get(key, field.default)
            if value is REQUIRED:
                raise ConfigError(f"{section}.{key} is missing; it must be {field.says}")
            out[section][key] = check_field(f"{section}.{key}", field, value)
    trainer.check(out)
    return out


def validate_study(config: dict) -> dict:
    """The rest of a trainer's study config: ``trainer`` and ``train`` as every cell has them.

    Raises:
      ConfigError: as ``validate``; a size or steps set for the whole study, trunks or sentinels.
    """
    trainer = of(config)
    for key in ("trunks", "sentinels"):
        if config["grid"][key]:
            raise ConfigError(f"grid.{key} is {config['grid'][key]!r}; it is for language models alone")
    config.setdefault("train", {})
    for section, key in (("trainer", trainer.size), ("train", "steps"), ("train", "seed")):
        if key in config[section]:
            raise ConfigError(f"{section}.{key} is set for the whole study; it comes from the grid")
    return config


def resolve(
    study: Mapping, params: float, tokens: float | None, flops: float | None, seed: int, overrides: tuple
) -> dict:
    """A target of the grid as a validated cell; ``overrides``: (field, value) pairs on top.

    Raises:
      ConfigError: as ``validate``.
    """
    trainer = of(study)
    cell = {
        "trainer": {**study["trainer"], trainer.size: round(params)},
        "train": {"batch": 1, **study["train"], "steps": 1, "seed": seed},
    }
    for name, value in overrides:
        section, _, key = name.partition(".")
        cell[section][key] = value
    cell = validate(cell)
    if tokens is None:
        tokens = flops / trainer.account(cell).train_flops_per_token()
    cell["train"]["steps"] = max(1, round(tokens / cell["train"]["batch"]))
    return cell


def hashed(cell: Mapping) -> dict:
    """The sections of a cell that its id is taken over."""
    known = {"trainer": of(cell).fields, "train": TRAIN}
    return {
        section: {
            key: value
            for key, value in cell[section].items()
            if key == "name" or known[section][key].enters_id(value)
        }
        for section in known
    }


def account_of(cell: Mapping):
    """Parameters and FLOPs of any cell: its ``Ledger``, or its trainer's ``Account``."""
    trainer = of(cell)
    return ledger(cell["model"], cell["data"]["seq"]) if trainer is None else trainer.account(cell)


def tokens_per_step(cell: Mapping) -> int:
    """Tokens in a batch of any cell; of a trainer's, samples."""
    return cell["train"]["batch"] * (1 if "trainer" in cell else cell["data"]["seq"])


def columns_of(cell: Mapping) -> dict:
    """Columns of the run table that depend on what kind of cell it is."""
    trainer = of(cell)
    if trainer is None:
        operands = {f"{operand[:-1]}_bits": b for operand, b in bits(cell).items()}
        dense = {f"dense_{k}": cell.get("upcycle", {}).get(k) for k in ("cell", "tokens", "flops")}
        return {"family": cell["model"]["family"], "lr": cell["optim"]["lr"], **dense, **operands}
    return {"family": trainer.family(cell), "trainer": cell["trainer"]["name"]}


def truths_of(cells: list[Mapping]) -> dict[str, dict]:
    """What is known of the law of each family among a study's cells; without those of which nothing is."""
    families: dict[str, list] = {}
    for cell in cells:
        if of(cell) is not None and of(cell).truths is not None:
            families.setdefault(of(cell).family(cell), []).append(cell)
    known = {name: load(of(group[0]).truths)(group) for name, group in families.items()}
    return {name: truth for name, truth in known.items() if truth is not None}


def load(name: str) -> Callable:
    """The function named "module:function"."""
    module, _, function = name.partition(":")
    return getattr(importlib.import_module(module), function)


def achieved(cell: Mapping) -> dict:
    """What any cell really is: N under each convention, D, D/N, FLOPs under each convention."""
    account, tokens = account_of(cell), cell["train"]["steps"] * tokens_per_step(cell)
    return {
        "params_total": account.params_total,
        "params_active": account.params_active,
        "params_nonembedding": account.params_nonembedding,
        "params_embedding": account.params_embedding,
        "tokens": tokens,
        "ratio": tokens / account.params_total,
        "flops": account.train_flops(tokens, "exact"),
        "flops_by_convention": {c: account.train_flops(tokens, c) for c in CONVENTIONS},
    }


def refuse(cell: Mapping, what: str) -> None:
    """Raises ``ConfigError`` for a trainer's cell or study; ``what``: what is for language models alone."""
    if "trainer" in cell:
        raise ConfigError(f"trainer.name is {cell['trainer']['name']!r}; {what} is for language models alone")
