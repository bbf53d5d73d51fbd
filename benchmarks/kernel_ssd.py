"""``ssd`` on a CPU against its naive forms and attention, and what its TPU kernels take.

CPU: forward, and gradients of q, k and v, of the chunked loop against (a) the quadratic form, all pairs of
tokens at once, (b) the recurrence token by token, (c) the recurrence by ``lax.associative_scan`` over
states, (d) ``jax.nn.dot_product_attention``, causal, at the same heads and head size. The two sides of a
ratio run in turns in one process; the figure is the median over the turns of other / ours, so above 1 ours
is faster; the machine's load is printed with it.

TPU: each generation compiled ahead of time (no device): temporary memory, the bytes that the kernels move
over the floor (each operand and result once), and the tokens a chunk.

    python benchmarks/kernel_ssd.py [--quick] [--no-tpu]
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import json
import os
import statistics
import time

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp

from pallas_kernels import aot, dispatch, ssd
from pallas_kernels.cost import ssd as cost
from pallas_kernels.reference import ssd as reference
from pallas_kernels.tpu import ssd as tpu

HEADS, SIZE = 8, 64  # a model of width 512
# The most tokens, forward and backward, that memory and time allow the other side.
LONGEST = {
    "quadratic": (4096, 2048),
    "step": (16384, 4096),
    "associative": (2048, 1024),
    "attention": (8192, 4096),
}


def inputs(T: int):
    keys = jax.random.split(jax.random.key(0), 4)
    q, k, v = (jax.random.normal(key, (1, T, HEADS, SIZE)) for key in keys[:3])
    return q, k / SIZE**0.5, v, -jnp.abs(jax.random.normal(keys[3], (1, T, HEADS)))


def chunked(q, k, v, g):
    return ssd(q, k, v, g, implementation="xla_chunked")[0]


def quadratic(q, k, v, g):
    b = jnp.cumsum(g, 1)
    between = (b[:, :, None] - b[:, None]).transpose(0, 3, 1, 2)
    causal = jnp.tril(jnp.ones(between.shape[-2:], bool))
    A = jnp.einsum("btnd,bsnd->bnts", q, k) * jnp.exp(jnp.where(causal, between, -jnp.inf))
    return jnp.einsum("bnts,bsne->btne", A, v)


def step(q, k, v, g):
    return reference.ssd(q, k, v, g, scale=1.0, state0=None, segment_ids=None)[0]


def associative(q, k, v, g):
    def then(x, y):
        return x[0] * y[0], x[1] * y[0] + y[1]

    states = k[..., :, None] * v[..., None, :]
    _, states = jax.lax.associative_scan(then, (jnp.exp(g)[..., None, None], states), axis=1)
    return jnp.einsum("btnd,btnde->btne", q, states)


def attention(q, k, v, g):
    return jax.nn.dot_product_attention(q, k, v, is_causal=True)


OTHERS = {"quadratic": quadratic, "step": step, "associative": associative, "attention": attention}


def gradients(f):
    return jax.grad(lambda q, k, v, g: f(q, k, v, g).sum(), argnums=(0, 1, 2))


def compare(name: str, T: int, backward: bool, turns: int) -> dict:
    """Seconds of both sides in turns, and the temporary memory of their programs."""
    arrays = inputs(T)
    wrap = gradients if backward else lambda f: f
    sides = [jax.jit(wrap(f)).lower(*arrays).compile() for f in (chunked, OTHERS[name])]
    seconds = []
    for turn in range(turns + 1):
        pair = []
        for run in sides:
            begin = time.perf_counter()
            jax.block_until_ready(run(*arrays))
            pair.append(time.perf_counter() - begin)
        if turn:  # the first turn touches the memory for the first time
            seconds.append(pair)
    temp = [s.memory_analysis().temp_size_in_bytes / 2**20 for s in sides]
    return {
        "kernel": "ssd", "against": name, "T": T, "pass": "backward" if backward else "forward",
        "ours_s": statistics.median(s for s, _ in seconds),
        "ratio": statistics.median(other / ours for ours, other in seconds),
        "ours_temp_mib": temp[0], "other_temp_mib": temp[1], "load": os.getloadavg()[0],
        "device": jax.devices()[0].device_kind,
    }  # fmt: skip


# B, T, K, N, D, E, one decay a channel
TPU_CASES = {
    "mamba-2": (1, 4096, 1, 32, 128, 64, False),
    "a decay a head": (1, 4096, 16, 16, 128, 128, False),
    "a decay a channel": (1, 4096, 16, 16, 128, 128, True),
}


def compiled(name: str, generation: str) -> dict:
    """Forward and gradient of bfloat16 inputs on one TPU generation."""
    B, T, K, N, D, E, channel = TPU_CASES[name]
    shapes = [jax.ShapeDtypeStruct(s, jnp.bfloat16) for s in ((B, T, K, D), (B, T, K, D), (B, T, N, E))]
    shapes.append(jax.ShapeDtypeStruct((B, T, N, D) if channel else (B, T, N), jnp.float32))
    chunk = tpu.CHUNKS[generation][channel]
    sizes = {
        "B": B,
        "T": T,
        "K": K,
        "N": N,
        "D": D,
        "E": E,
        "chunk": chunk,
        "channel": channel,
        "itemsize": 2,
    }
    row = {"kernel": "ssd", "case": name, "generation": generation, "chunk": chunk}

    def o(*arrays):
        return ssd(*arrays)[0]

    grad = jax.grad(lambda *a: jnp.sum(o(*a).astype(jnp.float32)), argnums=range(4))
    for word, f, moved in (("forward", o, cost.forward(**sizes)), ("gradient", grad, cost.backward(**sizes))):
        program = aot.compile_tpu(f, *shapes, generation=generation)
        row[f"{word}_temp_mib"] = program.memory_analysis().temp_size_in_bytes / 2**20
        row[f"{word}_bytes_over_floor"] = moved.bytes / moved.floor_bytes
    return row


def measure(quick: bool) -> list[dict]:
    """The CPU rows."""
    return list(_on_cpu(quick))


def _on_cpu(quick: bool):
    for T in (1024, 2048) if quick else (1024, 2048, 4096, 8192, 16384):
        for name in OTHERS:
            for backward in (False, True):
                if LONGEST[name][backward] >= T:
                    yield compare(name, T, backward, turns=3 if quick or T > 4096 else 5)


def measure_tpu(quick: bool) -> list[dict]:
    """The TPU rows; none where libtpu is not installed."""
    return list(_for_tpu(quick))


def _for_tpu(quick: bool):
    if importlib.util.find_spec("libtpu") is not None:
        for generation in ("v5e",) if quick else dispatch.GENERATIONS:
            for name in TPU_CASES:
                yield compiled(name, generation)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--no-tpu", action="store_true")
    args = parser.parse_args()
    for row in itertools.chain(_on_cpu(args.quick), () if args.no_tpu else _for_tpu(args.quick)):
        print(json.dumps({k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()}), flush=True)


if __name__ == "__main__":
    main()
