"""Experts out of a dense cell: its logits at first, a plan that knows the dense cost, an exact resume."""

import json
import shutil

import jax
import numpy as np
import pytest
from kills import Killed, files, kill_after
from tiny_study import tiny_cell, tiny_study

from scaling.branches import spent_flops
from scaling.config import ConfigError, cell_id, validate_cell, validate_section
from scaling.data import Stream, open_data
from scaling.files import CellFolder, StudyError, read_jsonl, write_json
from scaling.flops import ledger
from scaling.grid import plan
from scaling.models.lm import build
from scaling.models.upcycled import upcycled_params
from scaling.records import collect
from scaling.study import validate_study
from scaling.train import Execution, train
from scaling.upcycle import check_same, filled

pytestmark = pytest.mark.usefixtures("quick_compiles")
BASE = {"d_model": 16, "layers": 3, "heads": 2, "kv_heads": 2, "head_dim": 8, "ffn_dim": 24, "vocab": 31}
EXPERTS = {"family": "moe", "experts": 4, "capacity_factor": 2.0}
FACTS = {"vocab": 256, "unique_tokens": 300_000, "heldout_tokens": 10**4}


def section(**changes):
    return validate_section("model", {**BASE, **changes})


MIXED = {"family": "hybrid", "pattern": ["min_gru", "attention"]}


@pytest.mark.parametrize(
    ("dense", "changes"),
    [
        ({"tied": False}, {**EXPERTS, "active_experts": 3, "capacity_factor": 1.34}),
        # every other layer, of a stack that does not divide
        ({}, {**EXPERTS, "family": "hybrid", "pattern": ["attention", "attention+moe"]}),
        (MIXED, {**EXPERTS, **MIXED, "pattern": ["min_gru", "attention+moe", "min_gru+moe", "attention"]}),
    ],
)
def test_the_logits_at_the_start_are_the_dense_models(dense, changes):
    before, after = section(**dense), section(**{**dense, **changes})
    check_same(before, after, "d")
    (old, params), (new, fresh) = build(before, seed=0), build(after, seed=5)
    rng = np.random.default_rng(1)
    params = jax.tree.map(lambda x: np.float32(x + 0.1 * rng.standard_normal(x.shape)), params)
    made = jax.jit(lambda *trees: upcycled_params(before, after, *trees))(params, fresh)
    assert jax.tree.map(np.shape, made) == jax.tree.map(np.shape, fresh)
    tokens = rng.integers(0, 31, (2, 24))
    want, logits = np.asarray(jax.jit(old)(params, tokens)), jax.jit(new)
    # weights that sum to 1 but for float32, times the same numbers
    np.testing.assert_allclose(logits(made, tokens), want, atol=2e-5 * want.std(), rtol=0)
    assert np.abs(logits(fresh, tokens) - want).max() > want.std()


@pytest.fixture(scope="module")
def dense(corpus, tmp_path_factory):
    """A dense cell of 24 steps that is trained, and its folder."""
    folder = CellFolder(tmp_path_factory.mktemp("dense"), "d")
    # its rate is low at the end, so that nothing much happens between a step and the next
    cell = tiny_cell(corpus, model={"kv_heads": 2}, train={"steps": 24}, schedule={"decay_fraction": 0.5})
    cell["data"]["fingerprint"] = open_data(cell["data"]).fingerprint
    train(cell, folder, Execution(checkpoint_steps=6))
    return cell, folder


def upcycled(corpus, folder, **changes):
    cell = tiny_cell(corpus, model={"kv_heads": 2, **EXPERTS}, train={"steps": 16}, optim={"lr": 1e-3})
    cell["data"]["fingerprint"] = open_data(cell["data"]).fingerprint
    cell["upcycle"] = {"dense": str(folder.path), **changes.pop("upcycle", {})}
    for name, fields in changes.items():
        cell[name] |= fields
    return filled(cell)


