"""What every TPU kernel takes on every generation, compiled ahead of time: no device ran.

A row is a kernel, a pass and a generation. The gradient's program holds the forward kernel too. Moved is what
the kernels read and write of main memory by their own account (``pallas_kernels.cost``, as they tell the
compiler); its floor is each array argument and result of the public function once forward, and for the
gradient that and the arguments, cotangents and gradients once. Cycles are those of the compiler's static
schedule for the block sizes that are taken, by ``rank_tpu_blocks.py``: a ranking, not a time; in the order of
the kernels, and missing where the data beside a kernel has none.

    JAX_PLATFORMS=cpu python benchmarks/kernel_tpu.py [--quick]
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import math
import os
import re

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import turns

import pallas_kernels as pk
from pallas_kernels import aot, dispatch
from pallas_kernels.tpu import (
    attention_blocks,
    causal_conv1d_blocks,
    gated_delta_rule_blocks,
    linear_cross_entropy,
    linear_cross_entropy_blocks,
    linear_scan_blocks,
    ssd_blocks,
)  # fmt: skip

bf16, f32, i32 = jnp.bfloat16, jnp.float32, jnp.int32
BYTES = re.compile(r'"bytes_accessed":"(\d+)"')


def array(dtype, *shape):
    return jax.ShapeDtypeStruct(shape, dtype)


def cases(quick: bool) -> dict:
    """Kernel -> (module, function, arguments, how many are differentiated, sizes(generation, passes))."""
    T, M = (1024, 1024) if quick else (4096, 8192)
    D, V = 1024, 50304
    q, k, beta = array(bf16, 1, T, 8, 128), array(bf16, 1, T, 2, 128), array(f32, 1, T, 8)
    scan, complex_scan = array(f32, 8, T, 2048), array(jnp.complex64, 8, T, 1024)
    h, decay, decays = array(bf16, 1, T, 16, 128), array(f32, 1, T, 16), array(f32, 1, T, 16, 128)
    mamba = array(bf16, 1, T, 1, 128), array(bf16, 1, T, 32, 64), array(f32, 1, T, 32)
    head = (array(bf16, M, D), array(bf16, D, V), array(i32, M))
    conv = array(bf16, 4, T, 2048), array(bf16, 4, 2048)
    even = jnp.arange(T // 512) % 2 == 0

    def causal(*x):
        return pk.dot_product_attention(*x, is_causal=True)

    def sparse(*x):
        return pk.block_sparse_attention(*x, (even[:, None] == even)[None], block_size=512)

    attention = functools.partial(from_table, attention_blocks)
    convolution = functools.partial(from_table, causal_conv1d_blocks)
    scans = functools.partial(from_table, linear_scan_blocks)
    delta = functools.partial(from_table, gated_delta_rule_blocks)
    xent = functools.partial(of_cross_entropy, M, D, V)
    mamba2, per_head, per_channel = (functools.partial(of_ssd, x) for x in ("mamba", "head", "channel"))
    return {
        "attention, causal": ("attention", causal, (q, k, k), 3, attention),
        "block_sparse_attention, half": ("attention", sparse, (q, k, k), 3, lambda *_: ("512 x 512", "")),
        "linear_scan, float32": ("linear_scan", pk.linear_scan, (scan,) * 2, 2, scans),
        "linear_scan, complex64": ("linear_scan", pk.linear_scan, (complex_scan,) * 2, 2, in_complex),
        "ssd, Mamba-2": ("ssd", pk.ssd, (mamba[0], *mamba), 4, mamba2),
        "ssd, a decay a head": ("ssd", pk.ssd, (h, h, h, decay), 4, per_head),
        "ssd, a decay a channel": ("ssd", pk.ssd, (h, h, h, decays), 4, per_channel),
        "mlstm": ("ssd", pk.mlstm, (h, h, h, decay, decay), 5, of_mlstm),
        "gated_delta_rule": ("gated_delta_rule", pk.gated_delta_rule, (q, q, q, beta, beta), 5, delta),
        "linear_cross_entropy": ("linear_cross_entropy", pk.linear_cross_entropy, head, 2, xent),
        "causal_conv1d": ("causal_conv1d", pk.causal_conv1d, conv, 2, convolution),
    }


def from_table(blocks, generation, gradient, sizes=None):
    """Block sizes and cycles as text, a part for each kernel of the pass, from the data beside a kernel."""
    sizes = list((sizes or blocks.BLOCK_SIZES[generation]).values())
    sizes = sizes if gradient else sizes[:1]
    text = "; ".join(" x ".join(map(str, one)) for one in sizes)
    ranked = blocks.BUNDLES[generation]
    if any(one not in ranked for one in sizes):
        return text, ""
    return text, f"{'; '.join(str(ranked[one][i]) for i, one in enumerate(sizes))} per {blocks.UNIT}"


def in_complex(generation, gradient):
    """A block of two planes holds half the tokens; the schedules ranked are those of real arrays."""
    chosen = linear_scan_blocks.BLOCK_SIZES[generation]
    halved = {kind: (tokens // 2, features) for kind, (tokens, features) in chosen.items()}
    return from_table(linear_scan_blocks, generation, gradient, halved)[0], ""


def of_cross_entropy(M, D, V, generation, gradient):
    with dispatch.target("tpu", generation):
        sizes = {
            kind: linear_cross_entropy.blocks(kind, M, D, V, jnp.dtype(bf16), jnp.dtype(bf16))
            for kind in linear_cross_entropy_blocks.BLOCK_SIZES[generation]
        }
    return from_table(linear_cross_entropy_blocks, generation, gradient, sizes)


def of_ssd(case, generation, gradient):
    chunk = ssd_blocks.CHUNKS[generation][case == "channel"]
    cycles = ssd_blocks.BUNDLES[generation][case, chunk]
    return f"chunk {chunk}", f"{'; '.join(map(str, cycles[: 1 + gradient]))} per {ssd_blocks.UNIT}"


def of_mlstm(generation, gradient):
    """One channel more than what was ranked: no cycles."""
    return of_ssd("head", generation, gradient)[0], ""


def measure(quick: bool) -> dict[str, list[dict]]:
    """One table; none where libtpu is not installed."""
    if importlib.util.find_spec("libtpu") is None:
        print("kernels compiled for TPU: libtpu is not installed, no table")
        return {}
    rows = []
    for name, (module, function, arguments, differentiated, sizes) in cases(quick).items():
        if "pallas_tpu" not in importlib.import_module(f"pallas_kernels.{module}").IMPLEMENTATIONS:
            print(f"{name}: no TPU kernel, no rows")
            continue
        for generation in ("v5e",) if quick else dispatch.GENERATIONS:
            for gradient in (False, True):
                row = _compiled(function, arguments, differentiated, gradient, generation)
                blocks, cycles = sizes(generation, gradient)
                head = {"kernel": name, "pass": "gradient" if gradient else "forward"}
                rows.append(
                    head | {"generation": generation} | row | {"block sizes": blocks, "cycles": cycles}
                )
    return {"kernels compiled for TPU": rows}


def _compiled(function, arguments, differentiated, gradient, generation) -> dict:
    def forward(*x):
        return jax.tree.leaves(function(*x))[0]  # without the last state

    def gradients(dy, *x):
        y, pull = jax.vjp(lambda *free: forward(*free, *x[differentiated:]), *x[:differentiated])
        return y, pull(dy)

    out = jax.eval_shape(forward, *arguments)
    floor = _bytes(*arguments, out)
    if gradient:
        floor += _bytes(*arguments, out, *arguments[:differentiated])
    program, shapes = (gradients, (out, *arguments)) if gradient else (forward, arguments)
    row = dict.fromkeys(("compiles", "custom calls", "temporary MB", "moved MB", "moved / floor"))
    try:
        compiled = aot.compile_tpu(program, *shapes, generation=generation)
    except Exception as e:  # what one generation refuses is a row of the table
        return row | {"compiles": f"no: {str(e).strip().splitlines()[0][:120]}"}
    calls = [
        line for line in compiled.as_text().splitlines() if 'custom_call_target="tpu_custom_call"' in line
    ]
    moved = sum(int(n) for line in calls for n in BYTES.findall(line))
    return {
        "compiles": "yes",
        "custom calls": len(calls),
        "temporary MB": turns.temporary_mb(compiled),
        "moved MB": round(moved / 1e6, 1),
        "moved / floor": round(moved / floor, 2),
    }


def _bytes(*shapes):
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in shapes)


if __name__ == "__main__":
    turns.main(measure, __doc__)
