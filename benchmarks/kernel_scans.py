"""The diagonal scan on this CPU: ours against ``lax.associative_scan`` and ``lax.scan``, interleaved.

    python benchmarks/kernel_scans.py [--quick]

Each round runs the three one after another, so that a load on the machine meets them alike; the ratio is the
median over rounds of the ratio within a round.
"""

import os
import statistics
import sys
import time

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import linear_scan

# rows, tokens, features
SIZES = ((4, 1024, 256), (4, 4096, 256), (1, 16384, 256), (1, 65536, 128))


def ours(a, b):
    return linear_scan(a, b, implementation="xla_chunked")[0]


def associative(a, b):
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


def measure(quick: bool) -> list[dict]:
    """Rows of size, pass, seconds of ours, and how many times as long each of the others takes."""
    rows = []
    for B, T, F in SIZES[:2] if quick else SIZES:
        rng = np.random.default_rng(0)
        a, b, dh = (jnp.asarray(rng.random((B, T, F), np.float32)) for _ in range(3))
        for name, wrap, arrays in (("forward", lambda f: f, (a, b)), ("gradient", gradient, (a, b, dh))):
            functions = {f.__name__: jax.jit(wrap(f)) for f in (ours, associative, scan)}
            for f in functions.values():
                jax.block_until_ready(f(*arrays))
            rounds = [
                {n: _seconds(f, arrays) for n, f in functions.items()} for _ in range(5 if quick else 15)
            ]
            rows.append(
                {
                    "rows": B, "tokens": T, "features": F, "pass": name,
                    "ours_s": statistics.median(r["ours"] for r in rounds),
                    "associative_scan": statistics.median(r["associative"] / r["ours"] for r in rounds),
                    "scan": statistics.median(r["scan"] / r["ours"] for r in rounds),
                    "load": os.getloadavg()[0],
                }
            )  # fmt: skip
    return rows


def _seconds(function, arrays):
    start = time.perf_counter()
    jax.block_until_ready(function(*arrays))
    return time.perf_counter() - start


if __name__ == "__main__":
    for row in measure("--quick" in sys.argv):
        print({k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()}, flush=True)
