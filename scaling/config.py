"""The cell config: its validation and its fingerprint.

A cell config is a plain nested mapping (sections of JSON values). ``scaling.schema.SCHEMA`` is the
single list of fields; ``validate_cell`` names the field, the value and what would be valid. The id
of a cell is a hash of the canonical JSON of every field that can change its numbers: file
paths cannot (the data's own fingerprint stands for them), remat and sharding must not, so
they are not part of the cell at all.
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
from collections.abc import Mapping
from typing import Any

from scaling import layers, trainers
from scaling.formats import WEIGHTS_ALONE
from scaling.schema import (
    COMPONENT_INHERITS,
    REQUIRED,
    SCHEMA,
    SCHEMA_VERSION,
    SYNTHETIC_SOURCES,
    ConfigError,
    check_field,
    check_keys,
)


def validate_cell(cell: Mapping) -> dict:
    """Checks a cell config and fills in the defaults.

    Args:
      cell: sections ``model, data, optim, schedule, train, eval, precision, upcycle`` as nested mappings; or
        ``trainer`` and ``train``, of a cell that is no language model (``scaling.trainers``).

    Returns:
      A new plain dict with every field of ``SCHEMA`` present, in schema order.

    Raises:
      ConfigError: an unknown section or key, a missing field, a wrong type or a value out of range.
    """
    if "trainer" in cell:
        return trainers.validate(cell)
    check_keys("the cell", cell, SCHEMA)
    out = {section: validate_section(section, cell.get(section, {})) for section in SCHEMA}
    if out["schedule"]["warmup_steps"] >= out["train"]["steps"]:
        raise ConfigError(
            f"schedule.warmup_steps is {out['schedule']['warmup_steps']}; "
            f"it must be less than train.steps = {out['train']['steps']}"
        )
    check_optimizer(out["optim"], out["schedule"])
    check_objective(out)
    if out["optim"]["name"] == "muon" and out["model"]["parametrization"] != "standard":
        raise ConfigError(
            f"optim.name is 'muon' with model.parametrization = {out['model']['parametrization']!r}; those "
            "rules are for Adam's updates, and Muon's have their own size already: use 'standard'"
        )
    check_precision(out)
    check_upcycle(out)
    check_blocks(out)
    return out


def check_objective(cell: Mapping) -> None:
    """Raises ``ConfigError`` where the evaluation is another objective's."""
    objective, evaluation = cell["model"]["objective"], cell["eval"]
    for key in ("probes", "block_threshold"):
        if objective == "masked_diffusion" and evaluation[key] != SCHEMA["eval"][key].default:
            raise ConfigError(
                f"eval.{key} is {evaluation[key]!r} with model.objective = 'masked_diffusion'; it is for "
                "models that predict the next token"
            )
    if objective == "next_token" and evaluation["draws"] != SCHEMA["eval"]["draws"].default:
        raise ConfigError(
            f"eval.draws is {evaluation['draws']} with model.objective = 'next_token', which does not read "
            "it; it is for 'masked_diffusion'"
        )


def check_optimizer(optim: Mapping, schedule: Mapping) -> None:
    """Raises ``ConfigError`` where the optimizer cannot go with its numbers or its schedule."""
    if optim["name"] != "schedule_free":
        return
    if schedule["name"] != "constant":
        raise ConfigError(
            f"schedule.name is {schedule['name']!r}; optim.name = 'schedule_free' averages instead of "
            "decaying and takes 'constant' (with warm-up) alone"
        )
    if optim["beta1"] == 0:
        raise ConfigError("optim.beta1 is 0; optim.name = 'schedule_free' divides by it and needs (0, 1)")


def check_blocks(cell: Mapping) -> None:
    """Raises ``ConfigError`` where evaluation in blocks is asked of a model that has no such attention."""
    evaluation, model = cell["eval"], cell["model"]
    threshold, choice = evaluation["block_threshold"], evaluation["block_choice"]
    given = [
        key
        for key in ("block", "block_choice", "block_divergence")
        if evaluation[key] != SCHEMA["eval"][key].default
    ]
    if threshold is None and given:
        raise ConfigError(
            f"eval.{given[0]} is {evaluation[given[0]]!r} without eval.block_threshold, which reads it"
        )
    if "block_divergence" in given and choice != "flexprefill":
        raise ConfigError(
            f"eval.block_divergence is {evaluation['block_divergence']} with eval.block_choice = {choice!r}, "
            "which does not read it; it is for 'flexprefill'"
        )
    in_order = layers.has(model, *set(layers.ATTENTION) - set(layers.NOT_IN_BLOCKS))
    if threshold is not None and (not in_order or layers.has(model, layers.ROUTED, *layers.NOT_IN_BLOCKS)):
        raise ConfigError(
            f"eval.block_threshold is {threshold!r} with model.family = {model['family']!r}; it must be None "
            "but for models with attention, none of whose layers choose tokens or see checkpoints alone"
        )


