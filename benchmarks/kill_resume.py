"""Kills ``scaling run`` at random moments and shows that the final numbers do not change.

One small study is trained twice: once undisturbed, once with SIGKILL sent to the whole process
group at random moments (checkpoints are saved every few steps, so that many kills fall into a
save), then resumed to the end. Result, metrics and config files must be byte-identical.

The study has trunks, branches that leave them and sentinels; its cells train in packs.

    python benchmarks/kill_resume.py [--kills 25] [--seed 0]
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

SCALING = [sys.executable, "-m", "launch.cli"]
CONFIG = {
    "name": "kills",
    "grid": {
        "kind": "product",
        "params": [6.5e3, 20e3, 40e3],
        "tokens": [1e4, 2e4, 4e4],
        "min_steps": 20,
        "trunks": True,
        "sentinels": {"lr": [0.5, 2.0], "cells": "cheapest"},
    },
    "model": {"head_dim": 12},
    "data": {"source": "stdlib", "seq": 64},
    "recipe": {
        "params": 33e3,
        "tokens": 2e5,
        "lr": 6e-3,
        "batch_tokens": 128,
        "width_per_layer": 28.0,
        "width_multiple": 12,
        "ffn_multiple": 8,
    },
    "eval": {"sequences": 64, "points": 2},
}
OPTIONS = ("--checkpoint-steps", "4", "--pack", "turns")
FILES = ("result.json", "metrics.jsonl", "config.json")


def scaling(*args: str) -> None:
    subprocess.run([*SCALING, *args], check=True, stdout=subprocess.DEVNULL)


def kill_once(study: Path, seconds: float) -> dict:
    """Starts `scaling run`, kills its process group after a while; says what stood on disk then."""
    before = unfinished_saves(study)
    process = subprocess.Popen(
        [*SCALING, "run", str(study), *OPTIONS],
        stdout=subprocess.DEVNULL,
        start_new_session=True,
    )
    time.sleep(seconds)
    ended = process.poll() is not None
    if not ended:
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    torn = len(unfinished_saves(study) - before)
    done = len(list((study / "cells").glob("*/result.json")))
    return {"after_seconds": round(seconds, 2), "ended": ended, "cells_done": done, "torn_saves": torn}


def unfinished_saves(study: Path) -> set:
    """Checkpoints that a kill cut short, by folder and inode: a name may come again."""
    found = (study / "cells").glob("*/checkpoints/*")
    return {(p, p.stat().st_ino) for p in found if not p.name.isdigit()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=25)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="also write the figures here")
    args = parser.parse_args()
    rng = np.random.default_rng(args.seed)
    with tempfile.TemporaryDirectory() as folder:
        config, whole, killed = (Path(folder) / n for n in ("config.json", "whole", "killed"))
        config.write_text(json.dumps(CONFIG))
        for study in (whole, killed):
            scaling("plan", str(config), "--study", str(study), "--no-estimate")
        start = time.perf_counter()
        scaling("run", str(whole), *OPTIONS)
        undisturbed = time.perf_counter() - start
        kills = []
        while len(kills) < args.kills:
            kill = kill_once(killed, rng.uniform(3.0, 3.0 + 0.25 * undisturbed))
            if kill["ended"]:
                break
            kills.append(kill)
            print(f"kill {len(kills)}: {kill}", flush=True)
        scaling("run", str(killed), *OPTIONS)
        differing = []
        for cell in sorted(p.name for p in (whole / "cells").iterdir()):
            for name in FILES:
                a, b = ((s / "cells" / cell / name).read_bytes() for s in (whole, killed))
                if a != b:
                    differing.append(f"{cell}/{name}")
        cells = len(list((whole / "cells").iterdir()))
    torn = sum(k["torn_saves"] > 0 for k in kills)
    print(f"{len(kills)} kills over {cells} cells, {torn} of them inside a save; ", end="")
    print(f"undisturbed {undisturbed:.0f} s")
    print("byte-identical" if not differing else f"DIFFERENT: {differing}")
    if args.json:
        args.json.write_text(json.dumps({"kills": kills, "cells": cells, "differing": differing}, indent=1))
    return bool(differing) or len(kills) < args.kills


if __name__ == "__main__":
    sys.exit(main())
