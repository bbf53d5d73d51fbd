"""The command line as a person meets it: exit codes, one clear sentence for bad input, real processes."""

import contextlib
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

import numpy as np
import pandas as pd
import pytest
from tiny_study import tiny_study

from launch.cli import main
from scaling.attempts import attempts_of
from scaling.files import CellFolder
from scaling.records import collect, read_table

SCALING = [sys.executable, "-m", "launch.cli"]
ROOT = Path(__file__).parent.parent.parent


def scaling(*args, cwd, check=0, **kwargs):
    """Runs the command; returns its standard output (and asserts its exit code)."""
    out = subprocess.run(
        [*SCALING, *map(str, args)],
        cwd=cwd,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        **kwargs,
    )
    assert out.returncode in (check if isinstance(check, tuple) else (check,)), out.stdout + out.stderr
    assert "Traceback" not in out.stderr
    return out.stdout + (out.stderr if out.returncode else "")


def called(*args, cwd, check=0):
    """The same in this process, which has everything imported: for tests of many questions."""
    out, err = io.StringIO(), io.StringIO()
    with (
        contextlib.chdir(cwd),
        mock.patch.object(sys, "argv", ["scaling", *map(str, args)]),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        pytest.raises(SystemExit) as end,
    ):
        main()
    code = end.value.code or 0
    assert code in (check if isinstance(check, tuple) else (check,)), out.getvalue() + err.getvalue()
    return out.getvalue() + (err.getvalue() if code else "")


def refused(*args, cwd):
    """Calls a command that must be refused; returns its one sentence."""
    said = called(*args, cwd=cwd, check=2)
    assert said.startswith("error: ") and len(said.strip().splitlines()) == 1, said
    return said


@pytest.fixture(scope="module")
def done(corpus, tmp_path_factory):
    """A tiny study, planned, trained and fitted once for the tests of this file."""
    folder = tmp_path_factory.mktemp("cli")
    (folder / "tiny.json").write_text(json.dumps(tiny(corpus)))
    scaling("plan", "tiny.json", "--study", "s", "--no-estimate", cwd=folder)
    scaling("run", "s", cwd=folder)
    # six runs of two budgets determine little: the exit code may say so
    scaling("fit", "s", "--bootstraps", 50, "--law", "power_C", cwd=folder, check=(0, 1))
    return folder


def tiny(corpus, **changes):
    return tiny_study(corpus, budgets=(1e8, 2e8), params=(3e3, 6e3, 1e4), batch_tokens=64, **changes)


@pytest.mark.slow
def test_whole_path(done):
    table = collect(done / "s")
    assert len(table) == 6 and set(table["status"]) == {"finished"}
    assert np.all(np.isfinite(table["loss"].to_numpy(float)))
    said = scaling("run", "s", cwd=done)
    assert "nothing to do: all 6 cells" in said
    status = json.loads(scaling("status", "s", "--json", cwd=done))
    assert [r["state"] for r in status["cells"]] == ["finished"] * 6
    scaling("collect", "s", cwd=done)
    for name in ("runs.csv", "runs.parquet"):
        np.testing.assert_array_equal(read_table(done / "s" / name)["loss"], table["loss"])
    again = json.loads(scaling("plan", "tiny.json", "--study", "s", "--no-estimate", "--json", cwd=done))
    assert again["outcome"] == "same" and [c["id"] for c in again["cells"]] == list(table["cell"])


@pytest.mark.slow
def test_report_of_a_study(done):
    out = scaling("report", "s", cwd=done)
    assert "report.html" in out
    page = (done / "s" / "report.html").read_text()
    assert page.lower().startswith("<!doctype html>") and "power_C" in page
    assert list((done / "s" / "plots").glob("*.png"))


@pytest.mark.slow
def test_two_launchers_train_no_cell_twice(corpus, tmp_path):
    (tmp_path / "tiny.json").write_text(json.dumps(tiny(corpus)))
    scaling("plan", "tiny.json", "--study", "s", "--no-estimate", cwd=tmp_path)
    command = [*SCALING, "run", "s", "--workers", "1"]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    two = [subprocess.Popen(command, cwd=tmp_path, env=env, stdout=subprocess.PIPE) for _ in range(2)]
    outs = [p.communicate(timeout=300)[0].decode() for p in two]
    assert [p.returncode for p in two] == [0, 0]
    assert all("6 cells: 6 finished" in o for o in outs)
    for cell in (tmp_path / "s" / "cells").iterdir():
        timing = json.loads((cell / "timing.json").read_text())
        assert timing["resumed_from_step"] == 0
        assert [a["outcome"] for a in attempts_of(CellFolder(cell.parent.parent, cell.name))].count(
            "finished"
        ) == 1