def check_precision(cell: Mapping) -> None:
    """Raises ``ConfigError`` where parameters stored in bfloat16 cannot go with the rest."""
    weights, scaling = cell["precision"]["weights"], cell["precision"]["weights_scaling"]
    if weights in WEIGHTS_ALONE and scaling == "block":
        raise ConfigError(
            f"precision.weights_scaling is 'block' with precision.weights = {weights!r}, whose scale is a "
            "mean; it must be 'tensor' or 'channel'"
        )
    if cell["precision"]["params"] == "float32":
        return
    if cell["model"]["dtype"] != "bfloat16":
        raise ConfigError(
            f"model.dtype is {cell['model']['dtype']!r}; "
            "precision.params = 'bfloat16' needs 'bfloat16' there too"
        )
    if cell["optim"]["name"] == "schedule_free":
        raise ConfigError(
            "optim.name is 'schedule_free'; it finds its averages as a difference of parameters and needs "
            "precision.params = 'float32'"
        )


def check_upcycle(cell: Mapping) -> None:
    """Raises ``ConfigError`` where a cell cannot start from the dense one that it names."""
    own, model = cell["upcycle"], cell["model"]
    if not any(own.values()):
        return
    for key in ("dense", "cell", "step", "tokens", "flops"):
        if own[key] is None:
            raise ConfigError(
                f"upcycle.{key} is None and others of upcycle are not; a plan fills them in from "
                "upcycle.dense (or scaling.upcycle.filled)"
            )
    if not layers.has(model, "moe"):
        raise ConfigError(f"upcycle.cell is {own['cell']!r} with a model without experts (a layer of 'moe')")
    for key, allowed, why in (
        ("router", ("chosen", "all"), "ReLU gates do not weigh copies to one whole"),
        ("expert_fraction", (1.0,), "every expert is a copy of the dense feed-forward"),
        ("shared_experts", (0,), "one that sees every token would count the dense feed-forward twice"),
    ):
        if model[key] not in allowed:
            raise ConfigError(
                f"model.{key} is {model[key]!r} in an up-cycled cell; it must be "
                f"{' or '.join(map(repr, allowed))}: {why}"
            )


def validate_section(section: str, given: Any) -> dict:
    """One section of a cell config, checked, with its defaults filled in.

    Raises:
      ConfigError: as ``validate_cell``.
    """
    fields = SCHEMA[section]
    if not isinstance(given, Mapping):
        raise ConfigError(f"{section} is {given!r}; it must be a mapping with keys {', '.join(fields)}")
    check_keys(section, given, fields)
    out = {}
    for key, field in fields.items():
        value = given.get(key, field.default)
        if value is REQUIRED:
            raise ConfigError(f"{section}.{key} is missing; it must be {field.says}")
        out[key] = check_field(f"{section}.{key}", field, value)
    if section == "model":
        check_model(out)
    if section == "data":
        check_data(out)
    return out


def check_data(data: Mapping) -> None:
    """Raises ``ConfigError`` where a source lacks what it needs, or is given what only another one reads."""
    source = data["source"]
    if source == "mixture":
        _check_mixture(data)
    elif data["components"] is not None:
        raise ConfigError(f"data.components is given with data.source = {source!r}; it is for 'mixture'")
    if source in ("text", "tokens") and not data["path"]:
        raise ConfigError(f"data.path is None; data.source = {source!r} needs a folder")
    for key in {key for keys in SYNTHETIC_SOURCES.values() for key in keys}:
        if key not in SYNTHETIC_SOURCES.get(source, ()) and data[key] != SCHEMA["data"][key].default:
            readers = " or ".join(repr(name) for name, keys in SYNTHETIC_SOURCES.items() if key in keys)
            raise ConfigError(
                f"data.{key} is {data[key]!r} with data.source = {source!r}, which does not read it; "
                f"it is for {readers}"
            )


