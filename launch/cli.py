"""The command line: scaling plan | launch | run | status | collect | fit | allocate | compare | next | ..."""

from __future__ import annotations

import contextlib
import io
import sys
from pathlib import Path

import click
from rich.markup import escape

from launch.launching import COMMANDS
from launch.options import (
    BUDGET_OPTIONS,
    FOR_A_LAW,
    LIMIT_OPTIONS,
    PATH,
    PREFLIGHT_OPTIONS,
    SIZE_OPTIONS,
    fit_options,
    with_options,
)
from launch.output import console, emit, json_option, stderr
from launch.search.command import search
from scaling import __version__
from scaling.config import ConfigError
from scaling.files import StudyError


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


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="scaling")
def cli() -> None:
    """Compute-optimal scaling laws: plan a grid of models, train it, fit the law, spend the budget.

    \b
    A study from nothing to an answer:
      scaling plan experiments/quickstart.py     resolve the grid, print what it will cost
      scaling run studies/quickstart             train every cell (again to resume)
      scaling status studies/quickstart --watch  where every cell stands, from anywhere
      scaling fit studies/quickstart             fit the law, with intervals
      scaling allocate studies/quickstart --budget 1e13
      scaling report studies/quickstart          one HTML file with every picture

    \b
    Before a pod is spent:
      scaling preflight experiments/isoflop.py --target v5e-256    compile every cell for a pod not here

    \b
    Further questions of a fit:
      scaling ask LAW_OR_FIT                     what else a law can answer
      scaling compare A B                        effective speed-up, and where the frontiers cross
      scaling next studies/quickstart --budget 1e13    which run teaches most per FLOP
      scaling select studies/quickstart          which law forecasts best
      scaling simulate experiments/quickstart.py ...   the same study from a law that you plant
      scaling families experiments/families.py   which architecture, at equal tuning
      scaling search experiments/tune.py         spend a budget adaptively: tuning, or a law from fewer cells

    \b
    The models themselves:
      scaling export studies/quickstart          the best one for Hugging Face transformers

    Exit codes: 0 done; 1 some cells failed or the fit cannot be trusted; 2 bad input, said in one sentence.
    """


@cli.command()
@click.argument("config", type=PATH)
@click.option("--study", type=PATH, help="Study folder (default: studies/NAME).")
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
    from launch.planning import manifest_of
    from scaling.grid import write_manifest
    from scaling.study import load_study

    settings = load_study(config, list(overrides))
    study = study or Path("studies") / settings["name"]
    manifest = manifest_of(settings)
    estimate = None if no_estimate else show.estimate(manifest)
    outcome = "dry run" if dry_run else write_manifest(study, manifest, grow)
    value = {**manifest, "outcome": outcome, "folder": str(study), "estimate": estimate}
    emit(as_json, value, lambda: show.plan(console, manifest, estimate, study, outcome))


@cli.command()
@click.argument("paths", nargs=-1, type=PATH)
@click.option("--out", required=True, type=PATH, help="A new folder for the shards.")
@click.option("--hub", metavar="NAME", help="Stream a data set of the Hugging Face Hub instead of files.")
@click.option("--subset", help="Of the Hub's data set.")
@click.option("--split", default="train", show_default=True, help="Of the Hub's data set.")
@click.option("--limit", type=click.IntRange(min=1), help="Read so many documents of the Hub's data set.")
@click.option("--field", default="text", show_default=True, help="Where a JSON line or a row has its text.")
@click.option("--tokenizer", type=PATH, help="A tokenizer.json to load.")
@click.option("--vocab", type=click.IntRange(min=1), help="Train a byte-level BPE of so many ids instead.")
@click.option("--train-documents", type=click.IntRange(min=1), help="Train it on so many of the first.")
@click.option("--begin", metavar="TOKEN", is_flag=False, flag_value="<|begintext|>",
              help="Put this token before each document.")  # fmt: skip
@click.option("--end", metavar="TOKEN", is_flag=False, flag_value="<|endoftext|>",
              help="Put this token after each document.")  # fmt: skip
@click.option(
    "--shard-tokens",
    type=click.IntRange(min=1),
    default=2**28,
    show_default=True,
    help="Close a shard at so many tokens.",
)
@json_option
def tokenize(paths, out, hub, subset, split, limit, field, as_json, **options):
    """Turn text into token shards that `data.source = "tokens"` trains on.

    PATHS are text files (each one document), .jsonl files (each line one) or folders of them; .gz and .zst
    are read too. Needs the extra `data`: pip install 'scaling[data]'.
    """
    from launch import tokenize as work

    documents = work.source(paths, hub, subset, split, field, limit)
    done = work.tokenize(documents, out, **options)
    emit(as_json, done, lambda: work.show(console, done))


