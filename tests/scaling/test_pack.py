"""Packs: cells side by side, each as if it were alone."""

import numpy as np
import pytest
from kills import Killed, files
from tiny_study import tiny_cell

from scaling.config import ConfigError, cell_id
from scaling.files import CellFolder, read_jsonl
from scaling.lane import Job
from scaling.train import Execution, train, train_pack


@pytest.fixture
def cells(corpus):
    """Four cells of one shape that differ in seed, rate, decay, warm-up and length."""
    steps = {"steps": 30}
    return [
        tiny_cell(corpus, train=steps),
        tiny_cell(corpus, train={"seed": 1, "steps": 12}),
        tiny_cell(corpus, train=steps, optim={"lr": 3e-3, "weight_decay": 0.0}, schedule={"warmup_steps": 6}),
        # diverges
        tiny_cell(corpus, train=steps, optim={"lr": 80.0, "grad_clip": None, "weight_decay": 0.0}),
    ]


def jobs(cells, folder):
    return [Job(c, CellFolder(folder, cell_id(c))) for c in cells]


@pytest.fixture
def alone(cells, tmp_path):
    """Each cell trained by itself."""
    out = jobs(cells, tmp_path / "alone")
    for job in out:
        train(job.cell, job.folder)
    return out


def test_in_turns_every_file_is_that_of_the_cell_alone(cells, alone, tmp_path):
    together = jobs(cells, tmp_path / "pack")
    results = train_pack(together, Execution(together="turns"))
    assert [r["status"] for r in results] == ["finished", "finished", "finished", "diverged"]
    assert [files(a.folder) for a in alone] == [files(b.folder) for b in together]


def test_killed_packs_resume_in_any_company(cells, alone, tmp_path):
    """Each attempt has other members; cells stand at different steps when they go on."""
    broken = jobs(cells, tmp_path / "broken")
    seen = 0

    def kill_after(count):
        def on_metrics(row):
            nonlocal seen
            seen += 1
            if seen >= count:
                seen = 0
                raise Killed

        return on_metrics

    execution = Execution(checkpoint_steps=4, checkpoint_seconds=1e9, together="turns")
    for members, count in (([0, 1, 2, 3], 25), ([0, 2], 9), ([2, 1], 5), ([1, 0, 3], 14)):
        with pytest.raises(Killed):
            train_pack([broken[i] for i in members], execution, kill_after(count))
    train_pack(broken, execution)
    assert [files(a.folder) for a in alone] == [files(b.folder) for b in broken]


def test_vmapped_cells_are_the_cells_alone_to_rounding(cells, alone, tmp_path):
    """XLA sums a batched product in another order: a rounding of 6e-8 a step at first, which 30 updates of
    Adam grow (its first updates divide by the gradient's own size); 1e-3 of a loss of 3 to 5 is 100 times
    what was seen and a tenth of what one other batch would change."""
    together = jobs(cells, tmp_path / "vmapped")
    results = train_pack(together, Execution(together="vmap", checkpoint_steps=10))
    assert [r["status"] for r in results] == ["finished", "finished", "finished", "diverged"]
    for a, b in zip(alone[:3], together[:3], strict=True):
        ours, theirs = (
            np.array([r["loss"] for r in read_jsonl(job.folder.metrics) if "loss" in r]) for job in (b, a)
        )
        assert len(ours) == len(theirs)
        np.testing.assert_allclose(ours[0], theirs[0], rtol=1e-6)  # before any update: one sum of a batch
        np.testing.assert_allclose(ours, theirs, rtol=1e-3)
    # the second cell ended at step 12 and was left as it stood while the others went on
    steps = [r["step"] for r in read_jsonl(together[1].folder.metrics) if "loss" in r]
    assert max(steps) == 12
    newest = max(int(p.name) for p in together[1].folder.checkpoints.glob("[0-9]*"))
    assert newest == 12


def test_cells_of_two_shapes_are_refused(cells, tmp_path):
    cells[1]["train"]["batch"] = 8
    with pytest.raises(ConfigError, match="a pack needs one shape and batch"):
        train_pack(jobs(cells[:2], tmp_path))


def test_a_wrong_way_of_sharing_is_named(cells, tmp_path):
    with pytest.raises(ConfigError, match="together is 'both'; it must be None, 'turns' or 'vmap'"):
        train_pack(jobs(cells[:2], tmp_path), Execution(together="both"))


def test_time_is_shared_among_the_cells(cells, tmp_path):
    import json

    together = jobs(cells[:3], tmp_path)
    train_pack(together, Execution(together="turns"))
    timings = [json.loads(j.folder.timing.read_text()) for j in together]
    wall = max(t["wall_seconds"] for t in timings)
    # device time adds up to the wall time of the one device, each cell's share below its own wall time
    np.testing.assert_allclose(sum(t["device_seconds"] for t in timings), wall, rtol=0.05)
    assert all(t["device_seconds"] < t["wall_seconds"] for t in timings)
    assert all(t["tokens_per_second"] > 0 for t in timings)
