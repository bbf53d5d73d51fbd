"""Our training step against the same architecture written plainly: ``jax.numpy`` on a CPU, PyTorch on a GPU.

CPU: the step that ``scaling.program`` compiles for a cell against ``plain_jax.py``, layers in a loop and
scanned, in blocks that alternate within one process; first both must give the same losses. The figure is
tokens per CPU-second (of all the process's threads, so that other load on the machine counts less),
ours / plain: the median over pairs of blocks.

    python benchmarks/train_step.py [--pairs 8] [--seconds 1.0] [--json FILE]

GPU, where there is one, with torch in the same environment or in that of --torch-python:

    python benchmarks/train_step.py --gpu [--torch-python PATH]

each side in processes of its own that take turns; tokens/s, and model FLOPs utilisation by the exact ledger.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
OPTIM = {"lr": 1e-3, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.1, "grad_clip": 1.0}

# d_model, layers, vocab, batch, seq
CPU_SHAPES = {
    "d_model 64, 2 layers": (64, 2, 256, 8, 128),
    "d_model 128, 4 layers": (128, 4, 256, 8, 128),
    "d_model 128, 8 layers": (128, 8, 256, 8, 128),
    "d_model 256, 4 layers, vocabulary 8192": (256, 4, 8192, 4, 256),
}
# d_model, layers, head_dim, ffn_dim, batch, seq; vocabulary 50,304
GPU_SHAPES = {"124M": (768, 12, 64, 2048, 16, 1024), "1.3B": (2048, 24, 128, 5504, 4, 2048)}


def make_cell(d_model, layers, vocab, batch, seq, dtype, head_dim=16, ffn_dim=None, **model) -> dict:
    from scaling.config import validate_cell

    heads = d_model // head_dim
    shape = {"d_model": d_model, "layers": layers, "heads": heads, "kv_heads": heads, "head_dim": head_dim}
    shape |= {"ffn_dim": ffn_dim or 8 * round(d_model / 3), "vocab": vocab, "dtype": dtype, **model}
    return validate_cell(
        {
            "model": shape,
            "data": {"source": "stdlib", "seq": seq},
            "optim": OPTIM,
            "schedule": {"name": "constant", "warmup_steps": 0},
            "train": {"batch": batch, "steps": 10**6},
        }
    )


def make_batch(vocab, batch, seq, seed=0) -> dict:
    """Rows of two documents each of random tokens, the second somewhere in the row."""
    import numpy as np

    rng = np.random.default_rng(seed)
    tokens = rng.zipf(1.3, (batch, seq + 1)) % vocab
    at = np.arange(seq)[None]
    second = rng.integers(1, seq, (batch, 1))
    inside = at >= second
    return {
        "inputs": tokens[:, :-1].astype(np.int32),
        "targets": tokens[:, 1:].astype(np.int32),
        "segment_ids": (1 + inside).astype(np.int32),
        "positions": np.where(inside, at - second, at).astype(np.int32),
        "loss_mask": np.ones((batch, seq), np.float32),
    }


def our_step(cell, params=None):
    """(step, state): step(state, batch) to (state, loss), from the params given or the seed's."""
    from scaling.optim import hyper_parameters
    from scaling.program import Static, compiled, first_state
    from scaling.step import init_state

    static, hp = Static.of(cell), hyper_parameters(cell)
    step = compiled(static)[0]

    def run(state, batch):
        state, metrics = step(state, batch, hp)
        return state, metrics["loss"]

    if params is None:
        return run, first_state(static, cell["train"]["seed"], hp)
    return run, init_state(params, static, hp)


def sides(cell, params=None, plain=("loop", "scan")) -> dict:
    """name -> [step, state] of ours and of the plain ones, from the same parameters."""
    import plain_jax

    step, state = our_step(cell, params)
    out = {"ours": [step, state]}
    for name in plain:
        start = plain_jax.init(plain_jax.from_ours(state.params, scan=name == "scan"))
        out[name] = [plain_jax.step_function(cell["model"], cell["optim"]), start]
    return out


