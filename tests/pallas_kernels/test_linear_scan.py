"""The diagonal recurrence against loops in NumPy, ``scipy.signal.lfilter`` and its reference."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.signal
from hypothesis import given, settings
from hypothesis import strategies as st
from scan_oracle import check, exact, problem, with_gradients

from pallas_kernels import dispatch, linear_scan
from pallas_kernels.reference import linear_scan as reference

XLA = ("xla", "xla_chunked")
compiled = jax.jit(linear_scan, static_argnames=("implementation", "reverse"))
# A state is a sum of unit normals with weights that decay: some 1e-6 of rounding at float32's 1.2e-7.
FLOAT32 = {"rtol": 2e-5, "atol": 2e-5}
# The same sums at epsilon 2.2e-16.
FLOAT64 = {"rtol": 1e-11, "atol": 1e-11}
# Results are rounded to 8 bits (2^-9); da is a product of a rounded state, up to 30 times the unit.
BFLOAT16 = {"rtol": 2**-6, "atol": 2**-5}


@pytest.mark.parametrize("dtype", ["float64", "complex128"])
@pytest.mark.parametrize("reverse", [False, True])
def test_reference_and_its_autodiff_equal_the_loops(dtype, reverse):
    arrays, ids = problem(T=11, F=3, dtype=dtype, segments=True)
    with jax.enable_x64(True):
        plain = with_gradients(arrays, ids, reference.linear_scan, reverse=reverse)
    check(plain, exact(*arrays, reverse=reverse, ids=ids), **FLOAT64)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    T=st.sampled_from([1, 2, 19]),
    dtype=st.sampled_from(["float64", "complex128"]),
    reverse=st.booleans(),
    segments=st.booleans(),
    implementation=st.sampled_from(XLA),
    seed=st.integers(0, 99),
)
def test_float64_equals_the_loops(T, dtype, reverse, segments, implementation, seed):
    arrays, ids = problem(T=T, F=3, dtype=dtype, seed=seed, segments=segments)
    with jax.enable_x64(True):
        got = with_gradients(arrays, ids, reverse=reverse, implementation=implementation)
    check(got, exact(*arrays, reverse=reverse, ids=ids), **FLOAT64)
    assert got[0].dtype == dtype


@pytest.mark.parametrize("implementation", XLA)
@pytest.mark.parametrize(
    "dtype,tolerance", [("float32", FLOAT32), ("complex64", FLOAT32), (jnp.bfloat16, BFLOAT16)], ids=str
)
def test_lower_precision_equals_the_loops(dtype, tolerance, implementation):
    arrays, ids = problem(T=70, F=5, dtype=dtype, segments=True)
    got = with_gradients(arrays, ids, implementation=implementation)
    check(got, exact(*arrays, ids=ids), **tolerance)
    state = np.complex64 if dtype == "complex64" else np.float32
    assert [x.dtype for x in got] == [dtype, state, dtype, dtype, state]


@pytest.mark.parametrize("implementation", XLA)
@pytest.mark.parametrize("decay", [0.0, 1e-6, 0.5, 1 - 1e-6, 1.0, -0.999])
def test_constant_decay_equals_lfilter(decay, implementation):
    rng = np.random.default_rng(0)
    b, h0 = rng.standard_normal((2, 500, 3)), rng.standard_normal((2, 3))
    with jax.enable_x64(True):
        h, h_last = compiled(np.full_like(b, decay), b, h0, implementation=implementation)
    want, _ = scipy.signal.lfilter([1], [1, -decay], b, axis=1, zi=decay * h0[:, None])
    # 500 additions without decay, at epsilon 2.2e-16 of sums up to about 100
    np.testing.assert_allclose(h, want, rtol=1e-9, atol=1e-10)
    np.testing.assert_array_equal(h_last, h[:, -1])


@pytest.mark.parametrize("implementation", XLA)
def test_bfloat16_carries_float32(implementation):
    a, b = np.ones((1, 600, 1), jnp.bfloat16), np.full((1, 600, 1), 2.0**-4, jnp.bfloat16)
    _, h_last = compiled(a, b, implementation=implementation)
    # 600 x 2^-4; a carry in bfloat16 stands still at 16
    np.testing.assert_array_equal(h_last, [[37.5]])


@pytest.mark.parametrize("implementation", XLA)
def test_nan_and_infinity_stay_in_their_row_feature_and_segment(implementation):
    (a, b, *_), ids = problem(T=21, F=3, segments=True)
    b[1, 4, 0], b[1, 5, 1] = np.nan, np.inf
    h = np.asarray(compiled(a, b, segment_ids=ids, implementation=implementation)[0])
    bad = ~np.isfinite(h)
    assert bad[1, 4:8, 0].all() and bad[1, 5:8, 1].all() and bad.sum() == 7  # the next segment starts at 8


def test_packed_documents_equal_each_alone():
    (a, b, *_), _ = problem(B=1, T=12, F=4)
    ids = np.repeat([5, 5, 2], [1, 6, 5])[None]
    h, _ = compiled(a, b, segment_ids=ids)
    for part in (slice(0, 7), slice(7, 12)):
        np.testing.assert_allclose(h[:, part], compiled(a[:, part], b[:, part])[0], **FLOAT32)


def test_several_feature_axes_are_one():
    arrays, _ = problem(F=12)
    split = [x.reshape(*x.shape[:-1], 3, 4) for x in arrays]
    for x, y in zip(with_gradients(split), with_gradients(arrays), strict=True):
        np.testing.assert_array_equal(x.reshape(y.shape), y)


def test_a_real_initial_state_of_a_complex_scan_has_a_real_gradient():
    (a, b, h0, *_), _ = problem(T=3, F=2, dtype="complex64")
    gradient = jax.grad(lambda h0: jnp.abs(linear_scan(a, b, h0)[1]).sum())(h0.real)
    assert gradient.dtype == np.float32 and np.all(np.isfinite(gradient))


@pytest.mark.parametrize("wrap", ["vmap", "checkpoint", "scan"])
@pytest.mark.parametrize("implementation", [None, "xla"])
def test_same_under_transformations(wrap, implementation):
    arrays, ids = problem(B=2, T=9, F=3, segments=True)

    def plain(a, b, h0, segment_ids):
        return linear_scan(a, b, h0, segment_ids=segment_ids, implementation=implementation)

    def row(xs):
        return jax.tree.map(lambda x: x[0], plain(*(x[None] for x in xs)))

    def scanned(xs):
        return jax.lax.scan(lambda _, x: (None, row(x)), None, xs)[1]

    by_row = {"vmap": jax.vmap(row), "scan": scanned, "checkpoint": jax.checkpoint(lambda xs: plain(*xs))}
    got = with_gradients(arrays, ids, lambda *xs, segment_ids: by_row[wrap]((*xs, segment_ids)))
    check(got, exact(*arrays, ids=ids), **FLOAT32)


def test_segments_given_under_vmap_to_all_rows_alike():
    arrays, ids = problem(B=2, T=9, F=3, segments=True)
    ids[:] = ids[1]

    def mapped(a, b, h0, segment_ids):
        one = jax.vmap(lambda a, b, h0: linear_scan(a[None], b[None], h0[None], segment_ids=segment_ids[:1]))
        return jax.tree.map(lambda x: x[:, 0], one(a, b, h0))

    check(with_gradients(arrays, ids, mapped), exact(*arrays, ids=ids), **FLOAT32)


def test_every_platform_is_lowered_from_one_trace():
    x = jax.ShapeDtypeStruct((1, 16, 128), jnp.float32)
    traced = jax.jit(lambda a, b: linear_scan(a, b)[0]).trace(x, x)
    kernels = {
        p: "tpu_custom_call" in traced.lower(lowering_platforms=(p,)).as_text() for p in ("tpu", "cpu")
    }
    assert kernels == {"tpu": True, "cpu": False}


BAD = {
    "a has shape (2, 21)": lambda a, b: ((a[..., 0], b), {}),
    "a has dtype int32": lambda a, b: ((a.astype(np.int32), b), {}),
    "no axis may be empty": lambda a, b: ((a[:, :0], b[:, :0]), {}),
    "b has shape (2, 21, 3)": lambda a, b: ((a, b[..., :3]), {}),
    "b has dtype float16; it must be that of a": lambda a, b: ((a, b.astype(np.float16)), {}),
    "h0 has shape (2, 21, 4); it must be (2, 4)": lambda a, b: ((a, b, b), {}),
    "h0 has dtype complex64": lambda a, b: ((a, b, b[:, 0].astype(np.complex64)), {}),
    "h0 has dtype int32": lambda a, b: ((a, b, b[:, 0].astype(np.int32)), {}),
    "segment_ids has shape (21,)": lambda a, b: ((a, b), {"segment_ids": np.zeros(21, np.int32)}),
    "segment_ids has dtype float32": lambda a, b: (
        (a, b), {"segment_ids": np.zeros((2, 21), np.float32)}
    ),
    "block_sizes is (100, 128)": lambda a, b: ((a, b), {"block_sizes": (100, 128)}),
    "block_sizes is 128": lambda a, b: ((a, b), {"block_sizes": 128}),
    "implementation is 'flash'": lambda a, b: ((a, b), {"implementation": "flash"}),
    "does not have; it has 'xla', 'xla_chunked', 'pallas_tpu'": lambda a, b: (
        (a, b), {"implementation": "cudnn"}
    ),
    "'pallas_tpu': a has dtype float16": lambda a, b: (
        (a.astype(np.float16), b.astype(np.float16)), {"implementation": "pallas_tpu"}
    ),
}  # fmt: skip


@pytest.mark.parametrize("words", BAD)
def test_bad_arguments_are_named(words):
    args, options = BAD[words](*problem(F=4)[0][:2])
    with pytest.raises(ValueError) as error:
        linear_scan(*args, **options)
    assert words in str(error.value)


def test_a_dtype_that_the_tpu_kernel_does_not_take_goes_to_the_next():
    a = np.ones((1, 2, 3), np.float16)
    with dispatch.target("tpu"):
        h, _ = linear_scan(a, a)
    np.testing.assert_array_equal(h[0, :, 0], [1, 2])
