"""Crashes of cells and of workers: the sweep goes on, each is counted once, and nothing false is finished."""

import json
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from slurm_cluster import wait_until
from tiny_study import tiny_study

from launch import engine, local
from launch.engine import Ended, Group, drive, outcome_of
from launch.planning import manifest_of
from scaling.attempts import Budgets, attempts_of, cancel_file, renew, tally
from scaling.claims import FolderStore, Observer, take
from scaling.files import CellFolder, StudyError, read_json
from scaling.grid import write_manifest
from scaling.records import progress
from scaling.study import validate_study

CRASHING = Path(__file__).parent / "crashing_worker.py"
KINDS = {0: "import", 1: "memory", 2: "data", 3: "hang", 4: "nan", 5: "killed"}


def planned(corpus, folder, seeds):
    """A study of one tiny size, a cell a seed."""
    cells = [{"params": 3e3, "tokens": 2e3, "seed": s} for s in seeds]
    config = tiny_study(corpus, grid={"kind": "list", "cells": cells, "min_steps": 10})
    manifest = manifest_of(validate_study(config))
    write_manifest(folder, manifest, False)
    return {e["config"]["train"]["seed"]: CellFolder(folder, e["id"]) for e in manifest["cells"]}


@pytest.fixture
def study(corpus, tmp_path):
    return tmp_path / "study", planned(corpus, tmp_path / "study", range(8))


@pytest.mark.slow
def test_every_kind_of_crash_is_counted_and_the_others_finish(study):
    path, cells = study
    words = [f"{kind}={seed}" for seed, kind in KINDS.items()]
    here = local.Local(worker=(sys.executable, str(CRASHING), *words, "--"))
    options = ["--watchdog-seconds", "8", "--max-preemptions", "2", "--max-failures", "2"]
    code = local.run_study(path, 2, options, lambda: None, budgets=Budgets(2, 2), engine=here)
    assert code == 1
    outcomes = {seed: [a["outcome"] for a in attempts_of(folder)] for seed, folder in cells.items()}
    # where the other worker looks before the launcher does, a hung worker's end reads as a preemption
    assert [o for o in outcomes.pop(3) if o != "preempted"] == ["failed", "failed"]
    assert outcomes == {
        **{seed: ["failed", "failed"] for seed in (0, 1, 2)},
        4: ["diverged"],  # a result: the reason is the cell's own
        5: ["preempted"] * 2,  # a SIGKILL that the kernel did not send for memory
        6: ["finished"],
        7: ["finished"],
    }
    rows = {r["cell"]: r for r in progress(path)}
    reasons = {seed: rows[folder.path.name]["reason"] for seed, folder in cells.items()}
    assert "a_module_that_is_not_there" in reasons[0] and "RESOURCE_EXHAUSTED" in reasons[1]
    assert "row 7" in reasons[2] and "watchdog" in reasons[3] and "nan" in reasons[4]
    for seed in (0, 1, 2):  # the traceback is kept, in the record and beside it
        last = attempts_of(cells[seed])[-1]["log"]
        assert reasons[seed] in last[-1] and any("in crash" in line for line in last)
        assert "in crash" in cells[seed].log.read_text()
    hung = attempts_of(cells[3])[-1]["log"]
    assert any("in crash" in line for line in hung)  # where it hung is in the stack
    assert not any(cells[s].result.exists() for s in (0, 1, 2, 3, 5))


def test_budgets_are_two_and_can_be_renewed(study):
    folder = study[1][0]
    store, budgets = FolderStore(folder.attempts), Budgets(failures=2, preemptions=3)
    for outcome in ("preempted", "failed", "preempted", "released"):
        take(store, "c", Observer()).close(outcome, reason=outcome)
    found = tally(folder)
    assert (found.failures, found.preemptions, found.last, found.spent(budgets)) == (1, 2, "preempted", False)
    renew(folder, budgets)
    assert not folder.renewed.exists()  # not spent: what was counted stays
    take(store, "c", Observer()).close("failed", reason="again")
    assert tally(folder).spent(budgets) and tally(folder).reason == "again"
    renew(folder, budgets)
    assert tally(folder).failures == tally(folder).preemptions == 0
    assert len(attempts_of(folder)) == 5  # the log stays


