"""wandb offline: what is written can be read back without a server, also after a kill."""

import numpy as np
import pytest

from scaling.config import cell_id, validate_cell
from scaling.files import CellFolder, StudyError
from scaling.tracking import Tracker, log_records, read_wandb, read_wandb_run, wait_until_written
from scaling.train import Execution, train

pytest.importorskip("wandb", reason="the extra `wandb` is not installed")


@pytest.mark.slow
def test_a_cell_is_mirrored(corpus, tmp_path):
    cell = validate_cell(
        {
            "model": {"d_model": 8, "layers": 1, "heads": 1, "kv_heads": 1, "head_dim": 8, "ffn_dim": 8},
            "data": {"source": "text", "path": str(corpus), "seq": 16},
            "optim": {"lr": 1e-2},
            "schedule": {"warmup_steps": 2},
            "train": {"batch": 2, "steps": 12},
            "eval": {"sequences": 8},
        }
    )
    name = cell_id(cell)
    result = train(cell, CellFolder(tmp_path / "study", name), Execution(wandb="offline"))
    table = read_wandb(tmp_path / "study")
    assert list(table["run_id"]) == [name]
    row = table.iloc[0]
    for key in ("loss", "loss_stderr", "tokens", "flops", "status", "steps"):
        assert row[key] == result[key]
    assert row["lr"] == row["optim.lr"] == 1e-2 and row["params"] == row["params_total"]


def test_history_and_torn_files(tmp_path):
    tracker = Tracker("offline", tmp_path, "abc", {"a": {"b": 1}})
    for step in range(1, 400):
        tracker.log({"step": step, "loss": 1.0 / step})
    tracker.finish({"loss": 0.5, "status": "finished"})
    path = next(tmp_path.rglob("run-*.wandb"))
    run = read_wandb_run(path)
    assert run["id"] == "abc" and run["config"]["a"] == {"b": 1} and run["summary"]["loss"] == 0.5
    losses = [h["train_loss"] for h in run["history"] if "train_loss" in h]
    np.testing.assert_array_equal(losses, [1.0 / s for s in range(1, 400)])
    data = path.read_bytes()
    assert len(data) > 32768, "the history must cross a block of the log for the test to mean anything"
    whole = len(list(log_records(data)))
    assert whole - 3 <= len(list(log_records(data[:-10]))) < whole
    path.write_bytes(data[: len(data) // 2])
    with pytest.warns(UserWarning, match="was not written to its end within 0.1 s"):
        wait_until_written(path, seconds=0.1)


def test_no_runs(tmp_path):
    with pytest.raises(StudyError, match="holds no wandb run"):
        read_wandb(tmp_path)
