"""Studies on a real Slurm of two emulated nodes: what is preempted, killed or out of time ends the same."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from kills import files
from slurm_cluster import free_ports, wait_until
from tiny_study import tiny_study

from launch import local
from launch.planning import manifest_of
from scaling.attempts import attempts_of
from scaling.claims import FolderStore, latest
from scaling.files import CellFolder, read_json
from scaling.grid import write_manifest
from scaling.records import read_manifest
from scaling.study import validate_study

pytestmark = pytest.mark.slow
pytest.importorskip("submitit", reason="no submitit here: pip install 'scaling[slurm]'")

WAIT = 240
"""Seconds for what takes a few on a machine that has nothing else to do."""


def test_the_cluster_has_two_nodes_that_see_each_other_and_keeps_account(slurm):
    said = slurm.command(
        "srun", "-N2", "bash", "-c", "getent hosts $SLURMD_NODENAME >&2; echo $SLURMD_NODENAME $SLURM_PROCID"
    )
    assert sorted(said.split()) == sorted([*slurm.nodes, "0", "1"])
    job = slurm.command("sbatch", "--parsable", "--wrap", "exit 3", "--output", "/dev/null").strip()
    ask = ("sacct", "--noheader", "--parsable2", "-X", "-o", "State,ExitCode", "-j", job)
    wait_until(lambda: slurm.command(*ask).strip() == "FAILED|3:0", "accounting knows how the job ended", 30)


def planned(folder: Path, config: dict) -> Path:
    """The study planned twice: in a folder for Slurm, returned, and in one beside it, ``-here``."""
    manifest = manifest_of(validate_study(config))
    for study in (folder, here(folder)):
        write_manifest(study, manifest, False)
    return folder


def here(study: Path) -> Path:
    return study.with_name(f"{study.name}-here")


@contextlib.contextmanager
def launched(slurm, study: Path, *options: str, **settings):
    """``scaling launch --on slurm`` under way."""
    file = study.with_name(f"{study.name}.toml")
    words = {"partition": "low", "time": 30, "poll_seconds": 1, **settings}
    file.write_text("[slurm]\n" + "".join(f"{key} = {json.dumps(value)}\n" for key, value in words.items()))
    command = [sys.executable, "-m", "launch.cli", "launch", study, "--on", "slurm", "--settings", file]
    process = subprocess.Popen(
        [*command, "--json", *options],
        env={**slurm.environment, "PYTHONPATH": os.pathsep.join(sys.path)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            process.terminate()
            process.communicate(timeout=60)


def ended(process, study: Path) -> None:
    """Waits for a launch that must end well."""
    out, errors = process.communicate(timeout=WAIT)
    logs = "".join(p.read_text()[-3000:] for p in sorted(study.glob("slurm/*/*.err")))
    assert process.returncode == 0, out[-1000:] + errors[-3000:] + logs


def cells(study: Path) -> list[CellFolder]:
    return [CellFolder(study, entry["id"]) for entry in read_manifest(study)["cells"]]


def outcomes(folder: CellFolder) -> list[str]:
    return [a["outcome"] for a in attempts_of(folder)]


def frozen(folders: list[CellFolder], after: int = 0) -> list[dict]:
    """Stops each cell's process once it has saved a step beyond ``after``; their attempts."""
    found: dict[CellFolder, dict] = {}

    def all_are() -> bool:
        for folder in folders:
            if folder not in found and saved(folder) > after:
                found[folder] = latest(FolderStore(folder.attempts))[1]
                os.kill(found[folder]["pid"], signal.SIGSTOP)
                assert not folder.result.exists()
        return len(found) == len(folders)

    wait_until(all_are, f"checkpoints beyond step {after}", WAIT, 0.02)
    return [found[folder] for folder in folders]


def saved(folder: CellFolder) -> int:
    """The step of a cell's newest checkpoint; 0 where it has none."""
    names = os.listdir(folder.checkpoints) if folder.checkpoints.exists() else []
    return max((int(name) for name in names if name.isdigit()), default=0)


