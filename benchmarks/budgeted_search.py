"""A law from fewer FLOPs: ``scaling search`` with kind "law" against a uniform grid, planted and real.

Planted studies: the losses of a known Chinchilla law, with an error of each run and one shared by a size's
runs, stand in for training; all else is the command's own (plan, prices with trunks, decisions, budget). The
search gets half the FLOPs of the uniform grid, and a pool that holds the uniform grid's cells, sizes and D
between them, and further seeds. "random" spends the same on the same pool without looking. Errors of a are
against the truth; a width is half of the fit's 95 % interval. Where the search would have stopped, had it
been asked for the width that the uniform grid has in that study, is read off its rounds.

Replay: the runs of a published study, each as if it were still to be trained at its own FLOPs. The search
begins with its 30 cheapest; the whole study is the uniform grid and the pool.

Real: SGD on power-law random features, trained on this machine, with the uniform grid's own width asked for;
each repeat has seeds of its own, data and features both, and a is known.

    python benchmarks/budgeted_search.py planted [--studies 40] [--json FILE]
    python benchmarks/budgeted_search.py replay TABLE [--json FILE]
    python benchmarks/budgeted_search.py real FOLDER [--repeats 5] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
ROOT = Path(__file__).resolve().parent.parent
sys.path[0] = str(ROOT)  # this checkout, whatever is installed

import numpy as np  # noqa: E402
import pandas as pd  # noqa: E402

from experiments.quickstart import get_config  # noqa: E402
from fits import fit_table, next_cells  # noqa: E402
from fits.adaptive import is_narrow, reported_half_width  # noqa: E402
from launch.search import law  # noqa: E402
from launch.search.session import Session, replay  # noqa: E402
from launch.search.settings import load_search  # noqa: E402
from scaling.grid import plan  # noqa: E402
from scaling.records import collect  # noqa: E402

FACTS = {"fingerprint": "f" * 16, "vocab": 256, "unique_tokens": 10**12, "heldout_tokens": 10**6}
TRUTH = {"E": 1.69, "A": 406.4, "B": 410.7, "alpha": 0.34, "beta": 0.28}
A_TRUE = TRUTH["beta"] / (TRUTH["alpha"] + TRUTH["beta"])
SIZES = [float(f"{x:.3g}") for x in np.geomspace(1e7, 3e8, 9)]
LENGTHS = [float(f"{x:.3g}") for x in np.geomspace(2e8, 2e10, 9)]
NOISES = ((0.004, 0.0), (0.004, 0.002))
"""Of log loss: standard deviation of a run, and of what a size's runs share."""


def base(grid: dict, seeds: list[int], **more) -> dict:
    """The quickstart's study on another grid of trunks and branches."""
    config = {**get_config().to_dict(), **more}
    config["grid"] = {"kind": "product", "trunks": True, "tolerance": 0.1, "min_steps": 20, **grid}
    return {**config, "seeds": seeds}


def settings_of(config: dict, folder: Path, name: str) -> dict:
    path = folder / f"{name}.json"
    path.write_text(json.dumps(config))
    return load_search(path)


def planted_config(sizes, lengths, seeds, budget) -> dict:
    recipe = {
        "params": 1e8, "tokens": 2e9, "lr": 2e-3, "batch_tokens": 131072, "width_multiple": 16,
        "ffn_multiple": 16,
    }  # fmt: skip
    model = {"head_dim": 16, "vocab": 8192}
    data = {"source": "stdlib", "seq": 512}
    grid = {"params": list(sizes), "tokens": list(lengths)}
    more = {"recipe": recipe, "model": model, "data": data, "name": "planted"}
    return {**base(grid, seeds, **more), "search": {"kind": "law", "budget": budget}}


class Planted:
    """Losses of one planted study: functions of the cell and the study's number, whoever asks."""

    def __init__(self, number: int, noise: float, shared: float):
        self.number, self.noise, self.shared = number, noise, shared

    def loss(self, entry: dict) -> float:
        n, d = entry["achieved"]["params_total"], entry["achieved"]["tokens"]
        own = np.random.default_rng([self.number, int(entry["id"][:8], 16)]).standard_normal()
        size = np.random.default_rng([self.number, 7, n]).standard_normal()
        clean = TRUTH["E"] + TRUTH["A"] / n ** TRUTH["alpha"] + TRUTH["B"] / d ** TRUTH["beta"]
        return float(clean * math.exp(self.noise * own + self.shared * size))


def fit_cells(cells: list[dict], planted: Planted):
    table = {
        "params": [e["achieved"]["params_total"] for e in cells],
        "tokens": [e["achieved"]["tokens"] for e in cells],
        "loss": [planted.loss(e) for e in cells],
    }
    return fit_table(table, bootstraps=law.BOOTSTRAPS, sensitivity=False)


def estimate(fit) -> dict:
    return {"a": float(fit.law.compute_exponents(fit.params)["a"]), "width": reported_half_width(fit)}


