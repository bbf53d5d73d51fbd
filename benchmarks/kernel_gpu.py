"""Attention on Hopper GPUs: what its kernels take of an H100, compiled without one; on a GPU, its time.

Compiled: registers of a thread, bytes spilled, shared memory of a block, by ptxas (needs JAX's CUDA plugin).
The kernels use ``wgmma``, which only Hopper has, so there are no rows for A100 or B200.

Timed, where JAX finds a GPU: this kernel, cuDNN by ``jax.nn`` and tokamax if installed; causal, bfloat16,
16 heads, 32k tokens in all; forward, and forward with the gradients of q, k and v. The sides run by turns;
the figure is the median over rounds. FLOP/s count 2 a multiply-add over the pairs that the causal mask keeps:
2 products forward, 7 with the gradients (the scores come twice, as published figures count: 3.5 x forward).

    python benchmarks/kernel_gpu.py [--quick] [--json FILE]
"""

from __future__ import annotations

import argparse
import functools
import glob
import importlib.util
import json
import os
import statistics
import types

if not glob.glob("/dev/nvidia[0-9]*"):
    os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import turns

from pallas_kernels.gpu import attention, cudnn
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
    sets = {"causal": {}, "causal, window, soft-cap": {"window": (1023, 0), "logits_soft_cap": 50.0}}
    for H in (128,) if quick else attention.HEAD_SIZES:
        q, k = (jax.ShapeDtypeStruct((1, 4096, n, H), jnp.bfloat16) for n in (16, 4))
        lse = jax.ShapeDtypeStruct((1, 4096, 16), jnp.float32)
        for name, more in sets.items():
            o = options(H, **more)

            def ahead(q, k, v, o=o):
                return attention.forward(q, k, v, *[None] * 5, options=o)

            def back(q, k, v, out, lse, dout, dlse, o=o):
                return attention.backward(q, k, v, *[None] * 5, out, lse, dout, dlse, options=o)[:3]

            for function, arrays in ((ahead, (q, k, k)), (back, (q, k, k, q, lse, q, lse))):
                head = {"section": "compiled", "target": "h100", "head_dim": H, "options": name}
                try:
                    found = kernel_resources(function, *arrays)
                except Exception as e:  # a compiler's failure is a row of the table
                    rows.append(
                        head | {"kernel": function.__name__, "compiles": False, "error": str(e)[-200:]}
                    )
                    continue
                rows += [
                    head
                    | {
                        "kernel": r.name,
                        "compiles": True,
                        "registers": r.registers,
                        "spill_stores": r.spill_stores,
                        "spill_loads": r.spill_loads,
                        "shared_memory": r.shared_memory,
                    }
                    for r in found
                ]
    return rows


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


def timed(quick: bool) -> list[dict]:
    """A row per length, head size, pass and implementation, on the GPU that is here."""
    devices = [d for d in jax.devices() if d.platform == "gpu"]
    if not devices:
        return [{"section": "timed", "skipped": "JAX finds no GPU here"}]
    rows = []
    lengths = (4096,) if quick else (1024, 2048, 4096, 8192, 16384, 32768)
    for H in (128,) if quick else attention.HEAD_SIZES:
        for T in lengths:
            keys = jax.random.split(jax.random.key(0), 4)
            shape = (TOKENS // T, T, HEADS, H)
            q, k, v, dout = (jax.random.normal(key, shape, jnp.bfloat16) for key in keys)
            for name in ("forward", "forward and backward"):
                rows += _race(name, q, k, v, dout, devices[0].device_kind)
    return rows


def _race(name, q, k, v, dout, device):
    B, T, N, H = q.shape
    head = {"section": "timed", "device": device, "jax": jax.__version__, "pass": name, "T": T, "head_dim": H}
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
    tables = {}
    for row in compiled(quick) + timed(quick):
        tables.setdefault(f"attention on Hopper: {', '.join(row)}", []).append(row)
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
