"""What a grid of 6 sizes x 5 D costs: trunk and branch, against one cosine run a cell.

One side is what a ladder of scripts does: every (N, D) is a run of its own, a cosine that decays
fully at its own D, one after another, each in a process that starts, compiles and trains with all CPU
cores. The other is ``scaling run`` on the same grid with ``grid.trunks``, as it comes: one worker a core,
packed where the planner packs. Both sides train the same (N, D) on the same data by the same recipe,
from compilation caches that are empty, in one call of this script. Each schedule has its own best learning
rate (a cosine's is higher: its mean is half its peak), so both get the same bracket of the recipe's rate
first, at the middle (N, D), and train with the best of it; that is not timed.

    python benchmarks/grid_cost.py [--scale 1.0] [--write]

Prints FLOPs, wall time and CPU seconds of both sides and their ratios beside the arithmetic limit;
the losses at every (N, D) and their differences beside the seed noise (a second seed of both sides'
cells at the middle D, not timed); the fitted exponents with their intervals.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path[0] = str(ROOT)  # this checkout, whatever is installed

import fits  # noqa: E402
from experiments.quickstart import get_config  # noqa: E402
from scaling.branches import saving  # noqa: E402
from scaling.records import collect  # noqa: E402

SIZES = [6.5e3, 13e3, 20e3, 40e3, 68e3, 102e3]
SHORTEST = 131_072
LENGTHS, COOLDOWN = 5, 0.2
MULTIPLES = [0.7, 1, 1.4, 2, 2.8, 4, 5.6]
"""Of the recipe's learning rate, tried by both sides."""
SIDES = {"trunks": {"name": "wsd", "decay_fraction": COOLDOWN}, "cosine": {"name": "cosine"}}
LIMIT = (2 - 2 ** (1 - LENGTHS)) / ((1 - COOLDOWN) + COOLDOWN * (2 - 2 ** (1 - LENGTHS)))


def config(side: str, grid: dict, seeds: list[int], lr: float) -> dict:
    """The quickstart's study on another grid, with one side's schedule and ``lr`` times its rate."""
    study = get_config().to_dict()
    recipe = {**study["recipe"], "lr": study["recipe"]["lr"] * lr}
    own = {"name": side, "grid": {"tolerance": 0.03, **grid}, "schedule": SIDES[side], "seeds": seeds}
    return {**study, **own, "recipe": recipe}


def lengths(scale: float) -> list[float]:
    return [scale * SHORTEST * 2**k for k in range(LENGTHS)]


def scaling(*args: str, cache: Path) -> None:
    env = {**os.environ, "SCALING_COMPILATION_CACHE": str(cache)}
    command = [sys.executable, "-m", "launch.cli", *args]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=env, cwd=ROOT)


def planned(folder: Path, name: str, study: dict, cache: Path) -> Path:
    """The study planned in ``folder / name``."""
    file = folder / f"{name}.json"
    file.write_text(json.dumps(study))
    scaling("plan", str(file), "--study", str(folder / name), "--no-estimate", cache=cache)
    return folder / name


