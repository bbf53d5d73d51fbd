"""Selective scans against loops in NumPy and the reference in float64, both with gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ssd_oracles import agree

from pallas_kernels import selective_scan
from pallas_kernels.reference import selective_scan as reference

NAMES = ("y", "h", "du", "ddt", "dkey", "dquery", "drate", "dh0")
KINDS = ("mamba", "longhorn")
# (of each element, of the largest): sums of some tens of float32 terms, decayed
FLOAT32 = (1e-4, 1e-5)


def make(kind, B=2, T=37, E=6, S=5, seed=0):
    """(u, dt, key, query, rate or None, h0), and cotangents of y and h."""
    rng = np.random.default_rng(seed)
    u, dt, dy = rng.standard_normal((3, B, T, E))
    key, query = rng.standard_normal((2, B, T, S))
    h0, dh = rng.standard_normal((2, B, E, S))
    beta = 1 / (1 + np.exp(-dt))
    if kind == "longhorn":
        return (u, beta / (1 + beta * (key**2).sum(-1, keepdims=True)), key, query, None, h0), (dy, dh)
    return (u, beta, key, query, -np.exp(rng.standard_normal((E, S))), h0), (dy, dh)


def loop(u, dt, key, query, rate, h0, segments):
    """One row, channel and state at a time."""
    (B, T, E), S = u.shape, key.shape[2]
    y = np.zeros_like(u)
    for b in range(B):
        for e in range(E):
            for s in range(S):
                h = h0[b, e, s]
                for t in range(T):
                    if t and segments[b, t] != segments[b, t - 1]:
                        h = 0.0
                    k, d = key[b, t, s], dt[b, t, e]
                    h = (1 - d * k * k if rate is None else np.exp(d * rate[e, s])) * h + d * u[b, t, e] * k
                    y[b, t, e] += h * query[b, t, s]
    return y


@functools.partial(jax.jit, static_argnums=(0, 1))
def _gradients(function, options, inputs, segments, cotangents):
    def call(u, dt, key, query, rate, h0):
        return function(u, dt, key, query, rate, h0=h0, segment_ids=segments, **dict(options))

    out, pull = jax.vjp(call, *inputs)
    return out, pull(cotangents)


def both(inputs, cotangents, segments, dtype=np.float32, **options):
    """Ours in ``dtype`` and the reference in float64: outputs and gradients, flat."""
    cast = lambda d: jax.tree.map(lambda x: jnp.asarray(x, d), (inputs, cotangents))  # noqa: E731
    low = cast(dtype)
    ours = _gradients(selective_scan, tuple(options.items()), low[0], segments, low[1])
    with jax.enable_x64(True):
        high = cast(np.float64)
        exact = _gradients(reference.selective_scan, (), high[0], segments, high[1])
        exact = jax.tree.map(np.asarray, exact)
    return [np.asarray(x) for x in jax.tree.leaves(ours)], jax.tree.leaves(exact)


def names(kind):
    return [n for n in NAMES if not (n == "drate" and kind == "longhorn")]


@pytest.mark.parametrize("kind", KINDS)
def test_reference_is_the_loop(kind):
    inputs, _ = make(kind)
    segments = np.repeat([[1, 2, 3]], 2, 0)[:, np.r_[[0] * 9, [1] * 20, [2] * 8]]
    with jax.enable_x64(True):
        *rest, h0 = (None if x is None else jnp.asarray(x) for x in inputs)
        y, _ = reference.selective_scan(*rest, h0=h0, segment_ids=jnp.asarray(segments))
    np.testing.assert_allclose(y, loop(*inputs, segments), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("T", "options"),
    [(37, {}), (1, {}), (64, {"chunk": 8}), (70, {"chunk": 16, "implementation": "xla"}), (33, {"chunk": 1})],
)
def test_values_and_gradients(kind, T, options):
    inputs, cotangents = make(kind, T=T)
    rng = np.random.default_rng(3)
    segments = jnp.asarray(np.cumsum(rng.random((2, T)) < 0.1, axis=1).astype(np.int32))
    ours, exact = both(inputs, cotangents, segments, **options)
    agree(ours, exact, FLOAT32, names(kind))


@pytest.mark.parametrize("kind", KINDS)
def test_chunks_of_any_length_and_no_segments(kind):
    inputs, cotangents = make(kind, T=50)
    first, exact = both(inputs, cotangents, None, chunk=50)
    second, _ = both(inputs, cotangents, None, chunk=7)
    agree(first, exact, FLOAT32, names(kind))
    agree(second, exact, FLOAT32, names(kind))


def test_a_row_in_two_parts_is_the_whole_row():
    (*inputs, rate, h0), _ = make("mamba", T=40)
    whole, last = selective_scan(*inputs, rate, h0=h0)
    early, middle = selective_scan(*(x[:, :17] for x in inputs), rate, h0=h0)
    late, end = selective_scan(*(x[:, 17:] for x in inputs), rate, h0=middle)
    np.testing.assert_allclose(np.concatenate([early, late], 1), whole, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(end, last, rtol=1e-5, atol=1e-5)


def test_states_of_a_chunk_alone_are_in_memory():
    """States of all tokens would be 32 MiB, and their gradients again; all that is set aside is less."""
    shape = jax.ShapeDtypeStruct
    E, S, T = 64, 16, 8192
    args = shape((1, T, E), np.float32), shape((1, T, E), np.float32), shape((1, T, S), np.float32)
    gradient = jax.grad(
        lambda u, dt, k, q, r: selective_scan(u, dt, k, q, r)[0].sum(), argnums=(0, 1, 2, 3, 4)
    )
    program = jax.jit(gradient).lower(*args, args[2], shape((E, S), np.float32)).compile()
    assert program.memory_analysis().temp_size_in_bytes < 4 * T * E * S


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"u": np.ones((2, 8))}, "u has shape"),
        ({"dt": np.ones((2, 8, 3))}, r"dt has shape \(2, 8, 3\); it must be \(2, 8, 4\)"),
        ({"key": np.ones((2, 7, 3))}, "key has shape"),
        ({"query": np.ones((2, 8, 2))}, r"query has shape \(2, 8, 2\); it must be \(2, 8, 3\)"),
        ({"rate": np.ones(4)}, r"rate has shape \(4,\); it must be \(4, 3\)"),
        ({"h0": np.ones((2, 4))}, "h0 has shape"),
        ({"chunk": 0}, "chunk is 0; it must be a positive integer"),
        ({"u": np.ones((2, 8, 4), np.int32)}, "u has dtype int32"),
        ({"segment_ids": np.ones((2, 8))}, "segment_ids has dtype"),
    ],
)
def test_bad_arguments_are_named(changes, words):
    good = {"u": np.ones((2, 8, 4)), "dt": np.ones((2, 8, 4)), "key": np.ones((2, 8, 3))}
    with pytest.raises(ValueError, match=words):
        selective_scan(**{**good, "query": np.ones((2, 8, 3)), "rate": -np.ones((4, 3)), **changes})
