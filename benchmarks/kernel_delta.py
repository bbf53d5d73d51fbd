"""The gated delta rule on a CPU: time and memory of the chunked path against the rule token by token.

Both (the latter a scan that JAX differentiates) run by turns in one process; token by token / ours is the
median over turns, above 1 ours is faster. Memory: temporary bytes of the compiled program, at T and at 2 T.

    python benchmarks/kernel_delta.py [--quick]
"""

from __future__ import annotations

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import turns

from pallas_kernels import gated_delta_rule
from pallas_kernels.reference import gated_delta_rule as reference


def chunked(*arrays):
    return gated_delta_rule(*arrays, implementation="xla_chunked")[0]


def token_by_token(q, k, v, beta, log_decay):
    (B, T, N, D), E = q.shape, v.shape[-1]
    reset, state = jnp.zeros((B, T), bool), jnp.zeros((B, N, D, E))
    scale = D**-0.5
    return reference.gated_delta_rule(q, k, v, beta, log_decay, reset, state, scale=scale)[0]


def gradient(f):
    return jax.grad(lambda *a: jnp.sum(f(*a).astype(jnp.float32)), range(5))


def inputs(B, T, N, D):
    keys = jax.random.split(jax.random.key(0), 5)
    q, k, v = (jax.random.normal(key, (B, T, N, D)) for key in keys[:3])
    k = k / jnp.linalg.norm(k, axis=-1, keepdims=True)
    beta = jax.random.uniform(keys[3], (B, T, N))
    return q, k, v, beta, -0.1 * jax.random.exponential(keys[4], (B, T, N))


def measure(quick: bool) -> dict[str, list[dict]]:
    """One table."""
    shapes = [(1, 256, 2, 64)] if quick else [(1, 1024, 4, 64), (1, 4096, 4, 64), (1, 1024, 4, 128)]
    rows = []
    for B, T, N, D in shapes:
        arrays, longer = inputs(B, T, N, D), jax.eval_shape(lambda: inputs(B, 2 * T, N, D))  # noqa: B023
        for what, wrap in (("forward", lambda f: f), ("gradient", gradient)):
            programs = {
                "ours": turns.compiled(wrap(chunked), *arrays),
                "token by token": turns.compiled(wrap(token_by_token), *arrays),
            }
            seconds = turns.by_turns(programs, *arrays, turns=2 if quick else 5)
            megabytes = turns.temporary_mb(programs["ours"])
            at_twice = turns.temporary_mb(turns.compiled(wrap(chunked), *longer))
            rows.append(
                {
                    "tokens": T, "heads": N, "head size": D, "pass": what,
                    "ms": turns.median_ms(seconds["ours"]),
                    "token by token / ours": turns.ratio(seconds["token by token"], seconds["ours"]),
                    "temporary MB": megabytes, "at 2 T / at T": round(at_twice / max(megabytes, 0.1), 2),
                    "token by token's MB": turns.temporary_mb(programs["token by token"]),
                    "load": turns.load(),
                }
            )  # fmt: skip
    return {"gated_delta_rule, chunked": rows}


if __name__ == "__main__":
    turns.main(measure, __doc__)
