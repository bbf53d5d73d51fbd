"""The TPU kernel of the diagonal recurrence: interpreted, with planted bugs, and compiled ahead of time."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from scan_oracle import check, exact, problem, with_gradients

from pallas_kernels import aot, dispatch, linear_scan, sharding
from pallas_kernels.cost import linear_scan as cost
from pallas_kernels.tpu import linear_scan as tpu
from pallas_kernels.tpu.linear_scan_blocks import BLOCK_SIZES

FLOAT32 = {"rtol": 2e-5, "atol": 2e-5}  # see test_linear_scan.py
BFLOAT16 = {"rtol": 2**-6, "atol": 2**-5}


def run(arrays, ids, mode=True, **options):
    with dispatch.interpret(mode):
        return with_gradients(arrays, ids, implementation="pallas_tpu", **options)


# Ragged: 21 tokens are two blocks of 16 and three groups of 8; 200 features are two tiles.
@pytest.mark.parametrize(
    "dtype,segments,reverse",
    [
        ("float32", False, False),
        ("float32", False, True),
        ("float32", True, False),
        ("float32", True, True),
        (jnp.bfloat16, True, False),
        (jnp.bfloat16, False, True),
        ("complex64", True, True),
    ],
    ids=str,
)
def test_equals_the_loops(dtype, segments, reverse):
    tolerance = BFLOAT16 if dtype == jnp.bfloat16 else FLOAT32
    arrays, ids = problem(dtype=dtype, segments=segments)
    got = run(arrays, ids, reverse=reverse, block_sizes=(16, 128))
    check(got, exact(*arrays, reverse=reverse, ids=ids), **tolerance)


@pytest.mark.parametrize(
    "T,F,block_sizes",
    [(1, 5, None), (8, 128, (8, 128)), (40, 384, (24, 256)), (48, 512, (16, 512)), (7, 256, (256, 2048))],
)
def test_other_shapes_equal_the_loops(T, F, block_sizes):
    arrays, ids = problem(T=T, F=F, segments=True)
    check(run(arrays, ids, block_sizes=block_sizes), exact(*arrays, ids=ids), **FLOAT32)


def test_rows_mapped_and_rematerialised_equal_the_loops():
    arrays, ids = problem(T=9, F=3, segments=True)

    @jax.checkpoint
    @jax.vmap
    def mapped(a, b, h0, segment_ids):
        out = linear_scan(
            a[None], b[None], h0[None], segment_ids=segment_ids[None], implementation="pallas_tpu"
        )
        return jax.tree.map(lambda x: x[0], out)

    with dispatch.interpret():
        got = with_gradients(arrays, ids, lambda *xs, segment_ids: mapped(*xs, segment_ids))
    check(got, exact(*arrays, ids=ids), **FLOAT32)


@pytest.fixture
def simulate(monkeypatch):
    """Runs at small T in the interpreter with memory spaces, races and NaN in memory not yet written."""
    # its callbacks are not lowered inside custom_partitioning
    monkeypatch.setattr(sharding, "per_shard", lambda function, rule, **options: function)

    def simulated(dtype="float32", **options):
        jax.clear_caches()
        with_gradients.__globals__["_compiled"].cache_clear()
        arrays, ids = problem(B=2, T=24, F=256, dtype=dtype, segments=True)
        # both cores of a v4 or tpu7x share the axes marked parallel
        mode = pltpu.InterpretParams(
            detect_races=True, uninitialized_memory="nan", num_cores_or_threads=2, random_seed=1, **options
        )
        got = run(arrays, ids, mode, block_sizes=(8, 128))
        return got, exact(*arrays, ids=ids)

    return simulated


@pytest.mark.parametrize("dtype,tolerance", [("float32", FLOAT32), (jnp.bfloat16, BFLOAT16)], ids=str)
def test_simulated_without_races_or_memory_not_written(simulate, dtype, tolerance):
    check(*simulate(dtype), **tolerance)


def _no_start(monkeypatch):
    """The carry is not set before the first block."""
    real = tpu.pl.when
    whens = iter(range(10**6))
    monkeypatch.setattr(tpu.pl, "when", lambda c: (lambda f: None) if next(whens) % 2 == 0 else real(c))


def _parallel_time(monkeypatch):
    monkeypatch.setattr(tpu, "SEMANTICS", ("parallel", "parallel", "parallel"))


def _wrong_order(monkeypatch):
    """Blocks are visited from the other end, rows within them as before."""
    real = tpu._Plan._block
    monkeypatch.setattr(tpu._Plan, "_block", lambda self, k: self.grid[2] - 1 - real(self, k))


def _edge_off_by_one(monkeypatch):
    """The backward pass takes the state before a block from one group too late."""
    real = tpu._Plan._edge
    monkeypatch.setattr(tpu._Plan, "_edge", lambda self, k: jnp.minimum(real(self, k) + 1, 2))


def _block_too_long(monkeypatch):
    """A group beyond the block is taken for its first."""
    real = tpu._Plan.group_count
    monkeypatch.setattr(tpu._Plan, "group_count", lambda self, k: real(self, k) + 1)


@pytest.mark.parametrize(
    "plant", [_no_start, _parallel_time, _wrong_order, _edge_off_by_one, _block_too_long]
)
def test_planted_bugs_are_caught(simulate, monkeypatch, plant):
    plant(monkeypatch)
    with pytest.raises(Exception) as error:
        check(*simulate(), **FLOAT32)
    assert re.search(r"Not equal to tolerance|[Rr]ace|out.of.bounds|Out-of-bounds", str(error.value))


needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed (pip install 'scaling[tpu]')"
)
B, T, F = 4, 4096, 8192  # more than VMEM holds, or XLA keeps h there
HLO_BYTES = {"f32": 4, "bf16": 2, "s32": 4, "pred": 1}


def traffic(text):
    """Bytes of HBM that the instructions of a compiled program's entry read and write, each operand once.

    Arrays in VMEM, memory space 1, do not count: XLA moves one there ahead of the kernel, by a copy.
    """
    free = "parameter|bitcast|get-tuple-element|tuple|constant|copy-done"
    entry = text[text.index("\nENTRY") :]
    lines = re.findall(r"^\s+(?:ROOT )?(%\S+) = (.*)$", entry, re.M)
    size, total = {}, 0
    for name, rest in lines:
        operation = re.search(r"(?:^|[\s)}])([a-z][\w-]*)\((%[^)]*)?\)", rest)
        shape = rest[: operation.start(1)] if operation else rest
        parts = re.findall(r"(f32|bf16|s32|pred)\[([\d,]*)\](?:\{([^}]*)\})?", shape)
        sizes = [
            0 if "S(1)" in layout else HLO_BYTES[d] * int(np.prod([int(n) for n in dims.split(",") if n]))
            for d, dims, layout in parts
        ]
        size[name] = sum(sizes)
        if operation is None or re.fullmatch(free, operation[1]):
            continue
        written = sizes[0] if operation[1] == "copy-start" else size[name]  # which returns its source too
        total += written + sum(size.get(n, 0) for n in set(re.findall(r"%[\w.-]+", operation[2] or "")))
    return total


@needs_libtpu
@pytest.mark.aot
@pytest.mark.parametrize("generation", ["v4", "v5e", "v5p", "v6e", "tpu7x"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_compiled_for_tpu_moves_every_array_once(generation, dtype):
    x = jax.ShapeDtypeStruct((B, T, F), dtype)
    ids = jax.ShapeDtypeStruct((B, T), jnp.int32)
    size = B * T * F * jnp.dtype(dtype).itemsize

    def forward(a, b, ids):
        return linear_scan(a, b, segment_ids=ids)

    def gradient(a, b, ids, dh):
        return jax.vjp(lambda a, b: linear_scan(a, b, segment_ids=ids)[0], a, b)[1](dh)

    passes = {forward: (3, 0, (x, x, ids)), gradient: (3 + 5, 1, (x, x, ids, x))}
    for function, (n, kept, shapes) in passes.items():
        compiled = aot.compile_tpu(function, *shapes, generation=generation)
        text = compiled.as_text()
        assert text.count('"tpu_custom_call"') == (1 if n == 3 else 2)
        # the gradient keeps h between its two kernels; the rest is states and resets
        assert compiled.memory_analysis().temp_size_in_bytes <= (kept + 0.02) * size
        # h goes in twice, the second time for one group of tokens a block
        one = cost.backward(B, T, F, x.dtype.itemsize, block_tokens=BLOCK_SIZES[generation]["backward"][0])
        edges = (one.bytes - one.floor_bytes) if n > 3 else 0
        assert (n - 0.01) * size < traffic(text) and traffic(text) + edges < 1.2 * n * size


SHARDED = """
import jax, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from pallas_kernels import dispatch, linear_scan
from pallas_kernels.tpu import linear_scan as tpu
from scan_oracle import check, exact, problem

