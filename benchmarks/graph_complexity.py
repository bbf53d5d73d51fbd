"""Exponents against the complexity of the source: random walks on graphs of several degrees.

For each degree the study `experiments/theory/graphs.py` is planned, trained and fitted with Chinchilla's law;
of its largest size, what is left above the entropy rate, which is exact, is fitted with a power of D. A study
that is there already is not trained again.

    python benchmarks/graph_complexity.py FOLDER [--degrees 3,6,12,24] [--json FILE] [--markdown FILE]
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import numpy as np
from scipy.stats import linregress, t

import fits
from launch.cli import cli
from scaling.data.synthetic import make_source
from scaling.records import collect, read_manifest

CONFIG = Path(__file__).parents[1] / "experiments" / "theory" / "graphs.py"
PREFACE = """# Exponents against the complexity of the source

`python benchmarks/graph_complexity.py FOLDER`: random walks on graphs of 256 nodes and several mean degrees
(`experiments/theory/graphs.py`: {cells} cells a graph, transformers of one layer and {sizes} parameters on
{tokens} tokens). H is the exact entropy rate in nats; E, alpha and beta are of Chinchilla's law,
its residual the standard deviation in log loss; the last exponent is that of D in what the largest size
leaves above H. Intervals are of 95 %: Student's t over clusters of model size, and over the last one's runs.
jax {jax}; {seconds:.0f} worker-seconds on CPU cores that other work shared.
"""
HEAD = "| degree | edges | H | losses | fitted E | alpha | beta | of D, largest size | residual |"


def study(folder: Path, degree: float) -> Path:
    """The graph's study, planned and trained."""
    path = folder / f"degree_{degree:g}"
    plan = ["plan", str(CONFIG), "--study", str(path), "--no-estimate", "--set", f"data.degree={degree}"]
    for words in (plan, ["run", str(path), "--workers", "1"]):
        cli(words, standalone_mode=False)
    return path


def measure(path: Path, degree: float) -> dict:
    """Exponents with 95 % intervals."""
    table, manifest = collect(path), read_manifest(path)
    final = table[table["final"].astype(bool)]
    graph, truth = make_source(manifest["cells"][0]["config"]["data"]), manifest["data"]["entropy_rate"]
    out = {
        "degree": degree,
        "edges": graph.facts["edges"],
        "entropy_rate": truth,
        "cells": len(final),
        "losses": [float(final["loss"].min()), float(final["loss"].max())],
        "params": sorted({int(n) for n in final["params"]}),
        "tokens": sorted({int(d) for d in final["tokens"]}),
        "seconds": float(final["wall_seconds"].sum()),
    }
    law = fits.fit_table(final, "chinchilla", sensitivity=False)
    residual = [r["residual"] for r in law.rows if r["outcome"] == "used"]
    out |= {"status": law.status, "residual_sd": float(np.std(residual))}
    out |= {k: [law.params[k], law.intervals[k]["95"]] for k in ("E", "alpha", "beta")}
    # of the largest size alone, whose floor is known: the slope of the log of what is above it
    widest = final[final["params"] == final["params"].max()]
    x, y = np.log(widest["tokens"].to_numpy(float)), np.log(widest["loss"].to_numpy(float) - truth)
    line = linregress(x, y)
    half = float(t.ppf(0.975, len(x) - 2) * line.stderr)
    out["data"] = [-line.slope, [-line.slope - half, -line.slope + half]]
    return out


def row(got: dict) -> str:
    """One line of the table."""

    def said(name):
        value, ends = got[name]
        return f"{value:.2f}" + (f" ({ends[0]:.2f} to {ends[1]:.2f})" if ends else "")

    low, high = got["losses"]
    return (
        f"| {got['degree']:g} | {got['edges']} | {got['entropy_rate']:.4f} | {low:.3f} to {high:.3f} "
        f"| {' | '.join(map(said, ('E', 'alpha', 'beta', 'data')))} | {got['residual_sd']:.3f} |"
    )


def markdown(rows: list[dict]) -> str:
    first = rows[0]
    words = {
        "cells": first["cells"],
        "sizes": f"{first['params'][0]:,} to {first['params'][-1]:,}",
        "tokens": f"{first['tokens'][0]:,} to {first['tokens'][-1]:,}",
        "jax": jax.__version__,
        "seconds": sum(r["seconds"] for r in rows),
    }
    line = "|" + "---|" * (HEAD.count("|") - 1)
    return "\n".join([PREFACE.format(**words), HEAD, line, *map(row, rows), ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="where the studies lie")
    parser.add_argument("--degrees", default="3,6,12,24")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--markdown", type=Path)
    args = parser.parse_args()
    degrees = [float(d) for d in args.degrees.split(",")]
    rows = [measure(study(args.folder, d), d) for d in degrees]
    print(markdown(rows))
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n")
    if args.markdown:
        args.markdown.write_text(markdown(rows))


if __name__ == "__main__":
    main()
