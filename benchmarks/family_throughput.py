"""Each recurrent mixer with our kernel against the same mixer with its recurrence as a plain ``lax.scan``.

The whole layer (projections, convolution, gates), forward and gradient, at T = 4096, on the device at hand;
both sides compiled in one process, run by turns, after their outputs and gradients agreed. The figure is
plain / ours, the median over turns of the ratio within a turn: above 1 ours is faster.

    python benchmarks/family_throughput.py [--quick] [--write]

``--write`` keeps the table in benchmarks/results/family_throughput.md.
"""

from __future__ import annotations

import argparse
import importlib
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import turns
from flax import nnx

from scaling.config import validate_section
from scaling.models.lm import MIXERS

RESULTS = Path(__file__).parent / "results" / "family_throughput.md"
SHAPE = {"d_model": 128, "layers": 1, "heads": 4, "kv_heads": 4, "head_dim": 32, "ffn_dim": 256}


def over_tokens(step, state, *arrays):
    """``step`` token by token; what it puts out has the tokens in its second axis again."""
    tokens = [jnp.moveaxis(x.astype(jnp.float32), 1, 0) for x in arrays]
    state, out = jax.lax.scan(step, state, tokens)
    return jnp.moveaxis(out, 0, 1), state


def linear_scan(a, b, segment_ids=None):
    def step(h, token):
        h = token[0] * h + token[1]
        return h, h

    return over_tokens(step, jnp.zeros_like(b[:, 0]), a, b)


def selective_scan(u, dt, key, query, rate=None, *, segment_ids=None):
    def step(h, token):
        u, dt, key, query = token
        dt, key = dt[..., None], key[:, None]
        decay = 1 - dt * key**2 if rate is None else jnp.exp(dt * rate)
        h = decay * h + dt * u[..., None] * key
        return h, jnp.einsum("bes,bs->be", h, query)

    y, h = over_tokens(step, jnp.zeros((*u.shape[::2], key.shape[-1])), u, dt, key, query)
    return y.astype(u.dtype), h


