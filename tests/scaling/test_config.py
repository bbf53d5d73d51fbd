"""The cell config: defaults, errors that name the field, and ids."""

import copy
import re

import pytest

from scaling.config import SCHEMA, ConfigError, canonical_json, cell_id, validate_cell
from scaling.schema import Field


def cell(**changes):
    out = {
        "model": {"d_model": 32, "layers": 2, "heads": 4, "kv_heads": 2, "head_dim": 8, "ffn_dim": 64},
        "optim": {"lr": 1e-2},
        "schedule": {"warmup_steps": 5},
        "train": {"batch": 4, "steps": 100},
    }
    for name, value in changes.items():
        section, key = name.split("__")
        out.setdefault(section, {})[key] = value
    return out


def test_defaults_are_filled_in():
    filled = validate_cell(cell())
    for section, fields in SCHEMA.items():
        assert set(filled[section]) == set(fields)
    assert filled["optim"]["beta1"] == 0.9 and filled["data"]["source"] == "stdlib"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model__width": 3}, "model has an unknown key 'width'"),
        ({"model__d_modle": 3}, "did you mean 'd_model'"),
        ({"model__d_model": "32"}, r"model.d_model is '32' \(str\); it must be a positive integer"),
        ({"model__layers": 0}, r"model.layers is 0 \(int\); it must be a positive integer"),
        ({"model__layers": True}, "model.layers is True"),
        ({"model__heads": 3}, "heads x head_dim must equal d_model = 32"),
        ({"model__kv_heads": 3}, "model.kv_heads is 3; it must divide model.heads = 4"),
        ({"model__head_dim": 7}, "model.head_dim is 7"),
        ({"model__dtype": "float16"}, "one of 'float32', 'bfloat16'"),
        ({"optim__lr": -1.0}, r"optim.lr is -1.0 \(float\); it must be a positive number"),
        ({"optim__lr": float("nan")}, "optim.lr is nan"),
        ({"optim__beta1": 1.0}, "optim.beta1 is 1.0"),
        ({"train__steps": 5}, "schedule.warmup_steps is 5; it must be less than train.steps = 5"),
        ({"data__source": "text"}, "data.path is None"),
        ({"eval__sequences": 1}, "a standard error needs two"),
    ],
)
def test_errors_name_the_field(change, words):
    with pytest.raises(ConfigError, match=words):
        validate_cell(cell(**change))


def test_missing_field():
    broken = cell()
    del broken["optim"]["lr"]
    with pytest.raises(ConfigError, match="optim.lr is missing"):
        validate_cell(broken)


def test_id_depends_on_every_number_and_on_no_path():
    base = cell_id(validate_cell(cell()))
    assert re.fullmatch("[0-9a-f]{16}", base)
    assert cell_id(validate_cell(cell(optim__lr=1.0000001e-2))) != base
    assert cell_id(validate_cell(cell(train__seed=1))) != base
    assert cell_id(validate_cell(cell(data__path="/elsewhere"))) == base
    reordered = {k: dict(reversed(v.items())) for k, v in reversed(cell().items())}
    assert cell_id(validate_cell(reordered)) == base


def test_every_hashed_field_changes_the_id():
    base = validate_cell(cell())
    for section, fields in SCHEMA.items():
        for key, field in fields.items():
            changed = copy.deepcopy(base)
            changed[section][key] = "changed"
            assert (cell_id(changed) != cell_id(base)) == field.hashed, f"{section}.{key}"


def test_a_later_field_at_its_default_leaves_old_ids_alone(monkeypatch):
    old = cell_id(validate_cell(cell()))
    later = Field(int, lambda x: x > 0, "a positive integer", 3, later=True)
    monkeypatch.setitem(SCHEMA, "new", {"count": later})
    assert cell_id(validate_cell(cell())) == old
    assert cell_id(validate_cell({**cell(), "new": {"count": 3}})) == old
    assert cell_id(validate_cell({**cell(), "new": {"count": 4}})) != old


@pytest.mark.parametrize("value", [float("nan"), float("inf"), object(), {1: 2}, [{"a": {1, 2}}]])
def test_canonical_json_refuses_what_it_cannot_write(value):
    with pytest.raises(ConfigError):
        canonical_json({"x": value})


def test_id_is_stable():
    # a change here silently orphans every study folder in the world: raise SCHEMA_VERSION with it
    assert cell_id(validate_cell(cell())) == "ff44e0f5edb2edd8"
