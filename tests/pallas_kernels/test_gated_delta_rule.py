"""The gated delta rule against loops in NumPy and the step-by-step reference."""

import functools
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels import delta_chunk, dispatch, gated_delta_rule
from pallas_kernels.reference import gated_delta_rule as reference

NAMES = ("xla_chunked", "pallas_tpu")
# Values near 1, each the sum of up to 100 products carried along at most 100 tokens: some 1e-6 of rounding
# at float32's epsilon of 1.2e-7, ten times that in gradients (their largest values are near 100).
FLOAT32 = {"rtol": 1e-4, "atol": 5e-5}
# The same at epsilon 2.2e-16.
FLOAT64 = {"rtol": 1e-10, "atol": 1e-11}


def make(B=2, T=100, N=2, K=None, D=16, E=24, dtype=np.float32, seed=0, most_beta=2.0):
    """q, k (normalised), v, beta, log_decay, state0, do, dstate."""
    rng = np.random.default_rng(seed)
    q, k = (rng.standard_normal((B, T, K or N, D)) for _ in range(2))
    k /= np.linalg.norm(k, axis=-1, keepdims=True)
    v, do = (rng.standard_normal((B, T, N, E)) for _ in range(2))
    state, dstate = (rng.standard_normal((B, N, D, E)) for _ in range(2))
    beta, log_decay = rng.uniform(0, most_beta, (B, T, N)), -rng.exponential(0.3, (B, T, N))
    return [x.astype(dtype) for x in (q, k, v, beta, log_decay, state, do, dstate)]


