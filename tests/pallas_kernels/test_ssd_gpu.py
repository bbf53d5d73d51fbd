"""The Hopper kernel of ``ssd``: interpreted with races against float64, or on a GPU at hand; and compiled."""

import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gpu_aot import figures, needs_plugin
from jax.experimental.pallas import mosaic_gpu as plgpu
from ssd_oracles import agree, exact, make, segments, with_gradients

from pallas_kernels import dispatch, sharding, ssd
from pallas_kernels.gpu import hopper
from pallas_kernels.gpu import ssd as gpu

ON_GPU = jax.default_backend() == "gpu"
THREADS = int(os.environ.get("NPROC") or os.cpu_count() or 1)
needs_interpreter = pytest.mark.skipif(
    not (ON_GPU or (hasattr(plgpu, "InterpretGPUParams") and THREADS >= 8)),
    reason="no GPU; the interpreter of GPU kernels needs jax 0.12 and NPROC=16, as `make test` sets it",
)
# (of each element, of the largest): the factors of every product, and o, are rounded to 8 or 11 bits
BFLOAT16, FLOAT16 = (0, 2**-6), (0, 2**-9)


@pytest.fixture
def interpreted(monkeypatch):
    """``ssd`` by this kernel. The interpreter's ordered effects cannot be partitioned: no ``per_shard``."""
    if ON_GPU:
        yield
        return
    monkeypatch.setattr(sharding, "per_shard", lambda function, rule, **_: function)
    with dispatch.interpret(plgpu.InterpretGPUParams(detect_races=True)):
        yield


CASES = {  # B, T, K, N, D, E, and whether two warpgroups share a block
    "ragged, heads shared by two warpgroups": (1, 300, 1, 2, 64, 64, True),
    "a head of two blocks of rows": (1, 130, 2, 2, 128, 64, False),
    "channels split over two warpgroups": (1, 70, 1, 1, 64, 128, True),
    "a token": (2, 1, 1, 1, 64, 64, False),
}


@needs_interpreter
@pytest.mark.parametrize("case", CASES)
def test_equals_float64_in_value_and_every_gradient(case, interpreted, monkeypatch):
    *sizes, shared = CASES[case]
    if shared:
        monkeypatch.setattr(gpu, "PROCESSORS", 0)
    arrays = make(*sizes, dtype=jnp.bfloat16)
    seg = segments(*sizes[:2])
    ours = with_gradients(ssd, arrays, segment_ids=seg, scale=0.3, implementation="pallas_gpu")
    assert ours[0].dtype == jnp.bfloat16 and ours[1].dtype == np.float32
    agree(ours, exact(arrays, scale=0.3, segment_ids=seg), BFLOAT16)


@needs_interpreter
def test_float16_is_closer(interpreted):
    arrays = make(1, 65, 1, 1, 64, 64, dtype=np.float16)
    ours = with_gradients(ssd, arrays, implementation="pallas_gpu")
    agree(ours[:2], exact(arrays)[:2], FLOAT16, ("o", "state"))


@needs_interpreter
def test_keeps_the_states_between_spans_of_chunks(interpreted):
    q, k, v, g, state0, *_ = make(1, 300, 1, 1, 64, 64, dtype=jnp.bfloat16, extreme=False)
    run = jax.jit(lambda *arrays: gpu.chunked(*arrays, scale=1.0, every=2))
    _, _, kept = run(*map(jnp.asarray, (q, k, v, g, state0)))
    assert kept.shape == (1, 3, 1, 64, 64)
    np.testing.assert_array_equal(kept[:, 0], state0)
    for i in (1, 2):
        before = [x[:, : 128 * i] for x in (q, k, v, g)]
        state = exact([*before, state0, before[2], state0])[1]
        agree((kept[:, i],), (state,), BFLOAT16, ("kept",))


@pytest.fixture
def broken():
    """After a kernel has failed, so that the next one of this process starts anew."""
    jax.clear_caches()
    yield
    from jax._src.pallas.mosaic_gpu.interpret.gpu_callbacks import reset_gpu_interpret_mode_state

    reset_gpu_interpret_mode_state()
    jax.clear_caches()


def _refill_at_once(self, step, warpgroup):
    ahead = step - 1 + self.slots
    now = (warpgroup == 0) & (step > 0) & (ahead < self.steps)
    jax.lax.cond(now, lambda: self._fill(ahead), lambda: None)


