"""Cross-entropy of a linear head on a CPU: time and memory of the chunked path against full logits.

The loss with both gradients, float32. Full logits differentiated by JAX and the chunked path run by turns in
one process; full / ours is the median over turns, above 1 ours is faster. Memory: temporary bytes of the
compiled program.

    python benchmarks/kernel_xent.py [--quick]
"""

from __future__ import annotations

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import turns

from pallas_kernels import linear_cross_entropy

Z_LOSS = 1e-4


def full_logits(x, w, labels):
    """What a model without the kernel does."""
    logits = jnp.matmul(x, w.astype(x.dtype), preferred_element_type=jnp.float32)
    lse = jax.nn.logsumexp(logits, axis=-1)
    picked = jnp.take_along_axis(logits, labels[:, None], axis=-1)[:, 0]
    return jnp.mean(lse - picked) + Z_LOSS * jnp.mean(jnp.square(lse))


def chunked(reduction):
    def loss(x, w, labels):
        options = {"z_loss": Z_LOSS, "reduction": reduction, "implementation": "xla_chunked"}
        return jnp.mean(linear_cross_entropy(x, w, labels, **options))

    return loss


def measure(quick: bool) -> dict[str, list[dict]]:
    """One table."""
    rows = []
    for D in (64,) if quick else (128, 512):
        M, V = (256, 4096) if quick else (4096, 50304)
        keys = jax.random.split(jax.random.key(0), 3)
        x, w = jax.random.normal(keys[0], (M, D)), jax.random.normal(keys[1], (D, V)) / D**0.5
        arrays = x, w, jax.random.randint(keys[2], (M,), 0, V)
        losses = {"full": full_logits, "mean": chunked("mean"), "none": chunked("none")}
        programs = {n: turns.compiled(jax.value_and_grad(f, (0, 1)), *arrays) for n, f in losses.items()}
        seconds = turns.by_turns(programs, *arrays, turns=2 if quick else 5)
        full = turns.temporary_mb(programs["full"])
        for name in ("mean", "none"):
            megabytes = turns.temporary_mb(programs[name])
            rows.append(
                {
                    "tokens": M, "features": D, "vocabulary": V, "reduction": name,
                    "ms": turns.median_ms(seconds[name]),
                    "full / ours": turns.ratio(seconds["full"], seconds[name]),
                    "temporary MB": megabytes, "full's MB": full,
                    "memory saved": round(1 - megabytes / full, 3), "load": turns.load(),
                }
            )  # fmt: skip
    return {"linear_cross_entropy, chunked, with its gradients": rows}


if __name__ == "__main__":
    turns.main(measure, __doc__)
