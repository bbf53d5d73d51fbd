"""Meshes: where arrays lie, and that numbers do not depend on how many devices or processes share a cell."""

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from click.testing import CliRunner
from jax.sharding import AbstractMesh
from jax.sharding import PartitionSpec as P
from tiny_study import tiny_cell, tiny_study

from launch.cli import cli
from scaling.config import ConfigError
from scaling.files import CellFolder, read_json
from scaling.mesh import (
    MeshShape,
    make_mesh,
    pad_rows,
    row_axes,
    row_parts,
    rows_with_padding,
    state_shardings,
)
from scaling.program import Static, state_shapes
from scaling.records import read_manifest
from scaling.train import Execution, train

pytestmark = pytest.mark.usefixtures("quick_compiles")
ROOT = Path(__file__).parents[2]
# Sums over the same float32 numbers in another order, grown by a dozen steps: losses of about 5 agree to some
# 1e-6 where measured.
SAME = {"rtol": 1e-5}


def abstract(replica=1, fsdp=1, tensor=1, expert=1):
    if expert == 1:
        return AbstractMesh((replica, fsdp, tensor), ("replica", "fsdp", "tensor"))
    return AbstractMesh((replica, fsdp, expert, tensor), ("replica", "fsdp", "expert", "tensor"))


def test_shapes_are_checked_by_name():
    assert MeshShape.parse("2,4,1") == MeshShape(2, 4, 1)
    assert MeshShape(2, 4, 1).devices == 8 and str(MeshShape(2, 4, 1)) == "2,4,1"
    assert MeshShape.parse("1,2,1,4") == MeshShape(fsdp=2, expert=4)
    assert MeshShape(1, 2, 1, 4).devices == 8 and str(MeshShape(1, 2, 1, 4)) == "1,2,1,4"
    for text in ("8", "1,2", "1,x,1", "1,-2,1", "1,1,1,1,1"):
        with pytest.raises(ConfigError, match="mesh is"):
            MeshShape.parse(text)
    with pytest.raises(ConfigError, match="mesh.fsdp is 0"):
        MeshShape(1, 0, 1)
    with pytest.raises(ConfigError, match="8 devices; this job has 1"):
        make_mesh(MeshShape(1, 8, 1), jax.devices()[:1])


def test_experts_are_whole_where_their_tokens_come_to(corpus):
    cell = tiny_cell(corpus, model={"d_model": 32, "heads": 4, "family": "moe", "shared_experts": 1})
    static = Static.of(cell)
    placed = state_shardings(abstract(1, 2, 2, expert=4), static, state_shapes(static))
    ffn = placed.params["blocks"]["ffn"]
    assert ffn["gate"].spec == P(None, "expert", "fsdp", "tensor")
    assert ffn["down"].spec == P(None, "expert", "tensor", "fsdp")
    # all else takes expert as more of fsdp
    assert ffn["router"].spec == P(None, ("fsdp", "expert"), None)
    assert ffn["shared"]["gate"].spec == P(None, ("fsdp", "expert"), "tensor")
    assert placed.params["embed"]["table"].spec == P("tensor", ("fsdp", "expert"))
    moments = {p[-2:]: s for p, s in specs_of(placed.opt_state).items()}
    assert moments["ffn", "gate"] == ffn["gate"].spec
    whole = state_shardings(abstract(1, 2, 2), static, state_shapes(static)).params["blocks"]["ffn"]
    assert whole["gate"].spec == P(None, None, "fsdp", "tensor")
    assert row_axes(abstract(1, 2, 2, expert=4)) == ("replica", "fsdp", "expert")
    with pytest.raises(ConfigError, match="mesh.expert is 3; it must divide model.experts = 8"):
        train(cell, CellFolder(corpus, "x"), Execution(mesh=MeshShape(expert=3)))
    with pytest.raises(ConfigError, match="mesh.expert is 2 for a model without experts"):
        MeshShape(expert=2).check(tiny_cell(corpus)["model"])


def test_rows_are_filled_up_to_equal_parts():
    assert row_parts(None) == 1 and row_parts(abstract(2, 4, 3)) == 8
    assert row_parts(abstract(2, 4, 3, expert=2)) == 16
    assert [rows_with_padding(n, 4) for n in (1, 4, 5)] == [4, 4, 8]
    batch = {"inputs": np.ones((3, 2), np.int32), "loss_mask": np.ones((3, 2), np.float32)}
    padded = pad_rows(batch, 4)
    assert padded["inputs"].shape == (4, 2) and padded["loss_mask"].sum() == 6
    assert pad_rows(batch, 3) is batch


