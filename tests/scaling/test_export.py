"""Export: an exported folder alone, run in NumPy, gives the model's logits and loss."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from click.testing import CliRunner
from hf_forward import forward, read_weights
from tiny_study import tiny_study

from launch.cli import cli
from launch.export import choose_cell, trained_params
from scaling import data
from scaling.checkpoint import Checkpoints
from scaling.claims import FolderStore, Observer, take
from scaling.config import SCHEMA, ConfigError, cell_id, validate_cell, validate_section
from scaling.data import heldout_batches
from scaling.export import byte_tokenizer, export_model, hf_config
from scaling.files import CellFolder, StudyError, read_json, write_json
from scaling.grid import plan, write_manifest
from scaling.lane import eval_batch
from scaling.models.lm import abstract_params, build
from scaling.optim import hyper_parameters
from scaling.program import Static, first_state
from scaling.schema import Field
from scaling.train import train

pytestmark = pytest.mark.usefixtures("quick_compiles")
MODEL = {"d_model": 32, "layers": 2, "heads": 4, "kv_heads": 2, "head_dim": 8, "ffn_dim": 40, "vocab": 97}
# with the study's Qwen3, tied and without a window, below; tests/oracles has every combination
CASES = {
    "Llama, untied, other theta and eps": (
        {"qk_norm": False, "tied": False, "kv_heads": 4, "rope_theta": 300.0, "norm_eps": 1e-3},
        "LlamaForCausalLM",
    ),
    "Mistral": ({"qk_norm": False, "local_window": 5}, "MistralForCausalLM"),
    "Qwen3, window, one key-value head, CompleteP": (
        {
            "local_window": 5,
            "kv_heads": 1,
            **dict(parametrization="completep", base_d_model=24, base_layers=3),
        }
        | {"base_head_dim": 6},
        "Qwen3ForCausalLM",
    ),
}
TOKENS = np.random.default_rng(3).integers(0, MODEL["vocab"], (2, 13))


def make_cell(**model):
    return validate_cell(
        {
            "model": {**MODEL, **model},
            "data": {"source": "tokens", "path": "elsewhere"},
            "optim": {"lr": 1e-2},
            "schedule": {"warmup_steps": 3},
            "train": {"batch": 4, "steps": 8},
        }
    )


def shaken(cell):
    """Random parameters: no scale at one, attention far from uniform."""
    rng = np.random.default_rng(0)

    def draw(x):
        noise = rng.standard_normal(x.shape) * (0.2 if len(x.shape) < 3 else 1.5 / x.shape[-2] ** 0.5)
        return np.asarray(noise, np.float32)

    params = jax.tree.map(draw, abstract_params(cell["model"]))
    return jax.tree_util.tree_map_with_path(lambda p, x: x + 1 if "norm" in str(p) else x, params)


def applied(cell):
    """The model as a function of parameters; none are drawn, which takes longest to compile."""
    built = []
    jax.eval_shape(lambda: built.append(build(cell["model"], seed=0)[0]))
    return built[0]


@pytest.mark.parametrize("case", CASES)
def test_logits_of_the_folder_are_those_of_the_model(case, tmp_path):
    changes, architecture = CASES[case]
    cell = make_cell(**changes)
    params = shaken(cell)
    folder = export_model(params, cell, tmp_path / "hf")
    assert read_json(folder / "config.json")["architectures"] == [architecture]
    assert sorted(p.name for p in folder.iterdir()) == ["config.json", "model.safetensors", "scaling.json"]
    ours = jax.jit(applied(cell))(params, TOKENS)
    assert np.std(ours) > 0.5
    # ours in float32, the folder's in float64: two layers of sums of up to 40 terms
    np.testing.assert_allclose(ours, forward(folder, TOKENS), rtol=1e-4, atol=1e-4)


def test_window_shows_in_the_folders_logits(tmp_path):
    """The comparison above would fail without it."""
    cell = make_cell(local_window=5)
    folder = export_model(shaken(cell), cell, tmp_path / "a")
    config = read_json(folder / "config.json")
    windowed = forward(folder, TOKENS)
    (folder / "config.json").write_text(json.dumps({**config, "use_sliding_window": False}))
    difference = np.abs(forward(folder, TOKENS) - windowed).max((0, 2))
    assert np.all(difference[:5] == 0) and np.all(difference[5:] > 0.01)


def test_bfloat16_is_the_nearest(tmp_path):
    cell = make_cell()
    params = shaken(cell)
    exact = read_weights(export_model(params, cell, tmp_path / "a"))
    folder = export_model(params, cell, tmp_path / "b", dtype="bfloat16")
    assert read_json(folder / "config.json")["torch_dtype"] == "bfloat16"
    rounded = read_weights(folder)
    assert rounded.keys() == exact.keys()
    for name, array in rounded.items():
        # 8 significant bits: half a unit in the last place is at most 2^-8 of the value
        np.testing.assert_allclose(array, exact[name], rtol=2**-8, err_msg=name)
    assert any(np.any(array != exact[name]) for name, array in rounded.items())
    with pytest.raises(ConfigError, match="dtype is 'float16'; it must be one of 'float32', 'bfloat16'"):
        export_model(params, cell, tmp_path / "c", dtype="float16")


def test_large_weights_are_spread_over_files(tmp_path):
    cell = make_cell(tied=False)
    params = shaken(cell)
    whole = read_weights(export_model(params, cell, tmp_path / "a"))
    limit = 13_000  # above the largest matrix, 97 x 32 float32
    folder = export_model(params, cell, tmp_path / "b", shard_bytes=limit)
    files = sorted(p.name for p in folder.glob("*.safetensors"))
    assert len(files) > 3
    assert files == [f"model-{i + 1:05d}-of-{len(files):05d}.safetensors" for i in range(len(files))]
    parts = read_weights(folder)
    assert list(parts) == list(whole) or set(parts) == set(whole)
    for name, array in whole.items():
        np.testing.assert_array_equal(parts[name], array)
    index = read_json(folder / "model.safetensors.index.json")
    assert index["metadata"]["total_size"] == sum(a.nbytes for a in whole.values())
    for file in files:
        held = [n for n, f in index["weight_map"].items() if f == file]
        assert sum(whole[n].nbytes for n in held) <= limit


def test_whole_or_not_at_all(tmp_path, monkeypatch):
    import safetensors.numpy

    cell, real, calls = make_cell(), safetensors.numpy.save_file, []

    def full_disk(tensors, path, **options):
        calls.append(path)
        if len(calls) == 2:
            raise safetensors.SafetensorError("Error while serializing: I/O error: No space left on device")
        return real(tensors, path, **options)

    monkeypatch.setattr(safetensors.numpy, "save_file", full_disk)
    with pytest.raises(StudyError, match="was not written .*No space left"):
        export_model(shaken(cell), cell, tmp_path / "hf", shard_bytes=13_000)
    assert len(calls) == 2 and not list(tmp_path.iterdir())
    (tmp_path / "hf").mkdir()
    folder = export_model(shaken(cell), cell, tmp_path / "hf")  # an empty folder is taken
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    with pytest.raises(
        StudyError, match="hf exists and is not empty; remove it or give --out another folder"
    ):
        export_model(shaken(cell), cell, tmp_path / "hf")
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before


@pytest.mark.parametrize("field", ["logits_soft_cap", "attention_soft_cap"])
def test_what_no_architecture_expresses_is_refused(field, tmp_path):
    cell = make_cell(**{field: 30.0})
    with pytest.raises(ConfigError, match=rf"model.{field} is 30.0; Llama, Mistral and Qwen3 express None"):
        export_model(shaken(cell), cell, tmp_path / "hf")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("field", ["weights", "activations"])
def test_simulated_precision_of_the_forward_pass_is_refused(field):
    cell = make_cell()
    with pytest.raises(ConfigError, match=f"precision.{field} is 'int8'; transformers would compute without"):
        hf_config({**cell, "precision": {**cell["precision"], field: "int8"}})
    assert hf_config({**cell, "precision": {**cell["precision"], "gradients": "int8"}}) == hf_config(cell)


def test_bfloat16_parameters_take_multipliers_unrounded(tmp_path):
    cell = make_cell(parametrization="mup", base_d_model=24)
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), shaken(cell))
    weights = read_weights(export_model(params, cell, tmp_path / "hf"))
    gain = np.asarray(params["final_norm"]["scale"], np.float32) * np.float32(24 / 32)  # logits by 1/m
    np.testing.assert_allclose(weights["model.norm.weight"], gain, rtol=1e-7)


def test_a_field_that_export_does_not_know_is_refused_off_its_default(monkeypatch):
    """So that a new field of the model can never be dropped in silence."""
    monkeypatch.setitem(SCHEMA["model"], "twist", Field(int, lambda x: True, "an integer", 0, later=True))
    cell = make_cell()
    assert hf_config(cell)["model_type"] == "qwen3"
    cell["model"] = validate_section("model", {**MODEL, "twist": 1})
    with pytest.raises(ConfigError, match="model.twist is 1"):
        hf_config(cell)


def test_tokenizer_goes_along(tmp_path):
    cell = make_cell()
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps({"model": {"vocab": {"a": 0, "b": 96}}, "added_tokens": []}))
    folder = export_model(shaken(cell), cell, tmp_path / "hf", tokenizer=path)
    assert read_json(folder / "tokenizer.json") == read_json(path)
    path.write_text(json.dumps({"model": {"vocab": {"a": 0}}, "added_tokens": [{"id": 97}]}))
    with pytest.raises(ConfigError, match="with ids up to 97; they must be below model.vocab = 97"):
        export_model(shaken(cell), cell, tmp_path / "hf2", tokenizer=path)
    with pytest.raises(ConfigError, match="it must be a tokenizer.json of Hugging Face"):
        export_model(shaken(cell), cell, tmp_path / "hf2", tokenizer=tmp_path / "none.json")
    vocab = byte_tokenizer()["model"]["vocab"]
    assert sorted(vocab.values()) == list(range(256)) and vocab["A"] == 65 and vocab["Ġ"] == 32


@pytest.fixture(scope="module")
def study(corpus, tmp_path_factory):
    """Two trained cells and one that never started; rows are streams, as the folder's forward takes them."""
    settings = tiny_study(corpus, budgets=(1e8,), params=(3e3,), batch_tokens=64, seeds=[0, 1, 2])
    settings["model"] |= {"cross_document": True}
    folder = tmp_path_factory.mktemp("export") / "s"
    dataset = data.open_data(validate_section("data", settings["data"]))
    from launch.planning import data_facts
    from scaling.study import validate_study

    manifest = plan(validate_study(settings), data_facts(dataset, 32))
    write_manifest(folder, manifest, False)
    cells = [entry["id"] for entry in manifest["cells"]]
    for entry in manifest["cells"][:2]:
        train(entry["config"], CellFolder(folder, entry["id"]))
    return folder, cells, dataset