def ssd(q, k, v, log_decay, *, segment_ids=None):
    q, k = (jnp.repeat(x, v.shape[2] // x.shape[2], axis=2) for x in (q, k))

    def step(S, token):
        q, k, v, g = token
        S = jnp.exp(g)[..., None, None] * S + k[..., :, None] * v[..., None, :]
        return S, jnp.einsum("bnd,bnde->bne", q, S)

    o, S = over_tokens(step, jnp.zeros((*v.shape[::2], q.shape[3], v.shape[3])), q, k, v, log_decay)
    return o.astype(v.dtype), S


def gated_delta_rule(q, k, v, beta, log_decay, *, scale=None, segment_ids=None):
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    q, k = (jnp.repeat(x, v.shape[2] // x.shape[2], axis=2) for x in (q, k))

    def step(S, token):
        q, k, v, beta, g = token
        S = jnp.exp(g)[..., None, None] * S
        new = beta[..., None] * (v - jnp.einsum("bnd,bnde->bne", k, S))
        S = S + k[..., :, None] * new[..., None, :]
        return S, scale * jnp.einsum("bnd,bnde->bne", q, S)

    state = jnp.zeros((*v.shape[::2], q.shape[3], v.shape[3]))
    o, S = over_tokens(step, state, q, k, v, beta, log_decay)
    return o.astype(v.dtype), S


def mlstm(q, k, v, i_gate, f_gate, *, scale=None, segment_ids=None):
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale

    def step(state, token):
        C, n, m = state
        q, k, v, i, f = token
        log_f = jax.nn.log_sigmoid(f)
        new = jnp.maximum(log_f + m, i)
        forget, write = jnp.exp(log_f + m - new)[..., None], scale * jnp.exp(i - new)[..., None]
        C = forget[..., None] * C + (write * k)[..., :, None] * v[..., None, :]
        n = forget * n + write * k
        below = jnp.maximum(jnp.abs(jnp.sum(q * n, -1)), jnp.exp(-new))
        return (C, n, new), jnp.einsum("bnd,bnde->bne", q, C) / below[..., None]

    B, _, N, D = q.shape
    state = jnp.zeros((B, N, D, v.shape[-1])), jnp.zeros((B, N, D)), jnp.zeros((B, N))
    h, state = over_tokens(step, state, q, k, v, i_gate, f_gate)
    return h.astype(v.dtype), state


def scan_tokens(inputs, recurrent, fresh):
    """sLSTM, which has no parallel form: ours is sequential too, its backward scan by hand."""

    def step(state, x):
        h, c, n, m = state
        z, i, f, o = jnp.split(x + jnp.einsum("nbh,nhg->nbg", h, recurrent), 4, axis=-1)
        log_f = jax.nn.log_sigmoid(f)
        new = jnp.maximum(log_f + m, i)
        forget, write = jnp.exp(log_f + m - new), jnp.exp(i - new)
        c, n = forget * c + write * jnp.tanh(z), forget * n + write
        h = jax.nn.sigmoid(o) * c / n
        return (h, c, n, new), h

    zero = jnp.zeros((*inputs.shape[1:3], inputs.shape[3] // 4))
    return jax.lax.scan(step, (zero, zero, zero, zero - 1e30), inputs)[1]


PLAIN = {
    "mamba2": ssd,
    "gated_deltanet": gated_delta_rule,
    "mlstm": mlstm,
    "slstm": scan_tokens,
    "mamba": selective_scan,
    "longhorn": selective_scan,
    "rglru": linear_scan,
    "min_gru": linear_scan,
    "qlstm": linear_scan,
}
"""Mixer to its recurrence, written plainly."""


def layer(mixer: str, plain: bool):
    """(gradient of the layer as a function of parameters, input and cotangent; the parameters)."""
    # every shape reads the defaults of all families
    family = {"mlstm": "xlstm", "rglru": "griffin", "slstm": "hybrid"}.get(mixer, mixer)
    changes = {"mamba2": {"state_dim": 64}, "slstm": {"pattern": ["slstm"]}}.get(mixer, {})
    cfg = validate_section("model", {**SHAPE, "family": family, **changes})
    graph, state = nnx.split(MIXERS[mixer](cfg, nnx.Rngs(0)))
    # the mixer's file calls the kernel by its name there
    module = importlib.import_module(f"scaling.models.{mixer}")

    def gradient(params, x, dy):
        kept = getattr(module, PLAIN[mixer].__name__)
        if plain:
            setattr(module, PLAIN[mixer].__name__, PLAIN[mixer])
        try:
            y, pull = jax.vjp(lambda p, x: nnx.merge(graph, p)(x, None, None), params, x)
            return y, pull(dy)
        finally:
            setattr(module, PLAIN[mixer].__name__, kept)

    return gradient, nnx.to_pure_dict(state)


def measure(tokens: int, rows: int, count: int) -> list[dict]:
    """One row a mixer."""
    rng = np.random.default_rng(0)
    x, dy = rng.standard_normal((2, rows, tokens, SHAPE["d_model"])).astype(np.float32)
    table = []
    for mixer in PLAIN:
        sides, params = {}, None
        for name in ("ours", "plain"):
            gradient, params = layer(mixer, name == "plain")
            sides[name] = turns.compiled(gradient, params, x, dy)
        ours, plain = (jax.tree.leaves(side(params, x, dy)) for side in sides.values())
        for a, b in zip(ours, plain, strict=True):
            # float32 sums over thousands of tokens, in another order
            np.testing.assert_allclose(a, b, rtol=5e-3, atol=5e-4 * np.abs(b).max(), err_msg=mixer)
        seconds = turns.by_turns(sides, params, x, dy, turns=count)
        ms = turns.median_ms(seconds["ours"])
        table.append(
            {
                "mixer": mixer, "recurrence": PLAIN[mixer].__name__, "tokens": tokens, "rows": rows, "ms": ms,
                "tokens/s": round(1e3 * rows * tokens / ms),
                "plain / ours": turns.ratio(seconds["plain"], seconds["ours"]),
                "temporary MB": turns.temporary_mb(sides["ours"]),
                "plain's MB": turns.temporary_mb(sides["plain"]), "load": turns.load(),
            }
        )  # fmt: skip
        turns.show({mixer: table[-1:]})
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="short rows and few turns")
    parser.add_argument("--write", action="store_true", help=f"keep the table in {RESULTS.name}")
    args = parser.parse_args()
    table = measure(*((256, 1, 2) if args.quick else (4096, 1, 7)))
    if args.write:
        head = list(table[0])
        lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
        lines += ["| " + " | ".join(str(row[k]) for k in head) + " |" for row in table]
        about = f"{turns.device()}, jax {jax.__version__}, float32, {SHAPE}".replace("'", "")
        words = " ".join(__doc__.split("\n\n")[1].split())
        text = "# Throughput of recurrent mixers\n\n`python benchmarks/family_throughput.py --write`\n\n"
        RESULTS.write_text(text + f"{words}\n\n{about}\n\n" + "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
