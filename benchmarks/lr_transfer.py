"""Whether the best learning rate stays where it is when a model is made four times as wide.

Two-layer models of three widths are trained on bytes of Python's standard library over a grid of learning
rates, under the standard parametrization and under muP with the narrowest as base (there the two are the
same numbers, trained once). The optimum of each is the vertex of a parabola in log2(learning rate) through
the held-out losses near the best, with a standard error. The claim: under standard it moves, under muP it
stays. All learning rates and seeds of a shape are one compiled program; about 7 CPU minutes in all.

    python benchmarks/lr_transfer.py [--steps 300] [--seeds 2] [--redraw]
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import numpy as np

from scaling import data
from scaling.config import validate_cell
from scaling.data import Stream, heldout_batches
from scaling.evaluate import held_out_loss
from scaling.optim import hyper_parameters
from scaling.program import Static, compiled, first_state

RESULTS = Path(__file__).parent / "results"
WIDTHS, LAYERS, HEAD_DIM = (24, 48, 96), 2, 12
SEQ, BATCH = 64, 8
LOG2_LRS = (-10, -9, -8, -7, -6, -5, -4)
NEAR = 2.1
"""Octaves on either side of the lowest loss that the parabola is fitted to."""


def make_cell(parametrization: str, width: int, lr: float, steps: int) -> dict:
    """One cell of the comparison."""
    base = {} if parametrization == "standard" else {"base_d_model": WIDTHS[0]}
    heads = width // HEAD_DIM
    model = {"d_model": width, "layers": LAYERS, "heads": heads, "kv_heads": heads, "head_dim": HEAD_DIM}
    return validate_cell(
        {
            "model": {**model, "ffn_dim": 8 * width // 3, "parametrization": parametrization, **base},
            "data": {"source": "stdlib", "seq": SEQ},
            "optim": {"lr": lr, "beta2": 0.98, "weight_decay": 0.1},
            "schedule": {"warmup_steps": steps // 10},
            "train": {"batch": BATCH, "steps": steps},
            "eval": {"sequences": 256},
        }
    )


def losses(parametrization: str, width: int, steps: int, seeds: int) -> list[list[float]]:
    """Held-out losses [seeds, learning rates] in nats a byte; all of them by one compiled program."""
    cells = [make_cell(parametrization, width, 2.0**x, steps) for x in LOG2_LRS]
    static = Static.of(cells[0])
    step, evaluate = compiled(static)
    dataset = data.open_data(cells[0]["data"])
    evals = heldout_batches(dataset.heldout, SEQ, 64, cells[0]["eval"]["sequences"])
    rows = []
    for seed in range(seeds):
        stream = Stream(dataset.train, SEQ, BATCH, seed)
        rows.append([])
        for cell in cells:
            hp = hyper_parameters(cell)
            state = first_state(static, seed, hp)
            for i in range(steps):
                state, _ = step(state, stream.batch_at(i), hp)
            rows[-1].append(held_out_loss(evaluate, state.params, evals, 1.0)["loss"])
        print(
            f"{parametrization} width {width} seed {seed}:",
            " ".join(f"{x:.4f}" for x in rows[-1]),
            flush=True,
        )
    return rows


def parabola(x, y):
    """Least-squares (a, b, c) of a x^2 + b x + c and their covariance from the scatter about it."""
    design = np.stack([x * x, x, np.ones_like(x)], -1)
    coef, *_ = np.linalg.lstsq(design, y, rcond=None)
    freedom = len(x) - 3
    spread = float(np.sum((y - design @ coef) ** 2)) / freedom if freedom > 0 else 0.0
    return coef, spread * np.linalg.inv(design.T @ design)


def optimum(log2_lrs, loss_SR, octaves: float = NEAR) -> dict:
    """The vertex of a parabola through the mean losses near the best, with a standard error.

    Two sources, added in quadrature: the scatter of the mean losses about the parabola (delta method: it
    holds how little a parabola the curve is) and the seeds' own vertices, over sqrt(seeds).

    Args:
      log2_lrs: the grid.
      loss_SR: losses [seeds, learning rates].
      octaves: on either side of the lowest mean loss, what the parabola is fitted to; with three points
        there is no scatter about it, and the error is that of the seeds alone.

    Returns:
      ``log2_lr`` and ``stderr``, in octaves; ``inside``: whether the lowest loss lies within the grid and
      the parabola is convex; ``loss``: the lowest mean.
    """
    x, loss_SR = np.asarray(log2_lrs, float), np.asarray(loss_SR, float)
    mean = loss_SR.mean(0)
    best = int(np.argmin(mean))
    near = np.abs(x - x[best]) <= octaves
    (a, b, _), cov = parabola(x[near], mean[near])
    gradient = np.array([b / (2 * a * a), -1 / (2 * a), 0.0])
    own = [-q[1] / (2 * q[0]) for q in (parabola(x[near], row[near])[0] for row in loss_SR)]
    between = float(np.var(own, ddof=1)) / len(own) if len(own) > 1 else 0.0
    return {
        "log2_lr": float(-b / (2 * a)),
        "stderr": float(np.sqrt(gradient @ cov @ gradient + between)),
        "inside": bool(0 < best < len(x) - 1 and a > 0),
        "loss": float(mean[best]),
    }


def shifts(found: dict, octaves: float = NEAR) -> dict:
    """By how many octaves the optimum moves from the narrowest to the widest, with its standard error."""
    out = {}
    for name in ("standard", "mup"):
        first, last = (
            optimum(LOG2_LRS, found["losses"][f"{name} {w}"], octaves) for w in (WIDTHS[0], WIDTHS[-1])
        )
        error = float(np.hypot(first["stderr"], last["stderr"]))
        out[name] = {"octaves": last["log2_lr"] - first["log2_lr"], "stderr": error}
    return out


def measure(steps: int, seeds: int, raw: Path) -> dict:
    """All losses; what is done is kept in ``raw`` after every shape."""
    start, found = time.process_time(), {"steps": steps, "seeds": seeds, "losses": {}}
    found["device"] = f"{jax.devices()[0].device_kind}, {os.cpu_count()} cores, jax {jax.__version__}"
    for parametrization in ("standard", "mup"):
        for width in WIDTHS:
            shared = parametrization != "standard" and width == WIDTHS[0]
            found["losses"][f"{parametrization} {width}"] = (
                found["losses"][f"standard {width}"]
                if shared
                else losses(parametrization, width, steps, seeds)
            )
            found["cpu_seconds"] = round(time.process_time() - start)
            raw.write_text(json.dumps(found, indent=1) + "\n")
    return found


def draw(found: dict, path: Path) -> None:
    """Held-out loss against learning rate, a panel a parametrization, the optima marked."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    fig, panels = plt.subplots(1, 2, figsize=(9, 4), sharey=True, layout="constrained")
    for panel, name in zip(panels, ("standard", "mup"), strict=True):
        for i, width in enumerate(WIDTHS):
            rows = np.array(found["losses"][f"{name} {width}"])
            best = optimum(LOG2_LRS, rows)
            panel.plot(LOG2_LRS, rows.mean(0), f"C{i}o-", ms=4, label=f"width {width}")
            panel.plot(np.tile(LOG2_LRS, (len(rows), 1)).T, rows.T, f"C{i}.", ms=3, alpha=0.5)
            panel.axvspan(
                best["log2_lr"] - best["stderr"],
                best["log2_lr"] + best["stderr"],
                color=f"C{i}",
                alpha=0.2,
                lw=0,
            )
            panel.axvline(best["log2_lr"], color=f"C{i}", ls=":", lw=1)
        move = shifts(found)[name]
        panel.set(
            title=f"{name}: optimum moves {move['octaves']:+.2f} ± {move['stderr']:.2f} octaves",
            xlabel="log2 learning rate",
        )
        panel.grid(alpha=0.3)
        panel.legend()
    panels[0].set_ylabel("held-out loss, nats a byte")
    fig.savefig(path, dpi=110)
    plt.close(fig)


