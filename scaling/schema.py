"""The fields of a cell config: their types, valid values and defaults, and the checks of a single field."""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Callable, Mapping
from typing import Any

from scaling import layers
from scaling.formats import FORMATS, SCALINGS, WEIGHTS_ALONE

SCHEMA_VERSION = 1
SHARED_FORMATS = tuple(name for name in FORMATS if name not in WEIGHTS_ALONE)
REQUIRED = object()
FILE_SOURCES = ("stdlib", "text", "tokens")
SYNTHETIC_SOURCES = {
    "markov": ("tokens", "vocab", "order", "concentration", "document"),
    "random_walk": ("tokens", "vocab", "degree", "zipf", "concentration", "document"),
    "grammar": ("tokens", "vocab", "depth", "branching", "rules", "concentration"),
}
"""Sources of known entropy rate, and the fields of ``data`` that each takes."""


class ConfigError(ValueError):
    """A config that cannot be run; the message names the field, the value and what is valid."""


@dataclasses.dataclass(frozen=True)
class Field:
    """One config field: type, test, the words for a valid value, the default (if any)."""

    kind: type
    valid: Callable[[Any], bool]
    says: str
    default: Any = REQUIRED
    optional: bool = False
    hashed: bool = True
    later: bool = False
    """Added after version 1: hashed only where it is not the default, so that older cells keep their ids."""

    content: Callable[[Any], Any] | None = None
    """What of a value is hashed, where it is not the whole."""

    def enters_id(self, value: Any) -> bool:
        """Whether a value of this field is part of the cell's id."""
        return self.hashed and not (self.later and value == self.default)


def _positive_int(default=REQUIRED, **kw) -> Field:
    return Field(int, lambda x: x > 0, "a positive integer", default, **kw)


def _positive(default=REQUIRED, **kw) -> Field:
    return Field(float, lambda x: x > 0, "a positive number", default, **kw)


def _fraction(default=REQUIRED, **kw) -> Field:
    return Field(float, lambda x: 0 <= x < 1, "a number in [0, 1)", default, **kw)


def _share(default=REQUIRED, **kw) -> Field:
    return Field(float, lambda x: 0 < x <= 1, "a number above 0, at most 1", default, **kw)


def _nonnegative(default=REQUIRED, **kw) -> Field:
    return Field(float, lambda x: x >= 0, "zero or a positive number", default, **kw)


def _choice(*names: str, default=REQUIRED, **kw) -> Field:
    return Field(str, lambda x: x in names, "one of " + ", ".join(map(repr, names)), default, **kw)


def _flag(default: bool, **kw) -> Field:
    return Field(bool, lambda x: True, "True or False", default, **kw)


def _count(default=REQUIRED, **kw) -> Field:
    return Field(int, lambda x: 0 <= x < 2**31, "an integer from 0 to 2^31 - 1", default, **kw)


def _without_paths(components: Any) -> Any:
    """Components as they are hashed: the data's fingerprint stands for their folders."""
    if not isinstance(components, list):
        return components
    return [{k: v for k, v in c.items() if k != "path"} for c in components]


COMPONENT_INHERITS = ("seq", "seed", "heldout_fraction")
"""Fields of ``data`` that a mixture's component takes from the mixture where it has none itself."""