@cli.command()
@click.argument("study", type=PATH)
@with_options(PREFLIGHT_OPTIONS)
@json_option
def preflight(study, target, overrides, remat, prices, cache, no_cache, jobs, markdown, as_json):
    """Compile every distinct cell of STUDY for a TPU slice that is not here: memory, time, money.

    STUDY is a study folder or a config file. Each cell is compiled for the smallest slice that holds it, the
    largest also for the whole target. Of v5e and v6e the number counts chips, of v4, v5p and tpu7x
    TensorCores: v5p-128 has 64 chips. Needs libtpu: pip install 'scaling[tpu]'. Exit code 1 where a cell
    does not fit or does not compile.
    """
    import os
    import time

    os.environ.setdefault("JAX_PLATFORMS", "cpu")  # the compiler is wanted, not the chip
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")  # else libtpu looks for a TPU and complains
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-1")
    from launch.preflight.hardware import parse_target
    from launch.preflight.prices import DEFAULT, read_prices

    where, table = parse_target(target), read_prices(prices or DEFAULT)
    from launch import show_preflight
    from launch.preflight.cache import Cache, default_folder
    from launch.preflight.cells import read_cells
    from launch.preflight.run import preflight as compile_all

    began = time.perf_counter()
    cells, note = read_cells(study, overrides)
    kept = Cache(None if no_cache else cache or default_folder())
    with show_preflight.progress(stderr) as say:
        policy = None if remat == "auto" else remat
        at_once = jobs or min(4, os.cpu_count() or 1)
        rows = list(compile_all(cells, where, table, kept, remat=policy, jobs=at_once, say=say))
    report = show_preflight.report(rows, where, table, note, kept, began)
    if markdown is not None:
        markdown.write_text(show_preflight.as_markdown(report, str(study)))
    emit(as_json, report, lambda: show_preflight.tables(console, report))
    return 0 if all(row["fits"] for row in rows if not row["whole_target"]) else 1


@cli.command()
@click.argument("study", type=PATH)
@click.option("--out", type=PATH, help="A .csv, .parquet or .jsonl file.")
@click.option("--wandb-dir", type=PATH, help="Read offline wandb runs instead.")
@json_option
def collect(study, out, wandb_dir, as_json):
    """Write the run table of STUDY: one row a (cell, evaluation).

    With --wandb-dir: one row a run, from the files that `--wandb offline` leaves, as wandb_runs, and what
    they logged as wandb_history.csv; no server is asked.
    """
    import pandas as pd

    from scaling.records import collect as collect_rows
    from scaling.records import write_table

    if wandb_dir is not None:
        from scaling.tracking import read_wandb, read_wandb_history

        table = read_wandb(wandb_dir).assign(study=study.name)
        history = (out.parent if out else study) / "wandb_history.csv"
        write_table(read_wandb_history(wandb_dir), history)
    else:
        table, history = collect_rows(study), None
    stem = "runs" if wandb_dir is None else "wandb_runs"
    outs = [out] if out else [study / f"{stem}.csv", study / f"{stem}.parquet"]
    for path in outs:
        write_table(table, path)
    outs += [history] if history else []
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


@cli.command()
@click.argument("study", type=PATH)
@click.option("--cell", default="best", show_default=True, metavar="ID|best|last", help="Which cell.")
@click.option("--out", type=PATH, help="New folder (default: STUDY/export/ID).")
@click.option(
    "--dtype",
    type=click.Choice(["float32", "bfloat16"]),
    default="float32",
    show_default=True,
    help="Of the weights written.",
)
@click.option("--tokenizer", type=PATH, help="A tokenizer.json to put beside them.")
@json_option
def export(study, cell, out, dtype, tokenizer, as_json):
    """Write a trained cell of STUDY in Hugging Face's format (Llama, Mistral or Qwen3).

    best: the lowest held-out loss; last: the cell that finished last. Weights come from the cell's newest
    checkpoint. Load the folder with transformers' AutoModelForCausalLM.from_pretrained.
    """
    from launch.export import export_cell

    done = export_cell(study, cell, out, dtype=dtype, tokenizer=tokenizer)
    said = "cell {cell}, step {step} of {steps}, as {architecture} in {dtype}: {folder}".format(**done)
    emit(as_json, done, lambda: console.print(said, soft_wrap=True))


