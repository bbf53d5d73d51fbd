"""Attention against three oracles: loops in NumPy, ``jax.nn`` and the reference in float64."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels import dot_product_attention
from pallas_kernels.reference import attention as reference

# Outputs and gradients are sums of fewer than 100 products of unit normals: at float32's
# epsilon of 1.2e-7 some 1e-6 of rounding, in either implementation.
FLOAT32 = {"rtol": 1e-5, "atol": 5e-6}
# The same sums at epsilon 2.2e-16.
FLOAT64 = {"rtol": 1e-11, "atol": 1e-12}


def make(B=2, T=11, S=None, N=4, K=2, H=8, dtype=np.float32, seed=0):
    """Random q, k, v and an output cotangent."""
    S = T if S is None else S
    rng = np.random.default_rng(seed)
    shapes = ((B, T, N, H), (B, S, K, H), (B, S, K, H), (B, T, N, H))
    return [rng.standard_normal(s).astype(dtype) for s in shapes]


def with_gradients(function, q, k, v, dout, **options):
    """Output and the gradients of q, k, v, as NumPy arrays."""
    out, pull = jax.vjp(lambda q, k, v: function(q, k, v, **options), q, k, v)
    return [np.asarray(x) for x in (out, *pull(jnp.asarray(dout)))]


def in_loops(q, k, v, *, bias=None, mask=None, scale=None, is_causal=False, window=None, q_seg=None,
             kv_seg=None, cap=None):  # fmt: skip
    """Attention one query and one head at a time, in NumPy float64."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    (B, T, N, H), (_, S, K, _) = q.shape, k.shape
    out = np.zeros_like(q)
    for b, t, n in itertools.product(range(B), range(T), range(N)):
        head, keys, logits = n // (N // K), [], []
        for s in range(S):
            if is_causal and s > t:
                continue
            if window is not None and not t - window[0] <= s <= t + window[1]:
                continue
            if q_seg is not None and q_seg[b, t] != kv_seg[b, s]:
                continue
            if mask is not None and not np.broadcast_to(mask, (B, N, T, S))[b, n, t, s]:
                continue
            x = float(q[b, t, n] @ k[b, s, head]) * (H**-0.5 if scale is None else scale)
            x = x if cap is None else cap * np.tanh(x / cap)
            x += 0 if bias is None else np.broadcast_to(bias, (B, N, T, S))[b, n, t, s]
            keys.append(s)
            logits.append(x)
        if keys:
            weights = np.exp(np.array(logits) - max(logits))
            out[b, t, n] = weights / weights.sum() @ v[b, keys, head]
    return out


JAX_NN_CASES = {
    "plain": {},
    "causal": {"is_causal": True},
    "scale": {"scale": 0.3},
    "window int": {"local_window_size": 3},
    "window pair": {"local_window_size": (2, 1)},
    "causal window": {"is_causal": True, "local_window_size": (4, 0)},
    "window of one": {"is_causal": True, "local_window_size": (0, 0)},
    "window longer than the row": {"is_causal": True, "local_window_size": 100},
}


@pytest.mark.parametrize("case", JAX_NN_CASES)
@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (4, 1)], ids=str)
def test_equals_jax_nn(case, heads):
    q, k, v, dout = make(N=heads[0], K=heads[1])
    ours = with_gradients(dot_product_attention, q, k, v, dout, **JAX_NN_CASES[case])
    theirs = with_gradients(jax.nn.dot_product_attention, q, k, v, dout, **JAX_NN_CASES[case])
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a, b, **FLOAT32)


@pytest.mark.parametrize("T,S", [(5, 9), (9, 5), (1, 7), (7, 1)])
@pytest.mark.parametrize("is_causal", [False, True])
def test_equals_jax_nn_where_lengths_differ(T, S, is_causal):
    q, k, v, dout = make(T=T, S=S)
    ours = with_gradients(dot_product_attention, q, k, v, dout, is_causal=is_causal)
    theirs = with_gradients(jax.nn.dot_product_attention, q, k, v, dout, is_causal=is_causal)
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a, b, **FLOAT32)


