"""Trunk and branch: a branch is the WSD cell that trained alone, bit for bit, for less."""

import json

import numpy as np
import pytest
from tiny_study import FACTS, tiny_cell, tiny_study

from launch.work import job_of, with_their_trunks
from scaling.branches import Chain, fork_step, saving, spent_flops, trunk_of
from scaling.config import ConfigError, cell_id, validate_cell
from scaling.files import CellFolder, read_jsonl
from scaling.grid import entry, plan
from scaling.lane import Job
from scaling.optim import hyper_parameters
from scaling.schedules import learning_rate
from scaling.study import validate_study
from scaling.train import Execution, train, train_pack


@pytest.fixture
def cells(corpus):
    """WSD cells of 20 and 40 steps that share a trunk."""
    same = {"model": {"layers": 1}, "schedule": {"decay_fraction": 0.25}}
    return [tiny_cell(corpus, **same, train={"steps": n}) for n in (20, 40)]


def jobs(cells, folder):
    """The trunk's job and its branches'."""
    trunk = trunk_of(cells)
    home = CellFolder(folder, cell_id(trunk))
    forks = tuple(sorted(map(fork_step, cells)))
    branches = [Job(c, CellFolder(folder, cell_id(c)), home, fork_step(c)) for c in cells]
    return Job(trunk, home, keep=forks), branches


def numbers(folder, after=0):
    """The result and the logged lines after a step."""
    rows = [r for r in read_jsonl(folder.metrics) if r["step"] > after]
    return json.loads(folder.result.read_text()), rows


def test_a_branch_is_the_cell_alone_bit_for_bit(cells, tmp_path):
    trunk, branches = jobs(cells, tmp_path / "study")
    end = train_pack([trunk])[0]
    assert end["steps"] == 30 and fork_step(cells[0]) == 15 and fork_step(cells[1]) == 30
    train_pack(branches, Execution(together="turns"))
    for cell, branch in zip(cells, branches, strict=True):
        alone = CellFolder(tmp_path / "alone", cell_id(cell))
        train(cell, alone)
        result, rows = numbers(branch.folder)
        whole, lines = numbers(alone, after=branch.fork)
        assert rows == lines and next(r["step"] for r in rows if "loss" in r) == branch.fork + 1
        assert result["loss"] == whole["loss"] and result["steps"] == whole["steps"]
        # evaluations before the fork are of the trunk, not of the cell
        assert result["evals"] == [e for e in whole["evals"] if e["step"] > branch.fork]
        rest = {k: v for k, v in result.items() if k not in ("evals", "spikes")}
        assert rest == {k: whole[k] for k in rest}


def test_a_trunk_grown_in_segments_is_the_cell_alone_bit_for_bit(corpus, cells, tmp_path):
    cells = [*cells, validate_cell({**cells[1], "train": {**cells[1]["train"], "steps": 50}})]
    chain = Chain(entry, {"params": 1e3, "seed": 0}, forks=[34])
    entries = [e for cell in cells for e in chain.add(cell)]
    assert [(e["role"], e["config"]["train"]["steps"], e.get("fork", 0)) for e in entries] == [
        ("trunk", 15, 0), ("branch", 20, 15), ("trunk", 30, 15), ("branch", 40, 30), ("trunk", 37, 30),
        ("branch", 50, 37),
    ]  # fmt: skip
    between, at = ({**cells[1], "train": {**cells[1]["train"], "steps": n}} for n in (34, 46))
    with pytest.raises(ConfigError, match="would leave its trunk at step 25, of which no checkpoint is kept"):
        chain.add(validate_cell(between))
    late = chain.add(validate_cell(at))  # a fork that was kept: a cooldown alone
    assert [(e["role"], e["trunk"], e["fork"]) for e in late] == [("branch", entries[4]["id"], 34)]
    # one branch brings the whole chain behind it
    assert [e["id"] for e in with_their_trunks(entries, [entries[3]["id"]])] == [
        entries[k]["id"] for k in (0, 2, 3)
    ]
    # no step is trained twice: all but the branches' cooldowns is one trunk of 37 steps
    alone_flops = entries[-1]["achieved"]["flops"] * 37 / 50
    cooldowns = sum(spent_flops(e) for e in entries if e["role"] == "branch")
    assert sum(map(spent_flops, entries)) == pytest.approx(alone_flops + cooldowns)
    # the first two segments train before the third is known, as in a search
    for part in (entries[:4], entries[4:]):
        for e in part:
            train_pack([job_of(tmp_path / "study", e)])
    assert len(read_jsonl(CellFolder(tmp_path / "study", entries[4]["id"]).metrics)) == 7  # its own steps
    for e in entries[3], entries[5]:
        alone = CellFolder(tmp_path / "alone", e["id"])
        train(e["config"], alone)
        whole, lines = numbers(alone, after=e["fork"])
        result, rows = numbers(CellFolder(tmp_path / "study", e["id"]))
        assert rows == lines and result["loss"] == whole["loss"]