def losses(side: list, batch, steps: int) -> list[float]:
    """The losses of some steps, which the side then has behind it."""
    out = []
    for _ in range(steps):
        side[1], loss = side[0](side[1], batch)
        out.append(float(loss))
    return out


def block(side: list, batch, steps: int) -> tuple[float, float]:
    """(CPU-seconds, wall seconds) a step."""
    import jax

    begin, cpu = time.perf_counter(), time.process_time()
    for _ in range(steps):
        side[1], loss = side[0](side[1], batch)
    jax.block_until_ready((side[1], loss))
    return (time.process_time() - cpu) / steps, (time.perf_counter() - begin) / steps


def compare(shape, dtype: str, pairs: int, seconds: float) -> dict:
    """One shape in one dtype: checks the losses, then times all sides by turns."""
    import jax
    import numpy as np

    cell = make_cell(*shape, dtype)
    _, _, vocab, batch_size, seq = shape
    batch = jax.device_put(make_batch(vocab, batch_size, seq))
    all_sides = sides(cell)
    trajectories = {name: losses(side, batch, 5) for name, side in all_sides.items()}
    # float32: sums in other orders. bfloat16 rounds by up to 2^-9 at other places of the graph, and the first
    # steps of Adam, of one size for small and large gradients, carry that on: 2.6e-3 was seen after five.
    tolerance = {"float32": 1e-5, "bfloat16": 1e-2}[dtype]
    for name in ("loop", "scan"):
        np.testing.assert_allclose(trajectories[name], trajectories["ours"], rtol=tolerance, err_msg=name)
    steps = max(2, round(seconds / block(all_sides["ours"], batch, 2)[1]))
    times: dict[str, list] = {name: [] for name in all_sides}
    for turn in range(pairs):
        for name in sorted(all_sides, reverse=turn % 2 == 1):
            times[name].append(block(all_sides[name], batch, steps))
    tokens = batch_size * seq
    row = {"steps_a_block": steps, "pairs": pairs, "first_loss": trajectories["ours"][0]}
    row["last_loss"] = trajectories["ours"][-1]
    for name, values in times.items():
        row[f"{name}_tokens_per_cpu_second"] = tokens / statistics.median(c for c, _ in values)
        row[f"{name}_tokens_per_second"] = tokens / statistics.median(w for _, w in values)
    for name in ("loop", "scan"):
        ratios = [theirs[0] / ours[0] for theirs, ours in zip(times[name], times["ours"], strict=True)]
        row[f"over_{name}"] = statistics.median(ratios)
        row[f"over_{name}_quartiles"] = [float(q) for q in np.quantile(ratios, [0.25, 0.75])]
    return row


def cpu_section(pairs: int, seconds: float) -> list[dict]:
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    import jax
    import turns

    print(f"jax {jax.__version__} on {turns.device()}, {os.cpu_count()} cores, load {turns.load()}")
    rows = []
    for name, shape in CPU_SHAPES.items():
        for dtype in ("float32", "bfloat16"):
            row = {"shape": name, "batch": shape[3], "seq": shape[4], "dtype": dtype, "load": turns.load()}
            rows.append(row | compare(shape, dtype, pairs, seconds))
            r = rows[-1]
            low, high = r["over_loop_quartiles"]
            print(
                f"{name}, {dtype}: ours {r['ours_tokens_per_cpu_second']:,.0f} tokens/CPU-s, "
                f"loop {r['loop_tokens_per_cpu_second']:,.0f}, scan {r['scan_tokens_per_cpu_second']:,.0f}; "
                f"ours/loop {r['over_loop']:.3f} ({low:.3f} to {high:.3f}), ours/scan {r['over_scan']:.3f}, "
                f"load {r['load']}",
                flush=True,
            )
    print(f"load at the end {turns.load()}")
    return rows


def gpu_cell(size: str) -> dict:
    """Rows are streams, so that both sides have plain causal attention."""
    d_model, layers, head_dim, ffn_dim, batch, seq = GPU_SHAPES[size]
    more = {"head_dim": head_dim, "ffn_dim": ffn_dim, "cross_document": True}
    return make_cell(d_model, layers, 50_304, batch, seq, "bfloat16", **more)


