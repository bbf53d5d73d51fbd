"""mLSTM against its equations one by one, its parallel form, and float64."""

import functools
import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ssd_oracles import agree, running, segments

from pallas_kernels import aot, mlstm
from pallas_kernels.reference import ssd as reference

BOTH = ("xla_chunked", "pallas_tpu")
NAMES = ("h", "C", "n", "m", "dq", "dk", "dv", "di", "df", "dC", "dn", "dm")
# (of each element, of the largest). h is a quotient, whose denominator is some tenths of its terms here and
# there, and its gradients divide by it once more.
FLOAT32 = (1e-4, 1e-5)
FLOAT64 = (1e-10, 1e-12)


def make(B=2, T=37, K=2, N=4, D=8, E=6, seed=0, gates=3.0):
    """q, k, v, i, f, (C, n, m), and cotangents of h, C, n and m."""
    rng = np.random.default_rng(seed)
    q, k = rng.standard_normal((2, B, T, K, D))
    v, dh = rng.standard_normal((2, B, T, N, E))
    i, f = gates * rng.standard_normal((2, B, T, N))
    state0, dstate = (
        tuple(rng.standard_normal(s) for s in ((B, N, D, E), (B, N, D), (B, N))) for _ in range(2)
    )
    return [q, k, v, i, f + 2, state0], [dh, dstate]


def with_gradients(function, inputs, cotangents, dtype, *, segment_ids=None, **options):
    inputs, cotangents = (jax.tree.map(lambda x: jnp.asarray(x, dtype), x) for x in (inputs, cotangents))
    out = _run(function, tuple(options.items()), segment_ids, inputs, tuple(cotangents))
    return [np.asarray(x) for x in jax.tree.leaves(out)]


@functools.partial(jax.jit, static_argnums=(0, 1))
def _run(function, options, segment_ids, inputs, cotangents):
    def f(*inputs):
        return function(*inputs[:-1], state0=inputs[-1], segment_ids=segment_ids, **dict(options))

    out, pull = jax.vjp(f, *inputs)
    return out, pull(cotangents)


def exact(inputs, cotangents, segment_ids=None):
    with jax.enable_x64(True):
        scale = inputs[0].shape[-1] ** -0.5
        return with_gradients(
            reference.mlstm, inputs, cotangents, np.float64, scale=scale, segment_ids=segment_ids
        )


