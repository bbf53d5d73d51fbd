"""Block sizes of the TPU kernels ranked by the compiler's static schedule: no device, and not a time.

    JAX_PLATFORMS=cpu python benchmarks/rank_tpu_blocks.py linear_scan [--generation v5e] [--sizes 256x2048]

libtpu, compiling ahead of time, writes the final schedule of each kernel where ``LIBTPU_INIT_ARGS=
--xla_jf_dump_to=`` says (undocumented). A line of it is a bundle, what a core issues in a cycle. A kernel is
a loop over the steps of its grid; loops of its own lie deeper. Counted are the bundles of a step times the
steps, those of inner loops times their turns too; a part that runs in the first or the last step of the
innermost axis alone (``pl.when`` of an index against a number) counts once a sweep, other branches in every
step. Waiting for memory is not in it. So it ranks block sizes and is never a gate: only a device says how
fast it is.

A line of the result is JSON. ``GHz`` is the clock at which the cycles take as long as the bytes that the
kernel says it moves: a chip with a lower clock is bound by its units, with a higher one by main memory.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import math
import os
import pathlib
import re
import subprocess
import sys
import tempfile

BUNDLE = re.compile(r"^\s*(?:0x[0-9a-f]+|0)\s+(?:[A-Z]{2})?\s*: (>*)\s*\{(\})?")
BRANCH = re.compile(r"sbr\.rel \((!?)(%p\w+)\) target = \$region(\d+)")
UNEQUAL = re.compile(r"(%p\w+) = scmp\.ne\.s32\.totalorder (%s\w+), \d+")
INDEX = re.compile(r"(%s\w+) = [^;}]*iteration index, stage = \d iter bound = (\d+)")
MOVED = re.compile(r'"bytes_accessed":"(\d+)"')
# Bytes a second of main memory, published, of what JAX calls one device: a chip; of tpu7x one of two cores.
BANDWIDTH = {"v4": 1.228e12, "v5e": 0.819e12, "v5p": 2.765e12, "v6e": 1.64e12, "tpu7x": 3.69e12}
FLAGS = "--xla_jf_dump_to={} --xla_jf_dump_llo_pass_label_regex=.*final_bundles --xla_jf_dump_hlo_text=false"


@dataclasses.dataclass(frozen=True)
class Schedule:
    """The final bundles of one kernel.

    Attributes:
      steps: of the grid, on one core.
      sweep: steps of the grid's innermost axis.
      once: bundles outside the loop over the grid; step: in every turn of it; edge: in the first or last of a
        sweep alone.
      inner: bundles of each loop within a step, in order.
    """

    name: str
    steps: int
    sweep: int
    once: int
    step: int
    edge: int
    inner: tuple[int, ...]

    def cycles(self, turns: tuple[int, ...] = ()) -> int:
        """Of the whole call, inner loops taking ``turns``."""
        loops = sum(n * t for n, t in zip(self.inner, turns, strict=True))
        return self.once + self.steps * (self.step + loops) + math.ceil(self.steps / self.sweep) * self.edge


def read_schedule(text: str) -> Schedule | None:
    """The schedule in the text of a ``final_bundles`` file; None where it is not a Pallas kernel's."""
    entry = re.search(r"entry bundle: %(\S+) = (?:.*? )?custom-call\(", text)
    if entry is None:
        return None
    grids = re.findall(r"iteration_bounds: \(([\d, ]+)\)", text)
    exits = re.findall(r", (\d+) /\* loop exit test", text)
    axes = dict(INDEX.findall(text))
    last = max(axes.values(), default=None)
    at_edges = {p for p, index in UNEQUAL.findall(text) if index in axes and axes[index] == last}
    once = step = edge = depth = 0
    inner, until = [], None
    for line in text.splitlines():
        found = BUNDLE.match(line)
        if found is None:
            continue
        if not found[2]:  # an empty bundle is written without its depth
            depth = len(found[1])
        if until is not None and re.search(rf"Start(/End empty)? region {until}\b", line):
            until = None
        if depth == 0:
            once += 1
        elif depth == 1:
            step, edge = (step + 1, edge) if until is None else (step, edge + 1)
        else:
            if ": >> {" in line and re.search(r"\bLB\s*: >>", line):
                inner.append(0)
            inner[-1] += 1
        branch = BRANCH.search(line)
        if depth == 1 and branch and until is None and not branch[1] and branch[2] in at_edges:
            until = branch[3]
    # the loop over the grid runs two turns more, to fill and to drain the pipeline of copies
    steps = int(exits[-1]) - 2 if exits else 1
    sweep = int(grids[-1].split(",")[-1]) if grids else steps
    return Schedule(entry[1], steps, sweep, once, step, edge, tuple(inner))


