"""A study that is written from a law: read as a real one, and the planted law is found again."""

import json

import numpy as np
import pytest
from click.testing import CliRunner
from tiny_study import tiny_study

import fits
from fits.noise import find_repeats
from fits.table import clean
from launch.cli import cli
from launch.fitting import Fitted, as_json
from launch.launching import run_here, start
from launch.simulate import Noise, planted, planted_words, simulate, write_cells
from launch.status import study_status
from scaling.config import ConfigError
from scaling.files import CellFolder, StudyError
from scaling.grid import plan, write_manifest
from scaling.records import check_cells, collect, curves, progress, read_manifest
from scaling.study import validate_study

PARAMS = {"E": 1.7, "A": 60.0, "B": 300.0, "alpha": 0.4, "beta": 0.35}
FACTS = {
    "fingerprint": "none",
    "vocab": 256,
    "unique_tokens": 10**9,
    "heldout_tokens": 10**7,
    "bytes_per_token": 1.0,
}


def study_config(seeds=(0, 1), tokens=(3e5, 1e6, 3e6, 1e7)):
    return validate_study(
        {
            "name": "s",
            "grid": {"kind": "product", "params": [1e4, 3e4, 1e5, 3e5], "tokens": list(tokens)},
            "seeds": list(seeds),
            "model": {"head_dim": 8},
            "recipe": {"params": 3e4, "tokens": 1e6, "lr": 1e-2, "batch_tokens": 1024, "width_multiple": 8},
        }
    )


def write(folder, noise, **config):
    law, params = planted("chinchilla", PARAMS)
    manifest = simulate(plan(study_config(**config), FACTS), law, params, noise)
    write_manifest(folder, manifest, grow=True)
    return write_cells(folder, manifest, law, params, noise)


def test_without_noise_the_law_is_found_again(tmp_path):
    assert write(tmp_path, Noise(seed_noise=0.0)) == {"finished": 32}
    check_cells(tmp_path)
    table = collect(tmp_path)
    exact = PARAMS["E"] + PARAMS["A"] * table["params"] ** -0.4 + PARAMS["B"] * table["tokens"] ** -0.35
    np.testing.assert_allclose(table["loss"], exact, rtol=1e-12)
    fit = fits.fit_table(table, bootstraps=0, sensitivity=False)
    for name, value in PARAMS.items():
        assert fit.params[name] == pytest.approx(value, rel=1e-3)  # the solver's tolerance on A and B
    words = planted_words(read_manifest(tmp_path), fit)
    assert "planted E 1.7" in words and as_json(Fitted(fit, None, "", planted=words))["planted"] == words


def test_noise_is_of_the_size_asked_for(tmp_path):
    write(tmp_path, Noise(seed_noise=0.01, size_effect=0.05), seeds=range(12), tokens=[1e6])
    table = collect(tmp_path)
    exact = PARAMS["E"] + PARAMS["A"] * table["params"] ** -0.4 + PARAMS["B"] * table["tokens"] ** -0.35
    off = np.log(table["loss"] / exact)
    within = off - off.groupby(table["params"]).transform("mean")
    assert within.std() == pytest.approx(0.01, rel=0.4)  # 44 degrees of freedom know it to 11 %
    assert off.groupby(table["params"]).mean().std() > 0.015  # four sizes of 0.05: under it once in 60
    rows = clean(table)
    assert np.bincount(find_repeats(rows, ("N", "D"))[0]).tolist() == [12] * 4


def test_what_goes_wrong_is_recorded_as_in_a_real_study(tmp_path):
    noise = Noise(diverged=0.2, failed=0.2, stragglers=0.2, seed=1)
    counts = write(tmp_path, noise)
    table, status = collect(tmp_path), study_status(tmp_path)["cells"]
    assert counts == table["status"].value_counts().to_dict() and len(counts) == 3
    assert {s["state"] for s in status} == {"finished", "diverged", "failed"}
    assert [s["state"] for s in status] == list(table["status"])
    assert table["loss"][table["status"] != "finished"].isna().all()
    slow = [s for s in status if s["preemptions"]]
    assert slow and all(s["state"] == "finished" and s["attempts"] == 2 for s in slow)
    by_cell = table.set_index("cell")
    flops_per_second = by_cell["flops"] / by_cell["wall_seconds"]
    slowest = flops_per_second[[s["cell"] for s in slow]]
    assert slowest.max() < 0.2 * flops_per_second.max()
    # a diverged cell stopped early; its curve ends there, and that of the others at their last step
    assert all(curve["step"].is_monotonic_increasing for curve in curves(tmp_path).values())
    steps = {r["cell"]: r["steps"] for r in progress(tmp_path)}
    last = {cell: int(curve["step"].iloc[-1]) for cell, curve in curves(tmp_path).items()}
    for cell, state in zip(table["cell"], table["status"], strict=True):
        assert (last[cell] == steps[cell]) == (state == "finished")
    assert len(fits.fit_table(table, bootstraps=0, sensitivity=False).data["columns"]) >= 3