def test_command_exports_the_trained_weights(study, tmp_path):
    """The folder's own forward pass, over the held-out set, gives the loss that training recorded."""
    folder, cells, dataset = study
    losses = {c: read_json(CellFolder(folder, c).result)["loss"] for c in cells[:2]}
    out = tmp_path / "hf"
    done = CliRunner().invoke(
        cli, ["export", str(folder), "--out", str(out), "--json"], catch_exceptions=False
    )
    about = json.loads(done.output)
    assert done.exit_code == 0 and losses[about["cell"]] == about["loss"] == min(losses.values())
    cell = read_json(out / "scaling.json")["config"]
    assert about["step"] == about["steps"] == cell["train"]["steps"]
    size = eval_batch(cell["train"]["batch"], 32)
    nats = tokens = 0.0
    for batch in heldout_batches(dataset.heldout, 32, size, cell["eval"]["sequences"]):
        logits = forward(out, np.asarray(batch["inputs"]))
        peak = logits.max(-1, keepdims=True)
        lse = np.log(np.exp(logits - peak).sum(-1)) + peak[..., 0]
        hit = np.take_along_axis(logits, np.asarray(batch["targets"])[..., None], -1)[..., 0]
        nats += float(np.sum((lse - hit) * batch["loss_mask"]))
        tokens += float(np.sum(batch["loss_mask"]))
    # float64 against a float32 model: the mean of 512 losses of about 3 nats
    assert nats / tokens == pytest.approx(about["loss"], rel=1e-5)