def random_cells(pool: law.Pool, budget: float, seed: int) -> list[dict]:
    """Cells of the pool in random order, as long as the budget holds the next."""
    picks, spent = [], 0.0
    for i in np.random.default_rng(seed).permutation(len(pool.cells)):
        price = float(pool.prices([int(i)], picks)[0])
        if spent + price <= budget:
            picks.append(int(i))
            spent += price
    return [pool.cells[i] for i in picks]


def plan_of(settings: dict) -> dict:
    return plan({k: v for k, v in settings.items() if k != "search"}, FACTS)


def one_study(truth: Planted, number: int, grid: law.Pool, settings: dict, manifest: dict) -> dict:
    """A uniform grid, random cells and a search for half its FLOPs on one planted study."""
    whole = grid.whole
    flat = estimate(fit_cells(grid.cells, truth))
    blind = estimate(fit_cells(random_cells(law.Pool(manifest), whole / 2, number), truth))
    made: list[Session] = []
    session = Session(settings, FACTS, lambda c: truth.loss(made[0].entries[c]), {"plan": manifest})
    made.append(session)
    replay(law.narrow, session)
    rounds = [r for r in session.rounds if "half_width" in r]
    widths = [tuple(r[k] or math.inf for k in ("half_width", "linear_half_width")) for r in rounds]
    points = [
        {"share": r["spent"] / whole, "a": r["estimate"], "width": w[0]}
        for r, w in zip(rounds, widths, strict=True)
    ]
    stops = [k for k in range(len(rounds)) if is_narrow(widths[: k + 1], flat["width"])]
    firsts = [k for k, w in enumerate(widths) if w[0] <= flat["width"]]
    return {
        "uniform": flat,
        "random": blind,
        "search": points[-1],
        "stop": points[stops[0]] if stops else None,
        "first": points[firsts[0]] if firsts else None,
        "rounds": len(rounds),
        "cells": sum(e["role"] != "trunk" for e in session.entries.values()),
    }


def planted(studies: int, folder: Path) -> dict:
    grid = law.Pool(plan_of(settings_of(planted_config(SIZES[::2], LENGTHS[::2], [0], 1e30), folder, "grid")))
    settings = settings_of(planted_config(SIZES, LENGTHS, [0, 1, 2], grid.whole / 2), folder, "pool")
    manifest = plan_of(settings)
    pool = law.Pool(manifest)
    out = {
        "uniform_cells": len(grid.cells), "uniform_flops": grid.whole, "pool_cells": len(pool.cells),
        "pool_flops": pool.whole, "studies": [],
    }  # fmt: skip
    for noise, shared in NOISES:
        for number in range(studies):
            found = one_study(Planted(number, noise, shared), number, grid, settings, manifest)
            out["studies"].append({"noise": noise, "shared": shared, **found})
            print(noise, shared, number, json.dumps(found), flush=True)
    return out


def summary(out: dict) -> str:
    """The table of a planted run."""
    lines = [
        f"uniform grid: {out['uniform_cells']} cells, {out['uniform_flops']:.3g} FLOPs; pool: "
        f"{out['pool_cells']} cells, {out['pool_flops']:.3g} FLOPs", "",
        "| noise of a run, of a size | design | FLOPs of the uniform grid | RMS error of a | "
        "median half-width | truth within |", "|---|---|---|---|---|---|",
    ]  # fmt: skip
    for noise, shared in NOISES:
        rows = [s for s in out["studies"] if (s["noise"], s["shared"]) == (noise, shared)]
        for name, words in (
            ("uniform", "uniform grid"), ("random", "random cells of the pool"),
            ("search", "search, half the FLOPs"), ("stop", "search, stopped at the uniform grid's width"),
            ("first", "the same, had it stopped at the first such round"),
        ):  # fmt: skip
            got = [s[name] for s in rows if s[name] is not None]
            if not got:
                continue
            error = np.array([g["a"] - A_TRUE for g in got])
            width = np.array([g["width"] for g in got])
            share = {"uniform": "1", "random": "0.5"}.get(
                name
            ) or f"{np.median([g['share'] for g in got]):.2g}"
            reached = "" if len(got) == len(rows) else f" ({len(got)} of {len(rows)} reached it)"
            lines.append(
                f"| {noise:g}, {shared:g} | {words}{reached} | {share} | {np.sqrt((error**2).mean()):.4f} | "
                f"{np.median(width):.4f} | {np.mean(np.abs(error) <= width):.0%} of {len(got)} |"
            )
    return "\n".join(lines)


FIRST_RUNS = 30


