"""The command line: scaling plan | run | status | collect | fit | allocate | report."""

from __future__ import annotations

import functools
import importlib.util
import json
import sys
from pathlib import Path

import click
from rich.console import Console
from rich.markup import escape

from scaling import __version__
from scaling.config import ConfigError
from scaling.files import StudyError

console = Console(highlight=False, width=None if sys.stdout.isatty() else 150)
stderr = Console(stderr=True, highlight=False)


def main() -> None:
    """Entry point: a clear error is one sentence and exit code 2."""
    try:
        code = cli(standalone_mode=False)
    except (ConfigError, StudyError) as error:
        fail(str(error))
    except click.exceptions.Abort:
        sys.exit(130)
    except KeyboardInterrupt:
        sys.exit(130)
    except click.ClickException as error:
        error.show()
        sys.exit(2)
    except Exception as error:
        if type(error).__name__ != "FitError":  # of fits, imported only by the commands that need it
            raise
        fail(str(error))
    sys.exit(code if isinstance(code, int) else 0)


def fail(message: str) -> None:
    stderr.print(f"[bold red]error:[/] {escape(message)}", soft_wrap=True)
    sys.exit(2)


LOSSES = ["huber", "lad", "lsq"]

json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON for programs, nothing else.")


def emit(as_json: bool, value, show) -> None:
    """JSON for programs, or what ``show`` prints for people."""
    if as_json:
        click.echo(json.dumps(value, indent=1, allow_nan=False))
    else:
        show()


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="scaling")
def cli() -> None:
    """Compute-optimal scaling laws: plan a grid of models, train it, fit the law, spend the budget.

    \b
    A study from nothing to an answer:
      scaling plan experiments/quickstart.py     resolve the grid, print what it will cost
      scaling run studies/quickstart             train every cell (again to resume)
      scaling fit studies/quickstart             fit the law, with intervals
      scaling allocate studies/quickstart --budget 1e13
      scaling report studies/quickstart          one HTML file with every picture

    Exit codes: 0 done; 1 some cells failed or the fit cannot be trusted; 2 bad input, said in one sentence.
    """


@cli.command()
@click.argument("config", type=click.Path(path_type=Path))
@click.option("--study", type=click.Path(path_type=Path), help="Study folder (default: studies/NAME).")
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override a field.")
@click.option("--grow", is_flag=True, help="Add the config's new cells to an existing study.")
@click.option("--dry-run", is_flag=True, help="Print the table, write nothing.")
@click.option("--no-estimate", is_flag=True, help="Skip the time estimate.")
@json_option
def plan(config, study, overrides, grow, dry_run, no_estimate, as_json):
    """Resolve CONFIG into a manifest of cells and print the table to check before spending.

    CONFIG is a Python file with get_config(), such as experiments/quickstart.py. Nothing is trained.
    """
    from launch import show
    from scaling import data
    from scaling.config import validate_section
    from scaling.grid import plan as make_plan
    from scaling.grid import write_manifest
    from scaling.study import load_study

    settings = load_study(config, list(overrides))
    study = study or Path("studies") / settings["name"]
    dataset = data.open_data(validate_section("data", settings["data"]))
    facts = show.data_facts(dataset, settings["data"].get("seq", 128))
    manifest = make_plan(settings, facts)
    estimate = None if no_estimate else show.estimate(manifest)
    outcome = "dry run" if dry_run else write_manifest(study, manifest, grow)
    value = {**manifest, "outcome": outcome, "folder": str(study), "estimate": estimate}
    emit(as_json, value, lambda: show.plan(console, manifest, estimate, study, outcome))


@cli.command()
@click.argument("study", type=click.Path(path_type=Path))
@click.option(
    "--cell", "cells", multiple=True, metavar="ID", help="Train only this cell (may be given again)."
)
@click.option("--workers", type=click.IntRange(min=1), help="Worker processes (default: one a CPU core).")
@click.option(
    "--cores-per-worker",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="CPU only; the last bits of a result depend on it.",
)
@click.option("--checkpoint-seconds", type=float, default=60.0, show_default=True)
@click.option("--checkpoint-steps", type=click.IntRange(min=1), help="Save also every so many steps.")
@click.option("--remat", type=click.Choice(["none", "full", "dots"]), default="none", show_default=True)
@click.option(
    "--wandb",
    type=click.Choice(["off", "offline", "online"]),
    default="off",
    is_flag=False,
    flag_value="offline",
    help="Mirror to Weights & Biases; without a value: offline.",
)
@json_option
def run(study, cells, workers, cores_per_worker, checkpoint_seconds, checkpoint_steps, remat, wandb, as_json):
    """Train every cell of STUDY that is not finished; run it again after any interruption.

    A killed run goes on from its checkpoints to the same numbers. Several `scaling run` on one
    study share the work: no cell is trained twice.
    """
    from launch import local, show
    from scaling.records import progress, read_manifest

    if wandb != "off" and importlib.util.find_spec("wandb") is None:
        raise StudyError("--wandb needs the package wandb; install the extra: pip install 'scaling[wandb]'")
    manifest = read_manifest(study)
    known = [e["id"] for e in manifest["cells"]]
    for cell in cells:
        if cell not in known:
            raise StudyError(f"--cell {cell!r} is not a cell of {study}; `scaling status {study}` lists them")
    todo = [r for r in progress(study) if r["status"] not in ("finished", "diverged")]
    todo = [r for r in todo if not cells or r["cell"] in cells]
    if not todo:
        message = f"nothing to do: all {len(cells or known)} cells of {study} have a result"
        emit(as_json, {"outcome": "nothing to do"}, lambda: console.print(message))
        return 0
    options = ["--checkpoint-seconds", str(checkpoint_seconds), "--remat", remat, "--wandb", wandb]
    options += ["--checkpoint-steps", str(checkpoint_steps)] if checkpoint_steps else []
    options += [x for c in cells for x in ("--cell", c)]
    count = workers or local.default_workers(len(todo), cores_per_worker)
    with show.progress_bars(console, study, quiet=as_json) as on_poll:
        code = local.run_study(study, count, options, on_poll, cells, cores_per_worker)
    emit(as_json, {"outcome": "done", "cells": progress(study)}, lambda: show.run_summary(console, study))
    return code