def test_a_lost_fork_costs_compute_and_no_number(cells, tmp_path, caplog):
    _, (branch, _) = jobs(cells, tmp_path / "a")
    train_pack([branch])
    assert "trains from its beginning" in caplog.text
    trunk, (other, _) = jobs(cells, tmp_path / "b")
    train_pack([trunk])
    train_pack([other])
    for name in ("result", "metrics"):
        assert getattr(branch.folder, name).read_bytes() == getattr(other.folder, name).read_bytes()


def test_a_trunk_that_diverges_ends_its_branches(cells, tmp_path):
    for cell in cells:
        cell["optim"] |= {"lr": 50.0, "grad_clip": None, "weight_decay": 0.0}
    trunk, branches = jobs(cells, tmp_path)
    end = train_pack([trunk])[0]
    assert end["status"] == "diverged" and end["steps"] < 15
    for result in train_pack(branches):
        assert result["status"] == "diverged" and "its trunk diverged" in result["reason"]
        assert result["steps"] == end["steps"]


def test_the_rate_before_the_fork_is_the_trunks_bit_for_bit(cells):
    trunk = hyper_parameters(trunk_of(cells))
    for cell in cells:
        fork, hp = fork_step(cell), hyper_parameters(cell)
        steps = np.arange(fork)
        np.testing.assert_array_equal(learning_rate("wsd", steps, hp), learning_rate("wsd", steps, trunk))
        after = learning_rate("wsd", np.arange(fork + 1, cell["train"]["steps"]), hp)
        assert (np.diff(np.asarray(after)) < 0).all() and after[0] < hp["lr"]


def study(corpus, **grid):
    config = tiny_study(corpus, grid={"kind": "product", "params": [3e3, 6e3], "min_steps": 10, **grid})
    config["schedule"] = {"decay_fraction": 0.2}
    return plan(validate_study(config), FACTS)


def test_the_plan_is_a_dag_and_says_what_it_saves(corpus):
    tokens = [1e4 * 2**k for k in range(5)]
    manifest = study(corpus, tokens=tokens, trunks=True)
    by_id = {e["id"]: e for e in manifest["cells"]}
    trunks = [e for e in manifest["cells"] if e["role"] == "trunk"]
    branches = [e for e in manifest["cells"] if e["role"] == "branch"]
    assert len(trunks) == 2 and len(branches) == 10 and not manifest["dropped"]
    for e in branches:
        trunk, config = by_id[e["trunk"]], e["config"]
        assert e["fork"] in trunk["forks"] and e["fork"] == fork_step(config)
        assert manifest["cells"].index(trunk) < manifest["cells"].index(e)
        assert {**config["optim"]} == trunk["config"]["optim"]
        assert cell_id(validate_cell(config)) == e["id"]
        # the share of a branch is its cooldown, up to the rounding to whole steps
        assert abs(spent_flops(e) / e["achieved"]["flops"] - 0.2) < 1.5 / config["train"]["steps"]
    # D doubling with 20 % cooldowns: (31/16) / (0.8 + 0.2 x 31/16) = 1.63; steps are rounded
    assert abs(saving(manifest["cells"])["ratio"] - 31 / 16 / (0.8 + 0.2 * 31 / 16)) < 0.02
    alone = study(corpus, tokens=tokens)
    assert saving(alone["cells"]) is None and {e["role"] for e in alone["cells"]} == {"cell"}


def test_one_length_needs_no_trunk_and_seeds_have_their_own(corpus):
    assert [e["role"] for e in study(corpus, tokens=[2e4], trunks=True)["cells"]] == ["cell", "cell"]
    config = tiny_study(
        corpus, grid={"kind": "product", "params": [3e3], "tokens": [2e4, 4e4], "trunks": True}, seeds=[0, 1]
    )
    cells = plan(validate_study(config), FACTS)["cells"]
    assert [e["role"] for e in cells].count("trunk") == 2


@pytest.mark.parametrize(
    ("grid", "schedule", "words"),
    [
        ({"trunks": 1}, "wsd", "grid.trunks is 1; it must be True or False"),
        ({"trunks": True}, "cosine", "only 'wsd' cells share a trunk"),
        ({"trunk_tokens": 1e4}, "wsd", "without grid.trunks"),
        ({"trunks": True, "trunk_tokens": -1}, "wsd", "grid.trunk_tokens holds -1"),
    ],
)
def test_bad_settings_are_named(corpus, grid, schedule, words):
    config = tiny_study(corpus)
    config["grid"] |= grid
    config["schedule"] = {"name": schedule}
    with pytest.raises(ConfigError, match=words):
        validate_study(config)


def test_a_cooldown_within_the_warm_up_is_refused(cells):
    for cell in cells:
        cell["schedule"]["warmup_steps"] = 16
    with pytest.raises(ConfigError, match="would begin at step 15, within the warm-up of 16"):
        trunk_of(cells)
    for cell in cells:
        cell["schedule"]["warmup_steps"] = 3
    cells[1]["optim"]["lr"] *= 2
    with pytest.raises(ConfigError, match="in more than its steps"):
        trunk_of(cells)
