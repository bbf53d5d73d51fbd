"""What a grid of 6 sizes x 5 D costs: trunk and branch, against one cosine run a cell.

One side is what a ladder of scripts does: every (N, D) is a run of its own, a cosine that decays
fully at its own D, one after another, each in a process that starts, compiles and trains with all CPU
cores. The other is ``scaling run`` on the same grid with ``grid.trunks``, as it comes: one worker a core,
packed where the planner packs. Both sides train the same (N, D) on the same data in the same batches, with
the same warm-up and weight decay of each N, from compilation caches that are empty, in one call of this
script: they differ in the schedule and its rate alone. Before that, and not timed, each side gets learning
rates of its own from the same bracket of the recipe's, on another seed: the trunks one for all, the best at
the middle (N, D); the cosines the best of it at every (N, D).

    python benchmarks/grid_cost.py [--scale 1.0] [--rates FILE] [--write]

Prints FLOPs, wall time and CPU seconds of both sides and their ratios beside the arithmetic limit;
the losses at every (N, D) and their differences beside the seed noise (a second seed of every branch, not
timed); the fitted exponents with their intervals.
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
MULTIPLES = [1, 1.4, 2, 2.8, 4, 5.6]
"""Of the recipe's learning rate, tried by both sides."""
RECIPE = {"batch_tokens": 512, "batch_tokens_exponent": 0.0, "lr": 3.2e-3, "beta2": 0.995}
"""The quickstart's at half its reference batch (so by Adam's rule the rate over sqrt 2), one for every D."""
NORMAL_95 = 1.96
SIDES = {"trunks": {"name": "wsd", "decay_fraction": COOLDOWN}, "cosine": {"name": "cosine"}}
LIMIT = (2 - 2 ** (1 - LENGTHS)) / ((1 - COOLDOWN) + COOLDOWN * (2 - 2 ** (1 - LENGTHS)))


def config(side: str, grid: dict, seed: int, lr: float = 1.0) -> dict:
    """The quickstart's study on another grid, with one side's schedule and ``lr`` times the recipe's rate."""
    study = get_config().to_dict()
    recipe = {**study["recipe"], **RECIPE, "lr": RECIPE["lr"] * lr}
    own = {"name": side, "grid": {"tolerance": 0.03, **grid}, "schedule": SIDES[side], "seeds": [seed]}
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


def trunk_bracket(folder: Path, middle: dict) -> dict[float, float]:
    """Multiple of the recipe's rate to the final loss of a cell of its own at the middle (N, D)."""
    found, cache = {}, folder / "cache-bracket"
    for multiple in MULTIPLES:
        study = config("trunks", {"kind": "list", "cells": [middle]}, 1, multiple)
        cell = planned(folder, f"bracket-{multiple}", study, cache)
        scaling("run", str(cell), cache=cache)
        (found[multiple],) = losses(cell).values()
    return found


def cosine_brackets(folder: Path, cells: list[dict]) -> dict[tuple, list[dict]]:
    """(N, D) to ``multiple`` of the recipe's rate, ``lr`` and final ``loss`` of its cells, the best first."""
    sweep = {"lr": [m for m in MULTIPLES if m != 1], "cells": "all"}
    grid, cache = {"kind": "list", "cells": cells, "sentinels": sweep}, folder / "cache-bracket"
    study = planned(folder, "brackets", config("cosine", grid, 1), cache)
    scaling("run", str(study), cache=cache)
    table = collect(study).set_index("cell")
    found: dict[tuple, list[dict]] = {}
    for e in entries_of(study):
        if table.loc[e["id"], "status"] == "finished":
            multiple = e.get("sentinel", {}).get("multiple", 1)
            got = {"multiple": multiple, "lr": e["config"]["optim"]["lr"], "loss": table.loc[e["id"], "loss"]}
            found.setdefault(target(e), []).append(got)
    return {key: sorted(got, key=lambda g: g["loss"]) for key, got in found.items()}


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