def _check_mixture(data: Mapping) -> None:
    if data["components"] is None:
        raise ConfigError("data.components is None; data.source = 'mixture' needs a list of two or more")
    for key in ("path", "unique_tokens"):
        if data[key] is not None:
            raise ConfigError(
                f"data.{key} is {data[key]!r} with data.source = 'mixture'; give it to a component"
            )
    for i, component in enumerate(data["components"]):
        name = f"data.components[{i}]"
        known = ["weight", *(k for k in SCHEMA["data"] if k not in ("seq", "components", "fingerprint"))]
        check_keys(name, component, known)
        weight = component.get("weight")
        if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not 0 < weight < math.inf:
            raise ConfigError(f"{name}.weight is {weight!r}; it must be a positive number")
        if component.get("source") == "mixture":
            raise ConfigError(f"{name}.source is 'mixture'; a component must be a corpus of its own")
        path = component.get("path")
        if isinstance(path, str) and not path.startswith(("/", "~")) and "://" not in path:
            raise ConfigError(f"{name}.path is {path!r}; it must be absolute, or a URL")
        component_section(data, component)


def component_section(data: Mapping, component: Mapping) -> dict:
    """The whole ``data`` section of a mixture's component.

    Raises:
      ConfigError: as ``validate_section``.
    """
    given = {key: data[key] for key in COMPONENT_INHERITS}
    return validate_section("data", given | {k: v for k, v in component.items() if k != "weight"})


def check_model(model: Mapping) -> None:
    """Raises ``ConfigError`` where the shape's parts do not fit each other."""
    if model["heads"] * model["head_dim"] != model["d_model"]:
        raise ConfigError(
            f"model.heads is {model['heads']} with head_dim {model['head_dim']}; heads x head_dim must equal "
            f"d_model = {model['d_model']} (heads that divide the width)"
        )
    if model["heads"] % model["kv_heads"]:
        raise ConfigError(
            f"model.kv_heads is {model['kv_heads']}; it must divide model.heads = {model['heads']}"
        )
    _check_layers(model)
    name = model.get("parametrization", "standard")
    needed = {"standard": (), "mup": ("base_d_model",), "completep": ("base_d_model", "base_layers")}[name]
    read = needed + (() if name == "standard" else ("base_ffn_dim", "base_head_dim"))
    for key in ("base_d_model", "base_layers", "base_ffn_dim", "base_head_dim"):
        if model.get(key) is None and key in needed:
            raise ConfigError(
                f"model.{key} is None; model.parametrization = {name!r} needs a positive integer, that of "
                "the shape whose hyper-parameters were tuned"
            )
        if model.get(key) is not None and key not in read:
            raise ConfigError(
                f"model.{key} is {model[key]}; model.parametrization = {name!r} does not read it, so that it "
                "must be None"
            )


