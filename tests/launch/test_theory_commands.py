"""Commands on a study whose cells are no language models: what works on it, and what refuses."""

import re
from pathlib import Path

import pytest
from click.testing import CliRunner

from launch.cli import cli
from scaling.files import CellFolder
from scaling.grid import plan, write_manifest
from scaling.lane import Job
from scaling.records import read_manifest
from scaling.run_trainer import run_trainer
from scaling.study import validate_study
from scaling.theory.plrf import frontier

POINTS = {"0.7 0.3": (0.7, 0.3), "1 0.7": (1.0, 0.7)}


def make(folder: Path, points) -> Path:
    """A study of the exact mean at three budgets, trained in this process."""
    cells = []
    for alpha, beta in points:
        for f in (1e9, 1e10, 1e11):
            (best,), _ = frontier(alpha, beta, [f])
            for k in range(-3, 4):
                fixed = {"trainer.alpha": alpha, "trainer.beta": beta}
                cells.append({"params": round(best * 2 ** (k / 2)), "flops": 6 * f, "set": fixed})
    config = {
        "name": folder.name,
        "grid": {"kind": "list", "cells": cells},
        "trainer": {"name": "plrf", "rate": 0.25, "dynamics": "equivalent"},
    }
    write_manifest(folder, plan(validate_study(config), {}))
    for entry in read_manifest(folder)["cells"]:
        run_trainer(Job(entry["config"], CellFolder(folder, entry["id"])))
    return folder


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    return make(tmp_path_factory.mktemp("s") / "two", POINTS.values())


def scaling(*words):
    return CliRunner().invoke(cli, [str(w) for w in words], catch_exceptions=True)


def test_preflight_refuses_a_planned_study_in_words(study):
    done = scaling("preflight", study, "--target", "v5e-8")
    said = "trainer.name is 'plrf'; scaling preflight is for language models alone"
    assert str(done.exception) == said and done.exit_code != 0


def test_a_report_needs_a_fit_and_then_holds_the_truths(study):
    none = scaling("report", study)
    assert "has no fit yet; make one with" in str(none.exception)
    scaling("fit", study, "--bootstraps", "40")
    done = scaling("report", study, "--without", "selection", "--without", "next")
    assert done.exit_code == 0, done.exception
    page = (study / "report.html").read_text()
    assert "rows are of 2 families" in page and "one law is fitted to all of them" in page
    section = re.search(r'<section id="problems">.*?</section>', page, re.S).group()
    assert section.count("<td>agrees</td>") == 2
    for name in POINTS:
        assert f"equivalent {name}" in section
    # phases Ia and II: 5/12, and 7/17 and 12/17, in the column of the limit
    for value in (5 / 12, 7 / 17, 12 / 17):
        assert any(abs(float(v) - value) < 1e-12 for v in re.findall(r'<data value="([^"]+)"', section))
