"""``linear_scan`` on the device at hand against ``lax.associative_scan`` and ``lax.scan``, by turns.

Milliseconds of what ``implementation=None`` gives; the others as their time over ours, the median over turns,
above 1 ours is faster. Complex numbers are complex64.

    python benchmarks/kernel_scans.py [--quick]
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import turns

from pallas_kernels import linear_scan

SIZES = ((4, 1024, 256), (4, 4096, 256), (2, 16384, 256), (1, 65536, 128))  # rows, tokens, features


def ours(a, b):
    return linear_scan(a, b)[0]


def associative_scan(a, b):
    def combine(early, late):
        return early[0] * late[0], late[0] * early[1] + late[1]

    return jax.lax.associative_scan(combine, (a, b), axis=1)[1]


def scan(a, b):
    def step(h, token):
        h = token[0] * h + token[1]
        return h, h

    tokens = a.swapaxes(0, 1), b.swapaxes(0, 1)
    return jax.lax.scan(step, jnp.zeros_like(a[:, 0]), tokens)[1].swapaxes(0, 1)


def gradient(function):
    return lambda a, b, dh: jax.vjp(function, a, b)[1](dh)


def inputs(shape, dtype):
    """a of modulus below 1, b and a cotangent."""
    keys = jax.random.split(jax.random.key(0), 4)
    a = jax.random.uniform(keys[0], shape)
    if dtype == jnp.complex64:
        a = a * jnp.exp(1j * jax.random.uniform(keys[1], shape, maxval=6.3))
    return a.astype(dtype), *(jax.random.normal(key, shape, dtype) for key in keys[2:])


def measure(quick: bool) -> dict[str, list[dict]]:
    """One table."""
    rows = []
    for dtype in (jnp.float32, jnp.complex64):
        for shape in ((2, 512, 128),) if quick else SIZES:
            a, b, dh = inputs(shape, dtype)
            for name, wrap, arrays in (("forward", lambda f: f, (a, b)), ("gradient", gradient, (a, b, dh))):
                rows.append(_compare(name, wrap, arrays, quick))
    return {"linear_scan": rows}


def _compare(name, wrap, arrays, quick) -> dict:
    B, T, F = arrays[0].shape
    programs = {f.__name__: turns.compiled(wrap(f), *arrays) for f in (ours, associative_scan, scan)}
    seconds = turns.by_turns(programs, *arrays, turns=2 if quick else 9 if T <= 4096 else 3)
    return {
        "dtype": str(arrays[0].dtype), "rows": B, "tokens": T, "features": F, "pass": name,
        "ms": turns.median_ms(seconds["ours"]),
        "associative_scan / ours": turns.ratio(seconds["associative_scan"], seconds["ours"]),
        "scan / ours": turns.ratio(seconds["scan"], seconds["ours"]),
        "temporary MB": turns.temporary_mb(programs["ours"]),
        "associative_scan's MB": turns.temporary_mb(programs["associative_scan"]), "load": turns.load(),
    }  # fmt: skip


if __name__ == "__main__":
    turns.main(measure, __doc__)
