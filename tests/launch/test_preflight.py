"""Cells compiled for TPUs that are not here; what needs no TPU compiler runs without it."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from tiny_study import tiny_cell

from launch.cli import cli
from launch.preflight import compile as compiler
from launch.preflight import run, search
from launch.preflight.cache import Cache
from launch.preflight.cells import Program, programs, read_cells
from launch.preflight.compile import compile_step, kernels_in, refused
from launch.preflight.hardware import GENERATIONS, parse_target, slice_of
from launch.preflight.plans import Choice, choices, mesh_for, moved_bytes, state_bytes
from launch.preflight.prices import read_prices
from launch.preflight.roofline import step_time
from pallas_kernels import aot
from scaling.config import ConfigError
from scaling.mesh import MeshShape
from scaling.program import program_key

ISOFLOP = Path(__file__).parents[2] / "experiments" / "isoflop.py"
needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed; `make aot` has it"
)


@pytest.fixture
def cells(study_file):
    return read_cells(study_file)[0]


def of(cell: dict) -> Program:
    return programs([{"id": "x", "config": cell}])[0]


@pytest.fixture
def wide(corpus):
    """A cell of five layers and four heads of 128, in bfloat16, that splits over sixteen devices."""
    model = dict(d_model=512, layers=5, heads=4, kv_heads=4, head_dim=128, ffn_dim=1024, vocab=2048)
    changes = dict(model=model | {"dtype": "bfloat16"}, data={"seq": 512}, train={"batch": 96})
    return of(tiny_cell(corpus, **changes))


def test_cells_that_share_a_program(cells):
    assert len(cells) == len({c["id"] for c in cells}) > 1
    twin = json.loads(json.dumps(cells[0]))
    twin["config"]["optim"]["lr"] *= 2  # traced, not compiled in
    twin["config"]["train"]["steps"] += 5
    assert program_key(twin["config"]) == program_key(cells[0]["config"])
    assert len(programs([cells[0], twin])[0].cells) == 2
    twin["config"]["train"]["batch"] *= 2
    assert program_key(twin["config"]) != program_key(cells[0]["config"])
    assert len(programs([cells[0], twin])) == 2


def test_a_config_with_a_vocabulary_is_planned_without_its_data():
    cells, said = read_cells(ISOFLOP)
    assert "the data was not looked at" in said
    sizes = [c["achieved"]["params_total"] for c in cells]
    assert 45e6 < min(sizes) < 55e6 and 6.3e9 < max(sizes) < 7.7e9
    assert len({c["target"]["flops"] for c in cells}) == 7
    assert {c["config"]["model"]["vocab"] for c in cells} == {128_256}
    assert all(c["config"]["data"]["seq"] == 4096 for c in cells)
    assert max(programs(cells), key=lambda p: p.params).batch % 256 == 0  # a row for each chip of a pod
    assert read_cells(ISOFLOP, ["seeds=[0,1]"])[0][1]["config"]["train"]["seed"] == 1


def test_a_config_without_a_vocabulary_needs_its_data(study_config, tmp_path):
    study_config["data"] |= {"source": "tokens", "path": str(tmp_path / "none")}
    path = tmp_path / "study.json"
    path.write_text(json.dumps(study_config))
    with pytest.raises(ConfigError, match="none"):
        read_cells(path)


def test_meshes_and_choices(wide):
    assert mesh_for(wide, parse_target("v5e-16")) == MeshShape(1, 16, 1)
    assert mesh_for(wide, parse_target("v5e-64")) == MeshShape(1, 32, 2)  # 96 rows, four heads
    assert mesh_for(wide, parse_target("v5e-256")) is None  # eight parts of four heads
    found = list(choices(wide, parse_target("v5e-16")))
    assert {(c.rows, c.accumulate) for c in found} == {(1, 6), (2, 3)}  # rows are powers of two that divide
    assert {c.remat for c in found} == {"none", "dots", "full"} and found[0].remat == "none"
    assert {c.remat for c in choices(wide, parse_target("v5e-16"), "full")} == {"full"}
    assert list(choices(wide, parse_target("v5e-256"))) == []
    assert state_bytes(wide, 4) == 12 * wide.params // 4


@pytest.fixture
def sparse(corpus):
    """A cell whose weights are those of sixteen wide experts, few of which a token takes."""
    model = dict(d_model=512, layers=4, heads=4, kv_heads=4, head_dim=128, ffn_dim=2048, vocab=2048)
    model |= dict(family="moe", experts=16, active_experts=1, capacity_factor=1.0, dtype="bfloat16")
    return of(tiny_cell(corpus, model=model, data={"seq": 256}, train={"batch": 32}))


def test_experts_are_split_where_their_weights_outweigh_their_tokens(corpus, sparse, wide):
    target = parse_target("v5e-16")
    found = list(choices(sparse, target))
    assert {c.mesh for c in found} == {MeshShape(1, 16 // n, 1, n) for n in (1, 2, 4, 8, 16)}
    # of each device's two rows 256 places a layer, against sixteen experts of 3 x 512 x 2048 weights
    whole, split = (Choice(MeshShape(1, 16 // n, 1, n), "none", 2, 1) for n in (1, 16))
    experts = 4 * 16 * 3 * 512 * 2048
    tokens = 4 * 2 * 256 * 512 * (4 * 2 * 15 / 16)  # there and back, forward and backward
    assert moved_bytes(sparse, whole) == 6 * sparse.params
    assert moved_bytes(sparse, split) == pytest.approx(6 * (sparse.params - experts) + tokens)
    assert found[0].mesh.expert == 16
    # as many tokens as there may be on a device, of narrow experts: exchanging them costs more
    model = sparse.model | {"ffn_dim": 64, "active_experts": 8}
    narrow = of(tiny_cell(corpus, model=model, data={"seq": 2048}, train={"batch": 128}))
    assert next(choices(narrow, target)).mesh.expert == 1
    assert {c.mesh.expert for c in choices(wide, target)} == {1}
    assert {c.mesh.expert for c in choices(sparse, parse_target("h100-16"))} == {1}


@pytest.mark.aot
@needs_libtpu
def test_split_experts_move_less_in_the_compiled_step_too(sparse):
    target, sent = slice_of("v5e", (2, 2)), {}
    for experts in (1, 4):
        choice = Choice(MeshShape(1, 4 // experts, 1, experts), "none", 8, 1)
        found = compile_step(sparse, target, choice, Cache(None))
        assert found["error"] is None and found["needed_bytes"] <= target.memory
        sent[experts] = step_time(0, 0, found["collectives"], target).network, moved_bytes(sparse, choice)
    ratio = [sent[4][i] / sent[1][i] for i in range(2)]
    # what the estimate is for, the order, and by how much about
    assert ratio[0] < 0.7 and 0.4 < ratio[1] / ratio[0] < 2.5


def test_kernels_are_read_off_the_program():
    call = ' = f32[8] custom-call(%a), custom_call_target="tpu_custom_call", op_name="jit(f)/pallas_call"'
    lines = [f"  {name}{call}" for name in ("%attention_forward.1", "ROOT %attention_forward.2", "%ssd_walk")]
    assert kernels_in("\n".join([*lines, "  %y = f32[8] add(%a, %b)"])) == ["attention_forward", "ssd_walk"]
    assert kernels_in("add(%a)") == []


def test_what_the_compiler_says_of_too_large_a_program():
    message = (
        "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. Used "
    )
    found = refused(message + "20.50G of 15.75G hbm. Exceeded hbm capacity by 4.75G.")
    assert found["needed_bytes"] == 20.5 * 2**30 and found["bytes"] is None
    early = (
        "the total memory required for HLO temporaries (16.18G) exceeds available HBM (15.75G). HLO module"
    )
    assert refused(early)["needed_bytes"] == 16.18 * 2**30
    assert refused("INTERNAL: something else\nmore")["error"] == "INTERNAL: something else"
    assert refused("INTERNAL: something else")["needed_bytes"] is None


def fake_compiler(monkeypatch, needed):
    """In place of the compiler: ``needed(target, choice)`` bytes, nothing else."""
    asked = []

    def compiled(program, target, choice, cache):
        asked.append((target.name, choice.remat, choice.rows))
        size = needed(target, choice)
        fits = size <= target.memory
        return {
            "bytes": {"arguments": size, "temporary": 0, "program": 0} if fits else None,
            "needed_bytes": size, "error": None if fits else "Ran out of memory", "kernels": ["attention"],
            "flops": 1e12, "memory_bytes": 1e9, "unknown_loops": [], "compiled_parts": 3, "cached": False,
            "collectives": [{"kind": "all-gather", "bytes": 1e6, "devices": 4, "spans": [2, 2], "times": 5}],
            "compile_seconds": 1.0,
        }  # fmt: skip

    monkeypatch.setattr(search, "compile_step", compiled)
    return asked


def test_the_smallest_slice_is_the_first_that_the_compiler_accepts(wide, monkeypatch):
    asked = fake_compiler(monkeypatch, lambda target, choice: 20 << 30 if target.chips < 4 else 10 << 30)
    found = search.smallest_slice(wide, parse_target("v5e-16"), Cache(None), say=lambda text: None)
    target, choice, result, tried = found
    assert target.name == "v5e-4" and result["needed_bytes"] == 10 << 30 and choice.remat == "none"
    assert [t["slice"] for t in tried] == ["v5e: 1 chip, 1x1, 1 host"]
    assert "needs 20.00 GiB a device" in tried[0]["why"]
    assert asked[0][0] == "v5e" and asked[-1] == ("v5e-4", "none", choice.rows)


def test_remat_is_taken_where_nothing_else_fits(wide, monkeypatch):
    fake_compiler(monkeypatch, lambda target, choice: (10 if choice.remat == "full" else 20) << 30)
    target, choice, _, tried = search.smallest_slice(wide, parse_target("v5e"), Cache(None), say=str)
    assert (target.name, choice.remat, tried) == ("v5e", "full", [])


def test_what_fits_nowhere_is_said_and_is_exit_code_1(cells, study_file, monkeypatch, tmp_path):
    fake_compiler(monkeypatch, lambda target, choice: target.memory + (3 << 30))
    monkeypatch.setattr(run.aot, "tpu_topology", lambda name: None)
    page = tmp_path / "page.md"
    options = ["preflight", str(study_file), "--target", "v6e", "--no-cache", "--markdown", str(page)]
    got = CliRunner().invoke(cli, options, standalone_mode=False)
    assert got.return_value == 1
    assert "3.00 GiB too much" in got.output and "v6e: 1 chip" in got.output
    assert "| no: 3.00 GiB too much |" in page.read_text()


def test_the_report_names_what_is_estimated(study_file, monkeypatch, tmp_path):
    fake_compiler(monkeypatch, lambda target, choice: 1 << 30)
    monkeypatch.setattr(run.aot, "tpu_topology", lambda name: None)
    prices = tmp_path / "prices.toml"
    prices.write_text('dated = "2030-01"\ncurrency = "EUR"\n[chip_hour]\nv5e = 2.0\n')
    options = ["preflight", str(study_file), "--target", "v5e-4", "--no-cache", "--prices", str(prices)]
    options += ["--set", "recipe.batch_tokens_exponent=0.0"]  # four rows: one a chip
    got = CliRunner().invoke(cli, [*options, "--json"], standalone_mode=False)
    report = json.loads(got.stdout)
    assert got.return_value == 0 and report["target"] == "v5e-4: 4 chips, 2x2, 1 host"
    last = report["rows"][-1]
    assert last["whole_target"] and last["chips"] == 4
    times = last["estimate"]
    assert times["compute"] == pytest.approx(1e12 / 197e12)
    assert times["memory"] == pytest.approx(1e9 / 0.819e12)
    assert times["network"] == pytest.approx(5 * 1e6 * 3 / 4 / 100e9)
    assert times["chip_hours"] == pytest.approx(times["step_seconds"] * last["steps"] * 4 / 3600)
    assert times["money"] == pytest.approx(2 * times["chip_hours"])
    assert times["mfu"] == pytest.approx(last["flops_per_step"] / (4 * 197e12 * times["step_seconds"]))
    assert report["totals"]["chip_hours"] == pytest.approx(
        sum(r["estimate"]["chip_hours"] for r in report["rows"] if not r["whole_target"])
    )
    shown = CliRunner().invoke(cli, options, standalone_mode=False).output
    assert "~MFU" in shown and "~EUR" in shown and "2030-01" in shown


def test_gpus_are_lowered_and_everything_is_an_estimate(study_file):
    got = CliRunner().invoke(
        cli,
        ["preflight", str(study_file), "--target", "h100-2", "--no-cache", "--json"],
        standalone_mode=False,
    )
    report = json.loads(got.stdout)
    assert "Nothing was compiled" in report["certainty"] and got.return_value == 0
    assert all(r["fits"] and r["bytes"] is None and r["chips"] == 1 for r in report["rows"])


@pytest.mark.parametrize("target", ["v9", "v5e-7"])
def test_an_unknown_target_is_named(study_file, target):
    with pytest.raises(ConfigError, match=f"target is '{target}'"):
        CliRunner().invoke(
            cli,
            ["preflight", str(study_file), "--target", target],
            standalone_mode=False,
            catch_exceptions=False,
        )


@pytest.mark.aot
@needs_libtpu
def test_each_shape_is_compiled_and_its_memory_is_more_than_its_state(cells, tmp_path):
    kept = Cache(tmp_path)
    rows = list(run.preflight(cells[:2], parse_target("v5e"), read_prices(), kept))
    assert [r["fits"] for r in rows] == [True] * len(rows)
    for row in rows:
        # float32 parameters and two Adam moments are among the arguments, whatever the compiler does
        assert row["bytes"]["arguments"] >= 12 * row["params"]
        assert {"attention_forward", "attention_backward_q"} <= set(row["kernels"])
        assert row["flops_per_step"] > 6 * 0.5 * row["params"] * row["batch"] * row["seq"] > 0
    again = list(run.preflight(cells[:2], parse_target("v5e"), read_prices(), kept))
    assert all(r["cached"] for r in again)
    assert [r["bytes"] for r in again] == [r["bytes"] for r in rows]


@pytest.mark.aot
@needs_libtpu
@pytest.mark.parametrize("shape", [(2, 2), (4, 4)])
def test_a_step_on_a_mesh(wide, shape):
    target = slice_of("v5e", shape)
    mesh = MeshShape(1, target.chips, 1)
    found = compile_step(wide, target, Choice(mesh, "none", 2, 3), Cache(None))
    assert found["error"] is None and found["unknown_loops"] == []
    # state is split over all devices, but for norms
    assert 12 * wide.params / target.chips <= found["bytes"]["arguments"] < 1.2 * 12 * wide.params / 4
    assert {"attention_forward", "linear_cross_entropy_forward"} <= set(found["kernels"])
    moved = run.by_kind(found["collectives"])
    # weights are gathered, in bfloat16, once at least in each part of the batch; a ring's share at the least
    assert sum(moved.values()) > 3 * 2 * wide.params / target.chips
    flops = wide.flops / wide.batch * 6 / 1  # of the six rows that each device has
    assert 0.8 * flops < found["flops"] < 2.2 * flops


@pytest.mark.aot
@needs_libtpu
def test_programs_that_differ_in_parts_alone_share_one(wide, tmp_path, monkeypatch):
    target = slice_of("v5e", (2, 2))
    mesh = MeshShape(1, 4, 1)
    kept = Cache(tmp_path)
    short = compile_step(wide, target, Choice(mesh, "full", 1, 3), kept)
    by_trips = compile_step(wide, target, Choice(mesh, "full", 1, 6), kept)
    assert by_trips["compiled_parts"] == 3 and by_trips["cached"]
    monkeypatch.setattr(compiler, "SHARED_PARTS", 6)
    whole = compile_step(wide, target, Choice(mesh, "full", 1, 6), kept)
    assert whole["compiled_parts"] == 6 and whole["flops"] > 1.5 * short["flops"]
    assert by_trips["flops"] == whole["flops"] and by_trips["collectives"] == whole["collectives"]
    assert by_trips["memory_bytes"] == pytest.approx(whole["memory_bytes"], rel=1e-3)
    assert by_trips["needed_bytes"] == pytest.approx(whole["needed_bytes"], rel=1e-3)


@pytest.mark.aot
@needs_libtpu
@pytest.mark.parametrize("name", [*GENERATIONS, "v5e-8", "v6e-16", "v4-64", "v5p-128", "tpu7x-8"])
def test_the_compiler_knows_every_slice_with_as_many_devices(name):
    target = parse_target(name)
    devices = aot.tpu_topology(target.topology).devices
    assert len(devices) == target.devices
    assert {tuple(d.coords[: len(target.shape)]) for d in devices} == set(np.ndindex(target.shape))


CONVOLUTION = {"causal_conv1d", "causal_conv1d_backward"}
SSD = {"ssd_forward_kernel", "ssd_backward_kernel"}
FAMILIES = {
    "griffin": (
        {"local_window": 128},
        {"linear_scan", "linear_scan_backward", "attention_forward"} | CONVOLUTION,
    ),
    "mamba2": ({}, SSD | CONVOLUTION),
    "gated_deltanet": ({}, {"gated_delta_rule_forward", "gated_delta_rule_backward"} | CONVOLUTION),
    "xlstm": ({}, SSD),
    "differential": ({}, {"attention_forward"}),
    "mamba": ({"layers": 4}, {"linear_scan", "linear_scan_backward"} | CONVOLUTION),
    "longhorn": ({"layers": 4}, {"linear_scan", "linear_scan_backward"} | CONVOLUTION),
    "min_gru": ({}, {"linear_scan", "linear_scan_backward"} | CONVOLUTION),
    "qlstm": ({}, {"linear_scan", "linear_scan_backward"} | CONVOLUTION),
    "moe": ({"expert_fraction": 0.5, "capacity_factor": 1.25}, {"attention_forward"}),
    "mixture_of_depths": ({"depth_capacity": 0.5}, {"attention_forward"}),
    "relu": (
        {"family": "moe", "router": "relu", "expert_fraction": 0.5, "capacity_factor": 1.25},
        {"attention_forward"},
    ),
    "monarch": ({}, {"attention_forward"}),
    "scout": (
        {"layers": 4},
        {"attention_forward", "attention_backward_q", "linear_scan", "linear_scan_backward"} | CONVOLUTION,
    ),
    "monarch_mixer": ({"cross_document": True}, CONVOLUTION),
    "masked diffusion": (
        {"family": "transformer", "objective": "masked_diffusion"},
        {"attention_forward", "linear_cross_entropy_forward"},
    ),
    "hybrid": ({"pattern": ["attention+memory", "min_gru", "slstm"]}, {"attention_forward", "linear_scan"}),
    "mosa": ({"family": "hybrid", "pattern": ["attention", "mosa"]}, {"attention_forward"}),
    "selective": (
        {"family": "hybrid", "pattern": ["mamba2", "selective_attention"], "local_window": 64},
        {"attention_forward"} | SSD | CONVOLUTION,
    ),
}


@pytest.mark.aot
@needs_libtpu
@pytest.mark.parametrize(
    ("family", "mesh"),
    [
        ("griffin", MeshShape()),
        ("moe", MeshShape(1, 2, 1, 2)),
        *((family, MeshShape(1, 2, 2)) for family in FAMILIES),
    ],
    ids=["griffin, one chip", "moe, experts split", *FAMILIES],
)
def test_every_family_compiles_for_v5e_with_its_kernels(corpus, family, mesh):
    """On one chip and on a mesh that splits rows and heads; kernels take their own part alone."""
    changes, kernels = FAMILIES[family]
    model = dict(d_model=256, layers=6, heads=2, kv_heads=2, head_dim=128, ffn_dim=512, vocab=512)
    model |= {"dtype": "bfloat16", "family": family} | changes
    program = of(tiny_cell(corpus, model=model, data={"seq": 512}, train={"batch": 8}))
    target = slice_of("v5e", (2, 2) if mesh.devices == 4 else (1, 1))
    found = compile_step(
        program, target, Choice(mesh, "none", 8 // (mesh.fsdp * mesh.expert), 1), Cache(None)
    )
    assert found["error"] is None and found["unknown_loops"] == []
    assert kernels <= set(found["kernels"])
    # tokens go to their experts and come back, in every layer and its backward pass
    moved = sum(c["times"] for c in found["collectives"] if c["kind"] == "all-to-all")
    assert mesh.expert == 1 or moved == 4 * model["layers"]
    flops = program.flops / mesh.devices
    # the ledger's exact count, against chunks and squares as the kernels compute them
    assert 0.7 * flops < found["flops"] < 2.0 * flops