@pytest.mark.parametrize(
    ("code", "words", "memory", "outcome"),
    [
        (-9, "", False, "preempted"),
        (-9, "", True, "failed"),
        (-15, "", True, "preempted"),
        (75, "", False, "preempted"),
        (-11, "Segmentation fault", False, "failed"),
        (-6, "Terminating: the JAX distributed service detected fatal errors.", False, "preempted"),
        (-6, "free(): invalid pointer", False, "failed"),
        (1, "Timeout (0:30:00)!\nThread 0x1", False, "failed"),
        (1, "ValueError: x", False, "failed"),
    ],
)
def test_what_an_end_means(code, words, memory, outcome):
    assert outcome_of(Ended(code, words), memory)[0] == outcome


class Engine:
    """Jobs that end as they are told to."""

    every = 0.0

    def __init__(self, ends):
        self.ends, self.submitted, self.cancelled = list(ends), [], []

    def submit(self, groups):
        self.submitted += groups
        return [str(len(self.submitted) - k) for k in reversed(range(len(groups)))]

    def poll(self, job):
        return self.ends.pop(0)

    def cancel(self, jobs):
        self.cancelled += jobs


def test_jobs_are_submitted_again_until_it_makes_no_sense(study):
    group = Group(study[0])
    lost = Engine([None, Ended(-9, "", 1), Ended(75), Ended(-9, "", 1), Ended(0)])
    drive(lost, [group])
    assert len(lost.submitted) == 4
    idle = Engine([Ended(1, "ImportError: no jax")] * 9)
    with pytest.raises(StudyError, match="ImportError: no jax"):
        drive(idle, [group])
    assert len(idle.submitted) == engine.MOST_IDLE_CRASHES
    bad = Engine([Ended(2, "noise\nerror: the disk is full")])
    with pytest.raises(StudyError, match=r"^the disk is full$"):
        drive(bad, [group] * 2)
    assert bad.cancelled == ["2"]
    removed = Engine([Ended(-15, "", unwanted=True), Ended(0)])
    drive(removed, [group] * 2)
    assert len(removed.submitted) == 2


def test_asked_to_stop_it_saves_and_goes_on_from_there(study):
    from launch.work import job_of
    from scaling.train import Execution, Preempted, train, train_pack

    path, _ = study
    entry = read_json(path / "manifest.json")["cells"][0]
    job = job_of(path, entry)
    with pytest.raises(Preempted):
        train_pack([job], Execution(), None, lambda steps: set(steps.values()) == {5})
    assert (job.folder.checkpoints / "5").is_dir() and not job.folder.result.exists()
    train(entry["config"], job.folder)
    assert read_json(job.folder.timing)["resumed_from_step"] == 5
    whole = CellFolder(path / "whole", entry["id"])
    train(entry["config"], whole)
    assert whole.result.read_bytes() == job.folder.result.read_bytes()
    assert json.loads(whole.metrics.read_text().splitlines()[-1]) == json.loads(
        job.folder.metrics.read_text().splitlines()[-1]
    )


def catches_sigterm(pid):
    """Whether a process has a handler: JAX's, once it has joined the others."""
    (mask,) = re.findall(r"SigCgt:\s+(\w+)", Path(f"/proc/{pid}/status").read_text())
    return int(mask, 16) >> (signal.SIGTERM - 1) & 1


@pytest.mark.slow
@pytest.mark.parametrize("how", ["SIGTERM", "cancel"])
def test_two_processes_that_wait_for_a_cell_end_together(corpus, tmp_path, how):
    """One of them alone is asked to; the other must not stay behind in a collective."""
    (folder,) = planned(corpus, tmp_path / "study", [0]).values()
    other = take(FolderStore(folder.attempts), "c", Observer())
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{s.getsockname()[1]}"
    command = [sys.executable, "-m", "launch.worker", str(tmp_path / "study"), "--heartbeat-seconds", "1"]
    pair = [subprocess.Popen([*command, "--distributed", f"{address},2,{i}"], stderr=-1) for i in range(2)]
    try:
        wait_until(lambda: all(catches_sigterm(p.pid) for p in pair), "they have joined", 120)
        time.sleep(2)
        if how == "SIGTERM":
            pair[1].terminate()
        else:
            cancel_file(tmp_path / "study").touch()
        ends = [p.wait(60) for p in pair]
    finally:
        for p in pair:
            p.kill()
    assert ends == ([75, 75] if how == "SIGTERM" else [0, 0])
    assert other.number == 1 and len(attempts_of(folder)) == 1
