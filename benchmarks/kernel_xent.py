"""Cross-entropy of a linear head: memory and time of the chunked path, and what the TPU kernels need.

Time: full logits differentiated by JAX and each implementation by turns in one process; the figure is the
median over rounds of theirs / full. Memory: temporary bytes of the compiled loss with both gradients. TPU:
compiled ahead of time for each generation; bytes over floor is what the kernels read and write of HBM, by
their own formula, over each operand and result once.

    python benchmarks/kernel_xent.py [--quick]
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import statistics
import time

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp

from pallas_kernels import aot, dispatch, linear_cross_entropy
from pallas_kernels.cost import linear_cross_entropy as cost
from pallas_kernels.tpu import linear_cross_entropy as tpu

Z_LOSS = 1e-4


def full_logits(x, w, labels):
    """What a model without the kernel does."""
    logits = jnp.matmul(x, w.astype(x.dtype), preferred_element_type=jnp.float32)
    lse = jax.nn.logsumexp(logits, axis=-1)
    picked = jnp.take_along_axis(logits, labels[:, None], axis=-1)[:, 0]
    return jnp.mean(lse - picked) + Z_LOSS * jnp.mean(jnp.square(lse))


def by(implementation, reduction="mean"):
    def loss(x, w, labels):
        options = {"z_loss": Z_LOSS, "reduction": reduction, "implementation": implementation}
        return jnp.mean(linear_cross_entropy(x, w, labels, **options))

    return loss


def on_cpu(quick: bool) -> list[dict]:
    """Memory and time against full logits, loss with both gradients, float32."""
    rows = []
    for D in (64,) if quick else (128, 512):
        M, V = (1024, 20000) if quick else (4096, 50304)
        keys = jax.random.split(jax.random.key(0), 3)
        x, w = jax.random.normal(keys[0], (M, D)), jax.random.normal(keys[1], (D, V)) / D**0.5
        labels = jax.random.randint(keys[2], (M,), 0, V)
        losses = {
            "full logits": full_logits,
            "xla_chunked, mean": by("xla_chunked"),
            "xla_chunked, none": by("xla_chunked", "none"),
        }
        compiled = {
            name: jax.jit(jax.value_and_grad(f, (0, 1))).lower(x, w, labels).compile()
            for name, f in losses.items()
        }
        temp = {name: c.memory_analysis().temp_size_in_bytes for name, c in compiled.items()}
        ratios = {name: [] for name in losses}
        for i in range(1 + (3 if quick else 5)):
            seconds = {}
            for name in sorted(losses, reverse=i % 2 == 1):
                start = time.perf_counter()
                jax.block_until_ready(compiled[name](x, w, labels))
                seconds[name] = time.perf_counter() - start
            if i:  # the first round warms up
                for name, s in seconds.items():
                    ratios[name].append(s / seconds["full logits"])
        for name in losses:
            rows.append(
                {
                    "kernel": "linear_cross_entropy",
                    "device": "cpu",
                    "case": f"M {M}, D {D}, V {V}, forward and backward",
                    "implementation": name,
                    "temp_mb": round(temp[name] / 1e6, 1),
                    "memory_saved": round(1 - temp[name] / temp["full logits"], 3),
                    "time_ratio": round(statistics.median(ratios[name]), 3),
                    "time_ratio_min": round(min(ratios[name]), 3),
                    "time_ratio_max": round(max(ratios[name]), 3),
                }
            )
    return rows


def on_tpu(quick: bool) -> list[dict]:
    """Every generation: does it compile, temporary memory, bytes over floor."""
    M, D, V = (1024, 256, 8192) if quick else (8192, 1024, 50304)
    shapes = (
        jax.ShapeDtypeStruct((M, D), jnp.bfloat16),
        jax.ShapeDtypeStruct((D, V), jnp.bfloat16),
        jax.ShapeDtypeStruct((M,), jnp.int32),
    )
    rows = []
    for generation in ("v5e",) if quick else dispatch.GENERATIONS:
        with dispatch.target("tpu", generation):
            sizes = {k: tpu.blocks(k, M, D, V, shapes[0].dtype, shapes[1].dtype) for k in tpu.BLOCKS}
        moved = {
            "forward": cost.forward(M, D, V, tokens=sizes["forward"][0], itemsize=2)["bytes"],
            "dx": cost.backward_x(M, D, V, tokens=sizes["backward_x"][0], itemsize=2)["bytes"],
            "dw": cost.backward_w(M, D, V, vocab=sizes["backward_w"][1], itemsize=2, w_itemsize=2)["bytes"],
        }
        for what, f in (
            ("forward", by("pallas_tpu")),
            ("forward and backward", jax.value_and_grad(by("pallas_tpu"), (0, 1))),
        ):
            gradients = what != "forward"
            compiled = aot.compile_tpu(f, *shapes, generation=generation)
            bytes_moved = sum(moved.values()) if gradients else moved["forward"]
            floor = cost.floor_bytes(M, D, V, itemsize=2, w_itemsize=2, gradients=gradients)
            rows.append(
                {
                    "kernel": "linear_cross_entropy",
                    "device": f"tpu {generation} (compiled only)",
                    "case": f"M {M}, D {D}, V {V}, {what}, bf16",
                    "implementation": "pallas_tpu",
                    "custom_calls": compiled.as_text().count("tpu_custom_call"),
                    "temp_mb": round(compiled.memory_analysis().temp_size_in_bytes / 1e6, 1),
                    "bytes_over_floor": round(bytes_moved / floor, 2),
                    "flops_per_byte": round((10 if gradients else 2) * M * D * V / bytes_moved),
                    "blocks": "; ".join(f"{k} {m}x{v}" for k, (m, v) in sizes.items()),
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