@pytest.mark.parametrize("heads_axis", [1, 4])
@pytest.mark.parametrize("batch_axis", [1, 2])
def test_bias_and_mask_equal_jax_nn_in_value_and_gradient(heads_axis, batch_axis):
    q, k, v, dout = make()
    rng = np.random.default_rng(1)
    shape = (batch_axis, heads_axis, 11, 11)
    bias = rng.standard_normal(shape).astype(np.float32)
    mask = rng.random(shape) < 0.5
    mask[..., 0] = True  # no empty row: there the two differ by intention

    def run(attend):
        return with_gradients(
            lambda q, k, bias: attend(q, k, v, bias=bias, mask=mask, is_causal=True), q, k, bias, dout
        )

    for a, b in zip(run(dot_product_attention), run(jax.nn.dot_product_attention), strict=True):
        np.testing.assert_allclose(a, b, **FLOAT32)


@st.composite
def problems(draw):
    # Few distinct shapes: each costs its own compilations.
    B, H = 2, 6
    T, S = draw(st.sampled_from([(1, 1), (7, 7), (7, 3), (3, 7)]))
    N, K = draw(st.sampled_from([(1, 1), (6, 2)]))
    q, k, v, dout = make(B, T, S, N, K, H, np.float64, draw(st.integers(0, 99)))
    rng = np.random.default_rng(draw(st.integers(0, 99)))
    options = {"is_causal": draw(st.booleans()), "scale": draw(st.sampled_from([None, 0.7, 3.0]))}
    window = draw(st.none() | st.tuples(st.integers(0, 6), st.integers(0, 6)))
    cap = draw(st.none() | st.sampled_from([0.5, 20.0]))
    bias, mask, q_seg, kv_seg = None, None, None, None
    if draw(st.booleans()):
        bias = rng.standard_normal((draw(st.sampled_from([1, B])), draw(st.sampled_from([1, N])), T, S))
    if draw(st.booleans()):
        mask = rng.random((draw(st.sampled_from([1, B])), draw(st.sampled_from([1, N])), T, S)) < 0.6
    if draw(st.booleans()):
        q_seg, kv_seg = (np.sort(rng.integers(0, 3, (B, n)), axis=1) for n in (T, S))
    options |= {"bias": bias, "mask": mask}
    return (q, k, v, dout), options, window, cap, q_seg, kv_seg


@pytest.mark.slow
@settings(max_examples=25, deadline=None, derandomize=True)
@given(problems())
def test_float64_equals_loops_and_reference(problem):
    (q, k, v, dout), options, window, cap, q_seg, kv_seg = problem
    with jax.enable_x64(True):
        expected = in_loops(q, k, v, window=window, cap=cap, q_seg=q_seg, kv_seg=kv_seg, **options)
        ours = with_gradients(
            dot_product_attention, q, k, v, dout, local_window_size=window, logits_soft_cap=cap,
            q_segment_ids=q_seg, kv_segment_ids=kv_seg, **options,
        )  # fmt: skip
        options["scale"] = options["scale"] or q.shape[-1] ** -0.5
        plain = with_gradients(
            lambda *qkv, **rest: reference.dot_product_attention(*qkv, **rest)[0],
            q, k, v, dout, window=window, logits_soft_cap=cap,
            q_segment_ids=q_seg, kv_segment_ids=kv_seg, **options,
        )  # fmt: skip
    assert ours[0].dtype == np.float64
    np.testing.assert_allclose(ours[0], expected, **FLOAT64)
    for a, b in zip(ours, plain, strict=True):
        np.testing.assert_allclose(a, b, **FLOAT64)


def test_gradients_equal_finite_differences():
    q, k, v, dout = make(B=1, T=5, N=2, K=1, H=4, dtype=np.float64)
    options = {"is_causal": True, "window": (2, 0), "cap": 2.0}

    def objective(q, k, v):
        return np.sum(in_loops(q, k, v, **options) * dout)

    with jax.enable_x64(True):
        same = {"is_causal": True, "local_window_size": (2, 0), "logits_soft_cap": 2.0}
        _, *gradients = with_gradients(dot_product_attention, q, k, v, dout, **same)
    for i, gradient in enumerate(gradients):
        for index in np.ndindex(gradient.shape):
            step = [np.zeros_like(x) for x in (q, k, v)]
            step[i][index] = 1e-5
            up = objective(*(x + d for x, d in zip((q, k, v), step, strict=True)))
            down = objective(*(x - d for x, d in zip((q, k, v), step, strict=True)))
            # Central differences err by the square of the step, and by rounding over the step: 1e-10 each.
            np.testing.assert_allclose(gradient[index], (up - down) / 2e-5, rtol=1e-6, atol=1e-8)