def measure_ours(size: str, steps: int) -> dict:
    """As ``plain_torch.measure``, for our step; in a process of its own."""
    import jax

    cell = gpu_cell(size)
    batch_size, seq = cell["train"]["batch"], cell["data"]["seq"]
    batch = jax.device_put(make_batch(cell["model"]["vocab"], batch_size, seq))
    side = list(our_step(cell))
    block(side, batch, 5)
    seconds = [block(side, batch, 5)[1] for _ in range(max(1, steps // 5))]
    return {
        "seconds": statistics.median(seconds),
        "peak_bytes": jax.devices()[0].memory_stats()["peak_bytes_in_use"],
        "loss": losses(side, batch, 1)[0],
        "device": jax.devices()[0].device_kind,
        "version": f"jax {jax.__version__}",
    }


def gpu_section(torch_python: str, steps: int, rounds: int) -> list[dict]:
    """Both sides by turns, each in a process of its own: neither leaves the other less memory.

    Raises:
      SystemExit: no GPU, or no torch.
    """
    from scaling.flops import ledger
    from scaling.records import mfu

    if shutil.which("nvidia-smi") is None:
        raise SystemExit("--gpu: no NVIDIA GPU was found here")
    if subprocess.run([torch_python, "-c", "import torch"], capture_output=True).returncode:
        raise SystemExit(f"--gpu: {torch_python} has no torch; give --torch-python one that has")
    rows = []
    for size in GPU_SHAPES:
        cell = gpu_cell(size)
        model, batch, seq = cell["model"], cell["train"]["batch"], cell["data"]["seq"]
        job = {"model": model, "optim": cell["optim"], "batch": batch, "seq": seq, "steps": steps}
        commands = {
            "ours": [sys.executable, __file__, "--measure-ours", size, "--steps", str(steps)],
            "torch": [torch_python, str(HERE / "plain_torch.py"), json.dumps(job)],
        }
        seen: dict[str, list] = {name: [] for name in commands}
        for turn in range(rounds):
            for name in sorted(commands, reverse=turn % 2 == 1):
                done = subprocess.run(commands[name], capture_output=True, text=True)
                if done.returncode:
                    raise SystemExit(f"{name} at {size} failed:\n{done.stderr[-2000:]}")
                seen[name].append(json.loads(done.stdout.splitlines()[-1]))
        flops = ledger(model, seq).train_flops_per_token("exact")
        row = {"size": size, "params": ledger(model, seq).params_total, "batch": batch, "seq": seq}
        for name, values in seen.items():
            speed = batch * seq / statistics.median(v["seconds"] for v in values)
            row |= {f"{name}_{k}": values[0][k] for k in ("device", "version", "peak_bytes")}
            row[f"{name}_tokens_per_second"] = speed
            row[f"{name}_mfu"] = mfu(flops * speed, values[0]["device"])
        row["ratio"] = row["ours_tokens_per_second"] / row["torch_tokens_per_second"]
        rows.append(row)
        print(json.dumps(row, indent=1), flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=8, help="blocks of each side")
    parser.add_argument("--seconds", type=float, default=1.0, help="wall time of a block, about")
    parser.add_argument("--gpu", action="store_true", help="against PyTorch on the GPU")
    parser.add_argument("--torch-python", default=sys.executable, help="an interpreter that has torch")
    parser.add_argument("--steps", type=int, default=40, help="GPU: timed steps of a process")
    parser.add_argument("--rounds", type=int, default=3, help="GPU: processes of each side")
    parser.add_argument("--measure-ours", metavar="SIZE", help="GPU: our side alone, one line of JSON")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    args = parser.parse_args()
    if args.measure_ours:
        print(json.dumps(measure_ours(args.measure_ours, args.steps)))
        return
    if args.gpu:
        rows = gpu_section(args.torch_python, args.steps, args.rounds)
    else:
        rows = cpu_section(args.pairs, args.seconds)
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
