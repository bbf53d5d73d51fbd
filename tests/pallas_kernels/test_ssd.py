"""State-space duality and gated linear attention against loops, the quadratic form and float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ssd_oracles import FLOAT32, FLOAT64, agree, exact, make, running, segments, with_gradients

from pallas_kernels import decay_sums, ssd
from pallas_kernels.ssd import IMPLEMENTATIONS, Options

BOTH = ("xla_chunked", "pallas_tpu")


def in_loops(q, k, v, g, state0, scale, segment_ids):
    """Token by token and head by head, in NumPy."""
    (B, T, K, D), (N, E) = q.shape, v.shape[2:]
    o, state = np.zeros((B, T, N, E)), np.array(state0)
    for b in range(B):
        for n in range(N):
            S = state[b, n]
            for t in range(T):
                if t and segment_ids[b, t] != segment_ids[b, t - 1]:
                    S = np.zeros_like(S)
                decay = np.broadcast_to(np.exp(g[b, t, n]), D)
                S = decay[:, None] * S + np.outer(k[b, t, n // (N // K)], v[b, t, n])
                o[b, t, n] = scale * q[b, t, n // (N // K)] @ S
            state[b, n] = S
    return o, state


def quadratic(q, k, v, g, segment_ids, scale):
    """As attention without a softmax: every pair of tokens weighted by the decays between them."""
    (_, T, K, _), N = q.shape, v.shape[2]
    q, k = (np.repeat(x, N // K, axis=2) for x in (q, k))
    g = np.maximum(g[..., None] if g.ndim == 3 else g, -1e4)  # finite, for differences
    o = np.zeros(v.shape)
    for t in range(T):
        for s in range(t + 1):
            weight = np.exp(g[:, s + 1 : t + 1].sum(1))  # [B, N, D or 1]
            same = (segment_ids[:, s] == segment_ids[:, t])[:, None]
            pair = scale * same * (q[:, t] * weight * k[:, s]).sum(-1)
            o[:, t] += pair[..., None] * v[:, s]
    return o


@pytest.mark.parametrize("channel", [False, True])
def test_the_reference_equals_loops_and_the_quadratic_form(channel):
    arrays = make(T=19, channel=channel, dtype=np.float64)
    q, k, v, g, state0 = arrays[:5]
    seg = segments(2, 19)
    o, state = exact(arrays, scale=0.7, segment_ids=seg)[:2]
    agree((o, state), in_loops(q, k, v, g, state0, 0.7, seg), FLOAT64, ("o", "state"))
    arrays[4] = np.zeros_like(state0)
    o = exact(arrays, scale=0.7, segment_ids=seg)[0]
    agree((o,), (quadratic(q, k, v, g, seg, 0.7),), FLOAT64, ("o",))


def in_spans(*arrays, **options):
    """A state kept each 32 tokens at most, and heads of a query-key head one by one."""
    return ssd(*arrays, block_sizes={"span": 32, "heads": 1}, **options)


# B, T, K, N, D, E, chunk: three spans of chunks of which the last is ragged, one token, whole chunks with one
# query-key head for all; D > E and D < E.
SHAPES = [(2, 70, 2, 4, 8, 6, 16), (1, 1, 1, 1, 4, 3, None), (1, 64, 1, 3, 5, 16, 32)]


@pytest.mark.parametrize("implementation", BOTH)
@pytest.mark.parametrize("channel", [False, True], ids=["head", "channel"])
@pytest.mark.parametrize("shape", [*SHAPES[:2], pytest.param(SHAPES[2], marks=pytest.mark.slow)], ids=str)
def test_equals_float64_in_value_and_every_gradient(shape, channel, implementation):
    *sizes, chunk = shape
    arrays = make(*sizes, channel=channel)
    seg = segments(*sizes[:2])
    function = in_spans if shape is SHAPES[0] else ssd
    with running(implementation):
        ours = with_gradients(
            function, arrays, segment_ids=seg, scale=0.5, chunk=chunk, implementation=implementation
        )
    agree(ours, exact(arrays, scale=0.5, segment_ids=seg), FLOAT32)


@pytest.mark.parametrize("channel", [False, True], ids=["head", "channel"])
def test_float64_stays_float64(channel):
    arrays = make(channel=channel, dtype=np.float64)
    with jax.enable_x64(True):
        ours = with_gradients(ssd, arrays, chunk=16)
    assert {x.dtype for x in ours} == {np.dtype(np.float64)}
    agree(ours, exact(arrays), FLOAT64)


@pytest.mark.parametrize("implementation", BOTH)
@pytest.mark.parametrize("channel", [False, True], ids=["head", "channel"])
def test_bfloat16(channel, implementation):
    """The oracle takes the rounded inputs. Each factor of a product is rounded at 2^-9, so a sum of some
    hundred terms of size 1 is off by some 2^-9 of its root mean square of 10."""
    arrays = make(channel=channel, dtype=jnp.bfloat16, extreme=False)
    with running(implementation):
        ours = with_gradients(ssd, arrays, chunk=16, implementation=implementation)
    assert ours[0].dtype == ours[2].dtype == jnp.bfloat16 and ours[1].dtype == np.float32
    oracle = exact(arrays)
    for a, b in zip(ours, oracle, strict=True):
        error = np.sqrt(np.mean((a.astype(np.float64) - b) ** 2) / np.mean(b**2))
        assert error < 0.01, error


@pytest.mark.slow
@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    st.booleans(), st.sampled_from(BOTH), st.integers(0, 10**6), st.floats(1e-4, 60.0),
    st.lists(st.sampled_from([0, 1, 15, 16, 17, 31, 32, 33, 63, 64, 69]), max_size=4),
)  # fmt: skip
def test_any_decay_and_any_segments(channel, implementation, seed, size, starts):
    *sizes, chunk = SHAPES[0]  # the same programs as above
    arrays = make(*sizes, channel=channel, seed=seed)
    arrays[3] = arrays[3] * np.float32(size)
    seg = np.zeros((2, 70), np.int32)
    for t in starts:  # ids that fall and return as well
        seg[1, t:] = (seg[1, t:] + 1) % 2
    with running(implementation):
        ours = with_gradients(
            in_spans, arrays, segment_ids=seg, scale=0.5, chunk=chunk, implementation=implementation
        )
    agree(ours, exact(arrays, scale=0.5, segment_ids=seg), FLOAT32)


@pytest.mark.parametrize(
    "channel,implementation,T", [(False, BOTH[0], 256), (False, BOTH[1], 256), (True, BOTH[0], 64)]
)
def test_weak_decays_after_strong_ones_are_exact(channel, implementation, T):
    """Sums of log_decay reach 5,000 in a chunk of 256, where float32 has steps of 5e-4."""
    arrays = make(1, T, 1, 1, 4, 3, channel=channel, extreme=False)
    strong = 100 * T // 256
    arrays[3] = g = np.full(arrays[3].shape, -0.01, np.float32)
    g[:, :strong] = -49.7
    with running(implementation):
        ours = with_gradients(ssd, arrays, chunk=T, implementation=implementation)
    agree(ours, exact(arrays), FLOAT32)
    if T == 256:
        naive = np.cumsum(g[0, :, 0], dtype=np.float32)
        assert abs((naive[-1] - naive[strong - 1]) + 0.01 * 156) > 1e-3


def test_the_coarse_sums_are_exact_up_to_the_longest_chunk():
    g = np.random.default_rng(0).uniform(decay_sums.LOWEST, 0, decay_sums.LONGEST).astype(np.float32)
    coarse, fine = (np.asarray(x, np.float64) for x in decay_sums.exact_cumsum(jnp.asarray(g)))
    np.testing.assert_array_equal(coarse, np.cumsum(np.round(g.astype(np.float64) * 256) / 256))
    np.testing.assert_allclose(coarse + fine, np.cumsum(g.astype(np.float64)), rtol=0, atol=1e-5)


@pytest.mark.parametrize("implementation", BOTH)
def test_a_segment_is_as_if_alone(implementation):
    q, k, v, g, state0 = make(B=1, T=40)[:5]
    seg = np.repeat([[5, 2, 5]], [7, 25, 8], axis=1).astype(np.int32)
    with running(implementation):
        call = jax.jit(lambda *a, **o: ssd(*a, **o, chunk=16, implementation=implementation))
        o, state = call(q, k, v, g, state0=state0, segment_ids=seg)
        parts, begins = [], state0
        for t in (slice(0, 7), slice(7, 32), slice(32, 40)):
            part, last = call(q[:, t], k[:, t], v[:, t], g[:, t], state0=begins)
            parts.append(part)
            begins = np.zeros_like(state0)
    agree((o, state), (np.concatenate(parts, 1), last), FLOAT32, ("o", "state"))


@pytest.mark.parametrize("implementation", BOTH)
def test_under_vmap_remat_and_scan(implementation):
    arrays = make(B=3, T=20)

    def loss(q, k, v, g, state0, do):
        o, state = ssd(
            q, k, v, g, state0=state0, chunk=16, implementation=implementation, block_sizes={"span": 16}
        )
        return jnp.sum(o * do) + jnp.sum(state**2)

    def gradients(f):
        return [np.asarray(x) for x in jax.jit(jax.grad(f, argnums=range(5)))(*arrays[:6])]

    def in_parts(*arrays):
        mapped = jax.vmap(jax.checkpoint(loss))
        each = [x[:, None, None] for x in arrays]
        return jax.lax.scan(lambda s, x: (s + mapped(*x)[0], None), 0.0, each)[0]

    with running(implementation):
        agree(gradients(in_parts), gradients(loss), FLOAT32, ("dq", "dk", "dv", "dlog_decay", "dstate0"))


@pytest.mark.parametrize("implementation", BOTH)
def test_the_states_kept_are_those_before_each_span(implementation):
    arrays = make(T=70)[:5]
    arrays[3] = np.maximum(arrays[3], decay_sums.LOWEST)
    options = Options(scale=1.0, chunk=16, heads=None, span=32)
    with running(implementation):
        forward = jax.jit(
            functools.partial(IMPLEMENTATIONS[implementation].forward, options=options, keep=True)
        )
        kept = np.asarray(forward(*arrays)[2], np.float64)
    seg = np.zeros((2, 70), np.int32)
    want = [in_loops(*(x[:, :t] for x in arrays[:4]), arrays[4], 1.0, seg)[1] for t in (0, 32, 64)]
    agree((kept,), (np.stack(want, 1),), FLOAT32, ("kept",))


def test_states_are_kept_for_gradients_alone_and_alike_whatever_the_platform():
    q, k, v, g, state0 = make(T=70)[:5]

    def loss(q, k, v, g, implementation=None):
        return ssd(q, k, v, g, state0=state0, block_sizes={"span": 32}, implementation=implementation)[
            0
        ].sum()

    kept = "f32[2,2,3,2,128,128]"  # B, K, spans, N / K, and E and D in whole lanes
    assert kept not in str(jax.make_jaxpr(functools.partial(loss, implementation="pallas_tpu"))(q, k, v, g))
    # of no platform yet, both implementations are branches of one trace, and must keep the same
    traced = str(jax.make_jaxpr(jax.grad(loss, argnums=(0, 1, 2, 3)))(q, k, v, g))
    assert kept in traced and "platform_index" in traced


@pytest.mark.slow
def test_memory_grows_with_the_tokens_not_their_square():
    def shape(*s):
        return jax.ShapeDtypeStruct(s, jnp.float32)

    x = shape(1, 4096, 2, 32)
    f = jax.grad(lambda q, k, v, g: ssd(q, k, v, g, implementation="xla_chunked")[0].sum(), range(4))
    program = jax.jit(f).lower(x, x, x, shape(1, 4096, 2)).compile()
    # ten arrays like q; one of all pairs of tokens would be 128 of them
    assert program.memory_analysis().temp_size_in_bytes < 10 * (4 * 4096 * 2 * 32)


ERRORS = [
    ({"q": np.zeros((2, 3, 4))}, r"q has shape \(2, 3, 4\); it must have four axes"),
    ({"q": np.zeros((2, 5, 2, 8), np.int32)}, "q has dtype int32; it must be a floating dtype"),
    ({"k": np.zeros((2, 5, 2, 8), jnp.bfloat16)}, "k has dtype bfloat16; it must be that of q, float32"),
    ({"k": np.zeros((2, 5, 2, 7), np.float32)}, r"k has shape \(2, 5, 2, 7\); it must be that of q"),
    ({"v": np.zeros((2, 4, 2, 6), np.float32)}, "swap axes 1 and 2"),
    ({"v": np.zeros((2, 5, 3, 6), np.float32)}, "v has 3 heads; they must be a multiple of q's 2"),
    ({"v": np.zeros((2, 5, 4, 0), np.float32)}, "v has shape .*; no axis may be empty"),
    (
        {"log_decay": np.zeros((2, 5, 2), np.float32)},
        r"log_decay has shape \(2, 5, 2\); it must be \(2, 5, 4\)",
    ),
    ({"log_decay": np.zeros((2, 5, 4), np.int32)}, "log_decay has dtype int32"),
    ({"state0": np.zeros((2, 4, 6, 8), np.float32)}, r"state0 has shape .*; it must be \(2, 4, 8, 6\)"),
    ({"segment_ids": np.zeros((5, 2), np.int32)}, r"segment_ids has shape \(5, 2\); it must be \(2, 5\)"),
    ({"segment_ids": np.zeros((2, 5))}, "segment_ids has dtype float32; it must be an integer dtype"),
    ({"chunk": 48}, "chunk is 48; it must be None or one of 16, 32, 64, 128, 256, 512"),
    ({"block_sizes": {"chunk": 8}}, "block_sizes is .*; its keys are 'heads' and 'span'"),
    ({"block_sizes": {"span": 48}}, "block_sizes has span 48; it must be a power of two of at least 16"),
    (
        {"block_sizes": {"span": 32}, "chunk": 64},
        "block_sizes has span 32; it must be a power of two of at least 64, a chunk",
    ),
    ({"block_sizes": {"heads": 3}}, "block_sizes has heads 3; it must divide the 2 value heads"),
    ({"implementation": "cudnn"}, "'cudnn'.*which ssd does not have; it has 'xla_chunked', 'pallas_tpu'"),
]


@pytest.mark.parametrize("wrong,message", ERRORS, ids=[m for _, m in ERRORS])
def test_errors_name_the_argument(wrong, message):
    q, k, v, g, state0 = make(T=5)[:5]
    arguments = {"q": q, "k": k, "v": v, "log_decay": g, "state0": state0} | wrong
    if "v" in wrong and "swap" in message:
        arguments |= {"v": np.zeros((2, 4, 2, 6), np.float32)}
    with pytest.raises(ValueError, match=message):
        ssd(**arguments)


def test_the_tpu_kernels_refuse_what_they_cannot_hold():
    x = jax.ShapeDtypeStruct((1, 16, 1, 256), jnp.float32)
    v = jax.ShapeDtypeStruct((1, 16, 64, 256), jnp.float32)
    g = jax.ShapeDtypeStruct((1, 16, 64), jnp.float32)

    def run(q, k, v, g):
        return ssd(q, k, v, g, implementation="pallas_tpu")

    with pytest.raises(ValueError, match="64 heads of 256 x 256 and 16 tokens .* MiB of VMEM, more than 15"):
        jax.eval_shape(run, x, x, v, g)
    half = jax.ShapeDtypeStruct((1, 16, 1, 8), jnp.float16)
    with pytest.raises(ValueError, match="q has dtype float16; it must be float32 or bfloat16"):
        jax.eval_shape(run, half, half, half, jax.ShapeDtypeStruct((1, 16, 1), jnp.float32))