@cli.command()
@click.argument("table", type=PATH)
@fit_options
@click.option("--out", type=PATH, help="Fit file (default: STUDY/fits/LAW.json).")
@click.option("--by", metavar="COLUMN", help="No law: of each group of runs the frontier's exponents.")
@json_option
def fit(table, out, by, as_json, **options):
    """Fit a law to TABLE: a study folder, or any .csv, .parquet or .jsonl table of runs.

    A table needs columns for parameters, tokens and loss; --map names them. Prints the law with
    intervals, what to doubt first. Exit code 1 where the fit cannot be trusted.

    --by family: for losses without a floor, N* ~ C^a and loss ~ C^-x of each family from isoFLOP parabolas,
    beside the true exponents where the study is of a problem of known law; exit code 1 where they disagree.
    """
    if by is not None:
        from launch import frontiers

        context = click.get_current_context()
        for name in FOR_A_LAW:
            if context.get_parameter_source(name) is click.core.ParameterSource.COMMANDLINE:
                raise ConfigError(f"--{name.replace('_', '-')} is given with --by, which fits no law")
        rows = frontiers.frontiers(table, by, options)
        path = frontiers.save(rows, table, by, out)

        def show() -> None:
            console.print(frontiers.as_table(rows))
            console.print(f"written to {path}", soft_wrap=True)

        emit(as_json, rows, show)
        return 1 if any(row["holds"] is False or row["refused"] for row in rows) else 0
    from launch import fitting

    result = fitting.fit(table, options)
    path = fitting.save_fit(result, table, out, options)
    emit(as_json, fitting.as_json(result), lambda: fitting.show(console, result, path))
    return 0 if result.fit.status in ("converged", "boundary") else 1


@cli.command()
@click.argument("config", type=PATH)
@click.option("--out", type=PATH, help="Folder of all its studies (default: studies/NAME).")
@json_option
@click.pass_context
def families(ctx, config, out, as_json):
    """Compare several families: CONFIG names what they share and what each has of its own.

    Each family is tuned by the same bracket of learning rates, trained on the same grid and fitted; then the
    compute multiplier of each over the reference, by FLOPs, by measured time, and by a chip's compute and
    memory. With equal="total" they are matched instead: the same total N, FLOPs and unique tokens, and losses
    compared. Run it again after any interruption. Writes comparison.json, .md and .html.
    """
    from launch import families as work
    from launch import show_families

    def call(name, *args):
        console.print(f"[dim]scaling {name} {' '.join(args)}[/]", soft_wrap=True)
        with contextlib.redirect_stdout(io.StringIO()) if as_json else contextlib.nullcontext():
            ctx.invoke(cli.commands[name], **cli.commands[name].make_context(name, list(args)).params)

    settings, result, folder = work.run(config, out, call)
    paths = work.save(folder, result, settings)
    emit(as_json, result, lambda: show_families.show(console, result, paths))
    return 0


@cli.command()
@click.argument("fit", type=PATH)
@with_options(BUDGET_OPTIONS + LIMIT_OPTIONS + SIZE_OPTIONS)
@click.option("--out", type=PATH, help="Write the allocation as JSON here.")
@json_option
def allocate(fit, within, out, as_json, **options):
    """Answer "what should I train?" for a budget, from FIT: a fit file, or a fitted study folder.

    Gives N*, D*, the loss, 80 and 95 % intervals, the range of N that costs little, what each limit
    costs, what 20 tokens a parameter would cost, and, for a study, a shape that can be built. With
    --target-loss in place of a budget: the least budget that reaches it. A decoded token is taken to
    need every weight read once, at the chip's bandwidth, and two FLOPs for each, at its peak.
    """
    from launch import fitting

    allocation = fitting.allocate(fit, within, out, options)
    emit(as_json, allocation.to_dict(), lambda: console.print(allocation))


@cli.command()
@click.argument("subject")
@click.argument("question", required=False)
@click.argument("given", nargs=-1, metavar="[NAME=VALUE]...")
@click.option("--out", type=PATH, help="Write the answer as JSON here.")
@json_option
def ask(subject, question, given, out, as_json):
    """Ask a law its own QUESTION: what repeated tokens are worth, which granularity, how many samples.

    SUBJECT is a fit file or a fitted study folder, for an answer with intervals, or the name of a law, for
    its published constants. Without QUESTION: what may be asked. A list is written NAME=1,2,3.
    """
    from launch import fitting

    answer = fitting.ask(subject, question, given, out)
    if question is None:
        return emit(as_json, {"questions": answer}, lambda: click.echo(answer))
    emit(as_json, answer.to_dict(), lambda: console.print(answer, soft_wrap=True))


