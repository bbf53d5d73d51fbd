"""How far the preflight's prediction is off, where it can be measured: on one core of this CPU.

The reader and the roofline of ``scaling preflight`` take the compiled training step of a few small cells;
in place of a chip's published figures stand this core's, measured: a large matrix product and a large copy.
Then the step is timed. Printed: predicted over measured, for the roofline (all at once) and for products and
memory in turn.

    python benchmarks/preflight_error.py [--steps 12] [--json FILE] [--markdown FILE]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time

os.environ.setdefault("JAX_PLATFORMS", "cpu")
if hasattr(os, "sched_setaffinity"):  # before XLA makes its threads: a worker of a study has one core
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})

import jax
import jax.numpy as jnp
import numpy as np

from launch.preflight.hlo import parse
from launch.preflight.roofline import StepTime
from launch.preflight.traffic import traffic
from scaling.config import validate_cell
from scaling.optim import hyper_parameters
from scaling.program import Static, first_state, step_function

# name: d_model, layers, vocabulary, batch, sequence length
CELLS = {
    "d_model 64, 2 layers": (64, 2, 256, 8, 128),
    "d_model 128, 4 layers": (128, 4, 256, 8, 128),
    "d_model 256, 6 layers": (256, 6, 256, 8, 128),
    "d_model 256, 6 layers, vocabulary 8192": (256, 6, 8192, 8, 128),
    "d_model 256, 6 layers, sequence 512": (256, 6, 256, 2, 512),
    "d_model 384, 6 layers": (384, 6, 256, 8, 128),
}


def make_cell(d_model: int, layers: int, vocab: int, batch: int, seq: int) -> dict:
    heads = d_model // 32
    model = {"d_model": d_model, "layers": layers, "heads": heads, "kv_heads": heads, "head_dim": 32}
    return validate_cell(
        {
            "model": {**model, "ffn_dim": 8 * round(d_model / 3), "vocab": vocab},
            "data": {"source": "stdlib", "seq": seq},
            "optim": {"lr": 1e-3},
            "schedule": {"warmup_steps": 10},
            "train": {"batch": batch, "steps": 1000},
        }
    )


def best_seconds(function, *arrays, repeats: int = 7) -> float:
    """Of some runs the shortest: others use the machine too."""
    jax.block_until_ready(function(*arrays))
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(function(*arrays))
        times.append(time.perf_counter() - start)
    return min(times)


def measured_peak(n: int = 1536) -> float:
    """FLOP/s of a float32 product of two n x n matrices."""
    x = jnp.ones((n, n))
    return 2 * n**3 / best_seconds(jax.jit(jnp.matmul), x, x)


def measured_bandwidth(size: int = 2**28) -> float:
    """Bytes/s read and written by a copy of ``size`` bytes, more than any cache holds."""
    x = jnp.ones(size // 4)
    return 2 * size / best_seconds(jax.jit(lambda x: x + 1), x)


def compiled_step(cell: dict):
    """The compiled step, its state and the rest of its arguments."""
    static, hp = Static.of(cell), hyper_parameters(cell)
    shape = cell["train"]["batch"], cell["data"]["seq"]
    ids = np.random.default_rng(0).integers(0, cell["model"]["vocab"], shape, dtype=np.int32)
    batch = {
        "inputs": ids,
        "targets": np.roll(ids, -1, 1),
        "segment_ids": np.ones(shape, np.int32),
        "positions": np.broadcast_to(np.arange(shape[1], dtype=np.int32), shape),
        "loss_mask": np.ones(shape, np.float32),
    }
    state, batch = first_state(static, 0, hp), jax.device_put(batch)
    step = jax.jit(step_function(static), donate_argnums=0).lower(state, batch, hp).compile()
    return step, state, (batch, hp)


def measure(cell: dict, peak: float, bandwidth: float, steps: int) -> dict:
    """One row: the prediction, and the median of timed steps."""
    step, state, rest = compiled_step(cell)
    work = traffic(parse(step.as_text()), 1)
    predicted = StepTime(work.flops / peak, work.memory_bytes / bandwidth, 0.0)
    times = []
    for _ in range(steps + 2):
        start = time.perf_counter()
        state, metrics = step(state, *rest)
        jax.block_until_ready((state, metrics))
        times.append(time.perf_counter() - start)
    seconds = statistics.median(times[2:])
    return {
        "flops": work.flops,
        "memory_bytes": work.memory_bytes,
        "compute_seconds": predicted.compute,
        "memory_seconds": predicted.memory,
        "bound": predicted.bound,
        "predicted_seconds": predicted.seconds,
        "in_turn_seconds": predicted.in_turn,
        "measured_seconds": seconds,
        "fastest_seconds": min(times[2:]),
        "predicted_over_measured": predicted.seconds / seconds,
        "in_turn_over_measured": predicted.in_turn / seconds,
        "unknown_loops": list(work.unknown_loops),
    }


def as_markdown(result: dict) -> str:
    """The table, with what it was measured on."""
    before, after = result["load"]
    lines = [
        "# Preflight's prediction against measured steps, on a CPU core",
        "",
        f"`python benchmarks/preflight_error.py`, jax {jax.__version__}, one core of a {os.cpu_count()}-core "
        f"CPU machine; load {before:.1f} before and {after:.1f} after, one of it the benchmark.",
        f"This core, measured: {result['peak'] / 1e9:.1f} GFLOP/s in a float32 product of 1536 x 1536, "
        f"{result['bandwidth'] / 1e9:.1f} GB/s read and written by a copy of 256 MiB.",
        "",
        "| cell | products | memory | roofline | in turn | measured | roofline / measured "
        "| in turn / measured |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for name, row in result["rows"].items():
        shown = (
            "compute_seconds",
            "memory_seconds",
            "predicted_seconds",
            "in_turn_seconds",
            "measured_seconds",
        )
        cells = [f"{1000 * row[key]:.1f} ms" for key in shown]
        ratios = [f"{row[key]:.2f}" for key in ("predicted_over_measured", "in_turn_over_measured")]
        lines.append("| " + " | ".join([name, *cells, *ratios]) + " |")
    return "\n".join(
        [
            *lines,
            "",
            "Roofline: the slower of products and memory, as `scaling preflight` predicts a step; in turn: "
            "their sum. Below 1 the step is slower than predicted. Bytes are those of every operation's "
            "operands and results, so that what stays in a cache is counted as if it came from memory.",
            "",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=12, help="timed steps a cell")
    parser.add_argument("--json", help="write the numbers to this file")
    parser.add_argument("--markdown", help="write the table to this file")
    args = parser.parse_args()
    before = os.getloadavg()[0]
    peak, bandwidth = measured_peak(), measured_bandwidth()
    rows = {}
    for name, sizes in CELLS.items():
        rows[name] = measure(make_cell(*sizes), peak, bandwidth, args.steps)
        print(name, f"{rows[name]['predicted_over_measured']:.2f}", file=sys.stderr, flush=True)
    result = {"peak": peak, "bandwidth": bandwidth, "rows": rows, "load": [before, os.getloadavg()[0]]}
    text = as_markdown(result)
    print(text)
    for path, content in ((args.json, json.dumps(result, indent=1) + "\n"), (args.markdown, text)):
        if path:
            with open(path, "w") as file:
                file.write(content)


if __name__ == "__main__":
    main()
