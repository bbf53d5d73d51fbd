"""The commands that run a study and look after it, here or elsewhere, and the one that simulates it."""

from __future__ import annotations

import functools
import importlib.util
import time
from pathlib import Path

import click

from launch.options import (
    DEVICE_OPTIONS,
    ENGINE_OPTIONS,
    PATH,
    RUN_OPTIONS,
    WORKER_OPTIONS,
    as_argument,
    with_options,
)
from launch.output import console, emit, json_option
from scaling.files import CellFolder, StudyError, write_whole

study_argument = click.argument("study", type=PATH)
ON = click.Choice(["local", "slurm", "jobset", "skypilot"])


@click.command()
@study_argument
@with_options(WORKER_OPTIONS + RUN_OPTIONS + DEVICE_OPTIONS)
@json_option
def run(study, cells, workers, cores_per_worker, as_json, **options):
    """Train every cell of STUDY that is not finished; run it again after any interruption.

    A killed run goes on from its checkpoints to the same numbers. Several `scaling run` on one
    study share the work, from several machines too where they see one folder: no cell is trained twice.
    A config in place of STUDY is planned first, into studies/NAME, where that is not done yet.
    """
    if study.is_file():
        study = plan_there(study, None, [])
    return run_here(study, cells, workers, cores_per_worker, as_json, options)


@click.command()
@click.argument("config_or_study", type=PATH)
@click.option("--on", type=ON, default="local", show_default=True, help="Where.")
@click.option("--study", type=PATH, help="Study folder (default: studies/NAME).")
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override a field of a config.")
@with_options(ENGINE_OPTIONS + WORKER_OPTIONS + RUN_OPTIONS + DEVICE_OPTIONS)
@json_option
def launch(config_or_study, on, study, overrides, as_json, **given):
    """Plan CONFIG where that is not done yet, and train what has no result: `scaling plan` and `run` in one.

    A study folder in place of CONFIG is taken as it is. With --on slurm every cell is a job of an array.
    --on jobset (Kubernetes) and --on skypilot write a file for each job, with a README of how to apply them;
    they need --dry-run and --target.
    """
    check_engine(on, given)
    if config_or_study.is_dir():
        if overrides or study:
            raise StudyError(f"--set and --study are for a config; {config_or_study} is planned already")
        study = config_or_study
    else:
        study = plan_there(config_or_study, study, list(overrides))
    return start(study, on, as_json, given)


@click.command()
@study_argument
@click.option("--on", type=ON, help="Where (default: as STUDY was last launched).")
@with_options(ENGINE_OPTIONS + WORKER_OPTIONS + RUN_OPTIONS + DEVICE_OPTIONS)
@json_option
@click.pass_context
def relaunch(context, study, on, as_json, **given):
    """Train what STUDY lacks after a failure or a cancel; cells that were given up are tried again.

    On the engine of the last `scaling launch`, with its settings and those of its options that are not given
    here; --on with another engine takes over none of them.
    """
    from launch.settings import last_launch

    engine, kept = last_launch(study)
    if on in (None, engine):
        default = click.core.ParameterSource.DEFAULT
        asked = {k for k in given if context.get_parameter_source(k) is not default}
        kept = {k: v for k, v in kept.items() if k in given}  # an earlier version may have had others
        given = kept | {k: v for k, v in given.items() if k in asked or k not in kept}
    check_engine(on or engine, given)
    return start(study, on or engine, as_json, given)


@click.command()
@study_argument
@click.option("--watch", is_flag=True, help="Again every two seconds, until all is done.")
@click.option("--all", "everything", is_flag=True, help="Every cell, however many there are.")
@click.option("--price", type=click.FloatRange(min=0), help="Of a device-hour: says the cost too.")
@json_option
def status(study, watch, everything, price, as_json):
    """Show where every cell of STUDY stands, from the folder alone."""
    from launch import show_status
    from launch.status import study_status

    if watch and not as_json:
        return show_status.watch(console, study, price, everything)
    found = study_status(study, price)
    emit(as_json, found, lambda: console.print(show_status.table(study, found, everything)))


@click.command()
@study_argument
@json_option
def cancel(study, as_json):
    """Ask every worker of STUDY, wherever it runs, to save and stop; `scaling relaunch` goes on.

    They see it at their next heartbeat, within ten seconds, and stop after the step at hand.
    """
    from scaling.attempts import cancel_file
    from scaling.records import read_manifest

    read_manifest(study)
    write_whole(cancel_file(study), time.strftime("%Y-%m-%dT%H:%M:%SZ\n", time.gmtime()))
    said = f"workers of {study} will save and stop; to go on: scaling relaunch {study}"
    emit(as_json, {"outcome": "cancelled"}, lambda: console.print(said, soft_wrap=True))


