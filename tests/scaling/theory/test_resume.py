"""A trainer's cell that is cut off goes on from its checkpoint, to the same bytes."""

import pytest

from scaling import trainers
from scaling.config import cell_id, validate_cell
from scaling.files import CellFolder
from scaling.lane import Job
from scaling.run_trainer import run_trainer
from scaling.theory import cells
from scaling.train import Preempted

CELLS = {
    "plrf": {
        "trainer": {"name": "plrf", "alpha": 0.7, "beta": 0.3, "d": 8, "draws": 5},
        "train": {"batch": 2, "steps": 900},
    },
    "structured": {
        "trainer": {"name": "structured", "decay": 2.0, "target": 3.0, "modes": 12, "draws": 3},
        "train": {"batch": 4, "steps": 700},
    },
}


def job_in(folder, cell):
    return Job(cell, CellFolder(folder, cell_id(cell)))


def stop_after(chunks):
    """Asks to stop after so many chunks of steps; and the steps done at each."""
    seen = []

    def on_step(steps):
        seen.extend(step for step in steps.values() if step)
        return len(seen) >= chunks

    return on_step, seen


@pytest.mark.parametrize(
    ("name", "chunks"), [("plrf", 1), ("plrf", 4), ("plrf", 6), ("structured", 1), ("structured", 2)]
)
def test_a_stopped_cell_goes_on_to_the_same_bytes(name, chunks, tmp_path, monkeypatch):
    cell = validate_cell(CELLS[name])
    monkeypatch.setattr(cells, "MOST_ENTRIES", 2 * 32 * 8)  # plrf: two draws of [32, 8] at once, three blocks
    whole, cut = job_in(tmp_path / "a", cell), job_in(tmp_path / "b", cell)
    everything, all_seen = stop_after(10**6)
    run_trainer(whole, everything)
    assert len(all_seen) == (12 if name == "plrf" else 3)
    on_step, seen = stop_after(chunks)
    with pytest.raises(Preempted):
        run_trainer(cut, on_step)
    assert not cut.folder.result.exists() and seen == all_seen[:chunks]
    rest, rest_seen = stop_after(10**6)
    result = run_trainer(cut, rest)
    assert rest_seen == all_seen[chunks:]  # also where a block had just ended
    assert cut.folder.result.read_bytes() == whole.folder.result.read_bytes()
    assert cut.folder.metrics.read_bytes() == whole.folder.metrics.read_bytes()
    assert result["status"] == "finished" and not cut.folder.checkpoints.exists()


def test_blocks_of_one_chunk_are_saved_too(tmp_path, monkeypatch):
    cell = validate_cell({**CELLS["plrf"], "train": {"batch": 2, "steps": 200}})
    monkeypatch.setattr(cells, "MOST_ENTRIES", 2 * 32 * 8)  # three blocks, each of one chunk
    whole, cut = job_in(tmp_path / "a", cell), job_in(tmp_path / "b", cell)
    run_trainer(whole)
    on_step, seen = stop_after(10**6)

    def dies(steps):
        on_step(steps)
        if len(seen) == 3:
            raise KeyboardInterrupt
        return False

    with pytest.raises(KeyboardInterrupt):
        run_trainer(cut, dies, checkpoint_seconds=0.0)
    assert seen == [66, 133, 200]  # of 200, as status shows it
    rest, rest_seen = stop_after(1)  # asked to stop when nothing is left: it ends
    assert run_trainer(cut, rest)["status"] == "finished" and rest_seen == [200]
    assert cut.folder.result.read_bytes() == whole.folder.result.read_bytes()


def test_a_killed_cell_goes_on_from_its_last_checkpoint(tmp_path):
    cell = validate_cell(CELLS["plrf"])
    whole, cut = job_in(tmp_path / "a", cell), job_in(tmp_path / "b", cell)
    run_trainer(whole)

    def dies(steps):
        if max(steps.values()) >= 768:
            raise KeyboardInterrupt
        return False

    with pytest.raises(KeyboardInterrupt):
        run_trainer(cut, dies, checkpoint_seconds=0.0)
    on_step, seen = stop_after(10**6)
    run_trainer(cut, on_step)
    assert seen == [768, 900]  # saved at 512
    assert cut.folder.result.read_bytes() == whole.folder.result.read_bytes()


def test_a_checkpoint_that_is_not_whole_is_set_aside(tmp_path):
    cell = validate_cell(CELLS["plrf"])
    whole, cut = job_in(tmp_path / "a", cell), job_in(tmp_path / "b", cell)
    run_trainer(whole)
    with pytest.raises(Preempted):
        run_trainer(cut, lambda steps: max(steps.values()) >= 512)
    for file in (cut.folder.checkpoints / "512").rglob("*"):
        if file.is_file() and file.stat().st_size > 200:
            file.write_bytes(file.read_bytes()[:100])
    on_step, seen = stop_after(10**6)
    run_trainer(cut, on_step)
    assert seen[0] == 256
    assert cut.folder.result.read_bytes() == whole.folder.result.read_bytes()


def test_a_quick_cell_leaves_no_checkpoint(tmp_path, monkeypatch):
    def never(*args, **kwargs):
        raise AssertionError("made")

    monkeypatch.setattr("scaling.run_trainer.Checkpoints", never)
    cell = validate_cell(CELLS["structured"])
    assert run_trainer(job_in(tmp_path, cell))["status"] == "finished"
    assert trainers.of(cell).run.endswith("run_structured")