def _check_layers(model: Mapping) -> None:
    model = {key: field.default for key, field in SCHEMA["model"].items()} | dict(model)
    family, pattern = model["family"], model["pattern"]
    if (family == "hybrid") != (pattern is not None):
        raise ConfigError(
            f"model.pattern is {pattern!r} with model.family = {family!r}; 'hybrid' needs a pattern, and "
            "every other family has its own"
        )
    for i, text in enumerate(pattern or ()):
        try:
            layers.Layer.parse(text)
        except (ValueError, AttributeError) as error:
            said = error if isinstance(error, ValueError) else f"{text!r}; it must be a string"
            raise ConfigError(f"model.pattern[{i}] is {said}") from error
    for key, mixers in layers.READ.items():
        if model[key] != SCHEMA["model"][key].default and not layers.has(model, *mixers):
            raise ConfigError(
                f"model.{key} is {model[key]!r} with model.family = {family!r}, which does not read it; it "
                f"is for {' and '.join(map(repr, mixers))}"
            )
    for layer in layers.pattern(model):
        if not layers.causal(model) and (layer.routed or layer.mixer not in layers.BIDIRECTIONAL):
            raise ConfigError(
                f"model.objective is 'masked_diffusion' with a layer '{layer}', which cannot see both ways; "
                f"mixers that do, in layers that take every token, are "
                f"{', '.join(map(repr, layers.BIDIRECTIONAL))}"
            )
        if layer.mixer in layers.ACROSS_DOCUMENTS and not model["cross_document"]:
            raise ConfigError(
                f"model.cross_document is False with a layer '{layer}', whose convolution is as long as the "
                "row and cannot stop at a document's border; it must be True"
            )
    checks = {"mlstm": layers.key_dim, "moe": layers.expert_dim, "monarch": layers.monarch_dim}
    for name, check in checks.items():
        if layers.has(model, name):
            try:
                check(model)
            except ValueError as error:
                raise ConfigError(str(error)) from error
    if model["active_experts"] > model["experts"]:
        raise ConfigError(
            f"model.active_experts is {model['active_experts']}; it must be at most experts = "
            f"{model['experts']}"
        )
    relu = model["router"] == "relu"
    for key in ("balance_loss", "router_z_loss") if relu else ("router_l1", "router_l1_factor"):
        if model[key] != SCHEMA["model"][key].default:
            raise ConfigError(
                f"model.{key} is {model[key]!r} with model.router = {model['router']!r}, which does not read "
                f"it; it is for {repr('chosen') + ' and ' + repr('all') if relu else repr('relu')}"
            )
    if model["memory_top"] > model["memory_keys"]:
        raise ConfigError(
            f"model.memory_top is {model['memory_top']}; it must be at most memory_keys = "
            f"{model['memory_keys']}"
        )
    if model["kv_heads"] % layers.heads_multiple(model):
        raise ConfigError(
            f"model.kv_heads is {model['kv_heads']}; 'differential_attention' pairs them, so that it must "
            "be even"
        )
    if round(model["head_dim"] * model["rope_fraction"]) % 2 and layers.has(model, *layers.ATTENTION):
        raise ConfigError(
            f"model.rope_fraction is {model['rope_fraction']!r}; it must leave an even number of the "
            f"{model['head_dim']} channels of a head to turn (RoPE turns pairs)"
        )


def canonical_json(value: Any) -> str:
    """Canonical JSON: sorted keys, no spaces, shortest exact floats.

    Raises:
      ConfigError: a value that JSON cannot write exactly (NaN, infinities, arrays, objects).
    """

    def exact(v, where):
        if v is None or isinstance(v, (bool, int, str)):
            return v
        if isinstance(v, float):
            if not math.isfinite(v):
                raise ConfigError(f"{where} is {v!r}; a fingerprint takes finite numbers only")
            return v
        if isinstance(v, Mapping):
            for k in v:
                if not isinstance(k, str):
                    raise ConfigError(f"{where} has the key {k!r}; keys must be strings")
            return {k: exact(v[k], f"{where}.{k}") for k in v}
        if isinstance(v, (list, tuple)):
            return [exact(x, f"{where}[{i}]") for i, x in enumerate(v)]
        raise ConfigError(f"{where} is a {type(v).__name__}; it cannot be written to JSON exactly")

    return json.dumps(exact(value, "config"), sort_keys=True, separators=(",", ":"), allow_nan=False)


def cell_id(cell: Mapping) -> str:
    """The cell's id: 16 hex digits of SHA-256 over the canonical JSON of every hashed field."""
    if "trainer" in cell:
        return _digest(trainers.hashed(cell))
    hashed = {
        section: {
            k: cell[section][k] if field.content is None else field.content(cell[section][k])
            for k, field in fields.items()
            if field.enters_id(cell[section][k])
        }
        for section, fields in SCHEMA.items()
    }
    # a section of later fields alone, all of them at their defaults, is not there
    return _digest({k: v for k, v in hashed.items() if v})


def _digest(hashed: Mapping) -> str:
    text = canonical_json({"version": SCHEMA_VERSION, **hashed})
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def as_static(section: Mapping) -> tuple:
    """A section as a hashable, to be a static argument of ``jax.jit``; ``dict`` of it is a section again."""
    return tuple(sorted((k, tuple(v) if isinstance(v, list) else v) for k, v in dict(section).items()))


def to_plain(config: Any) -> Any:
    """A ``ConfigDict`` (or any nested mapping) as plain dicts and lists, copied."""
    if hasattr(config, "to_dict"):
        config = config.to_dict()
    if isinstance(config, Mapping):
        return {k: to_plain(v) for k, v in config.items()}
    if isinstance(config, (list, tuple)):
        return [to_plain(v) for v in config]
    return copy.copy(config)
