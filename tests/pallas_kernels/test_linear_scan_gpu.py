"""The GPU kernel of the diagonal recurrence: interpreted with races, and compiled for an H100."""

import importlib.util
import os
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu
from scan_oracle import check, exact, problem, with_gradients

from pallas_kernels import dispatch, linear_scan
from pallas_kernels.gpu import linear_scan as gpu

FLOAT32 = {"rtol": 2e-5, "atol": 2e-5}  # see test_linear_scan.py
BFLOAT16 = {"rtol": 2**-6, "atol": 2**-5}
needs_interpreter = pytest.mark.skipif(
    not hasattr(plgpu, "InterpretGPUParams"), reason="the interpreter of GPU kernels is public from jax 0.12"
)


def simulate(dtype="float32", T=19, reverse=False, segments=True):
    """19 tokens are two blocks of 8 and a tail, more than the ring's stages where those are two."""
    arrays, ids = problem(B=1, T=T, F=130, dtype=dtype, segments=segments)
    with dispatch.interpret(plgpu.InterpretGPUParams(detect_races=True)):
        got = with_gradients(arrays, ids, implementation="pallas_gpu", reverse=reverse, block_sizes=(8, 128))
    return got, exact(*arrays, reverse=reverse, ids=ids)


@needs_interpreter
@pytest.mark.parametrize(
    "dtype,segments,reverse",
    [
        ("float32", True, False),
        ("float32", False, True),
        (jnp.bfloat16, True, True),
        ("complex64", True, False),
    ],
    ids=str,
)
def test_simulated_equals_the_loops_without_races(dtype, segments, reverse, monkeypatch):
    monkeypatch.setattr(gpu, "MOST_STAGES", 2)  # so that slots are used again
    got, want = simulate(dtype, segments=segments, reverse=reverse)
    check(got, want, **(BFLOAT16 if dtype == jnp.bfloat16 else FLOAT32))


@needs_interpreter
def test_one_token():
    check(*simulate(T=1), **FLOAT32)


@needs_interpreter
@pytest.mark.parametrize("left_out", ["barrier_wait", "wait_smem_to_gmem"])
def test_planted_bugs_are_caught(monkeypatch, left_out):
    """Shared memory read before its copy has come, or written before its copy has gone."""
    jax.clear_caches()
    with_gradients.__globals__["_compiled"].cache_clear()
    monkeypatch.setattr(gpu, "MOST_STAGES", 2)
    monkeypatch.setattr(gpu.plgpu, left_out, lambda *args, **options: None)
    with pytest.raises(Exception) as error:
        check(*simulate(), **FLOAT32)
    assert re.search(r"Not equal to tolerance|[Rr]ace", str(error.value))


def test_bad_blocks_are_named():
    (a, b, *_), _ = problem(F=4)
    for wrong in ((8, 256), (512, 128)):
        with pytest.raises(ValueError, match=rf"'pallas_gpu': block_sizes is \({wrong[0]}, {wrong[1]}\)"):
            linear_scan(a, b, implementation="pallas_gpu", block_sizes=wrong)


COMPILE = """
import sys, jax, jax.numpy as jnp
from pallas_kernels import aot, linear_scan
dtype = sys.argv[1]
x, ids = jax.ShapeDtypeStruct((4, 4096, 2048), dtype), jax.ShapeDtypeStruct((4, 4096), jnp.int32)
scan = lambda a, b, ids: linear_scan(a, b, segment_ids=ids)
gradient = lambda a, b, ids, dh: jax.vjp(lambda a, b: scan(a, b, ids)[0], a, b)[1](dh)
compiled = aot.compile_gpu(gradient, x, x, ids, x, target_config="h100")
print("kernels", compiled.as_text().count('"mosaic_gpu_v2"'))
print("temporary", compiled.memory_analysis().temp_size_in_bytes)
"""


@pytest.mark.aot_gpu
@pytest.mark.skipif(importlib.util.find_spec("jax_cuda12_plugin") is None, reason="no CUDA plugin of JAX")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_compiled_for_h100_without_spills_or_copies(dtype):
    # in a process of its own, as ptxas reports to the standard output
    env = os.environ | {"JAX_PLATFORMS": "cpu", "MOSAIC_GPU_DUMP_PTXAS": "1"}
    command = [sys.executable, "-c", COMPILE, dtype]
    out = subprocess.run(command, capture_output=True, text=True, errors="replace", env=env)
    assert out.returncode == 0, out.stderr[-3000:]
    said = out.stdout + out.stderr
    assert re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", said) == [("0", "0")] * 2
    assert "kernels 2" in said
    # h between the two kernels; besides it states and resets
    size = 4 * 4096 * 2048 * jnp.dtype(dtype).itemsize
    assert int(re.search(r"temporary (\d+)", said)[1]) < 1.01 * size