def tune(folder: Path, scale: float) -> dict:
    """Both sides' brackets: of the trunks at the middle (N, D), of the cosines the best at every one."""
    middle = {"params": SIZES[len(SIZES) // 2], "tokens": lengths(scale)[LENGTHS // 2]}
    common = [{"multiple": m, "loss": loss} for m, loss in trunk_bracket(folder, middle).items()]
    shared = shared_settings(planned_trunks(folder, "trunks-tuned", scale, 0, best(common)))
    every = [{"params": n, "tokens": d, "set": shared[n]} for n in SIZES for d in lengths(scale)]
    own = cosine_brackets(folder, every).items()
    return {
        "trunks": common,
        "cosine": [{"params": n, "tokens": d, **found[0]} for (n, d), found in own],
    }


def best(bracket: list[dict]) -> float:
    return min(bracket, key=lambda r: r["loss"])["multiple"]


def planned_trunks(folder: Path, name: str, scale: float, seed: int, multiple: float) -> Path:
    grid = {"kind": "product", "params": SIZES, "tokens": lengths(scale), "trunks": True}
    return planned(folder, name, config("trunks", grid, seed, multiple), folder / "cache-trunks")


def shared_settings(trunks: Path) -> dict[float, dict]:
    """Planned N to what its cosines take over from its trunk."""
    return {
        target(e)[0]: {
            "optim.weight_decay": e["config"]["optim"]["weight_decay"],
            "schedule.warmup_steps": e["config"]["schedule"]["warmup_steps"],
        }
        for e in entries_of(trunks)
    }


def measure(folder: Path, scale: float, rates: dict) -> dict:
    """Both sides with the rates of ``tune``."""
    multiple = best(rates["trunks"])
    trunks = planned_trunks(folder, "trunks", scale, 0, multiple)
    second = planned_trunks(folder, "second", scale, 1, multiple)
    shared = shared_settings(trunks)
    tuned = [
        {"params": r["params"], "tokens": r["tokens"], "set": {"optim.lr": r["lr"], **shared[r["params"]]}}
        for r in rates["cosine"]
    ]
    cache = {side: folder / f"cache-{side}" for side in SIDES}
    cosine = planned(folder, "cosine", config("cosine", {"kind": "list", "cells": tuned}, 0), cache["cosine"])
    ours = cost(lambda: scaling("run", str(trunks), cache=cache["trunks"]))
    theirs = cost(lambda: one_by_one(cosine, cache["cosine"]))
    scaling("run", str(second), cache=cache["trunks"])
    return {"rates": rates, **summary(trunks, cosine, second, ours, theirs)}


def entries_of(study: Path) -> list[dict]:
    return json.loads((study / "manifest.json").read_text())["cells"]


def target(entry: dict) -> tuple[float, float]:
    return entry["target"]["params"], entry["target"]["tokens"]


def losses(study: Path) -> dict:
    """(planned N, planned D) to the final loss of the study's own cells."""
    table = collect(study).set_index("cell")
    own = {e["id"]: target(e) for e in entries_of(study) if e["role"] != "trunk"}
    return {
        key: float(table.loc[c, "loss"]) for c, key in own.items() if table.loc[c, "status"] == "finished"
    }


def seeds_apart(seed: float) -> float:
    """What two seeds of one cell differ by at most 95 times of 100, by one seed's standard deviation."""
    return NORMAL_95 * np.sqrt(2) * seed


def summary(trunks: Path, cosine: Path, second: Path, ours: dict, theirs: dict) -> dict:
    flops = saving(entries_of(trunks))
    base = sum(e["achieved"]["flops"] for e in entries_of(cosine))
    ours_at, theirs_at, again = losses(trunks), losses(cosine), losses(second)
    gap = np.array([np.log(ours_at[k] / theirs_at[k]) for k in theirs_at])
    apart = np.array([np.log(again[k] / ours_at[k]) for k in again])
    # two seeds of one cell differ by sqrt(2) of one seed's own deviation
    seed = np.sqrt(np.mean(np.square(apart)) / 2)
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
        "within": int((np.abs(gap) <= seeds_apart(seed)).sum()),
        "losses": [{"params": k[0], "tokens": k[1], "trunks": ours_at[k], "cosine": theirs_at[k]}
            for k in sorted(theirs_at)
        ],
        "laws": laws,
    }  # fmt: skip


def text(got: dict) -> str:
    ours, theirs, laws = got["ours"], got["theirs"], got["laws"]
    apart = seeds_apart(got["seed_noise"])
    worse = sum(np.log(row["trunks"] / row["cosine"]) > apart for row in got["losses"])
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
        f"mean square {got['gap_rms']:.2%}. A seed's own standard deviation {got['seed_noise']:.2%}: two "
        f"seeds of a cell are within {apart:.2%} of each other 95 "
        f"times of 100, trunk and cosine {got['within']} times of {got['cells']}; the trunk is worse by more "
        f"than that at {worse} of them, better at {got['cells'] - got['within'] - worse}.",
        "",
        "Learning rate of the trunks, times the recipe's, and the loss at the middle (N, D): "
        + ", ".join(f"{r['multiple']:g}: {r['loss']:.4f}" for r in got["rates"]["trunks"])
        + ". The cosines' own stand in the last table.",
        "",
    ]
    for name, law in laws.items():
        low, high = law["interval"]
        lines.append(
            f"Exponent a, {name}: {law['a']:.3f}, 95 % interval {low:.3f} to {high:.3f} ({law['status']}).  "
        )
    taken = {(r["params"], r["tokens"]): r["multiple"] for r in got["rates"]["cosine"]}
    lines += ["", "| N | D | trunk and branch | cosine | its rate, times the recipe's | difference |"]
    lines += ["|---|---|---|---|---|---|"]
    for row in got["losses"]:
        gap = f"{np.log(row['trunks'] / row['cosine']):+.2%}"
        rate = f"{taken[row['params'], row['tokens']]:g}"
        size = f"| {row['params']:.3g} | {row['tokens']:.3g} "
        lines.append(f"{size}| {row['trunks']:.4f} | {row['cosine']:.4f} | {rate} | {gap} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scale", type=float, default=1.0, help="multiplies every D")
    parser.add_argument(
        "--rates", type=Path, help="a file for the brackets' answer: read, or written if absent"
    )
    parser.add_argument("--write", action="store_true", help="keep the figures in benchmarks/results/")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if args.rates and args.rates.exists():
            rates = json.loads(args.rates.read_text())
        else:
            rates = tune(Path(folder), args.scale)
        if args.rates:
            args.rates.write_text(json.dumps(rates, indent=1) + "\n")
        got = measure(Path(folder), args.scale, rates)
    print(text(got))
    if args.write:
        results = ROOT / "benchmarks" / "results"
        (results / "grid_cost.md").write_text(text(got))
        (results / "grid_cost.json").write_text(json.dumps(got, indent=1) + "\n")


if __name__ == "__main__":
    main()
