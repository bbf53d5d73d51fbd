"""Kernels for Hopper GPUs: what they take of an H100, compiled without one; on a GPU, times.

Compiled: registers of a thread, bytes spilled, shared memory of a block, by ptxas (needs JAX's CUDA plugin).
The kernels use ``wgmma``, which only Hopper has, so there are no rows for A100 or B200.

Timed, where JAX finds a GPU: this kernel, cuDNN by ``jax.nn`` and tokamax if installed; causal, bfloat16,
16 heads, 32k tokens in all; forward, and forward with the gradients of q, k and v. The sides run by turns;
the figure is the median over rounds. FLOP/s count 2 a multiply-add over the pairs that the causal mask keeps:
2 products forward, 7 with the gradients (the scores come twice, as published figures count: 3.5 x forward).
The forward pass of ``ssd`` (16 value heads of 128, one query-key head) runs by turns with that of attention
of 16 heads of 128, at 2k and 16k tokens; ``linear_scan`` with a copy.

    python benchmarks/kernel_gpu.py [--quick] [--json FILE]
"""

from __future__ import annotations

import argparse
import functools
import glob
import importlib.util
import itertools
import json
import os
import statistics
import types

if not glob.glob("/dev/nvidia[0-9]*"):
    os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import turns

from pallas_kernels import linear_scan
from pallas_kernels.gpu import attention, cudnn, ssd
from pallas_kernels.gpu.resources import kernel_resources

HEADS, TOKENS = 16, 32768
LAUNCHES, ROUNDS = 10, 7


def options(H, **more):
    plain = {"is_causal": True, "window": None, "logits_soft_cap": None, "block_sizes": None}
    return types.SimpleNamespace(scale=H**-0.5, **(plain | more))


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def attend(q, k, v, H):
    return attention.forward(q, k, v, *[None] * 5, options=options(H))[0]


def _attend_fwd(q, k, v, H):
    out, lse = attention.forward(q, k, v, *[None] * 5, options=options(H))
    return out, (q, k, v, out, lse)


def _attend_bwd(H, residuals, dout):
    q, k, v, out, lse = residuals
    zeros = jnp.zeros(lse.shape, lse.dtype)
    return attention.backward(q, k, v, *[None] * 5, out, lse, dout, zeros, options=options(H))[:3]


attend.defvjp(_attend_fwd, _attend_bwd)


def compiled(quick: bool) -> list[dict]:
    """A row per kernel, head size and set of options; one that says why where nothing can be compiled."""
    if not any(importlib.util.find_spec(name) for name in ("jax_cuda12_plugin", "jax_cuda13_plugin")):
        return [{"section": "compiled", "target": "h100", "skipped": "JAX's CUDA plugin is not installed"}]
    rows = []
    everything = {"window": (1023, 0), "logits_soft_cap": 50.0, "segments": True}
    sets = {"causal": {}, "causal, window, soft-cap, segments, ragged": everything}
    for H in (128,) if quick else attention.HEAD_SIZES:
        for name, more in sets.items():
            T = 4001 if more else 4096
            q, k = (jax.ShapeDtypeStruct((1, T, n, H), jnp.bfloat16) for n in (16, 4))
            lse = jax.ShapeDtypeStruct((1, T, 16), jnp.float32)
            ids = (jax.ShapeDtypeStruct((1, T), jnp.int32),) * 2 if more else ()
            o = options(H, **{key: value for key, value in more.items() if key != "segments"})

            def ahead(q, k, v, *ids, o=o):
                ids = ids or (None, None)
                return attention.forward(q, k, v, None, None, *ids, None, options=o)

            def back(q, k, v, out, lse, dout, dlse, *ids, o=o):
                ids = ids or (None, None)
                arrays = q, k, v, None, None, *ids, None, out, lse, dout, dlse
                return attention.backward(*arrays, options=o)[:3]

            head = {"head_dim": H, "options": name}
            rows += _resources(ahead, (q, k, k, *ids), head) + _resources(
                back, (q, k, k, q, lse, q, lse, *ids), head
            )
    for B, (D, E) in itertools.product((1, 16), ((128, 64), (64, 128), (128, 128))):
        arrays = [jax.ShapeDtypeStruct(*x) for x in _scan_shapes(B, 4096, D, E)]
        run = functools.partial(ssd.chunked, scale=1.0)
        cost = ssd.cost(B=B, T=4096, K=1, N=HEADS, D=D, E=E)
        head = {"batch": B, "key_dim": D, "value_dim": E, "gflops": cost.flops / 1e9}
        rows += _resources(run, arrays, head | {"bytes_over_floor": cost.bytes / cost.floor_bytes})
    x, h = jax.ShapeDtypeStruct((8, 4096, 2048), jnp.float32), jax.ShapeDtypeStruct((8, 2048), jnp.float32)

    def gradients(a, b, h0, dh, dh_last):
        pull = jax.vjp(functools.partial(linear_scan, implementation="pallas_gpu"), a, b, h0)[1]
        return pull((dh, dh_last))

    return rows + _resources(gradients, (x, x, h, x, h), {"B": 8, "T": 4096, "F": 2048, "dtype": "float32"})


