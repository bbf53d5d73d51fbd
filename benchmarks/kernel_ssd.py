"""``ssd`` on a CPU against its naive forms and attention.

Forward, and gradients of q, k and v, of the chunked loop against (a) the quadratic form, all pairs of
tokens at once, (b) the recurrence token by token, (c) the recurrence by ``lax.associative_scan`` over
states, (d) ``jax.nn.dot_product_attention``, causal, at the same heads and head size. The two sides of a
ratio run by turns in one process; other / ours is the median over the turns, so above 1 ours is faster.

    python benchmarks/kernel_ssd.py [--quick]
"""

from __future__ import annotations

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import turns

from pallas_kernels import ssd
from pallas_kernels.reference import ssd as reference

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


def compare(name: str, T: int, backward: bool, turns_of: int) -> dict:
    """Time of both sides by turns, and the temporary memory of their programs."""
    arrays = inputs(T)
    wrap = gradients if backward else lambda f: f
    programs = {"ours": turns.compiled(wrap(chunked), *arrays)}
    programs["other"] = turns.compiled(wrap(OTHERS[name]), *arrays)
    seconds = turns.by_turns(programs, *arrays, turns=turns_of)
    return {
        "against": name, "tokens": T, "pass": "gradient" if backward else "forward",
        "ms": turns.median_ms(seconds["ours"]),
        "other / ours": turns.ratio(seconds["other"], seconds["ours"]),
        "temporary MB": turns.temporary_mb(programs["ours"]),
        "other's MB": turns.temporary_mb(programs["other"]), "load": turns.load(),
    }  # fmt: skip


def measure(quick: bool) -> dict[str, list[dict]]:
    """One table."""
    rows = [
        compare(name, T, backward, turns_of=2 if quick else 3 if T > 4096 else 5)
        for T in ((256,) if quick else (1024, 2048, 4096, 8192, 16384))
        for name in OTHERS
        for backward in (False, True)
        if LONGEST[name][backward] >= T
    ]
    return {"ssd, chunked": rows}


if __name__ == "__main__":
    turns.main(measure, __doc__)
