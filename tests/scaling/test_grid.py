"""The planner: same config, same ids; every wanted cell is kept or dropped with a reason."""

import copy
import json

import pytest
from tiny_study import FACTS

from scaling.config import ConfigError, cell_id
from scaling.files import StudyError
from scaling.flops import ledger
from scaling.grid import plan, write_manifest
from scaling.study import load_study, validate_study


def make(config, **changes):
    config = copy.deepcopy(config)
    for name, value in changes.items():
        section, _, key = name.partition("__")
        if key:
            config.setdefault(section, {})[key] = value
        else:
            config[section] = value
    return plan(validate_study(config), FACTS)


@pytest.fixture
def config(study_config):
    study_config["data"]["path"] = "texts"
    return study_config


def test_snapshot(config):
    """A change of any number here changes what users' studies mean: do it knowingly."""
    manifest = make(config)
    got = [
        (c["id"], c["achieved"]["params_total"], c["achieved"]["tokens"], c["config"]["train"]["batch"])
        for c in manifest["cells"]
    ]
    assert got == SNAPSHOT


def test_same_config_same_manifest(config):
    assert json.dumps(make(config)) == json.dumps(make(config))


def test_achieved_within_tolerance_of_the_exact_count(config):
    manifest = make(config)
    for c in manifest["cells"]:
        model, seq, t = c["config"]["model"], c["config"]["data"]["seq"], c["config"]["train"]
        flops = ledger(model, seq).train_flops_per_token("exact") * t["steps"] * t["batch"] * seq
        assert abs(flops / c["target"]["flops"] - 1) <= 0.01
        assert cell_id(c["config"]) == c["id"]


def test_every_target_is_kept_or_dropped(config):
    manifest = make(config, grid__tokens_per_param=[2.0, 20.0])
    assert len(manifest["cells"]) + len(manifest["dropped"]) == 6
    assert any("outside grid.tokens_per_param" in d["reason"] for d in manifest["dropped"])
    assert all(2 <= c["achieved"]["ratio"] <= 20 for c in manifest["cells"])


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"grid__tolerance": 1e-5}, "off by more than grid.tolerance"),
        ({"grid__min_steps": 300}, "fewer than grid.min_steps"),
        ({"grid__max_epochs": 1e-5}, "more than grid.max_epochs"),
        ({"grid__params": [3e3, 3.01e3]}, "resolves to the same cell as params 3000"),
        ({"grid__params": [3e3, 10.0]}, "smallest shape"),
    ],
)
def test_drop_reasons(config, changes, words):
    try:
        reasons = [d["reason"] for d in make(config, **changes)["dropped"]]
    except ConfigError as error:
        reasons = [str(error)]
    assert any(words in r for r in reasons), reasons


def test_product_and_list_grids(config):
    product = make(config, grid={"kind": "product", "params": [3e3, 6e3], "tokens": [1e4, 4e4]})
    assert [c["target"]["tokens"] for c in product["cells"]] == [1e4, 4e4, 1e4, 4e4]
    cells = [
        {"params": 3e3, "tokens": 2e4, "seed": 7, "set": {"optim.lr": 0.5}},
        {"params": 3e3, "flops": 1e9},
    ]
    listed = make(config, grid={"kind": "list", "cells": cells}, seeds=[1, 2])["cells"]
    assert [c["config"]["train"]["seed"] for c in listed] == [7, 1, 2]
    assert listed[0]["config"]["optim"]["lr"] == 0.5


def test_seeds_multiply_the_grid(config):
    cells = make(config, seeds=[0, 1])["cells"]
    assert len(cells) == 12 and len({c["id"] for c in cells}) == 12


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"grids": {}}, "the study has an unknown key 'grids'; did you mean 'grid'"),
        ({"grid__budgets": [1e9, -1.0]}, "grid.budgets holds -1.0; every entry must be a positive number"),
        ({"grid__budgets": [0]}, "grid.budgets holds 0"),
        ({"grid__budgets": []}, "grid.budgets is \\[\\]"),
        ({"grid__budgets": ["1e9"]}, "grid.budgets holds '1e9'"),
        ({"grid__kind": "iso"}, "grid.kind is 'iso'"),
        ({"grid__params": [[1e3]]}, "grid.params has 1 lists"),
        ({"grid__budget": 1}, "did you mean 'budgets'"),
        ({"seeds": [0, 0]}, "a seed is listed twice"),
        ({"seeds": [-1]}, "seeds is \\[-1\\]"),
        ({"seeds": [2**40]}, "from 0 to 2"),
        ({"grid__budgets": [10**400]}, "grid.budgets holds"),
        ({"grid__kind": ["isoflop"]}, "grid.kind is"),
        ({"grid__tokens_per_param": [1, "b"]}, "grid.tokens_per_param holds 'b'"),
        ({"grid__tokens_per_param": [5, 2]}, "low must be below high"),
        ({"model__vocab": 100}, "model.vocab is 100 but the data has token ids up to 255"),
        ({"eval__sequences": 10**6}, "eval.sequences is 1000000"),
        ({"grid": {"kind": "list", "cells": [{"params": 1, "tokens": 1, "set": [1]}]}}, "must be a mapping"),
        ({"name": "a/b"}, "without slashes"),
        ({"model__d_model": 64}, "model.d_model is set for the whole study; it comes from the recipe"),
        ({"model__head_dim": 3}, "model.head_dim is 3"),
        ({"train__z_loss": -1.0}, "train.z_loss is -1.0"),
        ({"flops_convention": "6ND"}, "flops_convention is '6ND'"),
        ({"grid": {"kind": "list", "cells": [{"params": 1}]}}, "needs params and one of tokens, flops"),
    ],
)
def test_bad_configs(config, changes, words):
    with pytest.raises(ConfigError, match=words):
        make(config, **changes)


