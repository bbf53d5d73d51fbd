"""What is asked of Slurm, where there is none: settings, jobs, the script."""

import json
import signal

import pytest
from click.testing import CliRunner
from tiny_study import tiny_study

pytest.importorskip("submitit", reason="no submitit here: pip install 'scaling[slurm]'")

from launch import slurm
from launch.cli import cli
from launch.engine import Ended, Group
from launch.planning import manifest_of
from launch.slurm_task import blame
from scaling.attempts import tally
from scaling.claims import JOB, FolderStore, Observer, take
from scaling.config import ConfigError
from scaling.files import CellFolder, StudyError, write_json
from scaling.grid import write_manifest
from scaling.records import read_manifest
from scaling.study import validate_study


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("partitoin = 'a'", r"partitoin.*it may have partition.*\(others in sbatch = \{\.\.\.\}\)"),
        ("time = 0", "time is 0.*above 0"),
        ("nodes = 'two'", "nodes is 'two'.*an integer"),
        ("nodes = true", "nodes is True"),
        ("setup = ['a', 1]", "setup is .*list of strings"),
        ("gpus_per_node = -1", "gpus_per_node is -1; it must be an integer of at least 0"),
        ("time = 2\nstop_seconds = 120", "stop_seconds is 120, not less than time"),
        ("time = ", "is not TOML"),
    ],
)
def test_wrong_settings_are_named(tmp_path, text, words):
    file = tmp_path / "cluster.toml"
    file.write_text(f"[slurm]\n{text}")
    with pytest.raises((ConfigError, StudyError), match=words):
        slurm.read_settings(file)
    with pytest.raises(ConfigError, match="cannot be read"):
        slurm.read_settings(tmp_path / "none.toml")


def plan(folder, config):
    manifest = manifest_of(validate_study(config))
    write_manifest(folder, manifest, False)
    return manifest["cells"]


