"""Options of commands: how to run, devices, preflight, budgets and their limits, and how to fit."""

from __future__ import annotations

import functools
from pathlib import Path

import click

from scaling.attempts import MAX_FAILURES, MAX_PREEMPTIONS


class LocalPath(click.Path):
    """A file or folder; a URL is refused, which would else become a folder named ``gs:``."""

    def convert(self, value, param, ctx):
        if "://" in str(value):
            self.fail(
                f"{str(value)!r} is a URL, and studies lie in folders: give one on a disk that all machines "
                "of the study mount (NFS, Filestore, FSx, Lustre; no mounted bucket), and copy it to the "
                "bucket when it is done. Token shards (data.path) may be in a bucket.",
                param,
                ctx,
            )
        return super().convert(value, param, ctx)


PATH = LocalPath(path_type=Path)
WORKER_OPTIONS = (
    click.option(
        "--cell", "cells", multiple=True, metavar="ID", help="Train only this cell (may be given again)."
    ),
    click.option(
        "--workers", type=click.IntRange(min=1), help="Worker processes (default: one a CPU core or GPU)."
    ),
    click.option(
        "--cores-per-worker",
        type=click.IntRange(min=1),
        default=1,
        show_default=True,
        help="CPU only; the last bits of a result depend on it.",
    ),
)
RUN_OPTIONS = (
    click.option("--checkpoint-seconds", type=float, default=60.0, show_default=True),
    click.option("--checkpoint-steps", type=click.IntRange(min=1), help="Save also every so many steps."),
    click.option(
        "--wandb",
        type=click.Choice(["off", "offline", "online"]),
        default="off",
        is_flag=False,
        flag_value="offline",
        help="Mirror to Weights & Biases; without a value: offline.",
    ),
    click.option(
        "--pack",
        type=click.Choice(["auto", "off", "turns", "vmap"]),
        default="auto",
        show_default=True,
        help="Cells of one shape side by side: auto where one leaves the device idle (never on CPU).",
    ),
    click.option(
        "--watchdog-seconds",
        type=click.FloatRange(min=0),
        default=1800.0,
        show_default=True,
        help="End a worker whose steps no longer end; 0: never.",
    ),
    click.option(
        "--max-failures",
        type=click.IntRange(min=1),
        default=MAX_FAILURES,
        show_default=True,
        help="Of a cell's attempts.",
    ),
    click.option(
        "--max-preemptions",
        type=click.IntRange(min=1),
        default=MAX_PREEMPTIONS,
        show_default=True,
        help="Of a cell's attempts: cut off from outside, not its fault.",
    ),
    click.option("--deterministic", is_flag=True, help="GPU: the same bits each time, for some speed."),
)
DEVICE_OPTIONS = (
    click.option(
        "--mesh",
        metavar="REPLICA,FSDP,TENSOR[,EXPERT]",
        help="Devices that each cell is split over, e.g. 1,8,1.",
    ),
    click.option(
        "--remat",
        type=click.Choice(["none", "dots", "full", "auto"]),
        default="none",
        show_default=True,
        help="What the backward pass recomputes; auto: the cheapest that fits, with --accumulate.",
    ),
    click.option(
        "--accumulate", type=click.IntRange(min=1), default=1, show_default=True, help="Parts of a batch."
    ),
    click.option("--memory-gb", type=float, help="What --remat auto may use of each device."),
    click.option(
        "--distributed",
        metavar="auto|HOST:PORT,COUNT,INDEX",
        help="One process of several: run the same command on every host.",
    ),
)
ENGINE_OPTIONS = (
    click.option("--dry-run", is_flag=True, help="Not local: show or write what would run, submit nothing."),
    click.option("--target", help="jobset, skypilot: what each job runs on, e.g. v5e-64, v6e-256, h100-8."),
    click.option(
        "--settings",
        type=PATH,
        help="Not local: a .toml file (partition, time; image, volume, ...).",
    ),
    click.option("--out", type=PATH, help="Folder of the files (default: STUDY/jobset, ...)."),
)
PREFLIGHT_OPTIONS = (
    click.option(
        "--target",
        default="v5e",
        show_default=True,
        help="v4, v5e, v5p, v6e, tpu7x (one chip), a slice such as v5e-256, GPUs (h100-8)",
    ),
    click.option(
        "--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override a field of a config."
    ),
    click.option(
        "--remat",
        type=click.Choice(["auto", "none", "dots", "full"]),
        default="auto",
        show_default=True,
        help="What the backward pass recomputes; auto: the fastest that fits.",
    ),
    click.option("--prices", type=PATH, help="Another file like launch/prices.toml."),
    click.option("--cache", type=PATH, help="Folder (default: ~/.cache/scaling/preflight)."),
    click.option("--no-cache", is_flag=True, help="Compile everything, keep nothing."),
    click.option(
        "--jobs",
        type=click.IntRange(min=1),
        help="Shapes compiled at once (default: CPU cores, at most 4).",
    ),
    click.option("--markdown", type=PATH, help="Write the tables to this file, too."),
)
BUDGET_OPTIONS = (
    click.option("--budget", type=float, help="Training FLOPs to spend, e.g. 1e21."),
    click.option("--device-hours", type=float, help="Instead of FLOPs: with --chip and --mfu."),
    click.option("--money", type=float, help="Instead of FLOPs: with --price, --chip and --mfu."),
    click.option("--price", type=float, help="Price of one device-hour, in the unit of --money."),
    click.option("--chip", help="Name of the accelerator, e.g. h100 or v5e."),
    click.option("--target-loss", type=float, help="Instead of a budget: find the least that reaches this."),
    click.option("--mfu", type=float, help="Model FLOPs utilisation, e.g. 0.4."),
)
LIMIT_OPTIONS = (
    click.option("--unique-tokens", type=float, help="Tokens before any is repeated."),
    click.option("--max-epochs", type=float, help="Passes over --unique-tokens at most."),
    click.option("--max-params", type=float, help="Largest model allowed."),
    click.option("--min-params", type=float, help="Smallest model allowed."),
    click.option("--max-tokens", type=float, help="Most training tokens allowed."),
    click.option("--tokens-per-param", type=float, help="Hold D/N at this value."),
    click.option("--inference-tokens", type=float, help="Tokens to serve; the budget pays 2 N a token."),
    click.option("--max-memory", type=float, help="Bytes for weights, at --bytes-per-param."),
    click.option("--bytes-per-param", type=float, default=2.0, show_default=True, help="As served."),
    click.option("--max-latency", type=float, help="Seconds a decoded token, with --inference-chip."),
    click.option("--inference-chip", help="What serves the model, e.g. h100, for --max-latency."),
    click.option("--inference-devices", type=float, help="How many share its weights.  [default: 1]"),
    click.option("--policy", type=float, default=20.0, show_default=True, help="D/N to compare with."),
)