@pytest.mark.slow
def test_kill_and_resume_equals_uninterrupted(corpus, tmp_path):
    """SIGKILL of the whole process group at random moments, saves included; then byte-identical files."""
    config = tiny(corpus)
    config["grid"] |= {"budgets": [6e8], "params": [3e3, 1e4]}
    (tmp_path / "tiny.json").write_text(json.dumps(config))
    for study in ("whole", "killed"):
        scaling("plan", "tiny.json", "--study", study, "--no-estimate", cwd=tmp_path)
    scaling("run", "whole", "--workers", 2, cwd=tmp_path)
    rng = np.random.default_rng(0)
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [*SCALING, "run", "killed", "--checkpoint-steps", "3"]
    for _ in range(4):
        process = subprocess.Popen(command, cwd=tmp_path, env=env, start_new_session=True, stdout=-3)
        time.sleep(rng.uniform(4, 9))
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    # another number of workers than the undisturbed run had
    scaling("run", "killed", "--checkpoint-steps", 3, "--workers", 1, cwd=tmp_path)
    cells = sorted(p.name for p in (tmp_path / "whole" / "cells").iterdir())
    assert len(cells) == 2
    for cell in cells:
        for name in ("result.json", "metrics.jsonl", "config.json"):
            a, b = ((tmp_path / s / "cells" / cell / name).read_bytes() for s in ("whole", "killed"))
            assert a == b, f"{cell}/{name}"


def test_help_of_every_command(tmp_path):
    from launch.cli import cli

    assert set(cli.commands) >= {
        "plan",
        "run",
        "status",
        "collect",
        "fit",
        "allocate",
        "compare",
        "next",
        "select",
        "report",
    }
    for name, command in cli.commands.items():
        assert command.help and len(command.help) > 40, name
        for option in command.params:
            if option.param_type_name == "option":
                assert option.help or option.name in ("remat", "wandb", "checkpoint_seconds", "loss", "space",
                                                      "bootstraps"), f"{name} {option.name}"  # fmt: skip
    assert "scaling plan" in scaling("--help", cwd=tmp_path)


def write_table(path, **changes):
    """A planted run table: 4 budgets, 5 sizes."""
    c, n = np.meshgrid([1e18, 1e19, 1e20, 1e21], np.geomspace(0.3, 3, 5), indexing="ij")
    params = n * 1e8 * (c / 1e19) ** 0.5
    tokens = c / 6 / params
    loss = 1.8 + 480 / params**0.35 + 2100 / tokens**0.37
    table = pd.DataFrame(
        dict(params=params.ravel(), tokens=tokens.ravel(), loss=loss.ravel(), flops=c.ravel())
    )
    for name, value in changes.items():
        table[name] = value
    table.to_csv(path, index=False)
    return table


def test_fit_recovers_a_planted_law(tmp_path):
    write_table(tmp_path / "t.csv")
    got = json.loads(scaling("fit", "t.csv", "--bootstraps", 20, "--json", cwd=tmp_path))["fit"]
    for name, value in {"E": 1.8, "A": 480, "B": 2100, "alpha": 0.35, "beta": 0.37}.items():
        # noise-free rows written with 16 digits
        assert got["params"][name] == pytest.approx(value, rel=1e-5)
    answer = json.loads(
        scaling("allocate", "t.chinchilla.fit.json", "--budget", "1e22", "--json", cwd=tmp_path)
    )
    assert answer["N"] * answer["D"] * 6 == pytest.approx(1e22, rel=1e-6)


