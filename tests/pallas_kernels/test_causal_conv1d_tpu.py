"""The TPU kernels of the causal convolution: interpreted, with planted bugs, and compiled ahead of time."""

import contextlib
import importlib
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import mutants
import numpy as np
import pytest
from conv_oracle import check, exact, problem, with_gradients
from hypothesis import given, settings
from hypothesis import strategies as st
from test_linear_scan_tpu import traffic

from pallas_kernels import aot, causal_conv1d, dispatch
from pallas_kernels.cost import causal_conv1d as cost
from pallas_kernels.tpu import causal_conv1d as tpu
from pallas_kernels.tpu.causal_conv1d_blocks import BLOCK_SIZES

conv = importlib.import_module("pallas_kernels.causal_conv1d")  # the name is the function's
FLOAT32 = {"rtol": 1e-5, "atol": 1e-5}  # see test_causal_conv1d.py
BFLOAT16 = {"rtol": 2**-8, "atol": 2**-8}


def run(arrays, ids, **options):
    with dispatch.interpret():
        return with_gradients(arrays, ids, implementation="pallas_tpu", **options)


# Ragged: 45 tokens are two blocks of 32 and three parts of 16; 300 channels are two blocks, the second short.
@pytest.mark.parametrize("dtype,tolerance", [("float32", FLOAT32), (jnp.bfloat16, BFLOAT16)], ids=str)
@pytest.mark.parametrize("segments,silu", [(False, False), (False, True), (True, False), (True, True)])
def test_equals_the_loops(dtype, tolerance, segments, silu):
    arrays, ids = problem(T=45, C=300, dtype=dtype, segments=segments)
    got = run(arrays, ids, silu=silu, block_sizes=(32, 256))
    check(got, exact(*arrays, ids=ids, silu=silu), **tolerance)
    assert {x.dtype for x in got} == {np.dtype(dtype)}


# One token, fewer than taps, whole blocks, one tap, as many as can be.
SHAPES = [
    (1, 5, 4, None), (2, 5, 4, None), (32, 128, 4, (16, 128)), (20, 3, 1, (16, 128)), (40, 3, 16, (16, 128)),
]  # fmt: skip


@settings(max_examples=15, deadline=None, derandomize=True)
@given(shape=st.sampled_from(SHAPES), often=st.sampled_from([0.05, 0.2, 0.7]), seed=st.integers(0, 99))
def test_other_shapes_and_segments_equal_the_loops(shape, often, seed):
    T, C, W, block_sizes = shape
    arrays, _ = problem(T=T, C=C, W=W, seed=seed)
    ids = np.cumsum(np.random.default_rng(seed).random((2, T)) < often, axis=1).astype(np.int32)
    got = run(arrays, ids, silu=True, block_sizes=block_sizes)
    # with 16 taps z is four times the usual, and so are its products
    check(got, exact(*arrays, ids=ids, silu=True), rtol=1e-5, atol=1e-5 * W**0.5)


def test_rows_mapped_scanned_and_rematerialised_equal_the_loops():
    arrays, ids = problem(T=9, C=3, segments=True)

    def row(x, w, bias, state, ids):
        return causal_conv1d(
            x[None], w, bias, initial_state=state[None], segment_ids=ids[None], activation="silu",
            implementation="pallas_tpu",
        )[0]  # fmt: skip

    def mapped(x, w, bias, *, initial_state, segment_ids, activation):
        rows = jax.checkpoint(jax.vmap(row, in_axes=(0, None, None, 0, 0)))
        return rows(x, w, bias, initial_state, segment_ids)

    def scanned(x, w, bias, *, initial_state, segment_ids, activation):
        step = jax.checkpoint(lambda _, xs: (None, row(xs[0], w, bias, *xs[1:])))
        return jax.lax.scan(step, None, (x, initial_state, segment_ids))[1]

    for function in (mapped, scanned):
        with dispatch.interpret():
            got = with_gradients(arrays, ids, function, silu=True)
        check(got, exact(*arrays, ids=ids, silu=True), **FLOAT32)


def test_a_nan_of_another_segment_is_not_seen():
    (x, w, bias, *_), ids = problem(T=24, segments=True)
    x[1, 14, 0] = np.nan
    with dispatch.interpret():
        y = causal_conv1d(x, w, bias, segment_ids=ids, implementation="pallas_tpu")
    bad = np.isnan(np.asarray(y))
    assert bad[1, 14:16, 0].all() and bad.sum() == 2  # the next segment starts at 16