def parallel(q, k, v, i, f, segment_ids):
    """h from all pairs of tokens at once (Beck et al. 2024, appendix A.3), from zeros, in float64."""
    (B, T, K, D), N = q.shape, v.shape[2]
    q, k = (np.repeat(x, N // K, axis=2) for x in (q, k))
    log_f = -np.log1p(np.exp(-f))
    h = np.zeros(v.shape)
    for b, n in np.ndindex(B, N):
        log_D = np.full((T, T), -np.inf)
        for t in range(T):
            for s in range(t + 1):
                if segment_ids[b, s] == segment_ids[b, t]:
                    log_D[t, s] = log_f[b, s + 1 : t + 1, n].sum() + i[b, s, n]
        m = log_D.max(1)
        weights = q[b, :, n] @ k[b, :, n].T / np.sqrt(D) * np.exp(log_D - m[:, None])
        h[b, :, n] = weights @ v[b, :, n] / np.maximum(np.abs(weights.sum(1)), np.exp(-m))[:, None]
    return h


def test_the_equations_and_the_parallel_form_agree():
    inputs, cotangents = make(T=20)
    inputs[-1] = jax.tree.map(np.zeros_like, inputs[-1])
    seg = segments(2, 20)
    h = exact(inputs, cotangents, seg)[0]
    agree((h,), (parallel(*inputs[:5], seg),), FLOAT64, ("h",))


@pytest.mark.parametrize("T", [1, 37])
def test_float64(T):
    inputs, cotangents = make(T=T)
    seg = segments(2, T)
    with jax.enable_x64(True):
        ours = with_gradients(mlstm, inputs, cotangents, np.float64, segment_ids=seg, chunk=16)
    agree(ours, exact(inputs, cotangents, seg), FLOAT64, NAMES)


@pytest.mark.parametrize("implementation", BOTH)
def test_float32_in_value_and_every_gradient(implementation):
    inputs, cotangents = make()
    seg = segments(2, 37)
    with running(implementation):
        ours = with_gradients(
            mlstm, inputs, cotangents, np.float32, segment_ids=seg, chunk=16, implementation=implementation
        )
    agree(ours, exact(inputs, cotangents, seg), FLOAT32, NAMES)


# A gate of 300 has steps of 3e-5 in float32, which is an error of its exponential.
LARGE_GATES = (1e-3, 3e-4)


@pytest.mark.parametrize("i,f", [(300, 0), (-300, 0), (0, -300), (0, 300), (-300, -300), (-np.inf, 3)])
def test_extreme_gates_neither_overflow_nor_give_nan(i, f):
    """exp of 300 is past float32, and so is exp(-m); the oracle in float64 holds both."""
    inputs, cotangents = make(gates=1.0)
    inputs[:2] = np.abs(inputs[:2])  # so that no denominator is a small difference
    for at, much in ((3, i), (4, f)):
        inputs[at][:, ::3] += much
    inputs[-1] = jax.tree.map(np.zeros_like, inputs[-1])
    cotangents[1] = jax.tree.map(np.zeros_like, cotangents[1])
    seg = segments(2, 37)
    ours = with_gradients(
        mlstm, inputs, cotangents, np.float32, segment_ids=seg, chunk=16, implementation="xla_chunked"
    )
    assert all(np.isfinite(x).all() for x in ours)
    oracle = exact(inputs, cotangents, seg)
    # through h alone, where the last gradients are of a state that is zero
    agree(ours[:1] + ours[4:9], oracle[:1] + oracle[4:9], LARGE_GATES, NAMES[:1] + NAMES[4:9])


def test_bfloat16():
    inputs, _ = make()
    q, k, v = (jnp.asarray(x, jnp.bfloat16) for x in inputs[:3])
    i, f = (jnp.asarray(x, jnp.float32) for x in inputs[3:5])
    h, state = mlstm(q, k, v, i, f)
    assert h.dtype == jnp.bfloat16 and {x.dtype for x in state} == {jnp.dtype(jnp.float32)}
    oracle = mlstm(*(x.astype(jnp.float32) for x in (q, k, v, i, f)))[0]
    # factors are rounded at 2^-9, and some denominators are a tenth of their terms
    error = np.abs(np.asarray(h, np.float32) - np.asarray(oracle))
    assert np.median(error) < 0.005 and np.mean(error) < 0.02


def test_a_state_carries_on():
    (q, k, v, i, f, state0), _ = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), make(T=36))
    call = jax.jit(functools.partial(mlstm, chunk=16))
    h, state = call(q, k, v, i, f, state0=state0)
    first, middle = call(*(x[:, :18] for x in (q, k, v, i, f)), state0=state0)
    second, last = call(*(x[:, 18:] for x in (q, k, v, i, f)), state0=middle)
    ours = (jnp.concatenate([first, second], 1), *last)
    agree(ours, [np.asarray(x) for x in (h, *state)], FLOAT32, NAMES[:4])


@pytest.mark.parametrize(
    "wrong,message",
    [
        ({"i_gate": np.zeros((2, 37, 3))}, r"i_gate has shape \(2, 37, 3\); it must be \(2, 37, 4\)"),
        ({"f_gate": np.zeros((2, 37, 4), np.int32)}, "f_gate has dtype int32; it must be a floating dtype"),
        ({"state0": np.zeros(3)}, r"state0 is a ndarray; it must be None or three arrays \(C, n, m\)"),
        ({"state0": (np.zeros((2, 4, 8, 6)), np.zeros((2, 4, 6)), np.zeros((2, 4)))}, "state0's n has shape"),
        ({"chunk": 7}, "chunk is 7; it must be None or one of"),
    ],
)
def test_errors_name_the_argument(wrong, message):
    q, k, v, i, f, _ = make()[0]
    with pytest.raises(ValueError, match=message):
        mlstm(**{"q": q, "k": k, "v": v, "i_gate": i, "f_gate": f} | wrong)


@pytest.mark.aot
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")
def test_compiles_for_tpu_within_its_memory():
    """Keys of 128 and values of 256 channels: with the normaliser 257, which lanes round up to 384."""
    shapes = [jax.ShapeDtypeStruct((1, 2048, 8, n), jnp.bfloat16) for n in (128, 128, 256)]
    shapes += [jax.ShapeDtypeStruct((1, 2048, 8), jnp.float32)] * 2
    grad = jax.grad(lambda *a: jnp.sum(mlstm(*a)[0].astype(jnp.float32)), argnums=range(5))
    compiled = aot.compile_tpu(grad, *shapes, generation="v5e")
    assert compiled.as_text().count('custom_call_target="tpu_custom_call"') == 2  # forward and backward
    assert compiled.memory_analysis().temp_size_in_bytes <= 128 * 2**20
