"""The short causal convolution on this CPU: ours against ``lax.conv_general_dilated``, by turns.

    python benchmarks/kernel_conv.py [--quick]

Each round runs both, one after the other, in an order that changes, so that a load on the machine meets them
alike; the ratio is the median over rounds of the ratio within a round. Float32, four taps, with SiLU.
"""

import os
import statistics
import sys
import time

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import causal_conv1d

# rows, tokens, channels
SIZES = ((4, 1024, 512), (4, 4096, 512), (1, 16384, 512))
TAPS = 4


def ours(x, w, bias):
    return causal_conv1d(x, w, bias, activation="silu", implementation="xla")


def convolution(x, w, bias):
    """One group a channel, what a model without the kernel does."""
    y = jax.lax.conv_general_dilated(
        x, w[:, None], window_strides=(1,), padding=((TAPS - 1, 0),),
        dimension_numbers=("NWC", "WIO", "NWC"), feature_group_count=x.shape[-1],
    )  # fmt: skip
    return jax.nn.silu(y + bias)


def gradient(function):
    return lambda x, w, bias, dy: jax.vjp(function, x, w, bias)[1](dy)


def measure(quick: bool) -> dict[str, list[dict]]:
    """Time of ours, and how many times as long the convolution takes, with the least and the most of it."""
    rows = []
    for B, T, C in SIZES[:1] if quick else SIZES:
        rng = np.random.default_rng(0)
        shapes = (B, T, C), (TAPS, C), (C,), (B, T, C)
        x, w, bias, dy = (jnp.asarray(rng.standard_normal(s, np.float32)) for s in shapes)
        for name, wrap, arrays in (
            ("forward", lambda f: f, (x, w, bias)), ("gradient", gradient, (x, w, bias, dy))
        ):  # fmt: skip
            functions = {f.__name__: jax.jit(wrap(f)) for f in (ours, convolution)}
            found = [jax.tree.map(np.asarray, f(*arrays)) for f in functions.values()]
            for a, b in zip(*(jax.tree.leaves(x) for x in found), strict=True):
                np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3 * np.abs(b).max())
            seconds = {n: [] for n in functions}
            for i in range(3 if quick else 5):
                for n in sorted(functions, reverse=i % 2 == 1):
                    start = time.perf_counter()
                    jax.block_until_ready(functions[n](*arrays))
                    seconds[n].append(time.perf_counter() - start)
            ratios = [b / a for a, b in zip(seconds["ours"], seconds["convolution"], strict=True)]
            rows.append(
                {
                    "rows": B, "tokens": T, "channels": C, "pass": name,
                    "ours_ms": round(1e3 * statistics.median(seconds["ours"]), 2),
                    "convolution": round(statistics.median(ratios), 2),
                    "least": round(min(ratios), 2), "most": round(max(ratios), 2),
                    "load": round(os.getloadavg()[0], 1),
                }
            )  # fmt: skip
    title = (
        "causal_conv1d, cpu: xla, and times as long lax.conv_general_dilated takes (float32, 4 taps, SiLU)"
    )
    return {title: rows}


if __name__ == "__main__":
    for title, rows in measure("--quick" in sys.argv).items():
        print(title)
        for row in rows:
            print(row, flush=True)
