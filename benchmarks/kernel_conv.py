"""The short causal convolution on this CPU: ours against ``lax.conv_general_dilated``, by turns.

    python benchmarks/kernel_conv.py [--quick]

The ratio is the median over turns, above 1 ours is faster. Float32, four taps, with SiLU.
"""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import numpy as np
import turns

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
    """One table."""
    rows = []
    for B, T, C in SIZES[:1] if quick else SIZES:
        rng = np.random.default_rng(0)
        shapes = (B, T, C), (TAPS, C), (C,), (B, T, C)
        x, w, bias, dy = (jnp.asarray(rng.standard_normal(s, np.float32)) for s in shapes)
        for name, wrap, arrays in (
            ("forward", lambda f: f, (x, w, bias)), ("gradient", gradient, (x, w, bias, dy))
        ):  # fmt: skip
            programs = {f.__name__: turns.compiled(wrap(f), *arrays) for f in (ours, convolution)}
            found = [jax.tree.map(np.asarray, f(*arrays)) for f in programs.values()]
            for a, b in zip(*(jax.tree.leaves(x) for x in found), strict=True):
                np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3 * np.abs(b).max())
            seconds = turns.by_turns(programs, *arrays, turns=3 if quick else 5)
            rows.append(
                {
                    "rows": B, "tokens": T, "channels": C, "pass": name,
                    "ms": turns.median_ms(seconds["ours"]),
                    "convolution / ours": turns.ratio(seconds["convolution"], seconds["ours"]),
                    "load": turns.load(),
                }
            )  # fmt: skip
    return {"causal_conv1d against lax.conv_general_dilated, a group a channel": rows}


if __name__ == "__main__":
    turns.main(measure, __doc__)