def test_a_run_goes_on_from_the_dense_cell_and_a_killed_one_ends_as_a_whole_one(dense, corpus, tmp_path):
    (before, there), copied = dense, CellFolder(tmp_path, "copy")
    shutil.copytree(there.path, copied.path)
    cell = upcycled(corpus, copied)
    whole, broken = CellFolder(tmp_path, "whole"), CellFolder(tmp_path, "broken")
    result = train(cell, whole)
    assert result["status"] == "finished"
    with pytest.raises(Killed):
        train(cell, broken, Execution(checkpoint_steps=4), kill_after(9))
    shutil.rmtree(copied.path)  # what a killed run goes on from is its own
    train(cell, broken, Execution(checkpoint_steps=4))
    assert files(broken) == files(whole)
    losses = [r["loss"] for r in read_jsonl(whole.metrics) if "loss" in r]
    trained = [r["loss"] for r in read_jsonl(there.metrics) if "loss" in r]
    # where the dense cell ended, not where a new one begins; and on from there
    assert abs(losses[0] - np.mean(trained[-6:])) < 0.3 < 1.5 < trained[0] - losses[0]
    end = json.loads(there.result.read_text())["loss"]
    assert result["loss"] < end
    # the data are those that come after the dense cell's
    data = open_data(before["data"]).train
    own = Stream(data, 32, 4, 0, first_sample=cell["upcycle"]["first_row"])
    np.testing.assert_array_equal(own.rows_at(0), Stream(data, 32, 4, 0).rows_at(24))
    assert own.unique_tokens_at(16) == result["unique_tokens"] == result["tokens"] == 16 * 4 * 32


def test_a_dense_checkpoint_that_is_gone_or_another_is_said(dense, corpus, tmp_path):
    _, there = dense
    copied = CellFolder(tmp_path, "copy")
    shutil.copytree(there.path, copied.path)
    cell = upcycled(corpus, copied)
    other = {**cell, "upcycle": {**cell["upcycle"], "first_row": 4}}
    with pytest.raises(ConfigError, match="upcycle.first_row is 4; by .* it must be 96"):
        train(other, CellFolder(tmp_path, "other"))
    for path in (copied.checkpoints / "24").rglob("*"):
        if path.is_file() and path.name != "_CHECKPOINT_METADATA":
            path.write_bytes(b"")
    with pytest.raises(StudyError, match="has no whole checkpoint of step 24, from which"):
        train(cell, CellFolder(tmp_path, "c"))


