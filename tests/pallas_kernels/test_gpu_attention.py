"""Attention on Hopper: against NumPy in float64, by the interpreter or on a GPU at hand; and compiled."""

import itertools
import os
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gpu_aot import figures, needs_plugin
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import aot, dispatch
from pallas_kernels.gpu import attention, attention_backward, attention_forward, hopper

ON_GPU = jax.default_backend() == "gpu"
# XLA's threads on a CPU; the interpreter holds one for each warpgroup that waits
THREADS = int(os.environ.get("NPROC") or os.cpu_count() or 1)
needs_interpreter = pytest.mark.skipif(
    not (ON_GPU or (hasattr(plgpu, "InterpretGPUParams") and THREADS >= 8)),
    reason="no GPU; the interpreter of GPU kernels needs jax 0.12 and NPROC=16, as `make test` sets it",
)
# Of the largest element: probabilities and results are rounded to 8 or 11 bits, each once, and a sum of such
# errors grows slower than the sum.
TOLERANCE = {"bfloat16": 2**-7, "float16": 2**-10}


def options(H=64, *, is_causal=True, window=None, logits_soft_cap=None):
    return types.SimpleNamespace(
        scale=H**-0.5, is_causal=is_causal, window=window, logits_soft_cap=logits_soft_cap, block_sizes=None
    )


def inputs(B, T, S, N, K, H, dtype="bfloat16", seed=0):
    """q, k, v, dout, dlse."""
    rng = np.random.default_rng(seed)
    shapes = (B, T, N, H), (B, S, K, H), (B, S, K, H), (B, T, N, H)
    arrays = [jnp.asarray(rng.standard_normal(shape), dtype) for shape in shapes]
    return *arrays, jnp.asarray(rng.standard_normal((B, T, N)), jnp.float32)


