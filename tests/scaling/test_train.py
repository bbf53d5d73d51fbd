"""Training one cell: resume equals an uninterrupted run bit for bit, and bad ends are data."""

import json
import shutil

import numpy as np
import optax
import pytest
from kills import Killed, files, kill_after
from tiny_study import tiny_cell

from scaling import train as train_module
from scaling.config import ConfigError, cell_id, validate_cell
from scaling.files import CellFolder, StudyError, read_jsonl
from scaling.program import Plan, Static, compiled
from scaling.train import Execution, train


@pytest.fixture
def cell(corpus):
    return tiny_cell(corpus)


def test_resume_is_bit_identical(cell, tmp_path):
    whole = CellFolder(tmp_path, "whole")
    result = train(cell, whole)
    assert result["status"] == "finished" and result["tokens"] == 40 * 4 * 32
    step, _ = compiled(Static.of(cell), Plan())
    programs = step._cache_size()
    assert programs > 0
    broken = CellFolder(tmp_path, "broken")
    for last in (1, 7, 20, 21, 33, 40):
        with pytest.raises(Killed):
            train(cell, broken, Execution(checkpoint_steps=6), kill_after(last))
    train(cell, broken, Execution(checkpoint_steps=6))
    assert files(broken) == files(whole)
    assert step._cache_size() == programs  # to resume compiles nothing anew
    assert json.loads(broken.timing.read_text())["resumed_from_step"] >= 36


def test_loss_falls_and_evaluations_are_recorded(cell, tmp_path):
    folder = CellFolder(tmp_path, "c")
    result = train(cell, folder)
    rows = [r for r in read_jsonl(folder.metrics) if "loss" in r]
    assert [r["step"] for r in rows] == list(range(1, 41))
    assert rows[-1]["loss"] < rows[0]["loss"] - 0.5
    assert [e["step"] for e in result["evals"]] == [20, 40]
    assert result["loss"] == result["evals"][-1]["loss"] < result["evals"][0]["loss"]
    # bytes: one token is one byte
    np.testing.assert_allclose(result["bits_per_byte"], result["loss"] / np.log(2), rtol=1e-12)


def test_finished_cell_is_only_read(cell, tmp_path):
    folder = CellFolder(tmp_path, "c")
    first = train(cell, folder)
    shutil.rmtree(folder.checkpoints)
    assert train(cell, folder) == first
    assert not folder.checkpoints.exists()


def test_corrupt_checkpoint_is_set_aside(cell, tmp_path):
    whole, broken = CellFolder(tmp_path, "whole"), CellFolder(tmp_path, "broken")
    train(cell, whole)
    with pytest.raises(Killed):
        train(cell, broken, Execution(checkpoint_steps=10), kill_after(35))
    newest = max(broken.checkpoints.glob("[0-9]*"), key=lambda p: int(p.name))
    for path in newest.rglob("*"):
        if path.is_file() and "state" in path.parts and path.stat().st_size > 200:
            path.write_bytes(path.read_bytes()[:-100] + bytes(100))
    train(cell, broken)
    assert files(broken) == files(whole)
    assert list(broken.path.glob("corrupt-checkpoint-*"))
    assert json.loads(broken.timing.read_text())["resumed_from_step"] < int(newest.name)


def test_torn_metrics_line(cell, tmp_path):
    whole, torn = CellFolder(tmp_path, "whole"), CellFolder(tmp_path, "torn")
    train(cell, whole)
    with pytest.raises(Killed):
        train(cell, torn, Execution(checkpoint_steps=10), kill_after(25))
    with open(torn.metrics, "a") as f:
        f.write('{"step": 26, "tok')
    train(cell, torn)
    assert files(torn) == files(whole)


def test_lost_metrics_restart_the_cell(cell, tmp_path):
    whole, cut = CellFolder(tmp_path, "whole"), CellFolder(tmp_path, "cut")
    train(cell, whole)
    with pytest.raises(Killed):
        train(cell, cut, Execution(checkpoint_steps=10), kill_after(35))
    lines = cut.metrics.read_bytes().splitlines(keepends=True)
    cut.metrics.write_bytes(b"".join(lines[:12]) + lines[13][:9])
    train(cell, cut)
    assert files(cut) == files(whole)


@pytest.mark.parametrize(("lr", "words"), [(1e30, "was (nan|inf)"), (50.0, "uniform guess")])
def test_divergence_is_data(cell, tmp_path, lr, words):
    cell["optim"] |= {"lr": lr, "grad_clip": None, "weight_decay": 0.0}
    folder = CellFolder(tmp_path, "c")
    result = train(cell, folder)
    assert result["status"] == "diverged" and result["loss"] is None
    import re

    assert re.search(words, result["reason"]), result["reason"]
    # what it cost is what was trained, not what was planned
    assert 0 < result["steps"] <= 40 and result["tokens"] == result["steps"] * 4 * 32
    assert "NaN" not in folder.result.read_text() + folder.metrics.read_text()


def test_parts_of_a_batch_sum_to_the_whole(cell, tmp_path):
    """Three parts of four rows: two rows are filled up, and count for nothing."""
    short = {**cell, "train": {**cell["train"], "steps": 12}}
    whole = train(short, CellFolder(tmp_path, "whole"))
    parts = train(short, CellFolder(tmp_path, "parts"), Execution(accumulate=3))
    # another order of float32 sums, grown by twelve steps
    np.testing.assert_allclose(parts["loss"], whole["loss"], rtol=1e-5)
    with pytest.raises(ConfigError, match="accumulate is 0"):
        train(cell, CellFolder(tmp_path, "none"), Execution(accumulate=0))