def report(found: dict) -> str:
    """The result as Markdown."""
    lines = ["| parametrization | width | best log2 lr | standard error | lowest loss | inside the grid |"]
    lines.append("|---|---|---|---|---|---|")
    for key, rows in found["losses"].items():
        best, (name, width) = optimum(LOG2_LRS, rows), key.split()
        best["inside"] = "yes" if best["inside"] else "no"
        lines.append(
            f"| {name} | {width} | {best['log2_lr']:.2f} | {best['stderr']:.2f} | {best['loss']:.4f} "
            f"| {best['inside']} |"
        )
    moves, narrow = (
        "; ".join(f"{k} {v['octaves']:+.2f} +- {v['stderr']:.2f}" for k, v in shifts(found, near).items())
        for near in (NEAR, 1.1)
    )
    tokens = found["steps"] * BATCH * SEQ
    return f"""# Learning-rate transfer across width

`python benchmarks/lr_transfer.py`, {found["device"]},
{found["cpu_seconds"]} CPU seconds on a busy machine. Bytes of Python's standard library, {LAYERS} layers,
head size {HEAD_DIM}, tied, query-key norm; {tokens:,} tokens a run:
{found["steps"]} steps of {BATCH} x {SEQ}, WSD, {found["seeds"]} seeds. Learning rates 2^{LOG2_LRS[0]}
to 2^{LOG2_LRS[-1]} by factors of 2. muP's base is the narrowest, where both are the same cells.

{chr(10).join(lines)}

**From width {WIDTHS[0]} to {WIDTHS[-1]} the optimum moves, in octaves: {moves}.**

The best learning rate is the vertex of a parabola through the mean losses within 2 octaves of the lowest; the
standard error adds the scatter about it and the difference between seeds, of which there are few. The window
matters more than that error says: through the lowest loss and its two neighbours alone (error from seeds
alone) the moves are {narrow}.

![loss against learning rate](lr_transfer.png)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of lr_transfer.{json,md,png}")
    parser.add_argument(
        "--redraw", action="store_true", help="table and picture from the losses measured before"
    )
    args = parser.parse_args()
    raw = args.out / "lr_transfer.json"
    found = json.loads(raw.read_text()) if args.redraw else measure(args.steps, args.seeds, raw)
    text = report(found)
    print(text)
    (args.out / "lr_transfer.md").write_text(text)
    draw(found, args.out / "lr_transfer.png")


if __name__ == "__main__":
    main()