def test_heads_that_do_not_divide_the_width(config):
    cells = [{"params": 3e3, "tokens": 2e4, "set": {"model.heads": 3}}]
    with pytest.raises(ConfigError, match="model.heads is 3.*must equal d_model"):
        make(config, grid={"kind": "list", "cells": cells})


def test_manifest_is_immutable(config, tmp_path):
    first = make(config)
    assert write_manifest(tmp_path, first) == "new"
    assert write_manifest(tmp_path, make(config)) == "same"
    grown = make(config, grid__budgets=[4e8, 1.6e9, 3e9])
    with pytest.raises(StudyError, match="add --grow"):
        write_manifest(tmp_path, grown)
    assert write_manifest(tmp_path, grown, grow=True) == "grown"
    assert json.loads((tmp_path / "manifest.json").read_text())["revision"] == 2
    assert json.loads((tmp_path / "manifest.r1.json").read_text()) == first
    same = make(config, grid__tolerance=0.02, grid__budgets=[4e8, 1.6e9, 3e9])
    with pytest.raises(StudyError, match="these same"):
        write_manifest(tmp_path, same)
    with pytest.raises(StudyError, match="not in this config"):
        write_manifest(tmp_path, make(config, data__seq=16), grow=True)


def test_a_manifest_of_before_a_field_existed_is_the_same_plan(config, tmp_path):
    manifest = make(config)
    older = copy.deepcopy(manifest)
    for entry in older["cells"]:
        del entry["config"]["model"]["memory_top"], entry["config"]["upcycle"]
    write_manifest(tmp_path, older)
    assert write_manifest(tmp_path, manifest) == "same"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("x = 1", "has no function get_config"),
        ("def get_config(): return 3", "holds a int; it must hold a mapping"),
        ("def get_config(): return 1 / 0", "ZeroDivisionError"),
        ("import sys; sys.exit(0)", "cannot be run: SystemExit"),
        ("import math; math.tauu", "cannot be run: AttributeError"),
        ("import nothing_such", "cannot be run: ModuleNotFoundError"),
    ],
)
def test_bad_config_files(tmp_path, text, words):
    path = tmp_path / "study.py"
    path.write_text(text)
    with pytest.raises(ConfigError, match=words):
        load_study(path)
    with pytest.raises(ConfigError, match="does not exist"):
        load_study(tmp_path / "nowhere.py")


def test_overrides(study_file):
    settings = load_study(study_file, ["grid.budgets=[1e9]", "optim.beta1=0.8", "data.source=text"])
    assert settings["grid"]["budgets"] == [1e9] and settings["optim"]["beta1"] == 0.8
    with pytest.raises(ConfigError, match="must look like"):
        load_study(study_file, ["grid.budgets"])


SNAPSHOT = [
    ("4ff1bfe2de002c88", 2920, 21248, 4),
    ("6c823b35ea7415ba", 5512, 10368, 3),
    ("02673ffadd786216", 13144, 4800, 2),
    ("c72b44a871f517ff", 2920, 84864, 6),
    ("d30b6f04af98ae3a", 5512, 41472, 4),
    ("674ad206f4114940", 13144, 19296, 3),
]


@pytest.mark.parametrize("name", ["lr", "optim", "optim.rate", "optimizer.lr"])
def test_a_listed_cell_sets_fields_of_the_cell_alone(config, name):
    listed = {"kind": "list", "cells": [{"params": 3e3, "tokens": 2e4, "set": {name: {"lr": 0.01}}}]}
    with pytest.raises(ConfigError, match=rf"grid.cells\[0\].set has '{name}'; it must name a field"):
        make(config, grid=listed)
