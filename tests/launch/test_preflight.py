"""Cells compiled for a TPU that is not here."""

import importlib.util
import json

import pytest
from click.testing import CliRunner

from launch import preflight
from launch.cli import cli
from scaling.config import ConfigError
from scaling.flops import memory_bytes
from scaling.program import program_key

needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed; `make aot` has it"
)


@pytest.fixture
def cells(study_file):
    return preflight.read_cells(study_file)


def test_cells_of_a_config_and_shapes_that_share_a_program(cells):
    assert len(cells) == len({c["id"] for c in cells}) > 1
    twin = json.loads(json.dumps(cells[0]))
    twin["config"]["optim"]["lr"] *= 2  # traced, not compiled in
    twin["config"]["train"]["steps"] += 5
    assert program_key(twin["config"]) == program_key(cells[0]["config"])
    twin["config"]["train"]["batch"] *= 2
    assert program_key(twin["config"]) != program_key(cells[0]["config"])


def test_an_unknown_target_is_named(cells):
    with pytest.raises(ConfigError, match="target is 'v9'; it must be one of v4"):
        list(preflight.preflight(cells, "v9"))


def test_kernels_are_read_off_the_program():
    call = ' = f32[8] custom-call(%a), custom_call_target="tpu_custom_call", op_name="jit(f)/pallas_call"'
    lines = [f"  {name}{call}" for name in ("%attention_forward.1", "ROOT %attention_forward.2", "%ssd_walk")]
    assert preflight.kernels_in("\n".join([*lines, "  %y = f32[8] add(%a, %b)"])) == [
        "attention_forward",
        "ssd_walk",
    ]
    assert preflight.kernels_in("add(%a)") == []


@pytest.mark.aot
@needs_libtpu
def test_each_shape_is_compiled_and_its_memory_is_more_than_its_state(cells):
    rows = list(preflight.preflight(cells[:2], "v5e"))
    assert [r["fits"] for r in rows] == [True] * len(rows)
    for row in rows:
        config = next(c["config"] for c in cells if c["id"] == row["cells"][0])
        # float32 parameters and two Adam moments are among the arguments, whatever the compiler does
        assert row["bytes"]["arguments"] >= 12 * row["params"]
        assert {"attention_forward", "attention_backward_q"} <= set(row["kernels"])
        assert row["flops_per_step"] > 6 * 0.5 * row["params"] * row["batch"] * row["seq"] > 0
        assert memory_bytes(config["model"], row["batch"], row["seq"]).total > 0


@pytest.mark.aot
@needs_libtpu
def test_what_does_not_fit_is_said_and_is_exit_code_1(cells, study_file, monkeypatch):
    monkeypatch.setitem(preflight.DEVICE_BYTES, "v6e", 1000)
    monkeypatch.setattr(preflight, "read_cells", lambda study: cells[:1])
    got = CliRunner().invoke(cli, ["preflight", str(study_file), "--target", "v6e"], standalone_mode=False)
    assert got.return_value == 1
    assert "no" in got.output and "v6e" in got.output