@click.command()
@click.argument("config", type=PATH)
@click.option("--law", default="chinchilla", show_default=True, help="Name of the law to plant.")
@click.option(
    "--param", "params", multiple=True, required=True, metavar="NAME=VALUE", help="Each of the law's."
)
@click.option("--study", type=PATH, help="Folder (default: studies/NAME-simulated).")
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override a field.")
@click.option(
    "--seed-noise", type=float, default=0.003, show_default=True, help="Sd of log loss between seeds."
)
@click.option(
    "--size-effect", type=float, default=0.0, show_default=True, help="Sd of log loss common to a size."
)
@click.option("--diverged", type=float, default=0.0, show_default=True, help="Share of cells.")
@click.option("--failed", type=float, default=0.0, show_default=True, help="Share of cells.")
@click.option(
    "--stragglers", type=float, default=0.0, show_default=True, help="Share of cells: 8 times longer."
)
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Of all of these.")
@click.option("--grow", is_flag=True, help="Add the config's new cells to a simulated study.")
@json_option
def simulate(config, law, params, study, overrides, grow, as_json, **noise):
    """Write a study folder whose losses are a law's plus noise: CONFIG's cells, planned but not trained.

    fit, report, status and the rest read it as a real one; `scaling fit` says what was planted.
    """
    from launch import simulate as work
    from launch.fitting import parse_pairs, to_number
    from launch.planning import manifest_of
    from scaling.grid import write_manifest
    from scaling.study import load_study

    given = {k: to_number("--param", k, v) for k, v in parse_pairs("--param", params).items()}
    law, given = work.planted(law, given)
    wrong = work.Noise(**noise)
    settings = load_study(config, list(overrides))
    study = study or Path("studies") / f"{settings['name']}-simulated"
    manifest = work.simulate(manifest_of(settings), law, given, wrong)
    work.check_same(study, manifest)
    write_manifest(study, manifest, grow)
    counts = work.write_cells(study, manifest, law, given, wrong)
    said = ", ".join(f"{v} {k}" for k, v in counts.items()) or "nothing to do"
    words = f"{said}; simulated in {study}; next: scaling fit {study} --law {law.name}"
    emit(as_json, {"folder": str(study), "cells": counts}, lambda: console.print(words, soft_wrap=True))


def plan_there(config: Path, study: Path | None, overrides: list[str]) -> Path:
    """Plans a config into its study folder, unless it holds that very plan; returns the folder."""
    from launch.planning import manifest_of
    from scaling.grid import write_manifest
    from scaling.study import load_study

    settings = load_study(config, overrides)
    study = study or Path("studies") / settings["name"]
    write_manifest(study, manifest_of(settings), False)
    return study


def check_engine(on: str, given: dict) -> None:
    """Refuses options that another engine has.

    Raises:
      StudyError: it says which.
    """
    if on == "local" and (given["dry_run"] or given["settings"]):
        raise StudyError("--dry-run and --settings are for --on slurm, jobset and skypilot")
    if on in ("local", "slurm") and (given["target"] or given["out"]):
        raise StudyError("--target and --out are for --on jobset and --on skypilot")
    if on in ("jobset", "skypilot"):
        from launch import pods

        pods.check(on, given["dry_run"], given["target"], given["workers"])


def start(study: Path, on: str, as_json: bool, given: dict) -> int | None:
    """Trains what a planned study lacks, and keeps how for `scaling relaunch`; the exit code.

    Args:
      given: every option of ``scaling launch`` that is not about the plan.
    """
    from launch.settings import remember

    options = dict(given)
    cells, dry_run, settings = (options.pop(name) for name in ("cells", "dry_run", "settings"))
    keep = functools.partial(remember, study, on, settings, dict(options))
    target, out, workers, cores = (options.pop(n) for n in ("target", "out", "workers", "cores_per_worker"))
    if on == "slurm":
        return run_on_slurm(study, cells, workers, cores, as_json, options, settings, dry_run, keep)
    if on == "local":
        return run_here(study, cells, workers, cores, as_json, options, keep)
    from launch import pods
    from launch.engine import Group, ids

    real_manifest(study)
    if all(CellFolder(study, name).result.exists() for name in ids(Group(study, tuple(cells)))):
        return say_nothing_to_do(study, cells, as_json)
    done = pods.write(on, study, target, settings, out, cells, options)
    keep()
    said = "{jobs} jobs of {cells} cells on {target}: see {folder}/README.md".format(**done)
    return emit(as_json, done, lambda: console.print(said, soft_wrap=True))