def strictly(which, plant=contextlib.nullcontext, T=24, segments=True, dtype="float32", tolerance=FLOAT32):
    """How one kernel, its memory and cores simulated, differs from the loops with a bug planted; or None."""
    arrays, ids = problem(T=T, C=256, dtype=dtype, segments=segments)
    x, w, bias, state, dy = (jnp.asarray(a) for a in arrays)
    y, *gradients = exact(*arrays, ids=ids, silu=True)

    def run():
        options = {"activation": "silu", "block_sizes": (16, 128)}
        reach = conv._reach(ids, w.shape[0]) if segments else None
        if which == "forward":
            return tpu.forward(x, w, bias, state, reach, **options)
        return tpu.backward(x, w, bias, state, reach, dy, **options)

    with plant():
        # both cores of a v4 share the axes marked parallel
        expected = y if which == "forward" else tuple(gradients)
        return mutants.caught(run, expected, tolerance, seed=1, cores=2)


@pytest.mark.parametrize("which", ["forward", "backward"])
@pytest.mark.parametrize("dtype,tolerance", [("float32", FLOAT32), (jnp.bfloat16, BFLOAT16)], ids=str)
def test_simulated_without_races_or_memory_not_written(which, dtype, tolerance):
    assert strictly(which, dtype=dtype, tolerance=tolerance) is None


@contextlib.contextmanager
def patched(name, value, place=tpu):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(place, name, value)
        yield


def edge_of_this_block(self, name, *args, real=tpu._Plan.__init__, **options):
    """The backward pass takes the block's own first tokens for those before it."""
    real(self, name, *args, **options)
    block, plain = self.before_spec, self.before_spec.index_map
    block.index_map = lambda c, b, k: (b, plain(c, b, k)[1] + 1, c)


ALL_PARALLEL = ("parallel", "parallel", "parallel")
PLANTED = {
    "carry not set up": ("forward", lambda: mutants.without_when(0)),
    "time parallel": ("forward", lambda: patched("FORWARD_SEMANTICS", ALL_PARALLEL), 56),
    "blocks in the wrong order": ("forward", lambda: mutants.reversed_axis(2)),
    "tap one token off": (
        "forward", lambda: patched("_shifted", lambda a, b, j, real=tpu._shifted: real(a, b, min(j + 1, 16)))
    ),
    "carry of gradients not set up": ("backward", lambda: mutants.without_when(0), 32, False),  # ids hide it
    "sums not set up": ("backward", lambda: mutants.without_when(1)),
    "gradient of the state not written": ("backward", lambda: mutants.without_when(2)),
    "time parallel backwards": ("backward", lambda: patched("BACKWARD_SEMANTICS", ALL_PARALLEL)),
    "rows parallel, which sums are taken over": ("backward", lambda: mutants.parallel_axis(1)),
    "tokens before the block from the block": (
        "backward", lambda: patched("__init__", edge_of_this_block, tpu._Plan)
    ),
    "past the last token": ("backward", lambda: patched("valid", lambda self, x, k, n: x, tpu._Plan)),
}  # fmt: skip


@pytest.mark.parametrize("name", PLANTED)
def test_planted_bugs_are_caught(name):
    # by what came out, and not by a refusal to run
    assert strictly(*PLANTED[name]) in ("NaN", "race", "other values")


needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed (pip install 'scaling[tpu]')"
)


def compiled(function, *shapes, generation):
    got = aot.compile_tpu(function, *shapes, generation=generation)
    assert got.as_text().count('"tpu_custom_call"') == 1
    return got


def functions(**options):
    def forward(x, w, bias, ids):
        return causal_conv1d(x, w, bias, segment_ids=ids, activation="silu", **options)

    def gradient(x, w, bias, ids, dy):
        return jax.vjp(lambda *xs: forward(*xs, ids), x, w, bias)[1](dy)

    return forward, gradient


def shapes_of(B, T, C, W, dtype):
    x, w = jax.ShapeDtypeStruct((B, T, C), dtype), jax.ShapeDtypeStruct((W, C), jnp.float32)
    return x, w, jax.ShapeDtypeStruct((C,), jnp.float32), jax.ShapeDtypeStruct((B, T), jnp.int32), x