@pytest.mark.skipif(ON_GPU, reason="a GPU does not check for races")
@needs_interpreter
@pytest.mark.parametrize("mutant", ["reads too early", "writes what has not left", "copies too early"])
def test_the_interpreter_catches_a_planted_bug(mutant, interpreted, broken, monkeypatch):
    if mutant.startswith("reads"):
        monkeypatch.setattr(hopper.Ring, "wait", lambda self, step: self._slot(step))
    elif mutant.startswith("writes"):
        monkeypatch.setattr(gpu.plgpu, "wait_smem_to_gmem", lambda *args, **options: None)
    else:  # over what the other warpgroup may still read
        monkeypatch.setattr(gpu, "PROCESSORS", 0)
        monkeypatch.setattr(hopper.Ring, "refill", _refill_at_once)
    arrays = make(1, 400, 1, 2, 64, 64, dtype=jnp.bfloat16)[:5]
    with pytest.raises((jax.errors.JaxRuntimeError, AssertionError)):
        o, state = jax.jit(lambda *x: gpu.chunked(*x, scale=1.0))(*map(jnp.asarray, arrays))
        agree((o, state), exact([*arrays, arrays[2], arrays[4]])[:2], BFLOAT16, ("o", "state"))


def shapes(T=1000, B=1, K=1, N=8, D=128, E=64, dtype=jnp.bfloat16, channel=False):
    like = jax.ShapeDtypeStruct
    g = like((B, T, N, D) if channel else (B, T, N), jnp.float32)
    return like((B, T, K, D), dtype), like((B, T, K, D), dtype), like((B, T, N, E), dtype), g


def by_name(*arrays, **options):
    return jax.eval_shape(lambda *x: ssd(*x, implementation="pallas_gpu", **options), *arrays)


def test_refuses_in_words_that_name_the_argument():
    assert by_name(*shapes())[0].shape == (1, 1000, 8, 64)
    for message, arrays, more in (
        ("q has dtype float32; it must be bfloat16 or float16", shapes(dtype=jnp.float32), {}),
        ("log_decay has shape .*, one a channel; this kernel takes one a head", shapes(channel=True), {}),
        ("q has head size 80; it must be one of 64, 128", shapes(D=80), {}),
        ("v has head size 256; it must be one of 64, 128", shapes(E=256), {}),
        ("chunk is 128; this kernel has chunks of 64", shapes(), {"chunk": 128}),
        ("block_sizes has heads 2", shapes(), {"block_sizes": {"heads": 2}}),
        ("block_sizes has span 32", shapes(), {"block_sizes": {"span": 32}}),
    ):
        with pytest.raises(ValueError, match=message):
            by_name(*arrays, **more)


def lowered(*arrays):
    with dispatch.target("cuda", "h100"):
        return jax.jit(lambda *x: ssd(*x)).trace(*arrays).lower(lowering_platforms=("cuda",)).as_text()


def test_none_on_an_h100_is_this_kernel_or_what_takes_the_arguments():
    """Also that either version of plgpu lowers it, where no plugin can compile."""
    assert "mosaic_gpu" in lowered(*shapes())
    assert "mosaic_gpu" not in lowered(*shapes(channel=True))


def test_cost_counts_what_blocks_move():
    sizes = dict(B=1, T=640, K=1, N=8, D=128, E=64)
    alone, shared = gpu.cost(**sizes), gpu.cost(**(sizes | {"B": 64}))
    assert alone.floor_bytes < alone.bytes
    assert shared.flops == 64 * alone.flops
    assert 64 * alone.bytes - shared.bytes == 64 * 4 * 2 * (640 * 128 * 2)  # q and k for half as many blocks


@pytest.mark.aot_gpu
@needs_plugin
@pytest.mark.parametrize("every", [None, 8])
@pytest.mark.parametrize("D", gpu.SIZES)
@pytest.mark.parametrize("E", gpu.SIZES)
@pytest.mark.parametrize("B", [1, 64], ids=["one warpgroup", "two"])
def test_forward_spills_nothing_on_an_h100(B, D, E, every):
    arrays = *shapes(B=B, D=D, E=E), jax.ShapeDtypeStruct((B, 8, D, E), jnp.float32)
    found = figures(lambda *x: gpu.chunked(*x, scale=0.1, every=every), *arrays)
    assert set(found) == {"ssd_forward"}
    assert found["ssd_forward"][1:] == (0, 0), found