@pytest.mark.slow
def test_questions_of_a_fitted_table(tmp_path):
    """Limits, money, the next run, a comparison and a selection, from the shell."""
    table = write_table(tmp_path / "t.csv")
    rng = np.random.default_rng(0)
    noisy = table.loss * np.exp(2e-3 * rng.standard_normal(len(table)))
    table.assign(loss=noisy).to_csv(tmp_path / "a.csv", index=False)
    # B needs half the compute for the same loss: N and D count as sqrt(2) times as much
    better = 1.8 + 480 / (2**0.5 * table.params) ** 0.35 + 2100 / (2**0.5 * table.tokens) ** 0.37
    table.assign(loss=better * noisy / table.loss).to_csv(tmp_path / "b.csv", index=False)
    for name in "ab":
        called("fit", f"{name}.csv", "--bootstraps", 120, cwd=tmp_path)
    a, b = "a.chinchilla.fit.json", "b.chinchilla.fit.json"
    limited = ("allocate", a, "--json", "--max-params", "1e8", "--inference-tokens", "1e11")
    got = json.loads(called(*limited, "--budget", "1e22", cwd=tmp_path))
    assert got["N"] == pytest.approx(1e8) and got["limits"] == {"max_params": 1e8, "inference_tokens": 1e11}
    assert 6 * got["N"] * got["D"] + 2 * got["N"] * 1e11 == pytest.approx(1e22, rel=1e-6)
    hours = ("--device-hours", "1000", "--chip", "h100", "--mfu", "0.4")
    got = json.loads(called("allocate", a, *hours, "--json", cwd=tmp_path))
    assert got["budget"] == pytest.approx(1000 * 3600 * 989.4e12 * 0.4)
    assert "in one way" in refused("allocate", a, "--budget", "1e22", *hours, cwd=tmp_path)
    assert "in one way" in refused("allocate", a, cwd=tmp_path)
    served = ("--max-latency", "1e-4", "--inference-chip", "v5e", "--bytes-per-param", "1")
    got = json.loads(called("allocate", a, "--target-loss", "2.7", *served, "--sizes", "2e7,5e7,5e8",
                             "--json", cwd=tmp_path))  # fmt: skip
    assert got["loss"] == pytest.approx(2.7) and got["target"]["budget"]["estimate"] == got["budget"]
    # 819e9 bytes/s at a byte a parameter, and 197e12 FLOP/s at two
    assert got["N"] <= 1e-4 / (1 / 819e9 + 2 / 197e12) * (1 + 1e-9)
    assert got["buildable"]["N"] == got["sizes"][0]["N"] and got["sizes"][-1]["loss"] is None
    assert "without inference_chip" in refused("allocate", a, "--budget", "1e22", *served[:2], cwd=tmp_path)
    assert "in one way" in refused("allocate", a, "--budget", "1e22", "--target-loss", "2.5", cwd=tmp_path)
    got = json.loads(called("compare", a, b, "--budget", "1e21", "--json", cwd=tmp_path))
    # the same noise on both sides; what is left is the difference of two noisy fits
    assert got["speedups"][0]["speedup"]["estimate"] == pytest.approx(2.0, rel=0.1)
    assert "speed-up" in called("compare", a, b, cwd=tmp_path)
    out = called("next", a, "--budget", "1e23", "--batch", 2, "--within", 0.1, cwd=tmp_path)
    assert out.count("95 % half-width") == 2 and out.count(" ± ") >= 4
    picked = json.loads(
        called("select", "a.csv", "--law", "chinchilla", "--law", "power_C", "--json", cwd=tmp_path)
    )
    assert picked["recommended"]
    # a table is fitted as the report's own fit was; a fit file is read
    called("report", a, "--against", "b.csv", "--without", "selection", "--out", "r.html", cwd=tmp_path)
    page = (tmp_path / "r.html").read_text()
    assert "speed-up of b" in page and "No forecasts: It was not asked for." in page
    fitted_first = page.split("speed-up of b")[1].split("</tbody>")[0]
    called("report", a, "--against", b, "--without", "selection", "--out", "r.html", cwd=tmp_path)
    said = (tmp_path / "r.html").read_text().split("speed-up of b.chinchilla.fit")[1].split("</tbody>")[0]
    assert re.findall(r'value="[^"]*"', said) == re.findall(r'value="[^"]*"', fitted_first)
    assert "law is 'none'" in refused("report", a, "--law", "none", cwd=tmp_path)