def job_of(attempt: dict) -> str:
    return attempt["job"].split()[-1]


def was_asked(pid: int) -> bool:
    """Whether SIGTERM waits for a stopped process, or it was continued and has ended since."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return True
    pending = [line.split()[1] for line in lines if "Pnd" in line]
    return any(int(mask, 16) >> (signal.SIGTERM - 1) & 1 for mask in pending)


def test_a_grid_as_an_array_gives_the_records_of_the_local_run(slurm, corpus, tmp_path):
    study = planned(tmp_path / "grid", tiny_study(corpus, budgets=(2e8, 4e8), params=(3e3, 6e3)))
    with launched(slurm, study) as process:
        ended(process, study)
    assert local.run_study(here(study), 2, [], lambda: None) == 0
    for mine, theirs in zip(cells(study), cells(here(study)), strict=True):
        assert files(mine) == files(theirs)  # to the byte; timings lie elsewhere
        assert outcomes(mine) == ["finished"]
    attempts = [attempts_of(folder)[0] for folder in cells(study)]
    assert len({job_of(a) for a in attempts}) == len(attempts)  # an element each, of one array
    assert len({job_of(a).split("_")[0] for a in attempts}) == 1
    with launched(slurm, study) as process:
        out, _ = process.communicate(timeout=WAIT)
    assert json.loads(out) == {"outcome": "nothing to do"}


def test_relaunch_submits_what_is_missing_as_it_was_launched(slurm, corpus, tmp_path):
    grid = [{"params": 3e3, "tokens": 4e3, "seed": s} for s in range(3)]
    config = tiny_study(corpus, grid={"kind": "list", "cells": grid, "min_steps": 10})
    study = planned(tmp_path / "again", config)
    done, *missing = cells(study)
    words = ("--cell", done.path.name, "--checkpoint-steps", "20")
    with launched(slurm, study, *words, partition="high") as process:
        ended(process, study)
    study.with_name("again.toml").unlink()
    environment = {**slurm.environment, "PYTHONPATH": os.pathsep.join(sys.path)}
    for verb in ("cancel", "relaunch"):
        command = [sys.executable, "-m", "launch.cli", verb, study, "--json"]
        said = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=WAIT)
        assert said.returncode == 0, said.stdout[-1000:] + said.stderr[-3000:]
    assert [outcomes(folder) for folder in cells(study)] == [["finished"]] * 3
    jobs = {job_of(attempts_of(folder)[0]) for folder in missing}
    assert len(jobs) == 2 and len({job.split("_")[0] for job in jobs}) == 1  # elements of one new array
    array = jobs.pop().split("_")[0]
    ask = ("sacct", "--noheader", "--parsable2", "-X", "-o", "Partition", "-j", array)
    assert slurm.command(*ask).split() == ["high", "high"]
    assert local.run_study(here(study), 1, [], lambda: None) == 0
    for mine, theirs in zip(cells(study), cells(here(study)), strict=True):
        assert files(mine) == files(theirs)
        newest, before = sorted((int(p.name) for p in mine.checkpoints.iterdir()), reverse=True)
        assert before == (newest - 1) // 20 * 20  # every 20 steps, as the first launch was told


def test_requeued_killed_and_out_of_time_it_goes_on_to_the_same_records(slurm, corpus, tmp_path):
    grid = [{"params": 3e3, "tokens": 1.2e4, "seed": s} for s in range(3)]
    config = tiny_study(corpus, grid={"kind": "list", "cells": grid, "min_steps": 10})
    study = planned(tmp_path / "events", config)
    requeued, killed, timed_out = cells(study)
    with launched(slurm, study, "--checkpoint-steps", "40") as process:
        attempts = frozen(cells(study))
        pids, jobs = [a["pid"] for a in attempts], [job_of(a) for a in attempts]
        slurm.command("scontrol", "requeue", jobs[0])
        os.kill(pids[1], signal.SIGKILL)
        minutes = int(slurm.command("squeue", "-h", "-j", jobs[2], "-o", "%M").split(":")[-2])
        limit = f"TimeLimit={minutes + 2}"  # with stop_seconds, 120, the signal is due at once
        slurm.command("scontrol", "update", f"JobId={jobs[2]}", limit)
        wait_until(lambda: was_asked(pids[2]), "Slurm's signal before the time limit", 90)
        for pid in (pids[0], pids[2]):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)
        wait_until(lambda: outcomes(timed_out)[0] == "preempted", "it is saved", 60)
        wait_until(
            lambda: slurm.jobs().get(jobs[2]) == "PENDING" or len(outcomes(timed_out)) == 2,
            "it asked to be requeued", 60,
        )  # fmt: skip
        with contextlib.suppress(AssertionError):  # it may have ended by now
            slurm.command("scontrol", "update", f"JobId={jobs[2]}", "TimeLimit=30")
        ended(process, study)
    assert local.run_study(here(study), 2, [], lambda: None) == 0
    for mine, theirs in zip(cells(study), cells(here(study)), strict=True):
        assert files(mine) == files(theirs)
        assert outcomes(mine) == ["preempted", "finished"]
        assert read_json(mine.timing)["resumed_from_step"] >= 40
    again = [job_of(attempts_of(folder)[-1]) for folder in (requeued, killed, timed_out)]
    assert again[0] == jobs[0] and again[2] == jobs[2]  # Slurm ran these again
    assert again[1] != jobs[1]  # and did not run this one: the launcher submitted it


def test_a_cell_of_two_nodes_saves_at_one_step_and_outlives_a_process(slurm, corpus, tmp_path):
    grid = [{"params": 3e3, "tokens": 1.2e4, "seed": 0}]
    config = tiny_study(corpus, grid={"kind": "list", "cells": grid, "min_steps": 10})
    study = planned(tmp_path / "pair", config)
    (folder,) = cells(study)
    with launched(slurm, study, "--checkpoint-steps", "10", nodes=2) as process:
        (first,) = frozen([folder])
        slurm.command("scancel", "--signal=TERM", job_of(first))
        os.kill(first["pid"], signal.SIGCONT)
        wait_until(lambda: outcomes(folder)[0] == "preempted", "both have saved", WAIT)
        stopped = attempts_of(folder)[0]["step"]
        assert saved(folder) == stopped  # the very step at which they stopped, not one that was due
        wait_until(lambda: len(outcomes(folder)) == 2, "the job runs again", WAIT)
        (second,) = frozen([folder], stopped)
        os.kill(peer_of(second["pid"]), signal.SIGKILL)
        os.kill(second["pid"], signal.SIGCONT)
        ended(process, study)
    assert outcomes(folder) == ["preempted", "preempted", "finished"]
    assert read_json(folder.timing)["resumed_from_step"] > stopped
    alone, pair = here(study), study.with_name("pair-undisturbed")
    shutil.copytree(alone, pair)
    assert local.run_study(alone, 1, [], lambda: None) == 0
    (port,) = free_ports(1)
    command = [sys.executable, "-m", "launch.worker", str(pair), "--cores", "1", "--distributed"]
    workers = [subprocess.Popen([*command, f"127.0.0.1:{port},2,{i}"]) for i in range(2)]
    assert [w.wait(WAIT) for w in workers] == [0, 0]
    assert files(folder) == files(cells(pair)[0])
    one, two = read_json(cells(alone)[0].result), read_json(folder.result)
    assert (one["devices"], two["devices"]) == (1, 2)
    # two devices sum in another order: float32 rounding, grown by training (as in tests/scaling/test_mesh.py)
    np.testing.assert_allclose(two["loss"], one["loss"], rtol=1e-5)


def peer_of(pid: int) -> int:
    """The worker of the other process of a job of two: the same words but for its parent's id, the last."""
    found = set()
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if words_of(folder.name)[:-1] == words_of(pid)[:-1]:
                found.add(int(folder.name))
    (peer,) = found - {pid}
    return peer


def words_of(pid) -> list[str]:
    return Path(f"/proc/{pid}/cmdline").read_bytes().decode().rstrip("\0").split("\0")