def schedules(directory: pathlib.Path) -> list[Schedule]:
    """Of the kernels in a dump, in the order in which they were compiled."""
    files = sorted(directory.glob("*-final_bundles.txt"))
    files = [f for f in files if "schedule-analysis" not in f.name]
    return [s for s in (read_schedule(f.read_text()) for f in files) if s is not None]


@dataclasses.dataclass(frozen=True)
class Case:
    """``function(*shapes)`` holds one kernel; its work in ``units``, and the turns of its inner loops."""

    function: object
    shapes: tuple
    units: float
    turns: tuple[int, ...] = ()


def _linear_scan(which, tokens, features, dtype="float32"):
    import jax
    import jax.numpy as jnp

    from pallas_kernels.tpu import linear_scan as tpu

    B, T, F = 8, 4096, 2048
    x = jax.ShapeDtypeStruct((B, T, F), dtype)
    h = jax.ShapeDtypeStruct((B, F), jnp.float32)
    options = {"reverse": False, "block_sizes": (tokens, features)}

    def forward(a, b, h0):
        return tpu.forward(a, b, h0, None, **options)

    def backward(a, h, dh, h0, dh_last):
        return tpu.backward(a, h, h0, None, dh, dh_last, **options)

    f, shapes = (forward, (x, x, h)) if which == "forward" else (backward, (x, x, x, h, h))
    return Case(f, shapes, B * T * F / 1024, (tokens // 8,))


def _gated_delta_rule(which, chunk, heads):
    import jax
    import jax.numpy as jnp

    from pallas_kernels.tpu import gated_delta_rule as tpu

    B, T, N, D = 1, 4096, 8, 128
    q, S = jax.ShapeDtypeStruct((B, T, N, D), jnp.bfloat16), jax.ShapeDtypeStruct((B, N, D, D), jnp.float32)
    g, reset = jax.ShapeDtypeStruct((B, T, N), jnp.float32), jax.ShapeDtypeStruct((B, T), jnp.bool_)
    starts = jax.ShapeDtypeStruct((B, T // chunk, N, D, D), jnp.float32)
    f = functools.partial(getattr(tpu, which), scale=D**-0.5, chunk=chunk, heads=heads)
    more = (S,) if which == "forward" else (starts, q, S)
    return Case(f, (q, q, q, g, g, reset, *more), B * T * N)


def _linear_cross_entropy(which, tokens, vocab):
    import jax
    import jax.numpy as jnp

    from pallas_kernels.tpu import linear_cross_entropy as tpu

    M, D, V = 8192, 1024, 32768
    x, w = jax.ShapeDtypeStruct((M, D), jnp.bfloat16), jax.ShapeDtypeStruct((D, V), jnp.bfloat16)
    labels, row = jax.ShapeDtypeStruct((M,), jnp.int32), jax.ShapeDtypeStruct((M,), jnp.float32)
    options = {"soft_cap": None, "tokens": tokens, "vocab": vocab}
    if which == "forward":
        return Case(functools.partial(tpu.forward, **options), (x, w, labels), M * V / 1024)

    def one(*arrays):
        return tpu.backward(*arrays, **options)[which == "backward_w"]  # the other is dead code

    return Case(one, (x, w, labels, row, row, row), M * V / 1024)


def _attention(which, block_q, block_kv):
    import jax
    import jax.numpy as jnp

    from pallas_kernels import dot_product_attention

    B, T, N, H = 1, 2048, 4, 128
    q = jax.ShapeDtypeStruct((B, T, N, H), jnp.bfloat16)

    def forward(q, k, v):
        return dot_product_attention(q, k, v, block_sizes=(block_q, block_kv), implementation="pallas_tpu")

    def backward(q, k, v, dout):
        dq, dk, dv = jax.vjp(forward, q, k, v)[1](dout)
        return dq if which == "backward_q" else (dk, dv)

    f, shapes = (forward, (q, q, q)) if which == "forward" else (backward, (q, q, q, q))
    return Case(f, shapes, B * N * T * T / 1024)


def _causal_conv1d(which, tokens, channels):
    import jax
    import jax.numpy as jnp

    from pallas_kernels.tpu import causal_conv1d as tpu

    B, T, C, W = 4, 4096, 2048, 4
    x, state = (jax.ShapeDtypeStruct((B, t, C), jnp.bfloat16) for t in (T, W - 1))
    w, bias = jax.ShapeDtypeStruct((W, C), jnp.bfloat16), jax.ShapeDtypeStruct((C,), jnp.bfloat16)
    options = {"activation": "silu", "block_sizes": (tokens, channels)}

    def forward(x, w, bias, state):
        return tpu.forward(x, w, bias, state, None, **options)

    def backward(x, w, bias, state, dy):
        return tpu.backward(x, w, bias, state, None, dy, **options)

    f, shapes = (forward, ()) if which == "forward" else (backward, (x,))
    return Case(f, (x, w, bias, state, *shapes), B * T * C / 1024, (tokens // 16,))


SSD_SPANS = {"mamba": 1024, "head": 512, "channel": 512}


def _ssd(which, case, chunk):
    import jax
    import jax.numpy as jnp

    from pallas_kernels import ssd

    B, T, K, N, D, E = (1, 4096, 1, 32, 128, 64) if case == "mamba" else (1, 4096, 16, 16, 128, 128)
    q, v = jax.ShapeDtypeStruct((B, T, K, D), jnp.bfloat16), jax.ShapeDtypeStruct((B, T, N, E), jnp.bfloat16)
    g = jax.ShapeDtypeStruct((B, T, N, D) if case == "channel" else (B, T, N), jnp.float32)
    span = SSD_SPANS[case]  # as `default_span` chooses

    def forward(*x):
        return ssd(*x, chunk=chunk, block_sizes={"span": span})[0]

    def backward(do, *x):
        return jax.vjp(forward, *x)[1](do)

    if which == "forward":
        return Case(forward, (q, q, v, g), B * T * N)
    chunks = span // chunk  # their states again but for the last's, then their gradients; one turn is no loop
    again = () if chunks == 2 else (chunks - 1,)
    return Case(backward, (v, q, q, v, g), B * T * N, turns=(*again, chunks))


# kernel -> (case of a pass and sizes, passes, what a unit is, candidates)
KERNELS = {
    "linear_scan": (
        _linear_scan,
        ("forward", "backward"),
        "1,024 elements",
        ((64, 2048), (128, 1024), (128, 2048), (256, 512), (256, 1024), (256, 2048), (512, 1024)),
    ),
    "linear_scan_bfloat16": (
        functools.partial(_linear_scan, dtype="bfloat16"),
        ("forward", "backward"),
        "1,024 elements",
        ((128, 2048), (256, 1024), (256, 2048), (512, 2048)),
    ),
    "gated_delta_rule": (
        _gated_delta_rule,
        ("forward", "backward"),
        "token and head",
        ((32, 4), (64, 1), (64, 2), (64, 4), (64, 8), (128, 2), (128, 4)),
    ),
    "linear_cross_entropy": (
        _linear_cross_entropy,
        ("forward", "backward_x", "backward_w"),
        "1,024 logits",
        ((256, 512), (512, 512), (512, 1024), (1024, 512), (1024, 1024), (1024, 2048)),
    ),
    "attention": (
        _attention,
        ("forward", "backward_q", "backward_kv"),
        "1,024 pairs",
        ((512, 512), (512, 1024), (1024, 1024)),
    ),
    "causal_conv1d": (
        _causal_conv1d,
        ("forward", "backward"),
        "1,024 elements",
        ((256, 512), (512, 256), (512, 512), (1024, 256), (1024, 512), (512, 1024)),
    ),
    "ssd": (
        _ssd,
        ("forward", "backward"),
        "token and head",
        tuple((case, chunk) for case in ("mamba", "head", "channel") for chunk in (64, 128, 256)),
    ),
}


def rank(kernel, generation, sizes, which, directory) -> dict:
    """A row: cycles a unit and temporary memory, or that it does not fit. ``directory`` is the dump's."""
    import jax

    from pallas_kernels import aot

    for old in directory.iterdir():
        old.unlink()
    build, _, unit, _ = KERNELS[kernel]
    case = build(which, *sizes)
    row = {"kernel": kernel, "generation": generation, "sizes": sizes, "pass": which}
    try:
        compiled = aot.compile_tpu(case.function, *case.shapes, generation=generation)
    except jax.errors.JaxRuntimeError as e:
        if "vmem" not in str(e).lower():
            raise
        return row | {"cycles": None, "why": "does not fit in VMEM"}
    found = schedules(directory)
    ours = (
        [s for s in found if re.search(rf"{which}(_kernel)?(\.\d+)?$", s.name)] if len(found) > 1 else found
    )
    if len(ours) != 1:
        raise RuntimeError(f"{kernel} {which}: kernels {[s.name for s in found]} in the dump")
    cycles = ours[0].cycles(case.turns)
    moved = sum(int(n) for n in MOVED.findall(compiled.as_text()))
    return row | {
        "cycles": round(cycles / case.units, 3),
        "unit": unit,
        "call": cycles,
        "GHz": round(cycles / (moved / BANDWIDTH[generation]) / 1e9, 2)
        if len(found) == 1 and moved
        else None,
        "schedule": dataclasses.astuple(ours[0]),
        "temporary MB": round(compiled.memory_analysis().temp_size_in_bytes / 1e6, 1),
    }


def smallest(cycles: dict, tolerance: float = 0.05):
    """The smallest block within ``tolerance`` of the fewest cycles; None: does not fit."""
    fit = {sizes: c for sizes, c in cycles.items() if c is not None}
    if not fit:
        return None
    near = [sizes for sizes, c in fit.items() if c <= min(fit.values()) * (1 + tolerance)]
    return min(near, key=lambda sizes: (math.prod(sizes), fit[sizes]))


def main() -> None:
    from pallas_kernels import dispatch

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("kernel", choices=KERNELS)
    parser.add_argument("--generation", action="append", choices=dispatch.GENERATIONS)
    parser.add_argument("--sizes", action="append", help="such as 256x2048")
    parser.add_argument("--only", action="append", help="a pass: forward, backward ...")
    args = parser.parse_args()
    dump = os.environ.get("RANK_DUMP")
    if dump is None:  # libtpu reads its flags when it is loaded: a process of its own, with them set
        with tempfile.TemporaryDirectory() as directory:
            env = os.environ | {"RANK_DUMP": directory, "LIBTPU_INIT_ARGS": FLAGS.format(directory)}
            raise SystemExit(subprocess.run([sys.executable, *sys.argv], env=env).returncode)
    _, passes, _, candidates = KERNELS[args.kernel]
    if args.sizes:
        candidates = [tuple(int(n) if n.isdigit() else n for n in sizes.split("x")) for sizes in args.sizes]
    for generation in args.generation or dispatch.GENERATIONS:
        for which in args.only or passes:
            rows = [rank(args.kernel, generation, s, which, pathlib.Path(dump)) for s in candidates]
            for row in rows:
                print(json.dumps(row), flush=True)
            if all(isinstance(n, int) for sizes in candidates for n in sizes):
                best = smallest({row["sizes"]: row["cycles"] for row in rows})
                print(
                    json.dumps({"kernel": args.kernel, "generation": generation, "pass": which, "best": best})
                )


if __name__ == "__main__":
    main()
