"""``dot_product_attention`` on the device at hand, and what its TPU kernels take.

Pattern x tokens x head size x pass: milliseconds of what ``implementation=None`` gives against logits in
full, in turns in one process (the ratio is the median over turns of full / ours, above 1 ours is faster),
and the temporary memory of both programs. On a CPU only few of them, to 8,192 tokens.

TPU: each generation compiled ahead of time (no device): temporary memory, bytes that the kernels move over
the floor (each operand and result once), block sizes.
"""

from __future__ import annotations

import importlib.util
import os
import statistics
import time

import jax
import jax.numpy as jnp

from pallas_kernels import aot, dot_product_attention
from pallas_kernels.cost import attention as cost
from pallas_kernels.tpu.attention_blocks import BLOCK_SIZES

PATTERNS = {
    "full": {},
    "causal": {"is_causal": True},
    "causal window 1024": {"is_causal": True, "local_window_size": (1023, 0)},
}
FULL_LOGITS_BYTES = 2**31  # of logits that "xla" may hold


def measure(quick: bool) -> dict[str, list[dict]]:
    """Tables of rows."""
    on_cpu = jax.default_backend() == "cpu"
    patterns = ["causal"] if on_cpu else list(PATTERNS)
    tokens = [1024, 4096] if quick else [1024, 2048, 4096, 8192] if on_cpu else [2**n for n in range(10, 16)]
    sizes = [64] if on_cpu else [64, 128, 256]
    turns = 2 if quick else 5
    matrix = [
        _compare(pattern, T, H, backward, turns, 2 if on_cpu else 8)
        for pattern in patterns
        for T in tokens
        for H in sizes
        for backward in (False, True)
    ]
    tables = {"attention": matrix}
    if importlib.util.find_spec("libtpu"):
        tables["attention compiled for TPU"] = [_compiled(g) for g in (("v5e",) if quick else aot.TPU_SLICES)]
    return tables


def _compare(pattern, T, H, backward, turns, heads) -> dict:
    dtype = jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
    x = [jax.random.normal(key, (1, T, heads, H), dtype) for key in jax.random.split(jax.random.key(0), 3)]

    def side(implementation):
        def f(q, k, v):
            return dot_product_attention(q, k, v, implementation=implementation, **PATTERNS[pattern])

        g = jax.grad(lambda *x: jnp.sum(f(*x).astype(jnp.float32)), (0, 1, 2)) if backward else f
        return jax.jit(g).lower(*x).compile()

    sides = [side(None)] + ([side("xla")] if 4 * heads * T * T <= FULL_LOGITS_BYTES else [])
    seconds = []
    for turn in range(turns + 1):
        times = []
        for run in sides:
            begin = time.perf_counter()
            jax.block_until_ready(run(*x))
            times.append(time.perf_counter() - begin)
        if turn:  # the first turn touches the memory for the first time
            seconds.append(times)
    row = {
        "pattern": pattern, "tokens": T, "head size": H, "pass": "gradient" if backward else "forward",
        "ms": round(1e3 * statistics.median(t[0] for t in seconds), 1),
        "full / ours": None, "temporary MB": round(sides[0].memory_analysis().temp_size_in_bytes / 1e6, 1),
        "full's MB": None, "load": round(os.getloadavg()[0], 1),
    }  # fmt: skip
    if len(sides) > 1:
        row["full / ours"] = round(statistics.median(t[1] / t[0] for t in seconds), 2)
        row["full's MB"] = round(sides[1].memory_analysis().temp_size_in_bytes / 1e6, 1)
    return row


def _compiled(generation) -> dict:
    B, T, N, K, H = 1, 4096, 8, 2, 128
    q, k = (jax.ShapeDtypeStruct((B, T, n, H), jnp.bfloat16) for n in (N, K))

    def gradients(q, k, v, dout):
        return jax.vjp(lambda *x: dot_product_attention(*x, is_causal=True), q, k, v)[1](dout)

    compiled = aot.compile_tpu(gradients, q, k, k, q, generation=generation)
    row = {
        "generation": generation,
        "kernels": compiled.as_text().count('custom_call_target="tpu_custom_call"'),
        "temporary MB": round(compiled.memory_analysis().temp_size_in_bytes / 1e6, 1),
    }
    for kind, (block_q, block_kv) in BLOCK_SIZES[generation].items():
        found = getattr(cost, kind)(
            B, T, T, N, K, H, block_q=block_q, block_kv=block_kv, itemsize=2, is_causal=True
        )
        row[kind] = f"{block_q} x {block_kv}, {found.bytes / found.floor_bytes:.2f} x floor"
    return row