def test_schedule_free_gives_its_averages(tmp_path):
    cell = make_cell()
    cell["optim"]["name"], cell["schedule"]["name"] = "schedule_free", "constant"
    static, folder = Static.of(cell), CellFolder(tmp_path, cell_id(cell))
    rng = np.random.default_rng(0)
    state = jax.eval_shape(lambda: first_state(static, 0, hyper_parameters(cell)))
    state = jax.tree.map(lambda x: np.asarray(1 + rng.random(x.shape), x.dtype), state)
    write_json(folder.config, cell)
    checkpoints = Checkpoints(folder.checkpoints, cell_id(cell))
    checkpoints.save(state._replace(step=np.int32(5)), 1.0)
    checkpoints.close()
    _, params, step = trained_params(tmp_path, cell_id(cell))
    averaged = state.opt_state[-1]
    # Defazio et al. 2024, equation 2: y = (1 - b1) z + b1 x, where y is trained, x the average
    x = (state.params["embed"]["table"] - (1 - averaged.b1) * averaged.z["embed"]["table"]) / averaged.b1
    assert step == 5
    np.testing.assert_allclose(params["embed"]["table"], x, rtol=1e-6)  # float32


def test_choice_of_the_cell_and_refusals(study, tmp_path):
    folder, cells, _ = study
    losses = {c: read_json(CellFolder(folder, c).result)["loss"] for c in cells[:2]}
    assert choose_cell(folder, "best")["cell"] == min(losses, key=losses.get)
    assert (
        choose_cell(folder, "last")["cell"] == cells[1] and choose_cell(folder, cells[0])["cell"] == cells[0]
    )
    with pytest.raises(StudyError, match="--cell 'abc' is not a cell of"):
        choose_cell(folder, "abc")
    with pytest.raises(StudyError, match=f"cell {cells[2]} of .* has no checkpoint"):
        trained_params(folder, cells[2])
    store = FolderStore(CellFolder(folder, cells[0]).attempts)
    mine = take(store, cells[0], Observer())
    with pytest.raises(StudyError, match=f"cell {cells[0]} is being trained"):
        trained_params(folder, cells[0])
    mine.close("released")
