"""A study of trunks, branches and sentinels through the command line."""

import json

import pandas as pd
import pytest
from click.testing import CliRunner
from tiny_study import tiny_study

from fits import fit_table
from launch import packs, work
from launch.cli import cli
from scaling.attempts import MAX_FAILURES, attempts_begun, tally
from scaling.claims import FolderStore, Observer, take
from scaling.config import cell_id
from scaling.files import CellFolder, write_json
from scaling.train import Execution


@pytest.fixture
def study(corpus, tmp_path):
    grid = {"kind": "product", "params": [3e3, 6e3], "tokens": [8e3, 1.6e4, 3.2e4], "min_steps": 10}
    config = tiny_study(
        corpus, grid={**grid, "trunks": True, "sentinels": {"lr": [0.5, 2], "cells": "sizes"}}
    )
    path = tmp_path / "trunks.json"
    path.write_text(json.dumps(config))
    said = run("plan", str(path), "--study", str(tmp_path / "study"), "--no-estimate")
    assert "2 trunks in place of a run a cell save" in said.output
    return tmp_path / "study"


def run(*args):
    result = CliRunner().invoke(cli, args, standalone_mode=False, catch_exceptions=False)
    assert result.return_value in (0, None), result.output
    return result


@pytest.mark.slow
def test_plan_run_collect_fit(study):
    work.work(study, Execution(together="turns"), pack="turns")
    manifest = json.loads((study / "manifest.json").read_text())
    by_id = {e["id"]: e for e in manifest["cells"]}
    run("collect", str(study))
    table = pd.read_csv(study / "runs.csv")
    assert table["role"].value_counts().to_dict() == {"branch": 6, "sentinel": 4, "trunk": 2}
    assert (table["status"] == "finished").all() and (table["mfu"].isna()).all()
    assert (table["tokens_per_second"] > 0).all()
    for row in table[table["role"] == "branch"].to_dict("records"):
        own = 1 - by_id[row["cell"]]["fork"] / row["steps"]
        assert row["flops_spent"] == pytest.approx(row["flops"] * own) and row["trunk"] in by_id
    fit = fit_table(table, "chinchilla", bootstraps=0)
    outcomes = [r["reason"] for r in fit.rows if r["outcome"] != "used"]
    assert len(outcomes) == 6 and sum("a trunk" in r for r in outcomes) == 2
    # a trunk was begun once; its branches were ready when its forks were saved
    assert all(attempts_begun(CellFolder(study, c)) == 1 for c in by_id)
    said = run("run", str(study)).output
    assert "nothing to do: all 12 cells" in said


def test_one_branch_brings_its_trunk_and_waits_for_it(study):
    entries = json.loads((study / "manifest.json").read_text())["cells"]
    branch = next(e for e in entries if e["role"] == "branch")
    names = [e["id"] for e in work.with_their_trunks(entries, [branch["id"]])]
    assert sorted(names) == sorted([branch["id"], branch["trunk"]])
    assert not work.is_ready(study, branch)
    trunk = CellFolder(study, branch["trunk"])
    (trunk.checkpoints / str(branch["fork"])).mkdir(parents=True)
    assert work.is_ready(study, branch)
    (trunk.checkpoints / str(branch["fork"])).rmdir()
    take(FolderStore(trunk.attempts), "trunk", Observer()).close("failed", reason="x", final=True)
    assert work.is_ready(study, branch)  # it will not come: the branch trains from its own beginning


def test_a_study_planned_before_a_field_was_added_still_runs(study, monkeypatch):
    import scaling.train

    entries = json.loads((study / "manifest.json").read_text())["cells"]
    old = [e for e in entries if e["role"] == "trunk"]
    for entry in old:
        del entry["config"]["precision"], entry["config"]["train"]["skip_spikes"], entry["role"]
    trained = []

    def finish(jobs, execution, on_metrics, on_step):
        trained.extend(jobs)
        for job in jobs:
            write_json(job.folder.result, {"status": "finished"})

    monkeypatch.setattr(scaling.train, "train_pack", finish)
    monkeypatch.setattr(work, "read_manifest", lambda study: {"cells": old})
    work.work(study, Execution(), pack="turns")
    assert {job.folder.path.name for job in trained} == {e["id"] for e in old}
    assert all(cell_id(job.cell) == job.folder.path.name for job in trained)


def test_one_that_fails_in_company_does_not_take_the_others_with_it(study, monkeypatch):
    import scaling.train

    entries = json.loads((study / "manifest.json").read_text())["cells"]
    trunks = [e for e in entries if e["role"] == "trunk"]
    twins = [trunks[0], {**trunks[0], "id": trunks[1]["id"]}]
    groups = []

    def fails(jobs, execution, on_metrics, on_step):
        groups.append(len(jobs))
        if len(jobs) > 1 or jobs[0].folder.path.name == twins[1]["id"]:
            raise RuntimeError("bad cell")
        write_json(jobs[0].folder.result, {"status": "finished"})

    monkeypatch.setattr(scaling.train, "train_pack", fails)
    monkeypatch.setattr(work, "read_manifest", lambda study: {"cells": twins})
    work.work(study, Execution(), pack="turns")
    assert groups == [2, 1, 1]
    assert tally(CellFolder(study, twins[0]["id"])).failures == 1  # of the pack; alone it finished
    assert CellFolder(study, twins[0]["id"]).result.exists()
    assert tally(CellFolder(study, twins[1]["id"])).failures == MAX_FAILURES


def test_packs_by_shape_and_by_device(study):
    cells = json.loads((study / "manifest.json").read_text())["cells"]
    branches = [e for e in cells if e["role"] == "branch"]
    config = branches[0]["config"]
    fit = packs.cells_that_fit
    assert fit(config, "auto", True, None, None) == 1  # a core is busy with one cell
    assert fit(config, "off", False, 1e15, 80e9) == 1
    assert fit(config, "turns", True, None, None) == packs.MOST_CELLS
    assert fit(config, "auto", False, 1e15, 80e9) == packs.MOST_CELLS  # microseconds a step
    assert fit(config, "auto", False, 1e15, 1e6) == 1  # no memory for two
    slow = 3e-3  # seconds a step at this peak: more than is worth packing for
    flops = 3 * 2 * 3e3 * 128 / slow
    assert fit(config, "auto", False, flops, 80e9) == 1
    pack = packs.form_pack(branches, lambda c: 2)
    assert len(pack) == 2 and len({e["config"]["model"]["d_model"] for e in pack}) == 1
    said = packs.describe(branches, lambda c: 16)
    assert "6 of 6 cells train in 2 packs of up to 3" in said
    assert "none on this device" in packs.describe(branches, lambda c: 1)