def test_packed_documents_equal_each_document_alone():
    lengths = (1, 6, 4)
    q, k, v, dout = make(B=1, T=sum(lengths))
    segments = np.repeat([1, 2, 3], lengths)[None].astype(np.int32)
    packed = with_gradients(dot_product_attention, q, k, v, dout, is_causal=True, q_segment_ids=segments)
    start = 0
    for n in lengths:
        part = slice(start, start + n)
        alone = with_gradients(dot_product_attention, *(x[:, part] for x in (q, k, v, dout)), is_causal=True)
        for a, b in zip(packed, alone, strict=True):
            np.testing.assert_allclose(a[:, part], b, **FLOAT32)
        start += n


def test_a_query_with_no_key_gives_zero_and_no_gradient():
    q, k, v, dout = make()
    mask = np.ones((1, 1, 11, 11), bool)
    mask[..., 3, :] = False
    out, dq, dk, dv = with_gradients(dot_product_attention, q, k, v, dout, mask=mask)
    assert np.all(out[:, 3] == 0) and np.all(dq[:, 3] == 0)
    kept = np.delete(np.arange(11), 3)
    rest = with_gradients(dot_product_attention, q[:, kept], k, v, dout[:, kept])
    np.testing.assert_allclose(out[:, kept], rest[0], **FLOAT32)
    np.testing.assert_allclose(dk, rest[2], **FLOAT32)
    np.testing.assert_allclose(dv, rest[3], **FLOAT32)
    assert np.all(np.isfinite(dq))


def test_extreme_logits_stay_finite_and_right():
    q, k, v, dout = make()
    parts = with_gradients(dot_product_attention, 1e4 * q, 1e4 * k, v, dout, is_causal=True)
    assert all(np.all(np.isfinite(x)) for x in parts)
    # Logits of 1e8 leave one key a row: its value, exactly.
    np.testing.assert_allclose(parts[0], in_loops(1e4 * q, 1e4 * k, v, is_causal=True), rtol=1e-6)


def test_nan_reaches_the_rows_that_see_it_and_no_others():
    q, k, v, _ = make(B=1, T=8)
    k[0, 5] = np.nan
    out = np.asarray(dot_product_attention(q, k, v, is_causal=True))
    assert np.all(np.isfinite(out[:, :5])) and np.all(np.isnan(out[:, 5:]))


def test_bfloat16_within_its_rounding_of_float64():
    q, k, v, _ = make(T=64, dtype=jnp.bfloat16)
    out = dot_product_attention(q, k, v, is_causal=True)
    assert out.dtype == jnp.bfloat16
    # Probabilities and output are each rounded to 8 bits: 2 x 2^-9 of values up to about 4.
    exact = in_loops(q, k, v, is_causal=True)
    np.testing.assert_allclose(np.asarray(out, np.float64), exact, rtol=2**-7, atol=2**-7)


@pytest.mark.parametrize("wrap", ["jit", "vmap", "checkpoint", "scan"])
def test_same_under_transformations(wrap):
    q, k, v, dout = make(B=3)

    def attend(q, k, v):
        return dot_product_attention(q, k, v, is_causal=True, local_window_size=(5, 0))

    def by_row(q, k, v):
        return jax.vmap(lambda *row: attend(*(x[None] for x in row))[0])(q, k, v)

    def scanned(q, k, v):
        return jax.lax.scan(lambda _, qkv: (None, attend(*(x[None] for x in qkv))[0]), None, (q, k, v))[1]

    wrapped = {"jit": jax.jit(attend), "vmap": by_row, "checkpoint": jax.checkpoint(attend), "scan": scanned}
    plain = with_gradients(attend, q, k, v, dout)
    for a, b in zip(plain, with_gradients(wrapped[wrap], q, k, v, dout), strict=True):
        np.testing.assert_allclose(a, b, **FLOAT32)


def test_forward_mode_agrees_with_reverse_mode():
    q, k, v, dout = make()
    _, tangent = jax.jvp(lambda q: dot_product_attention(q, k, v, is_causal=True), (q,), (np.ones_like(q),))
    _, dq, _, _ = with_gradients(dot_product_attention, q, k, v, dout, is_causal=True)
    np.testing.assert_allclose(np.sum(np.asarray(tangent) * dout), np.sum(dq), rtol=1e-4, atol=1e-4)