def replayed(path: Path) -> dict:
    """The search over the runs of a table with params, tokens, flops, loss (and kept: 1 for those to use)."""
    table = pd.read_csv(path)
    table = table[table.kept == 1] if "kept" in table else table
    table = table[["params", "tokens", "flops", "loss"]].reset_index(drop=True)
    points, price = list(zip(table.params, table.tokens, strict=True)), table.flops.to_numpy(float)

    def fit(rows):
        return fit_table(table.iloc[rows], bootstraps=law.BOOTSTRAPS, sensitivity=False)

    whole = estimate(fit(range(len(table))))
    done, rounds = [int(i) for i in np.argsort(price)[:FIRST_RUNS]], []
    while True:
        now, spent = fit(done), price[done].sum()
        rest = [i for i in range(len(table)) if i not in done]
        spend = min(price.sum() / 2 - spent, max(0.6 * spent, price[rest].min()))
        left = price[rest]
        chosen = next_cells(
            now, [points[i] for i in done], [points[i] for i in rest], lambda picks, left=left: left, spend
        )
        about = {"linear": chosen.before, "share": spent / price.sum(), "runs": len(done)}
        rounds.append({**estimate(now), **about})
        if not chosen.picks:
            break
        done += [rest[k] for k in chosen.picks]
    widths = [(r["width"], r["linear"]) for r in rounds]
    stop = [k for k in range(len(rounds)) if is_narrow(widths[: k + 1], whole["width"])]
    return {"whole": {**whole, "runs": len(table)}, "rounds": rounds, "stop": stop[0] if stop else None}


REAL = {
    "sizes": [16, 24, 32, 48, 64, 96, 128, 192, 256],
    "lengths": [2**k for k in range(8, 17)],
    "trainer": {"name": "plrf", "alpha": 0.7, "beta": 0.3, "rate": 0.25, "dynamics": "sgd", "draws": 4},
}
"""Phase Ia of power-law random features, whose a is 1 / (2 alpha + 1) in the limit: 0.417."""


def real_config(name: str, sizes, lengths, seeds: list[int]) -> dict:
    """SGD of the trainer on a grid of N and D."""
    grid = {"kind": "product", "params": list(sizes), "tokens": list(lengths), "min_steps": 24}
    return {"name": name, "grid": grid, "trainer": REAL["trainer"], "train": {"batch": 1}, "seeds": seeds}


def scaling(*args: str) -> float:
    """Runs a command of the command line; its seconds."""
    began = time.perf_counter()
    subprocess.run([sys.executable, "-m", "launch.cli", *args], check=True, cwd=ROOT)
    return time.perf_counter() - began


def real(folder: Path, repeat: int) -> dict:
    """A uniform grid trained, then a search for its width with half its FLOPs; seeds of this repeat alone."""
    folder.mkdir(parents=True, exist_ok=True)
    seeds = [3 * repeat + k for k in range(3)]
    uniform, searched = folder / "uniform", folder / "searched"
    configs = {study: study.with_suffix(".json") for study in (uniform, searched)}
    coarse = real_config("uniform", REAL["sizes"][::2], REAL["lengths"][::2], seeds[:1])
    configs[uniform].write_text(json.dumps(coarse))
    scaling("plan", str(configs[uniform]), "--study", str(uniform), "--no-estimate")
    seconds = scaling("run", str(uniform))
    table = collect(uniform)
    fit = fit_table(table, bootstraps=law.BOOTSTRAPS, sensitivity=False)
    whole = law.Pool(json.loads((uniform / "manifest.json").read_text())).whole
    asked = {"kind": "law", "budget": whole / 2, "within": reported_half_width(fit)}
    fine = real_config("searched", REAL["sizes"], REAL["lengths"], seeds)
    configs[searched].write_text(json.dumps({**fine, "search": asked}))
    took = scaling("search", str(configs[searched]), "--study", str(searched))
    record = json.loads((searched / "search.json").read_text())
    rows = collect(searched)
    again = fit_table(rows, bootstraps=law.BOOTSTRAPS, sensitivity=False)
    flat_side = {"flops": whole, "seconds": seconds, "cells": len(table)}
    found = {"flops": record["spent"], "seconds": took, "cells": len(rows)}
    return {
        "uniform": {**estimate(fit), **flat_side, "params": fit.params, "status": fit.status},
        "search": {**estimate(again), **found, "params": again.params, "status": again.status,
                   "ended": record["status"]},
        "rounds": record["rounds"],
    }  # fmt: skip


def real_table(studies: list[dict]) -> str:
    """The table of the real studies."""
    lines = ["| repeat | design | FLOPs | cells | a | half-width | status |", "|" + "---|" * 7]
    for k, study in enumerate(studies):
        for name in ("uniform", "search"):
            got = study[name]
            ended = f", {got['ended']}" if "ended" in got else ""
            lines.append(
                f"| {k} | {name} | {got['flops']:.3g} | {got['cells']} | {got['a']:.3f} | "
                f"{got['width']:.3f} | {got['status']}{ended} |"
            )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("what", choices=["planted", "replay", "real"])
    parser.add_argument("path", type=Path, nargs="?", help="Of the table, or a new folder for two studies.")
    parser.add_argument("--studies", type=int, default=40)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if args.what != "planted" and args.path is None:
        parser.error(f"{args.what} needs a PATH")
    if args.what == "planted":
        with tempfile.TemporaryDirectory() as folder:
            out = planted(args.studies, Path(folder))
        print(summary(out))
    elif args.what == "replay":
        out = replayed(args.path)
        print(json.dumps(out, indent=1))
    else:
        out = [real(args.path / str(k), k) for k in range(args.repeats)]
        print(real_table(out))
    if args.json:
        args.json.write_text(json.dumps(out, indent=1) + "\n")


if __name__ == "__main__":
    main()