def test_a_plan_takes_the_shape_and_knows_what_the_dense_cell_cost(dense, corpus, tmp_path):
    before, there = dense
    facts = {**FACTS, "fingerprint": before["data"]["fingerprint"]}
    n = ledger(section(**{**before["model"], **EXPERTS}), 32).params_total
    listed = [
        {"params": n, "tokens": 16 * 512, "set": {"upcycle.step": 18}},
        {"params": n, "tokens": 16 * 512},
        {"params": n, "tokens": 16 * 512, "seed": 1},
        {"params": 2 * n, "tokens": 16 * 512},
    ]
    study = tiny_study(corpus, batch_tokens=512)
    study["grid"] = {"kind": "list", "cells": listed, "min_steps": 10, "tolerance": 0.1}
    study["model"] |= EXPERTS
    study["upcycle"] = {"dense": str(there.path)}
    manifest = plan(validate_study(study), facts)
    assert [d["reason"] for d in manifest["dropped"]] == [
        f"params is {2 * n:g}; the dense cell of {there.path} with these experts has {n:,}, which is what "
        "must be asked for"
    ]
    found = [e["config"] for e in manifest["cells"]]
    of_a_token = ledger(before["model"], 32).train_flops_per_token("exact")
    for cell, step, first_row in zip(found, (18, 24, 24), (72, 96, 0), strict=True):
        assert {k: cell["model"][k] for k in ("d_model", "layers", "ffn_dim")} == {
            k: before["model"][k] for k in ("d_model", "layers", "ffn_dim")
        }
        own = cell["upcycle"]
        assert own["cell"] == cell_id(before) and own["step"] == step and own["tokens"] == step * 4 * 32
        assert own["flops"] == pytest.approx(own["tokens"] * of_a_token, rel=1e-12)
        assert own["first_row"] == first_row  # another seed is another order
        assert cell_id(cell) != cell_id(validate_cell({**cell, "upcycle": {}}))
    elsewhere = validate_cell({**found[0], "upcycle": {**found[0]["upcycle"], "dense": "/elsewhere"}})
    assert cell_id(elsewhere) == cell_id(found[0])
    write_json(tmp_path / "manifest.json", manifest)
    table = collect(tmp_path)
    assert table["dense_tokens"].tolist() == [18 * 128, 24 * 128, 24 * 128]
    assert table["dense_cell"].tolist() == [cell_id(before)] * 3
    np.testing.assert_allclose(table["dense_flops"], table["dense_tokens"] * of_a_token, rtol=1e-12)
    # those of the dense cell are in no other count
    own = manifest["cells"][0]
    assert spent_flops(own) == ledger(own["config"]["model"], 32).train_flops(own["achieved"]["tokens"])
    # passes over the data count what the dense cell has read of them
    few = {**facts, "unique_tokens": 24 * 128 + 100}
    with pytest.raises(ConfigError, match="epochs, more than grid.max_epochs"):
        plan(validate_study({**study, "grid": {**study["grid"], "cells": listed[1:2]}}), few)


def test_a_field_that_experts_share_with_a_mixer_is_the_dense_models():
    """``capacity_factor`` is free but where the dense model has read it for its own layers."""
    check_same(section(), section(**EXPERTS), "d")
    own = {"family": "hybrid", "pattern": ["selective_attention"], "capacity_factor": 2.0}
    experts = {**own, "pattern": ["selective_attention+moe"]}
    check_same(section(**own), section(**experts), "d")
    with pytest.raises(ConfigError, match="model.capacity_factor is 1.5; the dense cell d has 2.0"):
        check_same(section(**own), section(**{**experts, "capacity_factor": 1.5}), "d")


def test_what_cannot_be_up_cycled_is_named(dense, corpus, tmp_path):
    before, there = dense
    folder = {"dense": str(there.path)}

    def said(**changes):
        with pytest.raises(ConfigError) as error:
            upcycled(corpus, there, **changes)
        return str(error.value)

    name = cell_id(before)
    assert f"model.ffn_dim is 32; the dense cell {name} has 24" in said(model={"ffn_dim": 32})
    assert "model.tied is False; the dense cell" in said(model={"tied": False})
    hybrid = {"family": "hybrid", "pattern": ["min_gru", "attention+moe"]}
    assert "layer 0 is 'min_gru+swiglu'; the dense cell" in said(model=hybrid)
    assert "model.expert_fraction is 0.5 in an up-cycled cell" in said(model={"expert_fraction": 0.5})
    assert "model.shared_experts is 1 in an up-cycled cell" in said(model={"shared_experts": 1})
    assert "model.router is 'relu' in an up-cycled cell" in said(model={"router": "relu"})
    words = said(upcycle={"step": 7})
    assert "upcycle.step is 7" in words and "has no checkpoint of step 7" in words and "(18, 24)" in words
    assert "which has no config.json" in said(upcycle={"dense": str(tmp_path)})
    assert f"upcycle.cell is 'x'; {there.path} holds cell {name}" in said(upcycle={"cell": "x"})
    cell = tiny_cell(corpus, model={"kv_heads": 2})
    with pytest.raises(ConfigError, match="upcycle.cell is None and others of upcycle are not"):
        validate_cell({**cell, "upcycle": folder})
    with pytest.raises(ConfigError, match="with a model without experts"):
        filled({**cell, "upcycle": folder})
