"""The phase diagram of power-law random features, coloured by measured exponents.

At every point (alpha, beta) of a grid the best size and loss of two budgets are found from the deterministic
equivalent; the exponents are the slopes between them. The picture shows both, and their distance from the
theory. Run: ``python benchmarks/plrf_phases.py`` (40 CPU-seconds); ``--points 6`` for a quick look.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from pathlib import Path

import numpy as np

from scaling.theory.plrf import frontier, theory

BUDGETS = (1e16, 1e18)


def measure(points: int) -> list[dict]:
    """One dict a grid point: alpha, beta, phase, and loss and size measured and by theory."""
    rows = []
    for alpha in 0.1 + 1.2 * (np.arange(points) + 0.5) / points:
        for beta in 0.05 + 1.45 * (np.arange(points) + 0.5) / points:
            try:
                limit = theory(alpha, beta)
                d, loss = frontier(alpha, beta, BUDGETS, rate=0.25)
            except ValueError:  # no limit, or a loss below rounding
                continue
            span = np.log(BUDGETS[1] / BUDGETS[0])
            rows.append(
                {
                    "alpha": float(alpha),
                    "beta": float(beta),
                    "phase": limit.phase,
                    "loss": float(-np.log(loss[1] / loss[0]) / span),
                    "size": float(np.log(d[1] / d[0]) / span),
                    "loss_theory": limit.loss,
                    "size_theory": limit.size,
                }
            )
    return rows


def picture(rows: list[dict], points: int, path: Path) -> None:
    """Four panels: both exponents as measured, and measured minus theory."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    a, b = (np.array([r[k] for r in rows]) for k in ("alpha", "beta"))
    figure, axes = plt.subplots(2, 2, figsize=(10, 9), sharex=True, sharey=True, layout="constrained")
    for axis, (key, title) in zip(
        axes[0], (("loss", "loss ~ C^-x: x"), ("size", "N* ~ C^a: a")), strict=True
    ):
        _panel(figure, axis, a, b, np.array([r[key] for r in rows]), points, "viridis", None)
        axis.set_title(f"{title}, measured")
    for axis, key in zip(axes[1], ("loss", "size"), strict=True):
        off = np.array([r[key] - r[f"{key}_theory"] for r in rows])
        _panel(figure, axis, a, b, off, points, "RdBu", 0.05)
        axis.set_title("measured minus theory")
    for axis in axes.flat:
        borders(axis)
    for axis in axes[1]:
        axis.set_xlabel("alpha (data)")
    for axis in axes[:, 0]:
        axis.set_ylabel("beta (target)")
    figure.savefig(path, dpi=110)


def _panel(figure, axis, a, b, values, points, colours, limit) -> None:
    side = {"s": (300 / points) ** 2 * 0.85, "marker": "s", "cmap": colours}
    if limit is not None:
        side |= {"vmin": -limit, "vmax": limit}
    figure.colorbar(axis.scatter(a, b, c=values, **side), ax=axis)


def borders(axis) -> None:
    """The lines between phases, and their names."""
    root, line = 1 - 0.5**0.5, {"color": "black", "linewidth": 1}
    axis.plot([0.5, 0.5], [0, 1.5], **line)
    axis.plot([0, 1.3], [0.5, 0.5], **line)
    axis.plot([0.5, 1.3], [0.5, 1.3], **line)
    axis.plot([0.25, 0.25], [0.5, 1.5], **line)
    axis.plot([root, root], [0.5, 1.5], **line)
    axis.plot([0, 0.5], [0.5, 0], color="black", linewidth=1, linestyle="--")
    names = {"Ia": (0.9, 0.25), "Ib": (0.4, 0.32), "Ic": (0.17, 1.0), "II": (1.1, 0.75), "III": (0.75, 1.2)}
    for name, at in {**names, "IVa": (0.4, 1.0), "IVb": (0.27, 1.35)}.items():
        box = {"facecolor": "white", "alpha": 0.75, "edgecolor": "none", "pad": 1.5}
        axis.text(*at, name, ha="center", va="center", bbox=box)
    axis.set(xlim=(0.1, 1.3), ylim=(0.05, 1.5))


def summary(rows: list[dict]) -> dict:
    """Of each phase the number of points, and the largest and median distance from the theory."""
    out = {}
    for phase in sorted({r["phase"] for r in rows}):
        own = [r for r in rows if r["phase"] == phase]
        out[phase] = {"points": len(own)}
        for key in ("loss", "size"):
            off = [abs(r[key] - r[f"{key}_theory"]) for r in own]
            out[phase][key] = {"median": float(np.median(off)), "largest": float(np.max(off))}
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--points", type=int, default=22, help="of each axis")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    args = parser.parse_args()
    began = time.process_time()
    rows = measure(args.points)
    machine = {"python": platform.python_version(), "numpy": np.__version__, "machine": platform.machine()}
    found = {"budgets": BUDGETS, "phases": summary(rows), "points": rows, "versions": machine}
    (args.out / "plrf_phases.json").write_text(json.dumps(found) + "\n")
    picture(rows, args.points, args.out / "plrf_phases.png")
    print(json.dumps(summary(rows), indent=1), f"{time.process_time() - began:.0f} CPU-seconds", sep="\n")


if __name__ == "__main__":
    main()
