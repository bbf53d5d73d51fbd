"""What the training loop costs over a bare ``jax.jit`` of the same loss and optimiser.

Both sides run in one process, in blocks that alternate: our loop (``scaling.train.train``: batches
read from the data set, metrics read and logged, divergence checked, checkpoints due or not) is
paused in its own logging callback while the bare loop (one fixed batch on the device, optax's AdamW
with constants, nothing read back until the block's end) runs as many steps. The figure is the median
over pairs of blocks of ours / bare, in tokens per second; 1 means no cost.

    python benchmarks/step_overhead.py [--steps 48] [--pairs 14]
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import numpy as np
import optax

from scaling import data
from scaling.config import validate_cell
from scaling.data import Stream
from scaling.files import CellFolder
from scaling.lane import LOGGED_POINTS
from scaling.models.lm import build
from scaling.models.loss import loss_fn
from scaling.optim import decays
from scaling.program import UNROLLED_LAYERS
from scaling.train import Execution, train

SHAPES = {"d_model 64, 2 layers": (64, 2), "d_model 128, 4 layers": (128, 4)}
SEQ, BATCH = 128, 8


def make_cell(d_model: int, layers: int, steps: int) -> dict:
    heads = d_model // 16
    model = {"d_model": d_model, "layers": layers, "heads": heads, "kv_heads": heads, "head_dim": 16}
    return validate_cell(
        {
            "model": {**model, "ffn_dim": 8 * round(d_model / 3)},
            "data": {"source": "stdlib", "seq": SEQ},
            "optim": {"lr": 3e-3},
            "schedule": {"warmup_steps": 10},
            "train": {"batch": BATCH, "steps": steps},
            "eval": {"sequences": 64},
        }
    )


def bare_loop(cell: dict):
    """A function that runs n bare steps and returns the seconds they took."""
    optim, steps = cell["optim"], cell["train"]["steps"]
    unroll = cell["model"]["layers"] <= UNROLLED_LAYERS  # the same program as ours
    apply, params = build(cell["model"], seed=0, unroll=unroll)
    decay = round(cell["schedule"]["decay_fraction"] * steps)
    schedule = optax.join_schedules(
        [
            optax.linear_schedule(0.0, optim["lr"], 10),
            optax.constant_schedule(optim["lr"]),
            optax.linear_schedule(optim["lr"], 0.0, decay),
        ],
        [10, steps - decay],
    )
    mask = jax.tree_util.tree_map_with_path(decays, params)
    optimizer = optax.chain(
        optax.clip_by_global_norm(optim["grad_clip"]),
        optax.adamw(
            schedule,
            optim["beta1"],
            optim["beta2"],
            optim["eps"],
            weight_decay=optim["weight_decay"],
            mask=mask,
        ),
    )

    def step(params, opt_state, batch):
        (loss, _), grads = jax.value_and_grad(lambda p: loss_fn(apply, p, batch, 0.0), has_aux=True)(params)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, loss

    step = jax.jit(step, donate_argnums=(0, 1))
    tokens = data.open_data(cell["data"]).train
    batch = jax.device_put(Stream(tokens, SEQ, BATCH, 0).batch_at(0))
    state = [params, optimizer.init(params)]

    def run(n: int) -> float:
        start = time.perf_counter()
        loss = None
        for _ in range(n):
            *state[:], loss = step(*state, batch)
        jax.block_until_ready((state, loss))
        return time.perf_counter() - start

    run(5)
    return run


def compare(d_model: int, layers: int, block: int, pairs: int) -> dict:
    """Alternates blocks of the two loops; returns tokens per second of each and the ratios."""
    steps = block * (pairs + 2)
    if block % max(1, steps // LOGGED_POINTS):
        raise SystemExit(f"--steps {block} and --pairs {pairs}: the loop would not log at the end of a block")
    cell = make_cell(d_model, layers, steps)
    bare = bare_loop(cell)
    times: dict[str, list] = {"ours": [], "bare": []}
    began = None

    def on_metrics(row: dict) -> None:
        nonlocal began
        now = time.perf_counter()
        if row["step"] % block:
            return
        if began is not None:
            times["ours"].append((now - began) / (block - 1))
        time.sleep(0.3)  # the step already in flight ends here, on nobody's account
        times["bare"].append(bare(block - 1) / (block - 1))
        began = time.perf_counter()

    with tempfile.TemporaryDirectory() as folder:
        train(cell, CellFolder(Path(folder), "cell"), Execution(checkpoint_seconds=3600), on_metrics)
    ours, bare_times = np.array(times["ours"][:pairs]), np.array(times["bare"][:pairs])
    following = np.array(times["bare"][1 : pairs + 1])
    # each of our blocks lies between two bare ones: against their mean a drift of the machine cancels
    ratios = (bare_times[: len(ours)] + following[: len(ours)]) / 2 / ours
    tokens = SEQ * BATCH
    return {
        "pairs": len(ours),
        "ours_tokens_per_second": tokens / float(np.median(ours)),
        "bare_tokens_per_second": tokens / float(np.median(bare_times)),
        "ratio_median": float(np.median(ratios)),
        "ratio_quartiles": [float(q) for q in np.quantile(ratios, [0.25, 0.75])],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=48, help="steps in a block")
    parser.add_argument("--pairs", type=int, default=14, help="pairs of blocks")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    args = parser.parse_args()
    out = {}
    device = jax.devices()[0].device_kind
    print(f"jax {jax.__version__} on {device}, {os.cpu_count()} cores, load {os.getloadavg()}")
    print(f"seq {SEQ}, batch {BATCH}, vocabulary 256, blocks of {args.steps} steps")
    for name, (d_model, layers) in SHAPES.items():
        r = out[name] = compare(d_model, layers, args.steps, args.pairs)
        low, high = r["ratio_quartiles"]
        print(f"{name}: ours {r['ours_tokens_per_second']:,.0f} tokens/s", end=", ")
        print(f"bare {r['bare_tokens_per_second']:,.0f}; ratio {r['ratio_median']:.3f}", end=" ")
        print(f"(quartiles {low:.3f} to {high:.3f}, {r['pairs']} pairs)")
    print(f"load at the end {os.getloadavg()}")
    if args.json:
        args.json.write_text(json.dumps(out, indent=1) + "\n")


if __name__ == "__main__":
    main()