def _resources(function, arrays, head) -> list[dict]:
    head = {"section": "compiled", "target": "h100"} | head
    try:
        found = kernel_resources(function, *arrays)
    except Exception as e:  # a compiler's failure is a row of the table
        name = getattr(function, "__name__", "ssd")
        return [head | {"kernel": name, "compiles": False, "error": str(e)[-200:]}]
    fields = "registers", "spill_stores", "spill_loads", "shared_memory"
    return [
        head | {"kernel": r.name, "compiles": True} | {name: getattr(r, name) for name in fields}
        for r in found
    ]


def _scan_shapes(B, T, D, E):
    """(shape, dtype) of q, k, v, log_decay and state0 of ``ssd``; one query-key head for all."""
    wide, narrow = jnp.float32, jnp.bfloat16
    state, keys = (B, HEADS, D, E), ((B, T, 1, D), narrow)
    return keys, keys, ((B, T, HEADS, E), narrow), ((B, T, HEADS), wide), (state, wide)


def rivals(H):
    """Name -> function of q, k, v."""
    o = options(H)
    functions = {
        "pallas_gpu": lambda q, k, v: attend(q, k, v, H),
        "cudnn": lambda q, k, v: cudnn.forward(q, k, v, *[None] * 5, options=o, with_lse=False),
    }
    if importlib.util.find_spec("tokamax"):
        import tokamax

        functions["tokamax"] = lambda q, k, v: tokamax.dot_product_attention(q, k, v, is_causal=True)
    return functions


