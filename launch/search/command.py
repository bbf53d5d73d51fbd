"""``scaling search``: the command, and how a search prints."""

from __future__ import annotations

import math
from pathlib import Path

import click
from rich.table import Table

from launch.launching import check_wandb
from launch.options import DEVICE_OPTIONS, PATH, RUN_OPTIONS, WORKER_OPTIONS, as_argument, with_options
from launch.output import console, emit, json_option


@click.command()
@click.argument("config", type=PATH)
@click.option("--study", type=PATH, help="Study folder (default: studies/NAME).")
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override a key of search.")
@click.option("--dry-run", is_flag=True, help="Say what it would cost at most; train nothing.")
@with_options(WORKER_OPTIONS[1:] + RUN_OPTIONS + DEVICE_OPTIONS)  # all but --cell
@json_option
def search(config, study, overrides, dry_run, workers, cores_per_worker, as_json, **options):
    """Spend a compute budget adaptively, as the section `search` of CONFIG says (docs/search.md).

    Successive halving, Hyperband, its iterative deepening, population-based training, or the cells of a grid
    that narrow a law. Run it again after any interruption: it makes the same decisions and trains nothing
    twice; with a larger budget, or a longer list of tokens to deepen to, it goes on.
    """
    from launch.planning import facts_of
    from launch.search.session import Session, loss_on_disk, run_search
    from launch.search.settings import load_search
    from scaling.grid import check_data

    check_wandb(options)
    settings = load_search(config, list(overrides))
    study = study or Path("studies") / settings["name"]
    data = facts_of(settings)
    if data:
        check_data(settings, data)
    algorithm, memo = algorithm_of(settings["search"]["kind"]), {}
    if dry_run:
        record = at_most(algorithm, settings, data)
        emit(as_json, record, lambda: show(record, study))
        return 0
    with_run = trainer(study, workers, cores_per_worker, as_json, options)
    record = run_search(
        study, algorithm, lambda: Session(settings, data, loss_on_disk(study), memo), with_run
    )
    emit(as_json, record, lambda: show(record, study))
    return 1 if record["status"] == "stopped" else 0


def algorithm_of(kind: str):
    """The function that a kind of search is."""
    from launch.search import law, population, tuning

    return {
        "halving": tuning.halve,
        "hyperband": tuning.band,
        "deepening": tuning.deepen,
        "population": population.populate,
        "law": law.narrow,
    }[kind]


def at_most(algorithm, settings: dict, data: dict) -> dict:
    """The record of a search in which nothing is known, at the most it may cost: see ``dear_loss``."""
    from launch.search.law import Pool, start
    from launch.search.session import Session, replay
    from scaling.grid import plan

    losses: dict[str, float] = {}

    def dear_loss(cell: str) -> float:
        """Larger models go on; of one size the latest, so that no pass promotes what an earlier one did."""
        size = session.entries[cell]["achieved"]["params_total"]
        return losses.setdefault(cell, -size * (1 + 1e-9 * len(losses)))

    session = Session(settings, data, dear_loss)

    def planned() -> dict:
        budget = session.search["budget"] = settings["search"]["budget"]
        return session.record("planned: more than its budget" if session.spent > budget else "planned")

    if settings["search"]["kind"] != "law":
        session.search = {**session.search, "budget": math.inf, "sampler": _untold(session.search)}
        replay(algorithm, session)
        for r in session.rounds:
            r["losses"] = []
        return planned() | {"answer": None}
    pool = Pool(plan({k: v for k, v in settings.items() if k != "search"}, data))
    first = start(pool)
    session.search = {**session.search, "budget": math.inf}
    session.ask(pool.grow(first), [], chosen=len(first))
    return planned() | {"pool_flops": pool.whole, "pool": len(pool.cells)}


def _untold(search: dict) -> str:
    """A sampler that needs no results."""
    return {"tpe": "random"}.get(search.get("sampler", "random"), search.get("sampler", "random"))


