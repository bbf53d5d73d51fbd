"""`scaling relaunch`: the engine, settings and options of the last launch, for what is missing alone."""

import json

import pytest
import yaml
from click.testing import CliRunner
from tiny_study import tiny_study

from launch import launching, local
from launch.cli import cli
from launch.settings import last_launch, remember
from scaling.files import CellFolder, StudyError, write_json
from scaling.records import read_manifest


@pytest.fixture
def study(corpus, tmp_path):
    cells = [{"params": 3e3, "tokens": 2e3, "seed": s} for s in range(3)]
    (tmp_path / "tiny.json").write_text(
        json.dumps(tiny_study(corpus, grid={"kind": "list", "cells": cells, "min_steps": 10}))
    )
    call("plan", tmp_path / "tiny.json", "--study", tmp_path / "study", "--no-estimate")
    return tmp_path / "study"


def call(*words):
    return (
        CliRunner().invoke(cli, list(map(str, words)), standalone_mode=False, catch_exceptions=False).output
    )


def jobs(folder):
    return {p.name: yaml.safe_load(p.read_text()) for p in (folder / "jobs").glob("*.yaml")}


def test_files_for_pods_are_written_anew_for_what_is_missing(study, tmp_path):
    settings, out = tmp_path / "pods.toml", tmp_path / "out"
    settings.write_text('[jobset]\nimage = "registry.example/x:7"\nvolume = "v"\n')
    words = ("--dry-run", "--target", "v6e-4", "--mesh", "1,4,1", "--settings", settings, "--out", out)
    call("launch", study, "--on", "jobset", *words)
    first = jobs(out)
    settings.unlink()  # the study has a copy
    done = read_manifest(study)["cells"][0]["id"]
    write_json(CellFolder(study, done).result, {})
    call("relaunch", study, "--dry-run")
    left = {name: job for name, job in first.items() if done not in name}
    assert jobs(out) == left and len(left) == 2
    call("relaunch", study, "--dry-run", "--target", "v6e-8", "--mesh", "1,8,1")  # what is given counts
    assert all("1,8,1" in yaml.dump(j) and "registry.example/x:7" in yaml.dump(j) for j in jobs(out).values())
    with pytest.raises(StudyError, match="writes files and submits nothing: add --dry-run"):
        call("relaunch", study)
    for entry in read_manifest(study)["cells"]:
        write_json(CellFolder(study, entry["id"]).result, {})
    assert "nothing to do: all 3 cells" in call("relaunch", study, "--dry-run")


def test_options_are_those_of_the_last_launch_unless_given(study, monkeypatch):
    ran = []
    monkeypatch.setattr(local, "run_study", lambda *args: ran.append(args) or 0)
    call("launch", study, "--workers", 3, "--checkpoint-steps", 7, "--max-failures", 4, "--cell",
         read_manifest(study)["cells"][0]["id"])  # fmt: skip
    call("relaunch", study)
    call("relaunch", study, "--checkpoint-steps", 9, "--workers", 1)
    call("relaunch", study)
    launched, again, other, last = [(a[1], a[2][a[2].index("--checkpoint-steps") + 1], a[4]) for a in ran]
    assert launched[:2] == again[:2] == (3, "7") and other[:2] == last[:2] == (1, "9")
    assert len(launched[2]) == 1 and not again[2]  # all that is missing, not one cell
    assert all(a[2][a[2].index("--max-failures") + 1] == "4" for a in ran)


def test_another_engine_takes_over_nothing(study, tmp_path, monkeypatch):
    settings = tmp_path / "cluster.toml"
    settings.write_text('[slurm]\npartition = "gpu"\n')
    assert last_launch(study) == ("local", {})
    remember(study, "slurm", settings, {"checkpoint_steps": 7, "out": None})
    assert last_launch(study) == (
        "slurm",
        {"checkpoint_steps": 7, "out": None, "settings": study / "launch.toml"},
    )
    ran = []
    monkeypatch.setattr(local, "run_study", lambda *args: ran.append(args) or 0)
    monkeypatch.setattr(launching, "run_on_slurm", lambda *args: ran.append(args) or 0)
    call("relaunch", study)
    assert ran[0][5]["checkpoint_steps"] == 7 and ran[0][6].read_text() == settings.read_text()
    call("relaunch", study, "--on", "local")
    assert "--checkpoint-steps" not in ran[1][2]
    assert last_launch(study)[0] == "local"
