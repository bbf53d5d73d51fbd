"""The gated delta rule: time and memory of the chunked path, and what the TPU kernels need.

Time: the rule token by token (a scan that JAX differentiates) and the chunked path by turns in one process;
the figure is the median over rounds of chunked / token by token. Memory: temporary bytes of the compiled
gradient, at T and at 2 T. TPU: compiled ahead of time for each generation; bytes over floor is what the
kernels read and write of HBM, by their own formula, over each operand and result once.

    python benchmarks/kernel_delta.py [--quick]
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import os
import statistics
import time

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp

from pallas_kernels import aot, dispatch, gated_delta_rule
from pallas_kernels.cost import gated_delta_rule as cost
from pallas_kernels.gated_delta_rule import CHUNK
from pallas_kernels.reference import gated_delta_rule as reference


def chunked(*arrays, implementation="xla_chunked"):
    return gated_delta_rule(*arrays, implementation=implementation)[0]


def token_by_token(q, k, v, beta, log_decay):
    (B, T, N, D), E = q.shape, v.shape[-1]
    reset, state = jnp.zeros((B, T), bool), jnp.zeros((B, N, D, E))
    scale = D**-0.5
    return reference.gated_delta_rule(q, k, v, beta, log_decay, reset, state, scale=scale)[0]


def gradient(f):
    return jax.grad(lambda *a: jnp.sum(f(*a).astype(jnp.float32)), range(5))


def inputs(B, T, N, D, dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(0), 5)
    q, k, v = (jax.random.normal(key, (B, T, N, D), dtype) for key in keys[:3])
    k = k / jnp.linalg.norm(k, axis=-1, keepdims=True)
    beta = jax.random.uniform(keys[3], (B, T, N))
    return q, k, v, beta, -0.1 * jax.random.exponential(keys[4], (B, T, N))


def temporary(f, shape):
    arrays = jax.eval_shape(lambda: inputs(*shape))
    return jax.jit(f).lower(*arrays).compile().memory_analysis().temp_size_in_bytes


def on_cpu(quick: bool) -> list[dict]:
    shapes = [(1, 256, 2, 64)] if quick else [(1, 1024, 4, 64), (1, 4096, 4, 64), (1, 1024, 4, 128)]
    rows = []
    for B, T, N, D in shapes:
        arrays = inputs(B, T, N, D)
        for what, wrap in (("forward", lambda f: f), ("forward and backward", gradient)):
            both = {"token by token": wrap(token_by_token), "chunked": wrap(chunked)}
            compiled = {name: jax.jit(f).lower(*arrays).compile() for name, f in both.items()}
            ratios, best = [], dict.fromkeys(both, float("inf"))
            for i in range(1 + (3 if quick else 5)):
                seconds = {}
                for name in sorted(both, reverse=i % 2 == 1):
                    start = time.perf_counter()
                    jax.block_until_ready(compiled[name](*arrays))
                    seconds[name] = time.perf_counter() - start
                    best[name] = min(best[name], seconds[name])
                if i:  # the first round warms up
                    ratios.append(seconds["chunked"] / seconds["token by token"])
            temp = {name: c.memory_analysis().temp_size_in_bytes for name, c in compiled.items()}
            rows.append(
                {
                    "kernel": "gated_delta_rule",
                    "device": "cpu",
                    "case": f"B {B}, T {T}, N {N}, D {D}, {what}",
                    "implementation": "xla_chunked",
                    "temp_mb": round(temp["chunked"] / 1e6, 1),
                    "temp_mb_token_by_token": round(temp["token by token"] / 1e6, 1),
                    "temp_at_2T_over_T": round(
                        temporary(wrap(chunked), (B, 2 * T, N, D)) / max(temp["chunked"], 1), 2
                    ),
                    "time_ratio": round(statistics.median(ratios), 3),
                    "time_ratio_min": round(min(ratios), 3),
                    "time_ratio_max": round(max(ratios), 3),
                    "best_ms": round(1e3 * best["chunked"], 1),
                }
            )
    return rows


def on_tpu(quick: bool) -> list[dict]:
    """Every generation: does it compile, temporary memory, bytes over floor."""
    B, T, N, D = (1, 512, 2, 128) if quick else (1, 4096, 8, 128)
    arrays = jax.eval_shape(lambda: inputs(B, T, N, D, jnp.bfloat16))
    kernel = functools.partial(chunked, implementation="pallas_tpu")
    rows = []
    for generation in ("v5e",) if quick else dispatch.GENERATIONS:
        for what, f in (("forward", kernel), ("forward and backward", gradient(kernel))):
            gradients = what != "forward"
            compiled = aot.compile_tpu(f, *arrays, generation=generation)
            shape = (B, T, N, D, D)
            work = [cost.forward(*shape, chunk=CHUNK, itemsize=2, keep=gradients)]
            work += [cost.backward(*shape, chunk=CHUNK, itemsize=2)] * gradients
            moved = sum(w["bytes"] for w in work)
            floor = cost.floor_bytes(*shape, itemsize=2, gradients=gradients)
            rows.append(
                {
                    "kernel": "gated_delta_rule",
                    "device": f"tpu {generation} (compiled only)",
                    "case": f"B {B}, T {T}, N {N}, D {D}, {what}, bf16",
                    "implementation": "pallas_tpu",
                    "custom_calls": compiled.as_text().count("tpu_custom_call"),
                    "temp_mb": round(compiled.memory_analysis().temp_size_in_bytes / 1e6, 1),
                    "bytes_over_floor": round(moved / floor, 2),
                    "flops_per_byte": round(sum(w["flops"] for w in work) / moved),
                }
            )
    return rows


def measure(quick: bool) -> list[dict]:
    """Rows for the table of kernels; the TPU's only where libtpu is installed."""
    rows = on_cpu(quick)
    return rows + (on_tpu(quick) if importlib.util.find_spec("libtpu") else [])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    for row in measure(parser.parse_args().quick):
        print("  ".join(f"{k}={v}" for k, v in row.items()), flush=True)


if __name__ == "__main__":
    main()