SCHEMA: dict[str, dict[str, Field]] = {
    "model": {
        "family": _choice(*layers.FAMILIES, default="transformer"),
        "vocab": _positive_int(256),
        "d_model": _positive_int(),
        "layers": _positive_int(),
        "heads": _positive_int(),
        "kv_heads": _positive_int(),
        "head_dim": Field(int, lambda x: x > 0 and x % 2 == 0, "a positive even integer (RoPE turns pairs)"),
        "ffn_dim": _positive_int(),
        "tied": _flag(True),
        "qk_norm": _flag(True),
        "rope_theta": _positive(10_000.0),
        "norm_eps": _positive(1e-6),
        "logits_soft_cap": _positive(None, optional=True),
        "attention_soft_cap": _positive(None, optional=True),
        "local_window": _positive_int(None, optional=True),
        "cross_document": _flag(False),
        "dtype": _choice("float32", "bfloat16", default="float32"),
        "parametrization": _choice("standard", "mup", "completep", default="standard", later=True),
        "base_d_model": _positive_int(None, optional=True, later=True),
        "base_layers": _positive_int(None, optional=True, later=True),
        "base_ffn_dim": _positive_int(None, optional=True, later=True),
        "base_head_dim": _positive_int(None, optional=True, later=True),
        "objective": _choice(*layers.OBJECTIVES, default="next_token", later=True),
        # of families (docs/families.md)
        "pattern": Field(
            list,
            lambda x: len(x) > 0,
            "a list of layers such as 'rglru' or 'attention+geglu'",
            None,
            optional=True,
            later=True,
        ),
        "post_norm": _flag(False, later=True),
        "rope_fraction": Field(float, lambda x: 0 <= x <= 1, "a number from 0 to 1", 1.0, later=True),
        "expand": _positive_int(2, later=True),
        "state_dim": _positive_int(128, later=True),
        "conv_width": Field(int, lambda x: 1 < x <= 16, "an integer from 2 to 16", 4, later=True),
        "channel_state": _positive_int(16, later=True),
        "key_fraction": _share(0.5, later=True),
        "experts": _positive_int(8, later=True),
        "active_experts": _positive_int(2, later=True),
        "shared_experts": _count(0, later=True),
        "expert_fraction": _positive(1.0, later=True),
        "capacity_factor": Field(float, lambda x: x >= 1, "a number of at least 1", 1.5, later=True),
        "router": _choice("chosen", "all", "relu", default="chosen", later=True),
        "balance_loss": _nonnegative(0.01, later=True),
        "router_z_loss": _nonnegative(0.001, later=True),
        "router_l1": _positive(1e-8, later=True),
        "router_l1_factor": Field(float, lambda x: x > 1, "a number above 1", 1.2, later=True),
        "memory_keys": _positive_int(32, later=True),
        "memory_heads": _positive_int(4, later=True),
        "memory_top": _positive_int(16, later=True),
        "depth_capacity": _share(0.125, later=True),
        "attention_budget": _share(0.15, later=True),
        "sparse_heads": _positive_int(2, later=True),
        "head_capacity": _share(0.125, later=True),
        "budget_loss": _nonnegative(1.0, later=True),
        "monarch_blocks": _positive_int(4, later=True),
        "filter_dim": _positive_int(64, later=True),
        "segment_length": _positive_int(16, later=True),
    },
    "data": {
        "source": _choice(*FILE_SOURCES, *SYNTHETIC_SOURCES, "mixture", default="stdlib"),
        "path": Field(str, lambda x: bool(x), "a folder", None, optional=True, hashed=False),
        "seq": Field(int, lambda x: x > 1, "an integer above 1", 128),
        "heldout_fraction": Field(float, lambda x: 0 < x < 1, "a number strictly between 0 and 1", 0.05),
        "unique_tokens": _positive_int(None, optional=True),
        "seed": _count(0),
        "fingerprint": Field(str, lambda x: bool(x), "the data's content hash", None, optional=True),
        # of the synthetic sources (docs/data.md): train and held-out tokens together, token ids, and the rest
        "tokens": _positive_int(2**22, later=True),
        "vocab": Field(int, lambda x: 1 < x <= 2**20, "an integer from 2 to 2^20", 256, later=True),
        "order": Field(int, lambda x: 0 < x <= 16, "an integer from 1 to 16", 1, later=True),
        "degree": Field(float, lambda x: x >= 2, "a number of neighbours, 2 or above", 6.0, later=True),
        "zipf": Field(float, lambda x: 0 <= x <= 4, "a number from 0 to 4", 0.0, later=True),
        "concentration": Field(
            float, lambda x: 0.01 <= x <= 1e6, "a number from 0.01 to 1e6", 1.0, optional=True, later=True
        ),
        "document": Field(int, lambda x: x > 16, "an integer above 16", 1024, later=True),
        "depth": _positive_int(4, later=True),
        "branching": Field(int, lambda x: x > 1, "an integer above 1", 2, later=True),
        "rules": _positive_int(4, later=True),
        "components": Field(
            list,
            lambda x: len(x) > 1 and all(isinstance(c, Mapping) for c in x),
            "a list of two mappings or more, {weight, source, ...}",
            None,
            optional=True,
            later=True,
            content=_without_paths,
        ),
    },
    "optim": {
        "name": _choice("adamw", "lion", "muon", "schedule_free", default="adamw"),
        "lr": _positive(),
        "beta1": _fraction(0.9),
        "beta2": _fraction(0.95),
        "eps": _positive(1e-8),
        "weight_decay": _nonnegative(0.1),
        "grad_clip": _positive(1.0, optional=True),
        "momentum": _fraction(0.95, later=True),
        "update_rms": _positive(0.2, later=True),
    },
    "schedule": {
        "name": _choice("wsd", "cosine", "linear", "inverse_sqrt", "rex", "constant", default="wsd"),
        "warmup_steps": _count(),
        "decay_fraction": Field(float, lambda x: 0 < x <= 1, "a number in (0, 1]", 0.2),
        "final_fraction": _fraction(0.0),
        "decay": _choice("linear", "1-sqrt", default="linear", later=True),
    },
    "train": {
        "batch": _positive_int(),
        "steps": _positive_int(),
        "seed": _count(0),
        "z_loss": _nonnegative(0.0),
        "skip_spikes": _flag(False, later=True),
        "skip_window": Field(int, lambda x: x > 1, "an integer above 1", 128, later=True),
        "skip_sigma": _positive(6.0, later=True),
        # of a population: the cell at whose end this one's hyper-parameters took over
        "parent": Field(str, lambda x: len(x) > 0, "the id of a cell", None, optional=True, later=True),
    },
    "eval": {
        "sequences": Field(int, lambda x: x > 1, "an integer above 1 (a standard error needs two)", 256),
        "points": _positive_int(1),
        "probes": _flag(False, later=True),
        "block_threshold": _share(None, optional=True, later=True),
        "block": Field(int, lambda x: x > 0 and x % 8 == 0, "a positive multiple of 8", 128, later=True),
        "block_choice": _choice("xattention", "flexprefill", default="xattention", later=True),
        "block_divergence": Field(float, lambda x: 0 <= x <= 1, "a number from 0 to 1", 0.1, later=True),
        "draws": _positive_int(8, later=True),
    },
    "precision": {
        "params": _choice("float32", "bfloat16", default="float32", later=True),
        "rounding": _choice("stochastic", "nearest", default="stochastic", later=True),
        "weights": _choice(*FORMATS, default=None, optional=True, later=True),
        "activations": _choice(*SHARED_FORMATS, default=None, optional=True, later=True),
        "gradients": _choice(*SHARED_FORMATS, default=None, optional=True, later=True),
        "weights_scaling": _choice(*SCALINGS, default="tensor", later=True),
        "activations_scaling": _choice(*SCALINGS, default="tensor", later=True),
        "gradients_scaling": _choice(*SCALINGS, default="tensor", later=True),
        "block": _positive_int(32, later=True),
    },
    # of a cell that starts from a dense one (docs/families.md); a plan fills in all but the first
    "upcycle": {
        "dense": Field(
            str, lambda x: bool(x), "a cell's folder", None, optional=True, hashed=False, later=True
        ),
        "cell": Field(str, lambda x: bool(x), "the dense cell's id", None, optional=True, later=True),
        "step": _positive_int(None, optional=True, later=True),
        "tokens": _positive_int(None, optional=True, hashed=False, later=True),
        "flops": _positive(None, optional=True, hashed=False, later=True),
        "first_row": Field(int, lambda x: x >= 0, "zero or a positive integer", 0, later=True),
    },
}


def check_field(name: str, field: Field, value: Any) -> Any:
    """Returns ``value`` in the field's own type, or raises ``ConfigError`` naming it."""
    if value is None and field.optional:
        return None
    if field.kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    right_type = isinstance(value, field.kind) and (field.kind is bool or not isinstance(value, bool))
    finite = not isinstance(value, float) or math.isfinite(value)
    if not (right_type and finite and field.valid(value)):
        got = f"{value!r} ({type(value).__name__})"
        raise ConfigError(
            f"{name} is {got}; it must be {field.says}" + (" or None" if field.optional else "")
        )
    return value


def check_keys(name: str, given: Mapping, known: Mapping | list) -> None:
    """Raises ``ConfigError`` on the first key of ``given`` not in ``known``, with the nearest valid one."""
    for key in given:
        if key not in known:
            near = difflib.get_close_matches(str(key), list(known), n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ConfigError(f"{name} has an unknown key {key!r}{hint} Known keys: {', '.join(known)}")
