"""ReLU routers: the coefficient follows its rule, reaches the target, and is in what a resumed run has."""

import jax.numpy as jnp
import numpy as np
import pytest
from kills import Killed, files, kill_after
from tiny_study import tiny_cell

from scaling.config import ConfigError, cell_id, validate_section
from scaling.files import CellFolder, read_jsonl
from scaling.optim import hyper_parameters
from scaling.program import Static, first_state
from scaling.sparsity import next_l1
from scaling.step import TrainState
from scaling.train import Execution, train

pytestmark = pytest.mark.usefixtures("quick_compiles")
MODEL = {"family": "moe", "kv_heads": 2, "layers": 1, "experts": 4, "active_experts": 1, "router": "relu",
         "expert_fraction": 0.5, "capacity_factor": 2.0}  # fmt: skip


def cell_of(corpus, steps, **train):
    # from 1e-3 on: from 1e-8 the coefficient needs some 60 steps before it is felt
    return tiny_cell(corpus, model={**MODEL, "router_l1": 1e-3}, train={"steps": steps, **train})


def test_the_rule():
    model = {"active_experts": 2, "experts": 8, "router_l1": 1e-3, "router_l1_factor": 1.5}
    want = l1 = jnp.float32(1e-3)
    for share in (0.5, 0.3, 0.25, 0.2, 0.9, 0.1):
        l1 = next_l1(model, l1, jnp.float32(share))
        want *= 1.5 if share > 0.25 else 1 if share == 0.25 else 1 / 1.5
        np.testing.assert_allclose(l1, want, rtol=1e-6)
    for _ in range(9):  # not below where it began
        l1 = next_l1(model, l1, jnp.float32(0.1))
    assert l1 == np.float32(1e-3)


def test_the_target_is_reached_and_every_step_goes_by_the_rule(corpus, tmp_path):
    cell, folder = cell_of(corpus, 320), CellFolder(tmp_path, "c")
    cell["model"]["router_l1_factor"] = 1.05  # of so short a run: by 1.2 it goes far beyond and back
    cell["optim"]["lr"] = 1e-3  # at ten times that rate weights outrun the coefficient, by luck of rounding
    result = train(cell, folder)
    rows = [r for r in read_jsonl(folder.metrics) if "loss" in r]
    assert len(rows) == 320  # every step has a line
    l1, seen = (np.array([r[k] for r in rows]) for k in ("router_l1", "open_experts"))
    assert l1[0] == np.float32(1e-3)
    np.testing.assert_allclose(l1[1:], np.maximum(l1[:-1] * 1.05 ** np.sign(seen[:-1] - 1), 1e-3), rtol=1e-6)
    # half of the gates are open at first, then more; at last one of a token's four, up and down around it:
    # the mean of the last 60 steps was 0.99 to 1.02 with four seeds
    assert seen[:3].mean() > 1.5 and abs(seen[-60:].mean() - 1) < 0.25, seen
    assert result["open_experts"] == pytest.approx(seen.mean(), rel=1e-12)


def test_a_guarded_run_that_is_killed_ends_as_a_whole_one(corpus, tmp_path):
    """Without a guard: with the other families (test_train_families.py)."""
    cell = cell_of(corpus, 16, skip_spikes=True)
    state = first_state(Static.of(cell), 0, hyper_parameters(cell))
    assert state._fields[3:] == ("guard", "router_l1") and state.router_l1 == np.float32(1e-3)
    whole, broken = CellFolder(tmp_path, "whole"), CellFolder(tmp_path, "broken")
    train(cell, whole)
    with pytest.raises(Killed):
        train(cell, broken, Execution(checkpoint_steps=4), kill_after(9))
    assert train(cell, broken, Execution(checkpoint_steps=4))["status"] == "finished"
    assert files(broken) == files(whole)


def test_other_cells_keep_their_ids_and_their_state(corpus):
    chosen = tiny_cell(corpus, model={k: v for k, v in MODEL.items() if k != "router"})
    assert type(first_state(Static.of(chosen), 0, hyper_parameters(chosen))) is TrainState
    assert cell_id(chosen) == cell_id(
        tiny_cell(corpus, model={**MODEL, "router": "chosen", "router_l1": 1e-8, "router_l1_factor": 1.2})
    )


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"balance_loss": 0.1}, "model.balance_loss is 0.1 with model.router = 'relu', which does not read"),
        ({"router_z_loss": 0.1}, "it is for 'chosen' and 'all'"),
        ({"router": "all", "router_l1": 1e-3}, "model.router_l1 is 0.001 with model.router = 'all'"),
        ({"router_l1_factor": 1.0}, "model.router_l1_factor is 1.0 .float.; it must be a number above 1"),
    ],
)
def test_bad_settings_are_named(changes, words):
    shape = {"d_model": 16, "heads": 2, "head_dim": 8, "ffn_dim": 24}
    with pytest.raises(ConfigError, match=words):
        validate_section("model", {**shape, **MODEL, **changes})


def test_open_gates_are_a_mean_over_layers_of_experts_whatever_is_beside_them(corpus, tmp_path):
    """One in three layers has experts, and is itself routed: its own router's loss is there too."""
    pattern = ["attention", "routed:attention+moe", "attention"]
    shape = {"family": "hybrid", "pattern": pattern, "layers": 3, "capacity_factor": 4.0, "kv_heads": 2}
    wide = {"router_l1": 1e-30, "depth_capacity": 1.0}
    cell = tiny_cell(corpus, model={**MODEL, **shape, **wide}, train={"steps": 4})
    folder = CellFolder(tmp_path, "c")
    train(cell, folder)
    first = next(r for r in read_jsonl(folder.metrics) if "loss" in r)
    # of four gates with logits symmetric about zero half are open; over all three layers it would be 2/3
    assert 1.5 <= first["open_experts"] <= 2.5, first
