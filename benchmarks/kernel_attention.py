"""``dot_product_attention`` on the device at hand: pattern x tokens x head size x pass.

Milliseconds of what ``implementation=None`` gives, and logits in full by turns in one process: full / ours is
the median over turns, above 1 ours is faster; missing where the logits in full are too large. Temporary
memory of both programs: ours grows with the tokens, the other with their square. On an accelerator the whole
matrix, bfloat16; on a CPU one head in float32: causal to 32,768 tokens, other patterns at 4,096.

    python benchmarks/kernel_attention.py [--quick]
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import turns

from pallas_kernels import dot_product_attention

PATTERNS = {
    "full": {},
    "causal": {"is_causal": True},
    "causal, window 1024": {"is_causal": True, "local_window_size": (1023, 0)},
    "causal, segments": {"is_causal": True},
    "causal, soft-cap": {"is_causal": True, "logits_soft_cap": 50.0},
}
FULL_LOGITS_BYTES = {True: 2**29, False: 2**31}  # of logits that "xla" may hold, on a CPU or not
HEADS = 8  # on an accelerator


def matrix(on_cpu: bool, quick: bool):
    """(pattern, tokens, head size) of every pair of rows."""
    if quick:
        return [("causal", 512, 64), ("causal, segments", 512, 64)]
    lengths = [2**n for n in range(10, 16)]
    if not on_cpu:
        return [(pattern, T, H) for pattern in PATTERNS for T in lengths for H in (64, 128, 256)]
    causal = [("causal", T, H) for H in (64, 128, 256) for T in lengths if H == 64 or T <= 8192]
    return causal + [(pattern, 4096, 64) for pattern in PATTERNS if pattern != "causal"]


def measure(quick: bool) -> dict[str, list[dict]]:
    """One table."""
    on_cpu = jax.default_backend() == "cpu"
    rows = [
        _compare(*case, backward, on_cpu, quick)
        for case in matrix(on_cpu, quick)
        for backward in (False, True)
    ]
    return {"attention": rows}


def _compare(pattern, T, H, backward, on_cpu, quick) -> dict:
    heads, dtype = (1, jnp.float32) if on_cpu else (HEADS, jnp.bfloat16)
    x = [jax.random.normal(key, (1, T, heads, H), dtype) for key in jax.random.split(jax.random.key(0), 3)]
    options = dict(PATTERNS[pattern])
    if "segments" in pattern:  # four of unequal length
        ids = jnp.searchsorted(jnp.array([T // 10, T // 3, 3 * T // 4]), jnp.arange(T), side="right")[None]
        options |= {"q_segment_ids": ids, "kv_segment_ids": ids}

    def program(implementation):
        def f(q, k, v):
            return dot_product_attention(q, k, v, implementation=implementation, **options)

        g = jax.grad(lambda *x: jnp.sum(f(*x).astype(jnp.float32)), (0, 1, 2)) if backward else f
        return turns.compiled(g, *x)

    programs = {"ours": program(None)}
    if 4 * heads * T * T <= FULL_LOGITS_BYTES[on_cpu]:
        programs["full"] = program("xla")
    often = 2 if quick else 5 if T <= 4096 or not on_cpu else 2 if T <= 8192 else 1
    seconds = turns.by_turns(programs, *x, turns=often, launches=1 if on_cpu else 5)
    full = programs.get("full")
    return {
        "pattern": pattern, "tokens": T, "heads": heads, "head size": H,
        "pass": "gradient" if backward else "forward", "ms": turns.median_ms(seconds["ours"]),
        "full / ours": turns.ratio(seconds["full"], seconds["ours"]) if full else None,
        "temporary MB": turns.temporary_mb(programs["ours"]),
        "full's MB": turns.temporary_mb(full) if full else None, "load": turns.load(),
    }  # fmt: skip


if __name__ == "__main__":
    turns.main(measure, __doc__)