def test_the_script_has_what_the_user_asked_for_and_nothing_is_submitted(study_file, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")  # neither srun nor sbatch
    settings = tmp_path / "cluster.toml"
    settings.write_text(
        "[slurm]\npartition = 'gpu'\naccount = 'a1'\nqos = 'q'\nconstraint = 'h100'\ntime = 90\nnodes = 2\n"
        "gpus_per_node = 8\nmem_gb = 1.5\nstop_seconds = 300\nsetup = ['module load x']\n"
        "container = 'image.sqsh'\nmounts = ['/data:/data']\nsbatch = {reservation = 'r'}\n"
        "srun = ['--mpi=none']\n"
    )
    study = tmp_path / "study"
    words = ["launch", str(study_file), "--study", str(study), "--on", "slurm", "--settings", str(settings)]
    done = CliRunner().invoke(cli, [*words, "--dry-run", "--json", "--workers", "3", "--mesh", "1,16,1"])
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    entries = read_manifest(study)["cells"]
    assert sorted(c for cells in found["jobs"] for c in cells) == sorted(e["id"] for e in entries)
    lines = found["script"].splitlines()
    for line in (
        "partition=gpu", "account=a1", "qos=q", "constraint=h100", "time=90", "nodes=2", "ntasks-per-node=1",
        "gpus-per-node=8", "mem=1536M", "signal=TERM@300", "requeue", f"array=0-{len(entries) - 1}%3",
        "reservation=r",
    ):  # fmt: skip
        assert f"#SBATCH --{line}" in lines
    srun = next(i for i, line in enumerate(lines) if line.startswith("srun "))
    assert lines.index("module load x") < srun
    for word in ("--mpi=none", "--container-image=image.sqsh", "--container-mounts=/data:/data",
                 "--kill-on-bad-exit=1"):  # fmt: skip
        assert word in lines[srun].split()
    assert "--distributed auto" in found["worker"] and "--cores" not in found["worker"]
    assert not (study / "slurm").exists()


def test_options_that_do_not_go_together(study_file, tmp_path):
    settings = tmp_path / "cluster.toml"
    settings.write_text("[slurm]\ngpus_per_node = 4\n")
    words = ["launch", str(study_file), "--study", str(tmp_path / "s"), "--on", "slurm", "--dry-run"]
    done = CliRunner().invoke(cli, [*words, "--settings", str(settings)])
    assert isinstance(done.exception, StudyError) and "--mesh 1,4,1" in str(done.exception)
    done = CliRunner().invoke(cli, [*words, "--distributed", "auto"])
    assert isinstance(done.exception, StudyError) and "tasks_per_node" in str(done.exception)
    done = CliRunner().invoke(cli, ["launch", str(study_file), "--settings", str(settings)])
    assert isinstance(done.exception, StudyError) and "--on slurm" in str(done.exception)


def test_a_job_has_a_cell_or_a_pack_and_finished_cells_have_none(study_config, tmp_path):
    entries = plan(tmp_path / "s", study_config)
    one = slurm.groups_of(tmp_path / "s", (), ("--pack", "off"), lambda config: 1)
    assert [len(g.cells) for g in one] == [1] * len(entries)
    assert one[0].options == ("--pack", "off") and one[0].study.is_absolute()
    write_json(CellFolder(tmp_path / "s", entries[0]["id"]).result, {})
    left = slurm.groups_of(tmp_path / "s", (), (), lambda config: 1)
    assert {g.cells for g in left} == {(e["id"],) for e in entries[1:]}
    few = slurm.groups_of(tmp_path / "s", (entries[1]["id"],), (), lambda config: 1)
    assert [g.cells for g in few] == [(entries[1]["id"],)]


def test_a_dry_run_lists_cells_that_were_given_up(study_file, tmp_path):
    study = tmp_path / "s"
    words = ["launch", str(study_file), "--study", str(study), "--on", "slurm", "--dry-run", "--json"]
    first = json.loads(CliRunner().invoke(cli, words).stdout)["jobs"]
    for entry in read_manifest(study)["cells"]:
        claim = take(FolderStore(CellFolder(study, entry["id"]).attempts), "c", Observer())
        claim.close("failed", reason="a config that would fail again", final=True)
    again = CliRunner().invoke(cli, words)  # a launch would renew their budgets and try them
    assert again.exit_code == 0 and json.loads(again.stdout)["jobs"] == first != []


def test_cells_of_one_shape_go_together_and_so_do_a_trunk_and_its_branches(corpus, tmp_path):
    cells = [{"params": 3e3, "tokens": 2e3, "seed": s} for s in range(5)]
    plan(tmp_path / "p", tiny_study(corpus, grid={"kind": "list", "cells": cells, "min_steps": 10}))
    packs = slurm.groups_of(tmp_path / "p", (), (), lambda config: 2)
    assert sorted(len(g.cells) for g in packs) == [1, 2, 2]
    grid = {"kind": "product", "params": [3e3], "tokens": [2e4, 4e4], "trunks": True}
    entries = plan(tmp_path / "t", tiny_study(corpus, grid=grid))
    assert any(e.get("trunk") for e in entries)
    (group,) = slurm.groups_of(tmp_path / "t", (), (), lambda config: 1)
    assert set(group.cells) == {e["id"] for e in entries}


def test_cells_are_in_one_job_only_where_its_worker_packs_them(corpus, tmp_path):
    cells = [{"params": 3e3, "tokens": 2e3, "seed": s} for s in range(4)]
    plan(tmp_path / "p", tiny_study(corpus, grid={"kind": "list", "cells": cells, "min_steps": 10}))
    words = ["launch", str(tmp_path / "p"), "--on", "slurm", "--dry-run", "--json", "--pack", "turns"]

    def sizes(*more):
        done = CliRunner().invoke(cli, [*words, *more])
        assert done.exit_code == 0, done.output
        return [len(job) for job in json.loads(done.stdout)["jobs"]]

    assert sizes() == [4]
    assert sizes("--remat", "auto") == sizes("--accumulate", "2") == [1, 1, 1, 1]


def test_the_process_whose_fault_it_was_is_blamed(study_config, tmp_path):
    first, other, *_ = plan(tmp_path / "s", study_config)
    group, folders = Group(tmp_path / "s"), [CellFolder(tmp_path / "s", e["id"]) for e in (first, other)]
    with pytest.MonkeyPatch.context() as patch:
        for folder, job in zip(folders, ("slurm x 1", "slurm x 2"), strict=True):
            patch.setenv(JOB, job)
            take(FolderStore(folder.attempts), "c", Observer()).close("preempted", reason="a peer is gone")
    blame(group, "slurm x 1", Ended(-9), False, 0)  # killed from outside: nobody's fault
    assert tally(folders[0]).failures == 0
    blame(group, "slurm x 1", Ended(1, "Traceback\nMemoryError: no room"), False, 0)
    found = tally(folders[0])
    assert (found.failures, found.preemptions) == (1, 0) and "MemoryError: no room" in found.reason
    assert tally(folders[1]).preemptions == 1


def test_a_jobs_earlier_run_is_dead_and_another_jobs_is_not(tmp_path, monkeypatch):
    store = FolderStore(tmp_path)
    monkeypatch.setenv(JOB, "slurm x 1")
    assert take(store, "c", Observer()).number == 1
    monkeypatch.setenv(JOB, "slurm x 2")
    assert take(store, "c", Observer()) is None
    monkeypatch.setenv(JOB, "slurm x 1")
    assert take(store, "c", Observer()).number == 2


@pytest.mark.parametrize(
    ("state", "said", "code"),
    [
        ("CANCELLED by 0", "", -signal.SIGTERM),
        ("TIMEOUT", "", -signal.SIGTERM),
        ("OUT_OF_MEMORY", "", -signal.SIGKILL),
        ("NODE_FAIL", "", -signal.SIGKILL),
        ("FAILED", "2:0", 2),
        ("FAILED", "137:0", -9),
        ("FAILED", "9:0", -9),
        ("FAILED", "75:0", 75),
        ("FAILED", "0:11", -11),
        ("FAILED", "", 1),
    ],
)
def test_how_a_job_ended(monkeypatch, state, said, code):
    class Done:
        stdout = said

    monkeypatch.setattr(slurm.subprocess, "run", lambda *_, **__: Done)
    assert slurm.exit_code("1", state) == code