@needs_libtpu
@pytest.mark.aot
@pytest.mark.parametrize("generation", ["v4", "v5e", "v5p", "v6e", "tpu7x"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_compiled_for_tpu_moves_every_array_once(generation, dtype):
    B, T, C, W = 8, 4096, 4096, 4  # more than VMEM holds
    shapes, itemsize = shapes_of(B, T, C, W, dtype), jnp.dtype(dtype).itemsize
    size = B * T * C * itemsize
    tokens, channels = BLOCK_SIZES[generation]["backward"]
    counts = (
        cost.forward(B, T, C, W, itemsize, segments=True, channel_blocks=C // channels),
        cost.backward(
            B, T, C, W, itemsize, segments=True, channel_blocks=C // channels, block_tokens=tokens, silu=True
        ),
    )  # fmt: skip
    for function, n, passes, count in zip(functions(), (4, 5), (2, 3), counts, strict=True):
        got = compiled(function, *shapes[:n], generation=generation)
        # nothing of the size of x is kept or laid out anew: the state as 16 tokens, and the segments
        assert got.memory_analysis().temp_size_in_bytes <= 0.02 * size
        assert count.bytes < 1.2 * count.floor_bytes
        # the entry reads and writes what the formula says, but for the 16 tokens before each block
        edges = itemsize * B * T // tokens * 16 * C if passes == 3 else 0
        moved = traffic(got.as_text())
        assert passes * size < moved < 1.02 * passes * size and moved + edges < 1.2 * count.floor_bytes


@needs_libtpu
@pytest.mark.aot
@pytest.mark.parametrize("generation", ["v4", "v5e", "tpu7x"])
@pytest.mark.parametrize("B,T,C,W", [(2, 1, 2048, 4), (2, 1001, 200, 4), (1, 77, 600, 16), (2, 40, 3, 1)])
def test_odd_shapes_compile_for_tpu(generation, B, T, C, W):
    for function, n in zip(functions(), (4, 5), strict=True):
        compiled(function, *shapes_of(B, T, C, W, jnp.bfloat16)[:n], generation=generation)


SHARDED = """
import jax, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from pallas_kernels import causal_conv1d, dispatch
from pallas_kernels.tpu import causal_conv1d as tpu
from conv_oracle import check, exact, problem

seen = []
real = tpu._backward
tpu._backward = lambda x, *rest, **options: (seen.append(x.shape), real(x, *rest, **options))[1]
arrays, ids = problem(B=2, T=20, C=256, segments=True)

def run(implementation, x, w, bias, state, dy, ids):
    def conv(x, w, bias, state):
        options = {"segment_ids": ids, "activation": "silu", "implementation": implementation}
        return causal_conv1d(x, w, bias, initial_state=state, **options)
    y, pull = jax.vjp(conv, x, w, bias, state)
    return y, *pull(dy)

tokens = P("data", None, "model")
specs = tokens, P(None, "model"), P("model"), tokens, tokens, P("data")
for kind in (AxisType.Auto, AxisType.Explicit):
    mesh = jax.make_mesh((2, 2), ("data", "model"), axis_types=(kind,) * 2)
    with jax.set_mesh(mesh), dispatch.interpret():
        placed = [jax.device_put(x, NamedSharding(mesh, s)) for x, s in zip((*arrays, ids), specs)]
        for name in ("xla", "pallas_tpu"):
            step = jax.jit(run, static_argnums=0).lower(name, *placed).compile()
            out = step(*placed)
            check([np.asarray(x) for x in out], exact(*arrays, ids=ids, silu=True), rtol=1e-5, atol=1e-5)
            sharding = out[0].sharding  # the partitioner chooses that of the gradients as it likes
            assert sharding.is_equivalent_to(NamedSharding(mesh, tokens), 3), (name, kind, sharding)
        assert "all-gather" not in step.as_text()
    assert seen[-1] == (1, 20, 128), seen  # traced with whole shapes before, where the partitioner splits
print("sharded convolutions agree")
"""


def test_every_device_convolves_its_rows_and_channels():
    here = Path(__file__).parent
    env = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=4",
        "PYTHONPATH": f"{here}:{here.parents[1]}",
    }
    out = subprocess.run([sys.executable, "-c", SHARDED], capture_output=True, text=True, env=env)
    assert out.returncode == 0, out.stderr[-3000:]
    assert "sharded convolutions agree" in out.stdout


def test_cost_counts_what_the_kernel_moves():
    x, one = 2 * 32 * 128, cost.forward(2, 32, 128, 4, 4)
    assert one.flops == 2 * 4 * x
    assert one.floor_bytes == 4 * (2 * x + 2 * 3 * 128 + 5 * 128)
    assert one.bytes - one.floor_bytes == 4 * 2 * 13 * 128  # the state as 16 tokens
    segments = cost.forward(2, 32, 128, 4, 4, segments=True, channel_blocks=3)
    assert segments.bytes - one.bytes == 3 * 2 * 32 // 2 and segments.floor_bytes - one.floor_bytes == 4 * 64
    back = cost.backward(2, 32, 128, 4, 2, block_tokens=16)
    assert back.flops == 2 * one.flops and cost.backward(
        2, 32, 128, 4, 2, block_tokens=16, silu=True
    ).flops == (3 * one.flops)
    assert back.floor_bytes == 2 * (3 * x + 2 * 2 * 3 * 128) + 4 * 2 * 5 * 128
    # the state in and, in float32, out as 16 tokens, and as many of x before each of two blocks
    extra = 2 * 2 * 13 * 128 + 2 * 128 * (4 * 16 - 2 * 3) + 2 * 2 * 2 * 16 * 128
    assert back.bytes - back.floor_bytes == extra
