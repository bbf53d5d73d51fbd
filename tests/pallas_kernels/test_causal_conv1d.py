"""Causal convolution against loops and ``np.convolve``, its gradients against the same loops backwards."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conv_oracle import check, exact, problem, with_gradients
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels import causal_conv1d, dispatch
from pallas_kernels.reference import causal_conv1d as reference

# Sums of W products and, for w and bias, of some 40 tokens, at epsilon 2.2e-16.
FLOAT64 = {"rtol": 1e-12, "atol": 1e-12}
# The same sums at float32's 1.2e-7.
FLOAT32 = {"rtol": 1e-5, "atol": 1e-5}
# y and dx are rounded once, to 8 bits (2^-9); the gradients of w and bias, up to about 30, too.
BFLOAT16 = {"rtol": 2**-8, "atol": 2**-8}


def reference_y(*args, **options):
    return reference.causal_conv1d(*args, **options)[0]


@pytest.mark.parametrize("T,W", [(11, 4), (1, 4), (2, 4), (6, 1)])
@pytest.mark.parametrize("silu", [False, True])
def test_reference_and_its_autodiff_equal_the_loops(T, W, silu):
    arrays, ids = problem(T=T, W=W, dtype="float64", segments=True)
    with jax.enable_x64(True):
        got = with_gradients(arrays, ids, reference_y, silu=silu)
        _, last = reference.causal_conv1d(*arrays[:3], initial_state=arrays[3], segment_ids=ids)
    check(got, exact(*arrays, ids=ids, silu=silu), **FLOAT64)
    np.testing.assert_array_equal(last, np.concatenate([arrays[3], arrays[0]], axis=1)[:, T:])


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    shape=st.sampled_from([(1, 4), (3, 4), (19, 4), (7, 1), (5, 9)]),
    silu=st.booleans(),
    segments=st.booleans(),
    seed=st.integers(0, 99),
)
def test_float64_equals_the_loops(shape, silu, segments, seed):
    T, W = shape
    arrays, ids = problem(T=T, W=W, dtype="float64", seed=seed, segments=segments)
    if segments:
        ids = np.random.default_rng(seed).integers(0, 3, ids.shape).astype(np.int32)  # many runs, ids again
    with jax.enable_x64(True):
        got = with_gradients(arrays, ids, silu=silu)
    check(got, exact(*arrays, ids=ids, silu=silu), **FLOAT64)
    assert {x.dtype for x in got} == {np.dtype("float64")}


@pytest.mark.parametrize("dtype,tolerance", [("float32", FLOAT32), (jnp.bfloat16, BFLOAT16)], ids=str)
def test_lower_precision_equals_the_loops(dtype, tolerance):
    arrays, ids = problem(T=45, dtype=dtype, segments=True)
    got = with_gradients(arrays, ids, silu=True)
    check(got, exact(*arrays, ids=ids, silu=True), **tolerance)
    assert {x.dtype for x in got} == {np.dtype(dtype)}


def test_gradients_have_the_dtype_of_their_argument():
    (x, w, bias, state, dy), _ = problem()
    x, state, dy = (a.astype(jnp.bfloat16) for a in (x, state, dy))
    y, *gradients = with_gradients((x, w, bias, state, dy), silu=True)
    assert [a.dtype for a in (y, *gradients)] == [x.dtype, x.dtype, w.dtype, bias.dtype, state.dtype]


def test_one_channel_equals_numpys_convolution():
    (x, w, bias, _, _), _ = problem(T=50, dtype="float64")
    with jax.enable_x64(True):
        y = causal_conv1d(x, w, bias)
    for n, c in np.ndindex(2, 5):
        expected = np.convolve(x[n, :, c], w[::-1, c])[:50] + bias[c]
        np.testing.assert_allclose(y[n, :, c], expected, **FLOAT64)


def test_two_halves_with_the_state_equal_the_whole():
    (x, w, bias, _, _), _ = problem(T=11)
    whole = causal_conv1d(x, w, bias)
    first, state = causal_conv1d(x[:, :2], w, bias, return_state=True)
    rest = causal_conv1d(x[:, 2:], w, bias, initial_state=state)
    np.testing.assert_allclose(np.concatenate([first, rest], axis=1), whole, rtol=1e-6, atol=1e-6)


def test_packed_documents_equal_each_alone():
    (x, w, bias, *_), _ = problem(B=1, T=12)
    ids = np.repeat([5, 2, 5], [1, 6, 5])[None]
    y = causal_conv1d(x, w, bias, segment_ids=ids)
    for part in (slice(0, 1), slice(1, 7), slice(7, 12)):
        np.testing.assert_allclose(y[:, part], causal_conv1d(x[:, part], w, bias), rtol=1e-6, atol=1e-6)


def test_nan_stays_in_its_row_channel_and_segment():
    (x, w, bias, *_), ids = problem(T=24, segments=True)
    x[1, 14, 0], x[1, 17, 1] = np.nan, np.inf
    bad = ~np.isfinite(np.asarray(causal_conv1d(x, w, bias, segment_ids=ids)))
    assert bad[1, 14:16, 0].all() and bad[1, 17:21, 1].all() and bad.sum() == 6  # 16 and 21 begin segments


@pytest.mark.parametrize("implementation", ["xla", "pallas_tpu"])
def test_silu_and_its_derivative_at_extreme_values(implementation):
    z = np.array([-np.inf, -1e30, -200.0, -1e-30, 0.0, 200.0, 1e30, np.inf], np.float32)
    x, w = jnp.broadcast_to(z, (1, 3, 8)), jnp.ones((1, 8))
    options = {"activation": "silu", "implementation": implementation}
    with dispatch.interpret():
        y, pull = jax.vjp(lambda x: causal_conv1d(x, w, **options), x)
        dx = pull(jnp.ones_like(x))[0]
    # -inf times a gate of zero is NaN, as in jax.nn.silu
    np.testing.assert_allclose(y, jax.nn.silu(x), rtol=1e-6)
    np.testing.assert_allclose(dx[0, 0, 1:-1], [0, 0, 0.5, 0.5, 1, 1], atol=1e-6)


@pytest.mark.parametrize("wrap", ["vmap", "checkpoint", "scan"])
def test_same_under_transformations(wrap):
    arrays, ids = problem(T=9, segments=True)

    def plain(x, w, bias, initial_state, segment_ids, activation):
        return causal_conv1d(
            x, w, bias, initial_state=initial_state, segment_ids=segment_ids, activation=activation
        )

    def wrapped(x, w, bias, *, initial_state, segment_ids, activation):
        if wrap == "checkpoint":
            run = jax.checkpoint(plain, static_argnums=5)
            return run(x, w, bias, initial_state, segment_ids, activation)

        def row(xs):
            x, state, ids = (a[None] for a in xs)
            return plain(x, w, bias, state, ids, activation)[0]

        if wrap == "vmap":
            return jax.vmap(row)((x, initial_state, segment_ids))
        return jax.lax.scan(lambda _, xs: (None, row(xs)), None, (x, initial_state, segment_ids))[1]

    got = with_gradients(arrays, ids, wrapped, silu=True)
    check(got, exact(*arrays, ids=ids, silu=True), **FLOAT32)


def test_every_platform_is_lowered_from_one_trace():
    x, w = jax.ShapeDtypeStruct((1, 16, 128), jnp.float32), jax.ShapeDtypeStruct((4, 128), jnp.float32)
    gradient = jax.jit(jax.grad(lambda x, w: causal_conv1d(x, w).sum())).trace(x, w)
    kernels = {
        p: "tpu_custom_call" in gradient.lower(lowering_platforms=(p,)).as_text()
        for p in ("tpu", "cuda", "cpu")
    }
    assert kernels == {"tpu": True, "cuda": False, "cpu": False}


@pytest.mark.parametrize("dtype,W", [("float16", 4), ("float32", 17)])
def test_what_the_tpu_kernel_does_not_take_goes_to_the_next(dtype, W):
    x, w = np.ones((1, 2, 3), dtype), np.ones((W, 3), dtype)
    with dispatch.target("tpu"):
        np.testing.assert_array_equal(causal_conv1d(x, w)[0, :, 0], [1, 2])


BAD = {
    "x has shape (11, 3)": {"x": np.ones((11, 3))},
    "x has shape (2, 0, 3)": {"x": np.ones((2, 0, 3))},
    "w has shape (4, 2); it must be [width, 3]": {"w": np.ones((4, 2))},
    "bias has shape (4,); it must be (3,)": {"bias": np.ones(4)},
    "initial_state has shape (2, 4, 3); it must be (2, 3, 3)": {"initial_state": np.ones((2, 4, 3))},
    "x has dtype int32": {"x": np.ones((2, 11, 3), np.int32)},
    "segment_ids is float32": {"segment_ids": np.ones((2, 11), np.float32)},
    "segment_ids is int32 of shape (11,)": {"segment_ids": np.ones(11, np.int32)},
    "activation is 'gelu'": {"activation": "gelu"},
    "block_sizes is (8, 128); it must be (tokens, channels)": {"block_sizes": (8, 128)},
    "block_sizes is (16, 100)": {"block_sizes": (16, 100)},
    "block_sizes is 128": {"block_sizes": 128},
    "implementation is 'flash'": {"implementation": "flash"},
    "does not have; it has 'xla', 'pallas_tpu'": {"implementation": "cudnn"},
    "'pallas_tpu': x has dtype float16": {
        "x": np.ones((2, 11, 3), np.float16), "implementation": "pallas_tpu"
    },
    "'pallas_tpu': w has 17 taps; the kernel takes at most 16": {
        "w": np.ones((17, 3), np.float32), "implementation": "pallas_tpu"
    },
}  # fmt: skip


@pytest.mark.parametrize("words", BAD)
def test_bad_arguments_are_named(words):
    (x, w, *_), _ = problem(T=11, C=3)
    with pytest.raises(ValueError) as error:
        causal_conv1d(**({"x": x, "w": w} | BAD[words]))
    assert words in str(error.value)