def timed(quick: bool, device: str) -> list[dict]:
    """A row per length, head size, pass and implementation, on the GPU that is here."""
    rows = []
    lengths = (4096,) if quick else (1024, 2048, 4096, 8192, 16384, 32768)
    for H in (128,) if quick else attention.HEAD_SIZES:
        for T in lengths:
            keys = jax.random.split(jax.random.key(0), 4)
            shape = (TOKENS // T, T, HEADS, H)
            q, k, v, dout = (jax.random.normal(key, shape, jnp.bfloat16) for key in keys)
            for name in ("forward", "forward and backward"):
                rows += _race(name, q, k, v, dout, device)
    return rows


def timed_ssd(quick: bool, device: str) -> list[dict]:
    """``ssd`` and causal attention of as many heads of 128, forward: 32k tokens in all."""
    rows = []
    for T, D in itertools.product((2048,) if quick else (2048, 16384), (64, 128)):
        B = TOKENS // T
        keys = jax.random.split(jax.random.key(0), 8)
        shapes = _scan_shapes(B, T, D, 128)
        q, k, v, g, state0 = (jax.random.normal(key, *x) for key, x in zip(keys, shapes, strict=False))
        g = -jax.nn.softplus(g)
        aq, ak, av = (jax.random.normal(key, (B, T, HEADS, 128), jnp.bfloat16) for key in keys[5:])
        sides = {
            "ssd, pallas_gpu": (functools.partial(ssd.chunked, scale=1.0), (q, k, v, g, state0)),
            "attention, pallas_gpu": (lambda q, k, v: attend(q, k, v, 128), (aq, ak, av)),
        }
        runs = {name: functools.partial(jax.jit(f), *arrays) for name, (f, arrays) in sides.items()}
        seconds = turns.by_turns(runs, turns=ROUNDS, launches=LAUNCHES)
        medians = {name: statistics.median(times) for name, times in seconds.items()}
        head = {"section": "timed", "kernel": "ssd", "device": device, "jax": jax.__version__}
        for name, median in medians.items():
            row = {"implementation": name, "T": T, "key_dim": D, "milliseconds": median * 1e3}
            over = medians["attention, pallas_gpu"] / median
            rows.append(head | row | {"times_as_fast_as_attention": over})
    return rows


def timed_linear_scan(quick: bool, device: str) -> list[dict]:
    """``linear_scan`` forward, float32: bytes a second (a and b read, h written) over those of a copy."""
    rows = []
    for T in (4096,) if quick else [2**n for n in range(10, 17)]:
        B, F = 2**17 // T, 2048
        a, b = (jax.random.uniform(key, (B, T, F)) for key in jax.random.split(jax.random.key(0)))
        sides = {
            "linear_scan": functools.partial(linear_scan, implementation="pallas_gpu"),
            "copy": lambda a, b: a + 1,
        }
        runs = {name: functools.partial(jax.jit(f), a, b) for name, f in sides.items()}
        seconds = turns.by_turns(runs, turns=ROUNDS, launches=LAUNCHES)
        scan, copy = (statistics.median(seconds[name]) for name in sides)
        rate, copied = 3 * a.nbytes / scan, 2 * a.nbytes / copy
        row = {"section": "timed", "kernel": "linear_scan", "device": device}
        row |= {"jax": jax.__version__, "B": B, "T": T, "F": F, "milliseconds": scan * 1e3}
        rows.append(row | {"gigabytes_per_second": rate / 1e9, "over_copy": rate / copied})
    return rows


def _race(name, q, k, v, dout, device):
    B, T, N, H = q.shape
    head = {"section": "timed", "kernel": "attention", "device": device, "jax": jax.__version__}
    head |= {"pass": name, "T": T, "head_dim": H}
    runs, rows = {}, []
    for rival, function in rivals(H).items():

        def both(q, k, v, dout, function=function):
            out, vjp = jax.vjp(function, q, k, v)
            return out, vjp(dout)

        run, arrays = (function, (q, k, v)) if name == "forward" else (both, (q, k, v, dout))
        try:
            run = functools.partial(jax.jit(run), *arrays)
            jax.block_until_ready(run())
            runs[rival] = run
        except Exception as e:  # what one side cannot do must not stop the table
            rows.append(head | {"implementation": rival, "error": f"{type(e).__name__}: {e}"[:200]})
    seconds = turns.by_turns(runs, turns=ROUNDS, launches=LAUNCHES)
    flops = (2 if name == "forward" else 7) * 2 * B * N * H * T * (T + 1) / 2
    for rival, times in seconds.items():
        median = statistics.median(times)
        row = {"implementation": rival, "milliseconds": median * 1e3, "tflops": flops / median / 1e12}
        if "cudnn" in seconds:
            row["over_cudnn"] = statistics.median(seconds["cudnn"]) / median
        rows.append(head | row)
    return rows


def measure(quick: bool = False) -> dict[str, list[dict]]:
    """Rows by their form; a part that this machine cannot fill has one row that says why."""
    rows = compiled(quick)
    devices = [d.device_kind for d in jax.devices() if d.platform == "gpu"]
    for kernel, part in (("attention", timed), ("ssd", timed_ssd), ("linear_scan", timed_linear_scan)):
        missing = [{"section": "timed", "kernel": kernel, "skipped": "JAX finds no GPU here"}]
        rows += part(quick, devices[0]) if devices else missing
    tables = {}
    for row in rows:
        what = "not here" if "skipped" in row else row["kernel"]
        tables.setdefault(f"{row.pop('section')}: {what}", []).append(row)
    return tables


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="one head size and one length")
    parser.add_argument("--json", help="write the rows there too")
    arguments = parser.parse_args()
    tables = measure(arguments.quick)
    turns.show(tables)
    if arguments.json:
        with open(arguments.json, "w") as f:
            json.dump([row for rows in tables.values() for row in rows], f, indent=1)


if __name__ == "__main__":
    main()