seen = []
real = tpu._forward
tpu._forward = lambda a, *rest, **options: (seen.append(a.shape), real(a, *rest, **options))[1]
arrays, ids = problem(B=2, T=9, F=256, segments=True)

def run(implementation, a, b, h0, dh, dh_last, ids):
    scan = lambda *xs: linear_scan(*xs, segment_ids=ids, implementation=implementation)
    out, pull = jax.vjp(scan, a, b, h0)
    return *out, *pull((dh, dh_last))

tokens, states = P("data", None, "model"), P("data", "model")
specs = tokens, tokens, states, tokens, states, P("data")
for kind in (AxisType.Auto, AxisType.Explicit):
    mesh = jax.make_mesh((2, 2), ("data", "model"), axis_types=(kind,) * 2)
    with jax.set_mesh(mesh), dispatch.interpret():
        placed = [jax.device_put(x, NamedSharding(mesh, s)) for x, s in zip((*arrays, ids), specs)]
        for name in ("xla_chunked", "pallas_tpu"):
            out = jax.jit(run, static_argnums=0)(name, *placed)
            check([np.asarray(x) for x in out], exact(*arrays, ids=ids), rtol=2e-5, atol=2e-5)
            assert out[0].sharding.spec[0] == "data" and out[0].sharding.spec[2] == "model", out[0].sharding
    assert seen[-1] == (1, 9, 128), seen  # traced with whole shapes before, where the partitioner splits
print("sharded scans agree")
"""


def test_every_device_scans_its_rows_and_features():
    here = Path(__file__).parent
    env = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=4",
        "PYTHONPATH": f"{here}:{here.parents[1]}",
    }
    out = subprocess.run([sys.executable, "-c", SHARDED], capture_output=True, text=True, env=env)
    assert out.returncode == 0, out.stderr[-3000:]
    assert "sharded scans agree" in out.stdout


def test_cost_counts_what_the_kernel_moves():
    one = cost.forward(2, 16, 128, 4)
    assert one.bytes == one.floor_bytes == 4 * (3 * 2 * 16 * 128 + 2 * 2 * 128)
    assert one.flops == 2 * 2 * 16 * 128
    back = cost.backward(2, 16, 128, 2, block_tokens=8)
    assert back.floor_bytes == 2 * 5 * 2 * 16 * 128 + 4 * 3 * 2 * 128
    assert back.bytes - back.floor_bytes == 2 * 2 * 16 * 128  # eight tokens of h a block of eight
    assert cost.forward(1, 8, 8, 8, is_complex=True).flops == 8 * 64