def test_written_again_nothing_changes_also_of_cells_that_failed(tmp_path):
    noise = Noise(diverged=0.2, failed=0.2, stragglers=0.2, seed=1)
    write(tmp_path, noise)
    before = [(c["state"], c["attempts"]) for c in study_status(tmp_path)["cells"]]
    assert write(tmp_path, noise) == {}
    assert [(c["state"], c["attempts"]) for c in study_status(tmp_path)["cells"]] == before
    cell = next(c["cell"] for c in study_status(tmp_path)["cells"] if c["state"] == "failed")
    attempt = next(CellFolder(tmp_path, cell).attempts.glob("*.json"))
    attempt.write_text(json.dumps({**json.loads(attempt.read_text()), "device_kind": "cpu"}))
    with pytest.raises(StudyError, match="real training"):
        write(tmp_path, noise)


def test_a_grown_study_keeps_its_noise(tmp_path):
    write(tmp_path, Noise(size_effect=0.01))
    before = collect(tmp_path).set_index("cell")["loss"]
    assert write(tmp_path, Noise(size_effect=0.01), seeds=(0, 1, 2)) == {"finished": 16}
    after = collect(tmp_path).set_index("cell")["loss"]
    assert (after[before.index] == before).all() and len(after) == 48
    assert write(tmp_path, Noise(size_effect=0.01), seeds=(0, 1, 2)) == {}


def test_real_and_simulated_do_not_mix(tmp_path):
    write(tmp_path, Noise())
    with pytest.raises(StudyError, match="simulate"):
        run_here(tmp_path, (), 1, 1, False, {"wandb": "off", "pack": "auto"})
    given = {"cells": (), "dry_run": True, "settings": None, "target": "v5e", "out": None, "workers": None}
    with pytest.raises(StudyError, match="simulate"):
        start(tmp_path, "skypilot", False, {**given, "cores_per_worker": 1})
    result = CellFolder(tmp_path, read_manifest(tmp_path)["cells"][0]["id"]).result
    result.write_text(json.dumps({**json.loads(result.read_text()), "device_kind": "cpu"}))
    with pytest.raises(StudyError, match="real training"):
        write(tmp_path, Noise())


@pytest.mark.parametrize(
    ("params", "words"),
    [
        ({**PARAMS, "gamma": 1.0}, "'gamma' is not of chinchilla"),
        ({k: v for k, v in PARAMS.items() if k != "B"}, "--param B is missing"),
        ({**PARAMS, "A": -1.0}, "--param A is -1.0"),
    ],
)
def test_a_law_that_cannot_be_planted(params, words):
    with pytest.raises(ConfigError, match=words):
        planted("chinchilla", params)


def test_noise_that_cannot_be():
    with pytest.raises(ConfigError, match="seed_noise"):
        Noise(seed_noise=2.0)
    with pytest.raises(ConfigError, match="sum"):
        Noise(diverged=0.7, failed=0.7)
    settings = study_config()
    settings["grid"]["trunks"] = True
    law, params = planted("chinchilla", PARAMS)
    with pytest.raises(ConfigError, match="trunks"):
        simulate(plan(settings, FACTS), law, params, Noise())


def test_the_command_grows_a_study_under_the_same_law_alone(tmp_path, corpus):
    config = tmp_path / "c.json"
    grid = {"kind": "list", "cells": [{"params": 3e3, "tokens": 2e3}], "min_steps": 10}
    words = ["simulate", str(config), "--study", str(tmp_path / "s"), "--json"]
    words += [x for k, v in PARAMS.items() for x in ("--param", f"{k}={v}")]

    def call(*more, seeds):
        config.write_text(json.dumps(tiny_study(corpus, grid=grid, seeds=seeds)))
        return CliRunner().invoke(cli, [*words, *more])

    assert json.loads(call(seeds=[0]).stdout)["cells"] == {"finished": 1}
    assert "add --grow" in str(call(seeds=[0, 1]).exception)
    assert json.loads(call("--grow", seeds=[0, 1]).stdout)["cells"] == {"finished": 1}
    other = call("--grow", "--seed-noise", "0.1", seeds=[0, 1, 2])
    assert isinstance(other.exception, StudyError) and "'seed_noise': 0.003" in str(other.exception)