def ids(*shape):
    return np.ones(shape, np.int32)


BAD = {
    "q has shape": lambda q, k, v: ((q[0], k, v), {}),
    "k has dtype float16": lambda q, k, v: ((q, k.astype(np.float16), v), {}),
    "q has dtype int32": lambda q, k, v: ((q.astype(np.int32), k, v), {}),
    "v has shape": lambda q, k, v: ((q, k, v[:, 1:]), {}),
    "k has batch 1": lambda q, k, v: ((q, k[:1], v[:1]), {}),
    "k has head size 4": lambda q, k, v: ((q, k[..., :4], v[..., :4]), {}),
    "no axis may be empty": lambda q, k, v: ((q[:, :0], k, v), {}),
    "q has 3 heads": lambda q, k, v: ((q[:, :, :3], k, v), {}),
    "mask has dtype": lambda q, k, v: ((q, k, v), {"mask": np.ones((1, 1, 11, 11))}),
    "mask has shape": lambda q, k, v: ((q, k, v), {"mask": np.ones((11, 11), bool)}),
    "bias has shape": lambda q, k, v: ((q, k, v), {"bias": np.ones((1, 3, 11, 11), np.float32)}),
    "q_segment_ids has shape": lambda q, k, v: ((q, k, v), {"q_segment_ids": ids(2, 7)}),
    "kv_segment_ids has shape": lambda q, k, v: (
        (q, k, v), {"q_segment_ids": ids(2, 11), "kv_segment_ids": ids(2, 7)}
    ),
    "q_segment_ids is None": lambda q, k, v: ((q, k, v), {"kv_segment_ids": ids(2, 11)}),
    "kv_segment_ids is None": lambda q, k, v: ((q, k[:, 1:], v[:, 1:]), {"q_segment_ids": ids(2, 11)}),
    "q_segment_ids has dtype": lambda q, k, v: ((q, k, v), {"q_segment_ids": np.ones((2, 11), np.float32)}),
    "local_window_size is -1": lambda q, k, v: ((q, k, v), {"local_window_size": -1}),
    "local_window_size is (1,)": lambda q, k, v: ((q, k, v), {"local_window_size": (1,)}),
    "local_window_size is 2.5": lambda q, k, v: ((q, k, v), {"local_window_size": 2.5}),
    "logits_soft_cap is 0": lambda q, k, v: ((q, k, v), {"logits_soft_cap": 0}),
    "implementation is 'flash'": lambda q, k, v: ((q, k, v), {"implementation": "flash"}),
    "'cudnn': q has dtype float32": lambda q, k, v: ((q, k, v), {"implementation": "cudnn"}),
    "implementation is 'fast'": lambda q, k, v: ((q, k, v), {"implementation": ("xla", "fast")}),
    "implementation is ()": lambda q, k, v: ((q, k, v), {"implementation": ()}),
}  # fmt: skip


@pytest.mark.parametrize("words", BAD)
def test_bad_arguments_are_named(words):
    args, options = BAD[words](*make()[:3])
    with pytest.raises(ValueError) as error:
        dot_product_attention(*args, **options)
    assert words in str(error.value)


@pytest.mark.parametrize(
    "options",
    [
        {"q_segment_ids": ids(2, 16)},
        {"mask": np.ones((2, 4, 16, 16), bool)},
        {"bias": np.ones((2, 4, 16, 16), np.float32)},
    ],
    ids=["segments", "mask", "bias"],
)
def test_bhtd_given_for_btnh_is_recognised(options):
    q, k, v = (np.swapaxes(x, 1, 2) for x in make(T=16, N=4, K=4)[:3])
    with pytest.raises(ValueError, match="swap axes 1 and 2"):
        dot_product_attention(q, k, v, **options)


def test_bhtd_with_grouped_heads_is_recognised():
    q, k, v = (np.swapaxes(x, 1, 2) for x in make(T=11, S=7, N=4, K=2)[:3])
    with pytest.raises(ValueError, match="swap axes 1 and 2"):
        dot_product_attention(q, k, v)


def test_a_preferred_implementation_is_skipped_only_when_others_are_named():
    q, k, v, _ = make()
    out = dot_product_attention(q, k, v, implementation=("cudnn", "xla"))
    np.testing.assert_array_equal(out, dot_product_attention(q, k, v, implementation="xla"))