def oracle(q, k, v, dout, dlse, o, q_ids=None, kv_ids=None):
    """out, lse, dq, dk, dv in float64, the attention matrix written out."""
    q, k, v, dout, dlse = (np.asarray(x, np.float64) for x in (q, k, v, dout, dlse))
    (B, T, N, H), (S, K) = q.shape, k.shape[1:3]
    k, v = (np.repeat(x, N // K, axis=2) for x in (k, v))
    logits, slope = np.einsum("btnh,bsnh->bnts", q, k) * o.scale, 1.0
    if o.logits_soft_cap:
        bent = np.tanh(logits / o.logits_soft_cap)
        logits, slope = o.logits_soft_cap * bent, 1 - bent**2
    ahead = np.arange(S) - np.arange(T)[:, None]
    allowed = np.ones((B, 1, T, S), bool)
    if o.is_causal:
        allowed &= ahead <= 0
    if o.window:
        allowed &= (-o.window[0] <= ahead) & (ahead <= o.window[1])
    if q_ids is not None:
        allowed &= (np.asarray(q_ids)[:, :, None] == np.asarray(kv_ids)[:, None, :])[:, None]
    weights = np.where(allowed, np.exp(np.where(allowed, logits, 0)), 0)
    total = weights.sum(-1)
    p = weights / np.where(total == 0, 1, total)[..., None]
    out = np.einsum("bnts,bsnh->btnh", p, v)
    dp = np.einsum("btnh,bsnh->bnts", dout, v) + dlse.transpose(0, 2, 1)[..., None]
    ds = p * (dp - (out * dout).sum(-1).transpose(0, 2, 1)[..., None]) * slope * o.scale
    dk, dv = np.einsum("bnts,btnh->bsnh", ds, q), np.einsum("bnts,btnh->bsnh", p, dout)
    dk, dv = (x.reshape(B, S, K, N // K, H).sum(3) for x in (dk, dv))
    with np.errstate(divide="ignore"):
        return out, np.log(total).transpose(0, 2, 1), np.einsum("bnts,bsnh->btnh", ds, k), dk, dv


def interpreted(function, *arrays, races=True):
    if ON_GPU:
        return jax.jit(function)(*arrays)
    with dispatch.interpret(plgpu.InterpretGPUParams(detect_races=races)):
        return jax.jit(function)(*arrays)


def forward(arrays, o, ids=(None, None), **kwargs):
    return interpreted(
        lambda q, k, v: attention.forward(q, k, v, None, None, *ids, None, options=o), *arrays[:3], **kwargs
    )


def backward(arrays, out, lse, o, ids=(None, None), **kwargs):
    def gradients(q, k, v, out, lse, dout, dlse):
        return attention.backward(
            q, k, v, None, None, *ids, None, out.astype(q.dtype), lse, dout, dlse, options=o
        )

    *results, dbias = interpreted(gradients, *arrays[:3], out, lse, *arrays[3:], **kwargs)
    assert dbias is None
    return results


def check(got, want, dtype):
    want = np.asarray(want)
    np.testing.assert_allclose(
        np.asarray(got, np.float64), want, rtol=0, atol=TOLERANCE[dtype] * np.abs(want).max()
    )


@pytest.fixture
def two_slots(monkeypatch):
    """Rings of two slots of 64, so that a few blocks refill them."""
    monkeypatch.setitem(attention_forward.BLOCKS, 64, (64, 2))
    monkeypatch.setitem(attention_forward.BLOCKS_SEGMENTS, 64, (64, 2))
    monkeypatch.setitem(attention_backward.DQ_BLOCKS, 64, (64, 2, 2))
    monkeypatch.setitem(attention_backward.DKV_BLOCKS, 64, (64, 2, 2))


CASES = {
    "causal, ragged, grouped": ((1, 200, 200, 2, 1, 64), {}, None),
    "everything at once": (
        (1, 130, 250, 1, 1, 64),
        {"is_causal": False, "window": (90, 20), "logits_soft_cap": 2.0},
        (
            [0] * 64 + [1] * 30 + [2] * 36,
            [0] * 40 + [1] * 88 + [2] * 122,
        ),
    ),
    "a query": ((2, 1, 1, 1, 1, 64), {}, None),
    "queries without keys": ((1, 140, 70, 1, 1, 64), {"window": (10, 0)}, None),
}


@needs_interpreter
@pytest.mark.parametrize("case", CASES)
def test_forward_and_gradients_are_those_of_numpy(case, two_slots):
    sizes, more, ids = CASES[case]
    o, arrays = options(**more), inputs(*sizes)
    ids = (None, None) if ids is None else tuple(jnp.asarray([x], jnp.int32) for x in ids)
    out, lse, *gradients = oracle(*arrays, o, *ids)
    got, got_lse = forward(arrays, o, ids)
    assert got.shape == out.shape and got.dtype == jnp.bfloat16 and got_lse.dtype == jnp.float32
    check(got, out, "bfloat16")
    # logits are float32 sums of exact products; exp2 and log are off by a few units in the last place
    np.testing.assert_allclose(np.asarray(got_lse), lse, rtol=1e-5, atol=1e-5)
    assert not np.asarray(got, np.float32)[np.isneginf(lse)].any()
    for gradient, want in zip(backward(arrays, got, got_lse, o, ids), gradients, strict=True):
        check(gradient, want, "bfloat16")


@needs_interpreter
@pytest.mark.parametrize(("H", "dtype"), [(128, "float16"), (256, "bfloat16")])
def test_larger_heads(H, dtype):
    """256 has its own blocks, one warpgroup in dq and dk, and passes for dk and dv apart."""
    arrays, o = inputs(1, 72, 72, 1, 1, H, dtype), options(H)
    out, _, *gradients = oracle(*arrays, o)
    got, got_lse = forward(arrays, o, races=False)
    check(got, out, dtype)
    for gradient, want in zip(backward(arrays, got, got_lse, o, races=False), gradients, strict=True):
        check(gradient, want, dtype)


@needs_interpreter
def test_extreme_logits():
    q, k, *rest = inputs(1, 64, 64, 1, 1, 64)
    arrays, o = (q * 100, k * 10, *rest), options()
    out, lse = forward(arrays, o, races=False)
    logits = np.einsum("btnh,bsnh->bnts", *(np.asarray(x, np.float64) for x in arrays[:2])) * o.scale
    logits = np.where(np.tri(64, dtype=bool), logits, -np.inf)
    highest = logits.max(-1, keepdims=True)
    want = highest[..., 0] + np.log(np.exp(logits - highest).sum(-1))
    np.testing.assert_allclose(np.asarray(lse)[0, :, 0], want[0, 0], rtol=1e-5)
    assert np.isfinite(np.asarray(out, np.float32)).all()


@needs_interpreter
def test_vmap_is_another_batch():
    arrays, o = inputs(2, 64, 64, 1, 1, 64)[:3], options()

    def each(q, k, v):
        return attention.forward(q[None], k[None], v[None], *[None] * 5, options=o)

    out, _ = interpreted(jax.vmap(each), *arrays, races=False)
    check(out[:, 0], oracle(*inputs(2, 64, 64, 1, 1, 64), o)[0], "bfloat16")


@pytest.fixture
def broken():
    """After a kernel has failed, so that the next one of this process starts anew."""
    yield
    from jax._src.pallas.mosaic_gpu.interpret.gpu_callbacks import reset_gpu_interpret_mode_state

    reset_gpu_interpret_mode_state()


@pytest.mark.skipif(ON_GPU, reason="a GPU does not check for races")
@needs_interpreter
@pytest.mark.parametrize("mutant", ["reads before its copy is there", "copies before all have read"])
def test_the_interpreter_catches_a_missing_wait(mutant, two_slots, broken, monkeypatch):
    if mutant.startswith("reads"):
        monkeypatch.setattr(hopper.Ring, "wait", lambda self, step: self._slot(step))
    else:

        def refill(self, step, warpgroup):
            ahead = step - 1 + self.slots
            jax.lax.cond(
                (warpgroup == 0) & (step > 0) & (ahead < self.steps), lambda: self._fill(ahead), lambda: None
            )

        monkeypatch.setattr(hopper.Ring, "refill", refill)
    # a race, a phase that a warpgroup missed, or one so late that the barrier is two phases on
    with pytest.raises(jax.errors.JaxRuntimeError, match="RACE DETECTED|observe|already at phase"):
        jax.block_until_ready(forward(inputs(1, 256, 256, 1, 1, 64), options()))


def test_refuses_in_words_that_name_the_argument():
    def reason(q, **more):
        arrays = {"bias": None, "mask": None, "q_segments": None, "kv_segments": None, "block_mask": None}
        block_sizes = more.pop("block_sizes", None)
        o = options()
        o.block_sizes = block_sizes
        return attention.refuses(q, q, q, *(arrays | more).values(), options=o)

    q = jax.ShapeDtypeStruct((1, 8, 2, 64), jnp.bfloat16)
    ids = jax.ShapeDtypeStruct((1, 8), jnp.int32)
    assert reason(q) is None
    assert reason(q, q_segments=ids, kv_segments=ids) is None
    assert "q has dtype float32; it must be bfloat16 or float16" in reason(q.update(dtype=jnp.float32))
    assert "q has head size 80; it must be one of 64, 128, 256" in reason(q.update(shape=(1, 8, 2, 80)))
    logits = jnp.zeros((1, 1, 8, 8))
    assert reason(q, bias=logits).startswith("bias is given")
    assert reason(q, mask=logits > 0).startswith("mask is given")
    assert reason(q, block_mask=logits > 0).startswith("block_mask is given")
    assert reason(q, block_sizes=(128, 128)).startswith("block_sizes is (128, 128)")


def shapes(H, T=2048, N=4, K=2, segments=False):
    q, k = (jax.ShapeDtypeStruct((1, T, n, H), jnp.bfloat16) for n in (N, K))
    lse = jax.ShapeDtypeStruct((1, T, N), jnp.float32)
    ids = (jax.ShapeDtypeStruct((1, T), jnp.int32),) * 2 if segments else ()
    return (q, k, k, *ids), (q, k, k, q, lse, q, lse, *ids)


def of_forward(o):
    return lambda q, k, v, *ids: attention.forward(
        q, k, v, None, None, *(ids or (None, None)), None, options=o
    )


def of_backward(o):
    def gradients(q, k, v, out, lse, dout, dlse, *ids):
        ids = ids or (None, None)
        return attention.backward(q, k, v, None, None, *ids, None, out, lse, dout, dlse, options=o)[:3]

    return gradients


@pytest.mark.parametrize("H", attention.HEAD_SIZES)
def test_traces_and_lowers_for_cuda_on_every_jax(H):
    """The two versions differ in plgpu: this holds each to it where no plugin can compile."""
    o = options(H, window=(100, 5), logits_soft_cap=30.0)
    ahead, back = shapes(H, T=1001, segments=True)
    for function, arguments, kernels in ((of_forward(o), ahead, 1), (of_backward(o), back, 2)):
        text = jax.jit(function).trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()
        assert text.count("mosaic_gpu") >= kernels


@pytest.mark.aot_gpu
@needs_plugin
@pytest.mark.parametrize("H", attention.HEAD_SIZES)
@pytest.mark.parametrize("is_causal", [True, False])
def test_forward_spills_nothing_on_an_h100(H, is_causal):
    """Of every combination of segments, window, soft-cap and a ragged end."""
    spilled = {}
    for case in itertools.product((None, (300, 100)), (None, 30.0), (1024, 1001), (False, True)):
        window, cap, T, segments = case
        o = options(H, is_causal=is_causal, window=window, logits_soft_cap=cap)
        found = figures(of_forward(o), *shapes(H, T=T, segments=segments)[0])
        assert set(found) == {"attention_forward"}
        if any(found["attention_forward"][1:]):
            spilled[case] = found
    assert not spilled


@pytest.mark.aot_gpu
@needs_plugin
@pytest.mark.parametrize("H", attention.HEAD_SIZES)
def test_backward_spills_little_on_an_h100(H):
    found = figures(of_backward(options(H)), *shapes(H)[1])
    names = {"attention_dk", "attention_dv"} if H == 256 else {"attention_dk_dv"}
    assert set(found) == {"attention_dq"} | names
    # some words of a thread at most, beside 255 registers
    assert all(spills <= (32 if H <= 128 else 256) for _, *both in found.values() for spills in both), found


@pytest.mark.aot_gpu
@needs_plugin
def test_memory_is_linear_in_length():
    """No array of T x T: gradients at 32k tokens take less than one matrix of logits of one head."""
    T = 32768
    compiled = aot.compile_gpu(of_backward(options(128)), *shapes(128, T=T)[1])
    assert "mosaic_gpu" in compiled.as_text()
    assert compiled.memory_analysis().temp_size_in_bytes < T * T / 8
