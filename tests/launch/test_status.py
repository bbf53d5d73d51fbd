"""Status by the folder alone: every state from files as workers leave them; cancel and launch."""

import json
import os
import threading

import pytest
from click.testing import CliRunner
from rich.console import Console
from tiny_study import tiny_study

from launch import show_status, work
from launch.cli import cli
from launch.status import state_of, study_status
from scaling import train
from scaling.attempts import attempts_of
from scaling.claims import FolderStore, Observer, take
from scaling.files import CellFolder, write_json
from scaling.train import Execution, Preempted


def call(*args, code=0):
    done = CliRunner().invoke(cli, list(map(str, args)), standalone_mode=False, catch_exceptions=False)
    assert (done.return_value or 0) == code, done.output
    return done.output


@pytest.fixture
def study(corpus, tmp_path):
    cells = [{"params": 3e3, "tokens": 2e3, "seed": s} for s in range(6)]
    config = tiny_study(corpus, grid={"kind": "list", "cells": cells, "min_steps": 10})
    (tmp_path / "tiny.json").write_text(json.dumps(config))
    call("plan", tmp_path / "tiny.json", "--study", tmp_path / "study", "--no-estimate")
    return tmp_path / "study"


def claim(folder, **record):
    got = take(FolderStore(folder.attempts), folder.path.name, Observer())
    got.record |= {"device_kind": "NVIDIA H100", "devices": 2, **record}
    return got


def test_every_state_from_files_alone(study):
    entries = json.loads((study / "manifest.json").read_text())["cells"]
    cells = [CellFolder(study, e["id"]) for e in entries]
    claim(cells[0]).close("failed", reason="ValueError: x", final=True, log=["Traceback", "ValueError: x"])
    claim(cells[1]).close("preempted")
    starting = claim(cells[2])
    training = claim(cells[3])
    training.first, training.step = (4, 100.0), 12  # 8 steps in 4 s, by the clock below
    training.clock = lambda: 104.0
    training.beat()
    starting.beat()
    (cells[3].checkpoints / "8").mkdir(parents=True)
    done = claim(cells[4])
    done.record["began"] -= 7200.0
    done.record["devices"] = 1
    result = {"cell": entries[4]["id"], "status": "finished", "reason": None, "loss": 2.5, "steps": 31}
    result |= {"tokens": 1, "evals": [], "unique_tokens": 1, "epochs": 1.0, "device_kind": "NVIDIA H100"}
    write_json(cells[4].result, result)
    done.close("finished")
    found = study_status(study, price=3.0)
    rows = found["cells"]
    states = ["failed", "preempted", "starting", "training", "finished", "waiting"]
    assert [r["state"] for r in rows] == states
    assert rows[0]["log"][-1] == "ValueError: x" and rows[0]["failures"] == 1
    assert rows[1]["preemptions"] == 1
    tokens = entries[3]["config"]["train"]["batch"] * 32
    assert rows[3]["tokens_per_second"] == pytest.approx(2 * tokens)  # 2 steps a second
    assert rows[3]["eta_seconds"] == pytest.approx((rows[3]["steps"] - 12) / 2)
    # from the manifest's own count: FLOPs a second over two H100 of 989.4 TFLOP/s
    flops = 2 * entries[3]["achieved"]["flops_by_convention"]["exact"] / rows[3]["steps"]
    assert rows[3]["mfu"] == pytest.approx(flops / (2 * 989.4e12))
    assert (rows[3]["step"], rows[3]["durable_step"]) == (12, 8)
    assert rows[4]["device_seconds"] == pytest.approx(7200, abs=60)  # the test's own time
    # six equal cells, one done in 2 hours, one at 12 of its steps: what is left costs as the finished one did
    hours, share = found["study"]["device_hours"], 12 / rows[3]["steps"]
    assert found["study"]["done"] == pytest.approx((1 + share) / 6)
    assert hours["planned"] - hours["spent"] == pytest.approx(2 * (5 - share), rel=0.01)  # as above
    assert found["study"]["cost"]["planned"] == pytest.approx(3 * hours["planned"])
    console = Console(width=200, record=True)
    console.print(show_status.table(study, found, True))
    said = console.export_text()
    assert all(s in said for s in states) and "last words: ValueError: x" in said


def test_alive_is_not_training():
    attempt = {"heartbeat": 10.0, "beat": 3, "step_beat": None}
    assert state_of(attempt, 5.0) == "starting"
    assert state_of({**attempt, "step_beat": 1}, 5.0) == "training"
    assert state_of({**attempt, "step_beat": 1, "beat": 8}, 5.0) == "stalled"
    assert state_of({**attempt, "step_beat": 3}, 61.0) == "silent"


def test_cancel_saves_and_relaunch_goes_on(study):
    entries = json.loads((study / "manifest.json").read_text())["cells"]
    folder = CellFolder(study, entries[0]["id"])

    stop = threading.Event()
    tell = train.Pack.tell

    def cancelled_at_five(pack):
        if pack.lanes[0].done == 5:
            call("cancel", study)
            stop.set()  # what the next heartbeat would do
        return tell(pack)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Preempted):
        patch.setattr(train.Pack, "tell", cancelled_at_five)
        work.work(study, Execution(), [entries[0]["id"]], stop=stop)
    assert [a["outcome"] for a in attempts_of(folder)] == ["released"]  # no preemption: it was asked for
    assert study_status(study)["cells"][0]["durable_step"] == 5
    with pytest.raises(Preempted):  # a worker that starts late takes nothing
        work.work(study, Execution(), [entries[1]["id"]])
    assert not attempts_of(CellFolder(study, entries[1]["id"]))
    os.unlink(study / "cancelled")
    work.work(study, Execution(), [entries[0]["id"]])
    assert json.loads(folder.timing.read_text())["resumed_from_step"] == 5


@pytest.mark.slow
def test_launch_plans_trains_and_then_has_nothing_to_do(study, tmp_path):
    said = call("launch", tmp_path / "tiny.json", "--study", tmp_path / "other", "--workers", 1)
    assert "6 cells: 6 finished" in said
    assert "nothing to do: all 6 cells" in call("launch", tmp_path / "other")