@cli.command()
@click.argument("a", type=PATH)
@click.argument("b", type=PATH)
@click.option("--budget", type=float, multiple=True, help="Training FLOPs (may be given again).")
@click.option("--out", type=PATH, help="Write the comparison as JSON here.")
@json_option
def compare(a, b, budget, out, as_json):
    """Effective speed-up of study B over study A, and where their frontiers cross, with intervals.

    A and B are fit files or fitted study folders. A speed-up of 1.5 at a budget C says that A would
    need 1.5 C for the loss that B reaches with C. Their losses must be of one kind, on one data set.
    """
    from launch import fitting

    result = fitting.compare(a, b, list(budget), out)
    emit(as_json, result.to_dict(), lambda: console.print(result))


@cli.command("next")
@click.argument("fit", type=PATH)
@click.option("--budget", type=float, required=True, help="The budget to be decided, training FLOPs.")
@click.option("--quantity", default="N*", show_default=True, help="What to know better: N*, D*, loss, a.")
@click.option("--batch", type=click.IntRange(min=1), default=1, show_default=True, help="Runs to choose.")
@click.option("--max-flops", type=float, help="The dearest run allowed (default: the table's largest).")
@click.option("--within", type=float, help="Also say what it costs to know the quantity this well, e.g. 0.1.")
@click.option("--out", type=PATH, help="Write the answer as JSON here.")
@json_option
def next_(fit, budget, quantity, batch, max_flops, within, out, as_json):
    """Which run next teaches most per FLOP about the answer at a budget, from FIT.

    FIT is a fit file or a fitted study folder. With --within 0.1: how much must be spent until the
    quantity is known within 10 %, and on which runs.
    """
    from launch import fitting

    answers = fitting.next_runs(fit, budget, quantity, batch, max_flops, within, out)
    emit(as_json, {k: v.to_dict() for k, v in answers.items()},
         lambda: [console.print(v) for v in answers.values()])  # fmt: skip


@cli.command("select")
@click.argument("table", type=PATH)
@click.option("--law", "laws", multiple=True, help="A law to try (may be given again).")
@click.option(
    "--by",
    type=click.Choice(["flops", "params", "tokens"]),
    default="flops",
    show_default=True,
    help="What orders the runs; the largest are left out.",
)
@click.option("--map", "columns", metavar="params=N,tokens=D", help="Column names: ours=theirs.")
@click.option("--token-unit", type=float, default=1.0, help="1e9 where tokens are in billions.")
@click.option("--param-unit", type=float, default=1.0, help="1e6 where parameters are in millions.")
@click.option("--exclude", multiple=True, metavar="RULE", help="Leave out rows: 'tokens < params'.")
@json_option
def select_(table, laws, by, as_json, **reading):
    """Which law forecasts best: leave out the largest runs of TABLE, forecast them, compare the laws.

    The answer may be that the laws cannot be told apart.
    """
    from launch import fitting

    result = fitting.select(table, list(laws), by, reading)
    emit(as_json, result.to_dict(), lambda: console.print(result))


@cli.command()
@click.argument("study", type=PATH)
@click.option("--out", type=PATH, help="HTML file (default: STUDY/report.html).")
@click.option("--budget", type=float, help="Also allocate this budget (default: the last one asked for).")
@click.option(
    "--unique-tokens", type=float, help="For --budget and a law in unique tokens: how many there are."
)
@click.option(
    "--against",
    type=PATH,
    help="Compare with another fit file, study or table; a table is fitted as STUDY was.",
)
@click.option("--law", "laws", multiple=True, help="A law to forecast with (may be given again).")
@click.option(
    "--without",
    type=click.Choice(["selection", "next"]),
    multiple=True,
    help="Leave out the forecasts of rival laws or the next runs, to save time.",
)
@json_option
def report(study, out, budget, unique_tokens, against, laws, without, as_json):
    """Write one self-contained HTML report of a fitted STUDY (or of a fit file), and its plots as PNG."""
    from launch import fitting

    path = fitting.report(study, out, budget, unique_tokens, against, laws, without)
    emit(as_json, {"report": str(path)}, lambda: console.print(f"report: {path}", soft_wrap=True))


for command in (*COMMANDS, search):
    cli.add_command(command)


if __name__ == "__main__":
    main()
