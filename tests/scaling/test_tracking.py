"""wandb offline: what is written can be read back without a server, also after a kill."""

import itertools
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from click.testing import CliRunner

from launch.cli import cli
from scaling.config import cell_id, validate_cell
from scaling.files import CellFolder, StudyError
from scaling.tracking import (
    Tracker,
    log_records,
    read_wandb,
    read_wandb_history,
    read_wandb_run,
    wait_until_written,
)
from scaling.train import Execution, train

pytestmark = pytest.mark.usefixtures("quick_compiles")
ROOT = str(Path(__file__).parents[2])
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
    assert len(data) > 3 * 32768, "the history must cross blocks of the log for the test to mean anything"
    whole = len(list(log_records(data)))
    assert whole - 3 <= len(list(log_records(data[:-10]))) < whole

    def kept():
        history = read_wandb_history(tmp_path)
        np.testing.assert_array_equal(history["train_loss"], 1.0 / history["step"])  # nothing false is read
        return list(history["step"])

    assert kept() == list(range(1, 400))
    path.write_bytes(data[: len(data) // 2])  # cut off by a kill: the beginning, without a gap
    assert kept() == list(range(1, len(kept()) + 1)) and 100 < len(kept()) < 300
    assert list(read_wandb(tmp_path)["run_id"]) == ["abc"] and "loss" not in read_wandb(tmp_path)
    with pytest.warns(UserWarning, match="was not written to its end within 0.1 s"):
        wait_until_written(path, seconds=0.1)
    middle = 32768 + 16000  # one bit of the second block: the rest of it is lost, no more
    path.write_bytes(data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :])
    steps = kept()
    gaps = [b - a for a, b in itertools.pairwise(steps) if b - a > 1]
    assert steps[0] == 1 and steps[-1] == 399 and len(gaps) == 1
    assert 30 < gaps[0] < 90  # 16 KiB of rows of some 300 bytes
    path.write_bytes(data[: 3 * 32768] + bytes(20000))  # a file that was grown before it was written
    assert kept() == list(range(1, len(kept()) + 1)) and len(kept()) > 250


LOGS_AND_DIES = """
import os, sys, time
from pathlib import Path
from scaling.tracking import Tracker
study = Path(sys.argv[1])
tracker = Tracker("offline", study, "abc", {"params": 7, "attempt": 1})
for step in range(1, 301):
    tracker.log({"step": step, "loss": 1.0 / step})
path, size = Path(tracker.run.settings.sync_file), 0
while not size or path.stat().st_size > size:  # wandb's service writes in its own time, 32 KiB at once
    size = path.stat().st_size if path.exists() else 0
    time.sleep(0.5)
os.kill(os.getpid(), 9)
"""


def test_a_killed_run_goes_on_as_the_same_one(tmp_path):
    """SIGKILL, then another attempt from a checkpoint further back: one run, no step twice, none missing."""
    # a service of its own, as every worker has
    own = {k: v for k, v in os.environ.items() if not k.startswith("WANDB")} | {"PYTHONPATH": ROOT}
    done = subprocess.run([sys.executable, "-c", LOGS_AND_DIES, str(tmp_path)], env=own)
    assert done.returncode == -9
    before = read_wandb_history(tmp_path)
    assert list(before["step"]) == list(range(1, len(before) + 1)) and len(before) >= 50
    tracker = Tracker("offline", tmp_path, "abc", {"params": 7, "attempt": 2})
    assert (tracker.run.id, tracker.run.group, tracker.run.project) == ("abc", tmp_path.name, tmp_path.name)
    for step in range(41, 301):  # the checkpoint was at 40
        tracker.log({"step": step, "loss": 1.0 / step})
    tracker.finish({"loss": 0.25, "status": "finished"})
    assert len(list(tmp_path.rglob("run-abc.wandb"))) == 2
    history, runs = read_wandb_history(tmp_path), read_wandb(tmp_path)
    assert list(history["step"]) == list(range(1, 301)) and set(history["run_id"]) == {"abc"}
    np.testing.assert_array_equal(history["train_loss"], 1.0 / history["step"])
    assert runs[["run_id", "params", "attempt", "loss", "status"]].values.tolist() == [
        ["abc", 7, 2, 0.25, "finished"]
    ]
    words = ["collect", str(tmp_path / "study"), "--wandb-dir", str(tmp_path)]
    done = CliRunner().invoke(cli, words)
    assert done.exit_code == 0, done.output
    assert len(pd.read_csv(tmp_path / "study/wandb_history.csv")) == 300
    assert pd.read_parquet(tmp_path / "study/wandb_runs.parquet")["loss"].tolist() == [0.25]


def test_no_runs(tmp_path):
    with pytest.raises(StudyError, match="holds no wandb run"):
        read_wandb(tmp_path)