@cli.command()
@click.argument("study", type=click.Path(path_type=Path))
@json_option
def status(study, as_json):
    """Show where every cell of STUDY stands, from the folder alone."""
    from launch import show
    from scaling.records import progress

    rows = progress(study)
    emit(as_json, rows, lambda: show.status(console, study, rows))


@cli.command()
@click.argument("study", type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), help="A .csv, .parquet or .jsonl file.")
@click.option("--wandb-dir", type=click.Path(path_type=Path), help="Read offline wandb runs instead.")
@json_option
def collect(study, out, wandb_dir, as_json):
    """Write the run table of STUDY: one row a (cell, evaluation)."""
    import pandas as pd

    from scaling.records import collect as collect_rows
    from scaling.records import write_table

    if wandb_dir is not None:
        from scaling.tracking import read_wandb

        table = read_wandb(wandb_dir).assign(study=study.name)
    else:
        table = collect_rows(study)
    stem = "runs" if wandb_dir is None else "wandb_runs"
    outs = [out] if out else [study / f"{stem}.csv", study / f"{stem}.parquet"]
    for path in outs:
        write_table(table, path)
    states = table["status"] if "status" in table else pd.Series(["unfinished"] * len(table))
    counts = {k: int(v) for k, v in states.fillna("unfinished").value_counts().items()}
    said = ", ".join(f"{v} {k}" for k, v in counts.items())
    where = " and ".join(map(str, outs))
    value = {"rows": len(table), "status": counts, "written": [str(p) for p in outs]}
    emit(
        as_json,
        value,
        lambda: console.print(f"{len(table)} rows ({said}) written to {where}", soft_wrap=True),
    )


def fit_options(command):
    """Options that say how to fit, shared by the commands that fit."""
    options = [
        click.option("--law", default="chinchilla", show_default=True, help="Name of the law."),
        click.option("--loss", type=click.Choice(LOSSES), default="huber", show_default=True),
        click.option("--delta", type=float, default=1e-3, show_default=True, help="Huber's delta."),
        click.option("--space", type=click.Choice(["log", "raw"]), default="log", show_default=True),
        click.option("--bootstraps", type=click.IntRange(min=0), default=1000, show_default=True),
        click.option("--cluster", default="auto", show_default=True, help="auto, none, or a column."),
        click.option("--fixed", multiple=True, metavar="NAME=VALUE", help="Pin a parameter, e.g. E=1.6."),
        click.option("--map", "columns", metavar="params=N,tokens=D", help="Column names: ours=theirs."),
        click.option("--token-unit", type=float, default=1.0, help="1e9 where tokens are in billions."),
        click.option("--param-unit", type=float, default=1.0, help="1e6 where parameters are in millions."),
        click.option("--seed", type=int, default=0, show_default=True, help="Seed of the bootstrap."),
    ]
    return functools.reduce(lambda f, option: option(f), reversed(options), command)


@cli.command()
@click.argument("table", type=click.Path(path_type=Path))
@fit_options
@click.option("--out", type=click.Path(path_type=Path), help="Fit file (default: STUDY/fits/LAW.json).")
@json_option
def fit(table, out, as_json, **options):
    """Fit a law to TABLE: a study folder, or any .csv, .parquet or .jsonl table of runs.

    A table needs columns for parameters, tokens and loss; --map names them. Prints the law with
    intervals, what to doubt first. Exit code 1 where the fit cannot be trusted.
    """
    from launch import fitting

    result = fitting.fit(table, options)
    path = fitting.save_fit(result, table, out, options)
    emit(as_json, fitting.as_json(result), lambda: fitting.show(console, result, path))
    return 0 if result.fit.status in ("converged", "boundary") else 1


@cli.command()
@click.argument("fit", type=click.Path(path_type=Path))
@click.option("--budget", type=float, required=True, help="Training FLOPs to spend, e.g. 1e21.")
@click.option("--within", type=float, default=0.10, show_default=True, help="Near-optimal band.")
@click.option("--out", type=click.Path(path_type=Path), help="Write the allocation as JSON here.")
@json_option
def allocate(fit, budget, within, out, as_json):
    """Answer "what should I train?" for a budget, from FIT: a fit file, or a fitted study folder.

    Gives N*, D*, the loss, 80 and 95 % intervals, the range of N that costs little, and, for a study,
    a shape that can be built.
    """
    from launch import fitting

    allocation = fitting.allocate(fit, budget, within, out)
    emit(as_json, allocation.to_dict(), lambda: console.print(allocation))


@cli.command()
@click.argument("study", type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), help="HTML file (default: STUDY/report.html).")
@click.option("--budget", type=float, help="Also allocate this budget (default: the last one asked for).")
@json_option
def report(study, out, budget, as_json):
    """Write one self-contained HTML report of a fitted STUDY (or of a fit file), and its plots as PNG."""
    from launch import fitting

    path = fitting.report(study, out, budget)
    emit(as_json, {"report": str(path)}, lambda: console.print(f"report: {path}", soft_wrap=True))


if __name__ == "__main__":
    main()