def bracket(folder: Path, side: str, scale: float) -> dict[float, float]:
    """Multiple of the recipe's rate to final loss, cells of their own at the middle (N, D)."""
    found = {}
    middle = {"params": SIZES[len(SIZES) // 2], "tokens": lengths(scale)[LENGTHS // 2]}
    for multiple in MULTIPLES:
        study = config(side, {"kind": "list", "cells": [middle]}, [0], multiple)
        cell = planned(folder, f"bracket-{side}-{multiple}", study, folder / "cache-bracket")
        scaling("run", str(cell), cache=folder / "cache-bracket")
        found[multiple] = float(collect(cell)["loss"].iloc[0])
    return found


def cost(run) -> dict:
    """Wall and CPU seconds of what a function's child processes do, and the load when it began."""
    load, before, start = (
        os.getloadavg()[0],
        resource.getrusage(resource.RUSAGE_CHILDREN),
        time.perf_counter(),
    )
    run()
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"wall": time.perf_counter() - start, "cpu": cpu, "load": load}


def one_by_one(study: Path, cache: Path) -> None:
    """Every cell in a process of its own, one after another, each with every core."""
    cores = str(len(os.sched_getaffinity(0)))
    for entry in json.loads((study / "manifest.json").read_text())["cells"]:
        scaling("run", str(study), "--cell", entry["id"], "--workers", "1", "--cores-per-worker", cores,
                cache=cache)  # fmt: skip


def measure(folder: Path, scale: float) -> dict:
    brackets = {side: bracket(folder, side, scale) for side in SIDES}
    rate = {side: min(found, key=found.get) for side, found in brackets.items()}
    cache = {side: folder / f"cache-{side}" for side in SIDES}
    grid = {"kind": "product", "params": SIZES, "tokens": lengths(scale)}

    def study(name, side, **more):
        made = config(side, {**grid, **more}, [1] if name.startswith("seed") else [0], rate[side])
        return planned(folder, name, made, cache[side])

    trunks, cosine = study("trunks", "trunks", trunks=True), study("cosine", "cosine")
    ours = cost(lambda: scaling("run", str(trunks), cache=cache["trunks"]))
    theirs = cost(lambda: one_by_one(cosine, cache["cosine"]))
    middle = {"tokens": lengths(scale)[LENGTHS // 2 :][:1]}
    seeds = {
        "trunks": study("seed-trunks", "trunks", **middle),
        "cosine": study("seed-cosine", "cosine", **middle),
    }
    for side, other in seeds.items():
        scaling("run", str(other), cache=cache[side])
    return {"brackets": brackets, "lr": rate, **summary(trunks, cosine, seeds, ours, theirs)}


def losses(study: Path) -> dict:
    """(planned N, planned D) to the final loss of the study's own cells."""
    table = collect(study).set_index("cell")
    entries = json.loads((study / "manifest.json").read_text())["cells"]
    own = {e["id"]: (e["target"]["params"], e["target"]["tokens"]) for e in entries if e["role"] != "trunk"}
    return {
        key: float(table.loc[c, "loss"]) for c, key in own.items() if table.loc[c, "status"] == "finished"
    }


def summary(trunks: Path, cosine: Path, seeds: dict[str, Path], ours: dict, theirs: dict) -> dict:
    entries = json.loads((trunks / "manifest.json").read_text())["cells"]
    flops = saving(entries)
    base = sum(e["achieved"]["flops"] for e in json.loads((cosine / "manifest.json").read_text())["cells"])
    ours_at, theirs_at = losses(trunks), losses(cosine)
    gap = np.array([np.log(ours_at[k] / theirs_at[k]) for k in theirs_at])
    again = [np.log(y / at[k]) for side, at in (("trunks", ours_at), ("cosine", theirs_at))
             for k, y in losses(seeds[side]).items()]  # fmt: skip
    # two seeds of one cell differ by sqrt(2) of one seed's own deviation
    seed = np.sqrt(np.mean(np.square(again)) / 2)
    laws = {}
    for name, study in (("trunks", trunks), ("cosine", cosine)):
        fit = fits.fit_table(collect(study), "chinchilla", bootstraps=1000)
        laws[name] = {
            "a": fit.intervals["a"]["estimate"],
            "interval": fit.intervals["a"]["95"],
            "status": fit.status,
        }
    return {
        "ours": ours, "theirs": theirs, "wall_ratio": theirs["wall"] / ours["wall"],
        "cpu_ratio": theirs["cpu"] / ours["cpu"], "flops_ratio": base / flops["spent"], "limit": LIMIT,
        "flops": {"trunks": flops["spent"], "cosine": base}, "seed_noise": float(seed),
        "gap_mean": float(gap.mean()), "gap_rms": float(np.sqrt(np.mean(gap**2))), "cells": len(gap),
        "losses": [{"params": k[0], "tokens": k[1], "trunks": ours_at[k], "cosine": theirs_at[k]}
            for k in sorted(theirs_at)
        ],
        "laws": laws,
    }  # fmt: skip


def text(got: dict) -> str:
    ours, theirs, laws = got["ours"], got["theirs"], got["laws"]
    lines = [
        "# Trunk and branch against one cosine run a cell",
        "",
        f"`python benchmarks/grid_cost.py`, {len(SIZES)} sizes x {LENGTHS} D (doubling, {COOLDOWN:.0%} "
        f"cooldowns), {len(os.sched_getaffinity(0))} CPU cores, load {ours['load']:.1f} and "
        f"{theirs['load']:.1f} at the start.",
        "",
        "| | trunk and branch | cosine, one by one | ratio |",
        "|---|---|---|---|",
        f"| FLOPs (exact) | {got['flops']['trunks']:.3e} | {got['flops']['cosine']:.3e} | "
        f"{got['flops_ratio']:.2f} (arithmetic limit {got['limit']:.2f}) |",
        f"| wall seconds, compiling included | {ours['wall']:.0f} | {theirs['wall']:.0f} | "
        f"{got['wall_ratio']:.2f} |",
        f"| CPU seconds | {ours['cpu']:.0f} | {theirs['cpu']:.0f} | {got['cpu_ratio']:.2f} |",
        "",
        f"Loss at the {got['cells']} shared (N, D), log(trunk / cosine): mean {got['gap_mean']:+.2%}, root "
        f"mean square {got['gap_rms']:.2%}; a seed's own standard deviation {got['seed_noise']:.2%}.",
        "",
        "Learning rate, times the recipe's, and the loss at the middle (N, D): "
        + "; ".join(
            f"{side} "
            + ", ".join(f"{m:g}: {y:.4f}" for m, y in found.items())
            + f" (taken: {got['lr'][side]:g})"
            for side, found in got["brackets"].items()
        )
        + ".",
        "",
    ]
    for name, law in laws.items():
        low, high = law["interval"]
        lines.append(
            f"Exponent a, {name}: {law['a']:.3f}, 95 % interval {low:.3f} to {high:.3f} ({law['status']}).  "
        )
    lines += ["", "| N | D | trunk and branch | cosine | difference |", "|---|---|---|---|---|"]
    for row in got["losses"]:
        gap = f"{np.log(row['trunks'] / row['cosine']):+.2%}"
        size = f"| {row['params']:.3g} | {row['tokens']:.3g} "
        lines.append(f"{size}| {row['trunks']:.4f} | {row['cosine']:.4f} | {gap} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scale", type=float, default=1.0, help="multiplies every D")
    parser.add_argument("--write", action="store_true", help="keep the figures in benchmarks/results/")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        got = measure(Path(folder), args.scale)
    print(text(got))
    if args.write:
        results = ROOT / "benchmarks" / "results"
        (results / "grid_cost.md").write_text(text(got))
        (results / "grid_cost.json").write_text(json.dumps(got, indent=1) + "\n")


if __name__ == "__main__":
    main()