def trainer(study: Path, workers: int | None, cores: int, quiet: bool, options: dict):
    """Trains whatever the study lacks, on this machine."""

    def train() -> None:
        from launch import local, show
        from scaling.attempts import Budgets
        from scaling.files import CellFolder
        from scaling.records import read_manifest

        entries = read_manifest(study)["cells"]
        todo = [e for e in entries if not CellFolder(study, e["id"]).result.exists()]
        passed = [x for name, value in options.items() for x in as_argument(name, value)]
        one_job = options["mesh"] or options["distributed"]
        count = workers or (
            1 if one_job else local.default_workers(len(todo), cores, local.largest_cell(todo))
        )
        budgets = Budgets(options["max_failures"], options["max_preemptions"])
        with show.progress_bars(console, study, quiet=quiet) as on_poll:
            local.run_study(study, count, passed, on_poll, [], cores, budgets)

    return train


def show(record: dict, study: Path) -> None:
    """Prints the rounds, the budget and the answer."""
    table = Table(title=f"{record['kind']}: {record['status']}", title_justify="left")
    for name in ("round", "what", "cells", "FLOPs", "spent", "result"):
        table.add_column(name, justify="left" if name in ("what", "result") else "right")
    for k, r in enumerate(record["rounds"]):
        table.add_row(
            str(k), _what(r), str(len(r["cells"])), f"{r['flops']:.3g}", f"{r['spent']:.3g}", _result(r)
        )
    console.print(table)
    saved = "" if not record["saved"] else (
        f", {record['saved']:.3g} saved by going on from trunks (alone: {record['alone']:.3g})"
    )  # fmt: skip
    console.print(
        f"{record['spent']:.4g} of {record['budget']:.4g} FLOPs spent{saved}, {record['left']:.3g} left",
        soft_wrap=True,
    )
    answer = record["answer"]
    if record.get("lacking"):
        console.print(
            f"{len(record['lacking'])} cells have no result, `scaling status {study}` says why; run the same "
            "command again to go on",
            soft_wrap=True,
        )
    if record.get("pool"):
        console.print(f"the whole pool: {record['pool']} cells, {record['pool_flops']:.4g} FLOPs")
    if answer is None:
        return
    for flag in answer.get("flags", ()):
        console.print(f"flag: {flag['text']}", soft_wrap=True)
    if "quantity" in answer:
        estimate = "none" if answer["estimate"] is None else f"{answer['estimate']:.4g}"
        width = "none" if answer["half_width"] is None else f"{answer['half_width']:.3g}"
        console.print(
            f"{answer['quantity']} = {estimate}, 95 % half-width {width} from {answer['rows']} "
            f"of {answer['pool']} cells, for {answer['share']:.0%} of the pool's FLOPs; next: scaling fit "
            f"{study}",
            soft_wrap=True,
        )
        return
    where = ", ".join(
        f"{k} {v:g}" if isinstance(v, (int, float)) else f"{k} {v}" for k, v in answer["point"].items()
    )
    console.print(
        f"best at D {answer['tokens']:.4g}: {where}, loss {answer['loss']:.4f} (cell {answer['cell']})",
        soft_wrap=True,
    )


def _what(r: dict) -> str:
    if r.get("refused"):
        return "not started: over the budget"
    if "bracket" in r:
        return f"{r['bracket']}, D {r['tokens']:.3g}"
    if "generation" in r:
        return f"generation {r['generation']}, to step {r['steps']}"
    if "cooldown" in r:
        return f"cooldown of member {r['cooldown']}"
    return "cells of the grid"


def _result(r: dict) -> str:
    if r.get("half_width") is not None:
        return f"half-width {r['half_width']:.3g}"
    known = [x for x in r.get("losses", ()) if x is not None]
    if not known or "half_width" in r:
        return ""
    goes = f", {len(r['promoted'])} go on" if "promoted" in r else ""
    goes += f", {len(r['copied'])} copy" if r.get("copied") else ""
    return f"best {min(known):.4f}{goes}"