@pytest.mark.slow
def test_auto_takes_what_fits_and_says_what_is_missing(cell, tmp_path):
    short = {**cell, "train": {**cell["train"], "steps": 12}}
    whole = train(short, CellFolder(tmp_path, "whole"))
    roomy = train(short, CellFolder(tmp_path, "roomy"), Execution(remat="auto", memory_bytes=10**9))
    assert roomy["loss"] == whole["loss"]  # nothing recomputed, one part: the same program
    with pytest.raises(ConfigError, match="does not tell its memory"):
        train(short, CellFolder(tmp_path, "asked"), Execution(remat="auto"))
    with pytest.raises(ConfigError, match=r"needs .* GB of each device .* 1e-06 GB may be used"):
        one_row = {**short, "train": {**short["train"], "batch": 1}}  # three ways to try
        train(one_row, CellFolder(tmp_path, "small"), Execution(remat="auto", memory_bytes=1000))


def test_other_cell_in_the_folder(cell, tmp_path):
    folder = CellFolder(tmp_path, "c")
    train(cell, folder)
    other = validate_cell({**cell, "train": {**cell["train"], "seed": 1}})
    with pytest.raises(StudyError, match=f"holds cell {cell_id(cell)}, not {cell_id(other)}"):
        train(other, folder)


def test_changed_data(cell, tmp_path):
    cell["data"]["fingerprint"] = "0" * 16
    with pytest.raises(ConfigError, match="data.fingerprint is '0000000000000000'; the data"):
        train(cell, CellFolder(tmp_path, "c"))


def test_vocabulary_too_small(cell, tmp_path):
    cell["model"]["vocab"] = 100
    with pytest.raises(ConfigError, match="model.vocab is 100 but the data has token ids up to 255"):
        train(cell, CellFolder(tmp_path, "c"))


def test_seed_changes_the_result(cell, tmp_path):
    a = train(cell, CellFolder(tmp_path, "a"))
    cell["train"]["seed"] = 1
    b = train(cell, CellFolder(tmp_path, "b"))
    assert a["loss"] != b["loss"]
    assert abs(a["loss"] - b["loss"]) < 0.5


def test_optimizer_equals_optax(cell, tmp_path):
    """One step of ours against optax's own AdamW chain with constants, on the same gradient."""
    import jax

    from scaling.models.lm import build
    from scaling.optim import decays, hyper_parameters, make_optimizer
    from scaling.program import Static

    _, params = build(cell["model"], seed=0)
    rng = np.random.default_rng(0)
    grads = jax.tree.map(lambda p: rng.normal(size=p.shape).astype(np.float32), params)
    hp, optim, schedule = hyper_parameters(cell), cell["optim"], cell["schedule"]
    mask = jax.tree_util.tree_map_with_path(decays, params)
    theirs = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adamw(
            lambda i: optim["lr"] * (i + 1) / schedule["warmup_steps"],
            b1=optim["beta1"],
            b2=optim["beta2"],
            eps=optim["eps"],
            weight_decay=optim["weight_decay"],
            mask=mask,
        ),
    )
    ours = make_optimizer(Static.of(cell), hp, params)
    a, b = ours.init(params), theirs.init(params)
    for _ in range(3):
        step_a, a = ours.update(grads, a, params)
        step_b, b = theirs.update(grads, b, params)
    for x, y in zip(jax.tree.leaves(step_a), jax.tree.leaves(step_b), strict=True):
        # float32 with constants folded at different places: a few units in the last place
        np.testing.assert_allclose(np.asarray(x), np.asarray(y), rtol=2e-6, atol=1e-10)


def test_only_matrices_decay(cell):
    import jax

    from scaling.models.lm import build
    from scaling.optim import decays

    _, params = build(cell["model"], seed=0)
    flags = {jax.tree_util.keystr(p): decays(p, x) for p, x in jax.tree_util.tree_leaves_with_path(params)}
    assert {k for k, v in flags.items() if not v} == {k for k in flags if "norm" in k}
    assert any(flags.values()) and not all(flags.values())


class Clock:
    """Time that only work moves: 100 s for a program's first step, 2 s for the others, 30 s to evaluate."""

    def __init__(self, program):
        self.program, self.now, self.steps = program, 0.0, 0

    def perf_counter(self):
        return self.now

    def __getattr__(self, name):
        return getattr(self.program, name)

    def step(self, *args):
        self.steps += 1
        self.now += 100.0 if self.steps == 1 else 2.0
        return self.program.step(*args)

    def evaluate(self, *args):
        self.now += 30.0
        return self.program.evaluate(*args)


def test_speed_is_of_the_steps_alone(cell, tmp_path, monkeypatch):
    made, program_for = [], train_module.program_for

    def clocked(*args):
        made.append(Clock(program_for(*args)))
        monkeypatch.setattr(train_module, "time", made[-1])
        return made[-1]

    monkeypatch.setattr(train_module, "program_for", clocked)
    folder = CellFolder(tmp_path, "c")
    train(cell, folder, Execution(checkpoint_steps=7))
    timing = json.loads(folder.timing.read_text())
    assert timing["tokens_per_second"] == pytest.approx(4 * 32 / 2.0)
    # all of it: the first step compiled, 39 more, and every batch of two evaluations
    evaluations = (timing["device_seconds"] - 100 - 39 * 2) / 30
    assert evaluations == round(evaluations) > 1


def test_of_a_single_step_speed_is_all_there_is(cell, tmp_path):
    schedule = {**cell["schedule"], "warmup_steps": 0}
    one = validate_cell({**cell, "train": {**cell["train"], "steps": 1}, "schedule": schedule})
    folder = CellFolder(tmp_path, "one")
    train(one, folder)
    timing = json.loads(folder.timing.read_text())
    assert timing["tokens_per_second"] == pytest.approx(4 * 32 / timing["device_seconds"])