SIZE_OPTIONS = (
    click.option("--sizes", metavar="N,N,...", help="Sizes that can be built; the best of them is named."),
    click.option("--within", type=float, default=0.10, show_default=True, help="Near-optimal band."),
)


def with_options(options):
    """A decorator that adds click options in the order given."""
    return lambda command: functools.reduce(lambda f, option: option(f), reversed(options), command)


LOSSES = ["huber", "lad", "lsq", "quantile", "expectile"]


def as_argument(name: str, value) -> list[str]:
    """An option as another command line takes it; nothing where it is not given."""
    if value is None or value is False:
        return []
    flag = f"--{name.replace('_', '-')}"
    return [flag] if value is True else [flag, str(value)]


FOR_A_LAW = ("law", "loss", "delta", "delta_unit", "tau", "weights", "stderr", "space", "cluster", "fixed")
"""Of ``fit_options``, those that say nothing where no law is fitted."""


def fit_options(command):
    """Options that say how to fit, shared by the commands that fit."""
    options = [
        click.option("--law", default="chinchilla", show_default=True, help="Name of the law."),
        click.option("--loss", type=click.Choice(LOSSES), default="huber", show_default=True),
        click.option("--delta", type=float, default=1e-3, show_default=True, help="Huber's delta."),
        click.option(
            "--delta-unit",
            type=click.Choice(["absolute", "scale"]),
            default="absolute",
            show_default=True,
            help="Unit of --delta: the residual's own, or its robust standard deviation.",
        ),
        click.option("--tau", type=float, default=0.5, show_default=True, help="Of quantile and expectile."),
        click.option("--weights", metavar="COLUMN", help="A weight per row."),
        click.option("--stderr", metavar="COLUMN", help="Standard error of each loss, e.g. loss_stderr."),
        click.option("--space", type=click.Choice(["log", "raw"]), default="log", show_default=True),
        click.option("--bootstraps", type=click.IntRange(min=0), default=1000, show_default=True),
        click.option(
            "--cluster",
            default="auto",
            show_default=True,
            help="auto, size, budget, compute, row, or a column; two joined by + are crossed.",
        ),
        click.option("--exclude", multiple=True, metavar="RULE", help="Leave out rows: 'tokens < params'."),
        click.option("--fixed", multiple=True, metavar="NAME=VALUE", help="Pin a parameter, e.g. E=1.6."),
        click.option("--map", "columns", metavar="params=N,tokens=D", help="Column names: ours=theirs."),
        click.option("--token-unit", type=float, default=1.0, help="1e9 where tokens are in billions."),
        click.option("--param-unit", type=float, default=1.0, help="1e6 where parameters are in millions."),
        click.option("--seed", type=int, default=0, show_default=True, help="Seed of the bootstrap."),
    ]
    return with_options(options)(command)