def segments(B, T, seed=0):
    """Boundaries at block edges and inside, ids that come back."""
    ids = np.random.default_rng(seed).integers(0, 2, (B, -(-T // 4))).repeat(4, 1)[:, :T]
    ids[:, T // 2 :] += 1
    return ids


def in_loops(q, k, v, beta, log_decay, state, *, scale, segment_ids):
    """One row, head and token at a time, in float64."""
    q, k, v, beta, log_decay, S = (np.array(x, np.float64) for x in (q, k, v, beta, log_decay, state))
    (B, T, N, _), groups = v.shape, v.shape[2] // q.shape[2]
    o = np.zeros_like(v)
    for b in range(B):
        for n in range(N):
            for t in range(T):
                if segment_ids is not None and t and segment_ids[b, t] != segment_ids[b, t - 1]:
                    S[b, n] = 0
                key = k[b, t, n // groups]
                erase = np.eye(len(key)) - beta[b, t, n] * np.outer(key, key)
                S[b, n] = np.exp(log_decay[b, t, n]) * erase @ S[b, n]
                S[b, n] += beta[b, t, n] * np.outer(key, v[b, t, n])
                o[b, t, n] = scale * q[b, t, n // groups] @ S[b, n]
    return o, S


def step_by_step(q, k, v, beta, log_decay, state, *, scale, segment_ids):
    """The reference, from the public arguments."""
    groups = v.shape[2] // q.shape[2]
    q, k = (jnp.repeat(x, groups, axis=2) for x in (q, k))
    reset = jnp.zeros(v.shape[:2], bool)
    if segment_ids is not None:
        reset = jnp.diff(segment_ids, axis=1, prepend=segment_ids[:, :1]) != 0
    return reference.gated_delta_rule(q, k, v, beta, log_decay, reset, state, scale=scale)


def kernel(q, k, v, beta, log_decay, state, **options):
    return gated_delta_rule(q, k, v, beta, log_decay, state0=state, **options)


@functools.cache
def jitted(function, options):
    def run(arrays, cotangents, segment_ids):
        f = functools.partial(function, segment_ids=segment_ids, **dict(options))
        out, pull = jax.vjp(f, *arrays)
        cotangents = tuple(c.astype(o.dtype) for c, o in zip(cotangents, out, strict=True))
        return (*out, *pull(cotangents))

    return jax.jit(run)


def run(function, args, segment_ids=None, **options):
    """o, state and every gradient, in float64 for comparison."""
    with dispatch.interpret():
        out = jitted(function, tuple(options.items()))(tuple(args[:6]), tuple(args[6:]), segment_ids)
    return [np.asarray(x, np.float64) for x in out]


def oracle(args, segment_ids=None, scale=0.3):
    with jax.enable_x64(True):
        args = [jnp.asarray(np.asarray(x, np.float64)) for x in args]
        return run(step_by_step, args, segment_ids, scale=scale)


def check(args, tolerance, implementation, segment_ids=None, chunk=None):
    got = run(kernel, args, segment_ids, scale=0.3, chunk=chunk, implementation=implementation)
    for a, b in zip(got, oracle(args, segment_ids), strict=True):
        np.testing.assert_allclose(a, b, **tolerance)


SHAPES = {  # few: each compiles anew
    "several chunks, ragged": ({"T": 75, "D": 16, "E": 24}, 32),
    "one token": ({"T": 1}, None),
    "grouped heads, one chunk": ({"T": 16, "N": 4, "K": 2, "D": 8, "E": 8}, 16),
}


@settings(max_examples=4, deadline=None)
@given(data=st.data())
@pytest.mark.parametrize("implementation", NAMES)
def test_value_and_gradients_against_the_reference(implementation, data):
    shape, chunk = SHAPES[data.draw(st.sampled_from(list(SHAPES)))]
    args = make(**shape, seed=data.draw(st.integers(0, 2**31)))
    if data.draw(st.booleans()):
        args[4] = 0 * args[4]
    if data.draw(st.booleans()):
        args[5] = 0 * args[5]
    ids = segments(2, shape["T"], data.draw(st.integers(0, 99)))
    check(args, FLOAT32, implementation, ids if data.draw(st.booleans()) else 0 * ids, chunk)


def test_the_reference_against_loops():
    args = make(B=1, T=20, N=2, K=1, dtype=np.float64)
    ids = segments(1, 20)
    with jax.enable_x64(True):
        got = step_by_step(*map(jnp.asarray, args[:6]), scale=0.3, segment_ids=jnp.asarray(ids))
    for a, b in zip(got, in_loops(*args[:6], scale=0.3, segment_ids=ids), strict=True):
        np.testing.assert_allclose(a, b, **FLOAT64)


def test_float64_is_kept():
    with jax.enable_x64(True):
        check(make(T=75, dtype=np.float64), FLOAT64, "xla_chunked", segments(2, 75), 32)


@pytest.mark.parametrize("implementation", NAMES)
def test_bfloat16(implementation):
    q, k, v, *rest = make(T=75, most_beta=1.0)
    args = [np.asarray(x, jnp.bfloat16) for x in (q, k, v)] + rest
    got = run(kernel, args, scale=0.3, chunk=32, implementation=implementation)
    for a, b in zip(got, oracle(args), strict=True):
        # operands of every product are rounded to 8 bits (2^-9) and the state carries the errors on
        assert np.linalg.norm(a - b) <= 0.02 * np.linalg.norm(b)


@pytest.mark.parametrize("implementation", NAMES)
def test_extreme_values(implementation):
    # the same key again and again, each time written over: powers of L reach 1e8 in a chunk of 32
    args = make(T=75)
    args[1] = np.broadcast_to(args[1][:, :1], args[1].shape).copy()
    args[3] = np.ones_like(args[3])
    args[4] = 0 * args[4]
    check(args, FLOAT32, implementation, chunk=32)
    # reflections (beta 2), no decay beside decays that leave nothing
    args = make(T=75)
    args[3] = np.full_like(args[3], 2)
    args[4] = np.where(np.random.default_rng(1).random(args[4].shape) < 0.2, -np.float32(np.inf), 0 * args[4])
    # running sums of some -300 in a chunk: 300 epsilon of absolute rounding in an exponent
    check(args, {"rtol": 2e-4, "atol": 2e-4}, implementation, chunk=32)


def test_the_inverse_where_powers_of_it_fail():
    C = 64
    L = np.tril(np.ones((C, C), np.float32), -1)
    with jax.default_matmul_precision("highest"):
        got = np.asarray(delta_chunk.inverse(jnp.asarray(L)))
        powers, product = -jnp.asarray(L), jnp.eye(C)
        while np.any(powers):
            product = product + product @ powers
            powers = powers @ powers
    np.testing.assert_allclose(got, np.linalg.inv(np.eye(C) + L.astype(np.float64)), atol=1e-5)
    assert not np.allclose(product, got, atol=1.0)
    for C in (1, 16, 48):
        L = np.tril(np.random.default_rng(C).standard_normal((C, C)), -1).astype(np.float32) / 4
        want = np.linalg.inv(np.eye(C) + L.astype(np.float64))
        np.testing.assert_allclose(delta_chunk.inverse(jnp.asarray(L)), want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("implementation", NAMES)
def test_defaults_a_row_in_two_parts_and_segments_apart(implementation):
    q, k, v, beta, log_decay, *_ = make(T=40)

    @functools.partial(jax.jit, static_argnums=1)
    def f(state, part, segment_ids=None):
        tokens = (x[:, part[0] : part[1]] for x in (q, k, v, beta, log_decay))
        return gated_delta_rule(
            *tokens, state0=state, segment_ids=segment_ids, implementation=implementation, chunk=16
        )

    with dispatch.interpret():
        whole, last = f(None, (0, 40))
        first, state = f(None, (0, 23))
        second, end = f(state, (23, 40))
        np.testing.assert_allclose(whole, np.concatenate([first, second], 1), **FLOAT32)
        np.testing.assert_allclose(last, end, **FLOAT32)
        ids = np.broadcast_to(np.arange(40) >= 23, (2, 40)).astype(np.int32)
        packed, state = f(None, (0, 40), ids)
        alone, end = f(None, (23, 40))
        np.testing.assert_allclose(packed, np.concatenate([first, alone], 1), **FLOAT32)
        np.testing.assert_allclose(state, end, **FLOAT32)
        bare, _ = gated_delta_rule(q, k, v, beta, implementation=implementation)
    want, _ = in_loops(q, k, v, beta, 0 * beta, np.zeros((2, 2, 16, 24)), scale=0.25, segment_ids=None)
    np.testing.assert_allclose(bare, want, **FLOAT32)


@pytest.mark.parametrize("implementation", NAMES)
def test_under_vmap_remat_and_scan(implementation):
    arrays = [jnp.asarray(x) for x in make(T=20)[:5]]

    def loss(*a):
        o, state = gated_delta_rule(*a, chunk=16, implementation=implementation)
        return jnp.sum(o**2) + jnp.sum(state)

    def by_rows(f):
        return lambda *a: jnp.sum(f([x[:, None] for x in a]))

    def scanned(rows):
        step = jax.checkpoint(lambda total, row: (total + loss(*row), None))
        return jax.lax.scan(step, 0.0, tuple(rows))[0]

    with dispatch.interpret():
        want, mapped, looped = (
            jax.jit(jax.grad(f, range(5)))(*arrays)
            for f in (loss, by_rows(lambda rows: jax.vmap(loss)(*rows)), by_rows(scanned))
        )
    for got in (mapped, looped):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **FLOAT32), got, want)


def test_memory_grows_with_tokens_by_chunks():
    def temporary(T, f):
        shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in make(B=1, T=1, D=64, E=64)[:6]]
        grow = [
            jax.ShapeDtypeStruct((1, T, *s.shape[2:]), s.dtype) if i < 5 else s for i, s in enumerate(shapes)
        ]
        g = jax.grad(lambda *a: jnp.sum(f(*a)[0]), range(5))
        return jax.jit(g).lower(*grow).compile().memory_analysis().temp_size_in_bytes

    ours = functools.partial(kernel, implementation="xla_chunked")
    short, long = temporary(512, ours), temporary(1024, ours)
    assert long < 2.1 * short
    # the reference keeps a state for every token
    assert long < 0.15 * temporary(1024, functools.partial(step_by_step, scale=1.0, segment_ids=None))


SHARDED = """
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from pallas_kernels import delta_chunk, dispatch, gated_delta_rule

rng = np.random.default_rng(0)
q, k, v = (rng.standard_normal((4, 20, 2, 8)).astype(np.float32) / 3 for _ in range(3))
beta = rng.random((4, 20, 2)).astype(np.float32)
args = q, k, v, beta, -rng.random((4, 20, 2)).astype(np.float32)
for implementation in ("xla_chunked", "pallas_tpu"):
    def f(*a):
        o, state = gated_delta_rule(*a, chunk=16, implementation=implementation)
        return jnp.sum(o**2) + jnp.sum(state)

    with dispatch.interpret():
        want = jax.jit(jax.value_and_grad(f, range(5)))(*args)
        for kind in (AxisType.Auto, AxisType.Explicit):
            mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(kind,) * 2)
            with jax.set_mesh(mesh):
                put = [jax.device_put(a, NamedSharding(mesh, P("data", None, "model"))) for a in args]
                step = jax.jit(jax.value_and_grad(f, range(5)))
                got = step(*put)
                jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), got, want)
                if kind == AxisType.Auto:
                    assert "all-gather" not in step.lower(*put).compile().as_text()
print("sharded rules agree")
"""


@pytest.mark.slow
def test_sharded_rows_and_heads():
    env = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
    root = Path(__file__).parents[2]
    out = subprocess.run([sys.executable, "-c", SHARDED], capture_output=True, text=True, env=env, cwd=root)
    assert out.returncode == 0, out.stderr[-3000:]
    assert "sharded rules agree" in out.stdout


WRONG = {
    "q has shape .*four axes": lambda a: {"q": a["q"][0], "k": a["k"][0]},
    "v has dtype float16; it must be that of q, float32": lambda a: {"v": a["v"].astype(np.float16)},
    "q has dtype int32": lambda a: {n: a[n].astype(np.int32) for n in "qkv"},
    r"k has shape \(2, 9, 4, 8\); it must be that of q": lambda a: {"k": a["k"][..., :8]},
    "v has shape .*batch and tokens": lambda a: {"v": a["v"][:, 1:]},
    "v has 3 heads; they must be a multiple of q's 4": lambda a: {"v": a["v"][:, :, :3]},
    "batch and tokens .*swap axes 1 and 2": lambda a: (
        {n: np.swapaxes(a[n], 1, 2)[:, :2] for n in "qk"} | {"v": np.swapaxes(a["v"], 1, 2)}
    ),
    r"beta has shape \(2, 4, 9\).*looks like batch-head-token": lambda a: {
        "beta": np.swapaxes(a["beta"], 1, 2)
    },
    "beta has dtype int32": lambda a: {"beta": a["beta"].astype(np.int32)},
    r"log_decay has shape \(2, 9\)": lambda a: {"log_decay": a["beta"][..., 0]},
    r"state0 has shape \(2, 4, 24, 16\); it must be \(2, 4, 16, 24\)": lambda a: {
        "state0": np.zeros((2, 4, 24, 16), np.float32)
    },
    r"segment_ids has shape \(9,\)": lambda a: {"segment_ids": np.zeros(9, int)},
    "segment_ids has dtype float": lambda a: {"segment_ids": np.zeros((2, 9), np.float32)},
    "chunk is 0; it must be an int": lambda a: {"chunk": 0},
    "chunk is 24; it must be a multiple of 16": lambda a: {"chunk": 24, "implementation": "pallas_tpu"},
    "q has dtype float16; it must be bfloat16 or": lambda a: (
        {n: a[n].astype(np.float16) for n in "qkv"} | {"implementation": "pallas_tpu"}
    ),
    "gated_delta_rule does not have": lambda a: {"implementation": "cudnn"},
}


@pytest.mark.parametrize("message", WRONG)
def test_errors_name_the_argument(message):
    q, k, v, beta, *_ = make(T=9, N=4)
    args = {"q": q, "k": k, "v": v, "beta": beta}
    args |= WRONG[message](args)
    with pytest.raises(ValueError, match=message):
        gated_delta_rule(**args)
