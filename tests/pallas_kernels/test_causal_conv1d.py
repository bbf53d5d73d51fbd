"""Causal convolution against loops in NumPy, and its gradients against autodiff of the loops in JAX."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import causal_conv1d

# Sums of four products at epsilon 2.2e-16, gradients of w of 22.
FLOAT64 = {"rtol": 1e-12, "atol": 1e-12}


def make(T=11, W=4):
    rng = np.random.default_rng(T)
    ids = np.repeat([[0, 3]], [1, T - 1], axis=1) if T > 1 else np.zeros((1, 1), int)
    ids = np.concatenate([ids, np.arange(T)[None] // 5])
    shapes = ((2, T, 3), (W, 3), (3,), (2, W - 1, 3), (2, T, 3))
    return [rng.standard_normal(s) for s in shapes], ids


def in_loops(xp, x, w, bias, state, ids, silu):
    """One output at a time, from its taps; ``xp`` is numpy or jax.numpy."""
    W, rows = w.shape[0], []
    for n in range(x.shape[0]):
        row = []
        for t in range(x.shape[1]):
            z = bias
            for back in range(W):
                s = t - back
                if ids is None or ids[n, max(s, 0)] == ids[n, t]:
                    z = z + w[W - 1 - back] * (x[n, s] if s >= 0 else state[n, s])
            row.append(z / (1 + xp.exp(-z)) if silu else z)
        rows.append(xp.stack(row))
    return xp.stack(rows)


@pytest.mark.parametrize("T,W", [(11, 4), (1, 4), (2, 4), (6, 1)])
@pytest.mark.parametrize("silu,segments", [(False, True), (True, False), (True, True)])
def test_equals_the_loops_with_every_gradient(T, W, silu, segments):
    (*args, dy), ids = make(T, W)
    ids = ids if segments else None
    with jax.enable_x64(True):
        options = {"segment_ids": ids, "activation": "silu" if silu else None}

        def run(x, w, bias, state):
            return causal_conv1d(x, w, bias, initial_state=state, **options)

        y, pull = jax.vjp(jax.jit(run), *args)
        _, pull_loops = jax.vjp(lambda *xs: in_loops(jnp, *xs, ids, silu), *args)
        got, expected = pull(jnp.asarray(dy)), pull_loops(jnp.asarray(dy))
    np.testing.assert_allclose(y, in_loops(np, *args, ids, silu), **FLOAT64)
    for a, b in zip(got, expected, strict=True):
        np.testing.assert_allclose(a, b, **FLOAT64)


def test_two_halves_with_the_state_equal_the_whole():
    (x, w, bias, _, _), _ = make()
    whole = causal_conv1d(x, w, bias)
    first, state = causal_conv1d(x[:, :2], w, bias, return_state=True)
    rest = causal_conv1d(x[:, 2:], w, bias, initial_state=state)
    np.testing.assert_allclose(np.concatenate([first, rest], axis=1), whole, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    "words,change",
    [
        ("x has shape (11, 3)", {"x": np.ones((11, 3))}),
        ("w has shape (4, 2)", {"w": np.ones((4, 2))}),
        ("bias has shape (4,)", {"bias": np.ones(4)}),
        ("initial_state has shape (2, 4, 3)", {"initial_state": np.ones((2, 4, 3))}),
        ("x has dtype int32", {"x": np.ones((2, 11, 3), np.int32)}),
        ("segment_ids is float32", {"segment_ids": np.ones((2, 11), np.float32)}),
        ("activation is 'gelu'", {"activation": "gelu"}),
        ("does not have; it has 'xla'", {"implementation": "pallas_tpu"}),
    ],
)
def test_bad_arguments_are_named(words, change):
    (x, w, *_), _ = make()
    with pytest.raises(ValueError) as error:
        causal_conv1d(**({"x": x, "w": w} | change))
    assert words in str(error.value)