@pytest.mark.parametrize("optimizer", ["adamw", "lion", "muon", "schedule_free"])
def test_optimizer_state_lies_as_its_parameter_and_heads_are_split_whole(corpus, optimizer):
    schedule = {"name": "constant"} if optimizer == "schedule_free" else {}
    cell = tiny_cell(
        corpus,
        model={"d_model": 32, "heads": 4, "kv_heads": 2, "tied": False},
        optim={"name": optimizer},
        schedule=schedule,
        train={"skip_spikes": True},
    )
    static = Static.of(cell)
    shapes = state_shapes(static)
    placed = state_shardings(abstract(1, 2, 4), static, shapes)
    mixer = placed.params["blocks"]["mixer"]
    assert mixer["q"].spec == P(None, "fsdp", "tensor")
    assert mixer["k"].spec == P(None, "fsdp", None)  # two key-value heads are not split in four
    assert placed.params["embed"]["table"].spec == P("tensor", "fsdp")
    assert placed.guard.losses.spec == P()
    # whatever in the optimizer's state is a matrix of the layers is split as that one
    by_name = {path[-2:]: spec for path, spec in specs_of(placed.params).items()}
    moments = [(p, s) for p, s in specs_of(placed.opt_state).items() if p[-2:] in by_name and s != P()]
    assert len(moments) >= 9 and all(spec == by_name[path[-2:]] for path, spec in moments)


def specs_of(shardings):
    """Names along the path to every sharding, and its spec."""
    leaves = jax.tree_util.tree_leaves_with_path(shardings)
    return {tuple(str(getattr(k, "key", k)) for k in path): s.spec for path, s in leaves}


def run(command, devices=1, **more):
    env = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT / "tests")}
    env["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={devices}"
    return subprocess.Popen([sys.executable, *map(str, command)], cwd=ROOT, env=env, **more)


@pytest.mark.slow
def test_one_two_four_and_eight_devices_give_the_same_losses_and_take_over_from_each_other(corpus, tmp_path):
    process = run(["-m", "tests.mesh_program", corpus, tmp_path], 8, stdout=-1, stderr=-1, text=True)
    out, errors = process.communicate()
    assert process.returncode == 0, errors[-3000:]
    got = json.loads(out.splitlines()[-1])
    assert list(got["devices"].values()) == [1, 2, 4, 8, 8]
    assert len(got["losses"]["alone"]) == 12
    for name in got["losses"]:
        np.testing.assert_allclose(got["losses"][name], got["losses"]["alone"], **SAME, err_msg=name)
        np.testing.assert_allclose(got["final"][name], got["final"]["alone"], **SAME, err_msg=name)
    for name, row in got["experts"].items():
        assert len(row) == 9
        np.testing.assert_allclose(row, got["experts"]["alone"], **SAME, err_msg=name)
    assert got["resumed_from"] == 8
    assert "full rematerialization" not in errors  # XLA's word for moving a whole array for want of a way
    assert len(set(got["digests"])) == 1
    assert max(got["same_start"]) < 1e-6  # one unit in the last place of weights below one
    assert got["part"] == [1, 4, 24] and "fsdp" in got["moments"]


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@pytest.mark.slow
def test_two_processes_train_what_one_does_and_one_takes_over_from_two(corpus, tmp_path):
    """Real processes joined over gloo: the first writes, both read their own rows."""
    config = tiny_study(corpus, budgets=(2e8,), params=(6e3,))
    (tmp_path / "tiny.json").write_text(json.dumps(config))
    planned = CliRunner().invoke(
        cli, ["plan", str(tmp_path / "tiny.json"), "--study", str(tmp_path / "two"), "--no-estimate"]
    )
    assert planned.exit_code == 0, planned.output
    shutil.copytree(tmp_path / "two", tmp_path / "one")
    worker = ["-m", "launch.worker"]
    pair = [
        run(
            [*worker, tmp_path / "two", "--distributed", f"127.0.0.1:{port},2,{i}", "--checkpoint-steps", "5"]
        )
        for port in [free_port()]
        for i in range(2)
    ]
    assert [p.wait() for p in pair] == [0, 0]
    assert run([*worker, tmp_path / "one"]).wait() == 0
    for entry in read_manifest(tmp_path / "one")["cells"]:
        one, two = (read_json(tmp_path / s / "cells" / entry["id"] / "result.json") for s in ("one", "two"))
        assert (one["status"], two["status"], two["devices"]) == ("finished", "finished", 2)
        np.testing.assert_allclose(two["loss"], one["loss"], **SAME)
        where = tmp_path / "two" / "cells" / entry["id"]
        (where / "result.json").unlink()  # as if killed after the last save: one process ends what two began
    assert run([*worker, tmp_path / "two"]).wait() == 0
    for entry in read_manifest(tmp_path / "one")["cells"]:
        one, two = (read_json(tmp_path / s / "cells" / entry["id"] / "result.json") for s in ("one", "two"))
        assert two["devices"] == 1
        np.testing.assert_allclose(two["loss"], one["loss"], **SAME)