def run_here(
    study: Path, cells, workers, cores_per_worker: int, as_json: bool, options: dict, keep=lambda: None
) -> int:
    """Trains on this machine; the exit code. ``keep``: called once it is clear that there is work."""
    from launch import local, show
    from scaling.attempts import Budgets
    from scaling.records import progress, read_manifest

    entries = read_manifest(study)["cells"]
    todo = todo_of(study, cells, options)
    if not todo:
        return say_nothing_to_do(study, cells, as_json)
    keep()
    budgets = Budgets(options["max_failures"], options["max_preemptions"])
    passed = [x for name, value in options.items() for x in as_argument(name, value)]
    one_job = options["mesh"] or options["distributed"]  # its worker has all devices of this machine
    largest = local.largest_cell(entries)
    count = workers or (1 if one_job else local.default_workers(len(todo), cores_per_worker, largest))
    with show.progress_bars(console, study, quiet=as_json) as on_poll:
        code = local.run_study(study, count, passed, on_poll, cells, cores_per_worker, budgets)
    emit(as_json, {"outcome": "done", "cells": progress(study)}, lambda: show.run_summary(console, study))
    return code


def run_on_slurm(
    study: Path,
    cells,
    workers,
    cores_per_worker: int,
    as_json: bool,
    options: dict,
    settings: Path | None,
    dry_run: bool,
    keep,
) -> int:
    """Trains on a Slurm cluster that has jobs submitted from here; the exit code. ``keep``: see run_here."""
    if importlib.util.find_spec("submitit") is None:
        raise StudyError(
            "--on slurm needs the package submitit; install the extra: pip install 'scaling[slurm]'"
        )
    from launch import show, slurm
    from launch.engine import prepare, run_to_the_end
    from scaling.attempts import Budgets
    from scaling.records import progress

    budgets = Budgets(options["max_failures"], options["max_preemptions"])
    given = slurm.read_settings(settings)
    if not todo_of(study, cells, options):
        return say_nothing_to_do(study, cells, as_json)
    if not dry_run:
        prepare(study, budgets)
    engine, groups = slurm.plan(study, cells, options, given, cores_per_worker, workers)
    if dry_run:
        found = slurm.dry_run(engine, groups)
        emit(as_json, found, lambda: show.slurm_script(console, found))
        return 0
    keep()
    with show.progress_bars(console, study, quiet=as_json) as on_poll:
        code = run_to_the_end(engine, groups, on_poll, budgets)
    emit(as_json, {"outcome": "done", "cells": progress(study)}, lambda: show.run_summary(console, study))
    return code


def todo_of(study: Path, cells, options: dict) -> list[dict]:
    """Rows of the cells that have no result.

    Raises:
      StudyError: a cell that the study has not, or options that do not go together.
    """
    from scaling.records import progress

    check_wandb(options)
    known = {e["id"] for e in real_manifest(study)["cells"]}
    for cell in cells:
        if cell not in known:
            raise StudyError(f"--cell {cell!r} is not a cell of {study}; `scaling status {study}` lists them")
    todo = [r for r in progress(study) if r["status"] not in ("finished", "diverged")]
    return [r for r in todo if not cells or r["cell"] in cells]


def check_wandb(options: dict) -> None:
    """Raises ``StudyError`` where --wandb is given without the package, or with --pack."""
    wandb, pack = options["wandb"], options["pack"]
    if wandb != "off" and importlib.util.find_spec("wandb") is None:
        raise StudyError("--wandb needs the package wandb; install the extra: pip install 'scaling[wandb]'")
    if wandb != "off" and pack in ("turns", "vmap"):
        raise StudyError(f"--pack is {pack!r} with --wandb; wandb mirrors one cell at a time: use --pack off")


def real_manifest(study: Path) -> dict:
    """The manifest; ``StudyError`` for a folder that `scaling simulate` wrote, which is not to be trained."""
    from scaling.records import read_manifest

    manifest = read_manifest(study)
    if "simulated" in manifest:
        raise StudyError(f"{study} was written by `scaling simulate`; plan into another folder to train it")
    return manifest


def say_nothing_to_do(study: Path, cells, as_json: bool) -> int:
    """Tells that every cell has a result; the exit code."""
    from scaling.records import read_manifest

    count = len(cells or read_manifest(study)["cells"])
    message = f"nothing to do: all {count} cells of {study} have a result"
    emit(as_json, {"outcome": "nothing to do"}, lambda: console.print(message))
    return 0


COMMANDS = (run, launch, relaunch, status, cancel, simulate)