def test_bad_tables_end_in_one_sentence(tmp_path):
    table = write_table(tmp_path / "t.csv")
    assert "no-such.csv is not a file" in refused("fit", "no-such.csv", cwd=tmp_path)
    (tmp_path / "t.xlsx").write_text("")
    assert "give a study folder or a file in .csv" in refused("fit", "t.xlsx", cwd=tmp_path)
    table.drop(columns="loss").to_csv(tmp_path / "noloss.csv", index=False)
    assert "loss" in refused("fit", "noloss.csv", cwd=tmp_path)
    table.assign(tokens=table.tokens / 1e9).drop(columns="flops").to_csv(
        tmp_path / "billions.csv", index=False
    )
    said = refused("fit", "billions.csv", cwd=tmp_path)
    assert "tokens" in said and "1e9" in said
    table.head(3).to_csv(tmp_path / "few.csv", index=False)
    assert "3 usable rows" in refused("fit", "few.csv", cwd=tmp_path)
    table.assign(loss=np.nan).to_csv(tmp_path / "nan.csv", index=False)
    refused("fit", "nan.csv", cwd=tmp_path)
    assert "--fixed E='x' must be a number" in refused("fit", "t.csv", "--fixed", "E=x", cwd=tmp_path)
    assert "must look like name=value" in refused("fit", "t.csv", "--map", "params", cwd=tmp_path)


def test_doubtful_tables_say_so(tmp_path):
    table = write_table(tmp_path / "t.csv")
    table[table.flops == 1e20].to_csv(tmp_path / "one.csv", index=False)
    out = called("fit", "one.csv", "--bootstraps", 20, cwd=tmp_path, check=1)
    assert "not identified" in out
    doubled = pd.concat([table, table.head(4)])
    doubled.loc[doubled.index[7], "loss"] = np.nan
    doubled.to_csv(tmp_path / "dup.csv", index=False)
    got = json.loads(called("fit", "dup.csv", "--bootstraps", 20, "--json", cwd=tmp_path))["fit"]
    reasons = [r["reason"] for r in got["rows"] if r["outcome"] == "excluded"]
    assert len(reasons) == 5 and any("duplicate" in r or "same" in r for r in reasons), reasons


def test_bad_configs_end_in_one_sentence(corpus, tmp_path):
    def plan(words, **changes):
        (tmp_path / "c.json").write_text(json.dumps(tiny(corpus, **changes)))
        assert words in refused("plan", "c.json", "--study", "s", "--no-estimate", cwd=tmp_path)
        assert not (tmp_path / "s").exists()

    plan("the study has an unknown key 'modle'; did you mean 'model'", modle={})
    empty = tmp_path / "empty"
    empty.mkdir()
    plan("data.path", data={"source": "text", "path": str(empty)})
    plan("nowhere", data={"source": "text", "path": str(tmp_path / "nowhere")})
    plan("data.seq is 100000000", data={"source": "text", "path": str(corpus), "seq": 10**8})
    assert "is not a study folder" in refused("run", "nowhere", cwd=tmp_path)
    assert "is not a study folder" in refused("status", "nowhere", cwd=tmp_path)
    assert "has no fit yet" in refused("allocate", ".", "--budget", "1e9", cwd=tmp_path)


def test_manifest_of_another_config(corpus, tmp_path):
    (tmp_path / "tiny.json").write_text(json.dumps(tiny(corpus)))
    called("plan", "tiny.json", "--study", "s", "--no-estimate", cwd=tmp_path)
    (tmp_path / "other.json").write_text(json.dumps(tiny(corpus, name="other")))
    assert "holds study 'tiny'" in refused(
        "plan", "other.json", "--study", "s", "--no-estimate", cwd=tmp_path
    )
    manifest = json.loads((tmp_path / "s" / "manifest.json").read_text())
    manifest["cells"][0]["config"]["optim"]["lr"] *= 2
    (tmp_path / "s" / "manifest.json").write_text(json.dumps(manifest))
    assert "hashes differently" in refused("run", "s", cwd=tmp_path)


def test_cell_that_is_not_there(corpus, tmp_path):
    (tmp_path / "tiny.json").write_text(json.dumps(tiny(corpus)))
    scaling("plan", "tiny.json", "--study", "s", "--no-estimate", cwd=tmp_path)
    assert "is not a cell of s" in refused("run", "s", "--cell", "abc", cwd=tmp_path)
