"""The TPU kernels of ``ssd``: races and memory that is not initialised, planted bugs, sharding, compiling
ahead of time, and what they are said to cost."""

import importlib.util
import inspect
import itertools
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic.interpret import interpret_pallas_call
from jax.experimental.pallas import tpu as pltpu
from ssd_oracles import FLOAT32, NAMES, agree, exact, make

from pallas_kernels import aot, decay_sums, dispatch, ssd
from pallas_kernels.cost import ssd as cost
from pallas_kernels.ssd import Options
from pallas_kernels.tpu import ssd as tpu
from pallas_kernels.tpu import ssd_plan

STRICT = {"detect_races": True, "uninitialized_memory": "nan", "num_cores_or_threads": 2, "random_seed": 1}


OPTIONS = Options(scale=1.0, chunk=16, heads=1, span=32)


def check(channel, mode, backward=True, T=36):
    """Small, with two blocks of heads in a query-key head, two spans of which the last has fewer chunks, and
    a last chunk that is ragged.

    The kernels alone: the strict interpreter does not run where ``per_shard`` asks the partitioner.
    """
    arrays = make(1, T, 2, 4, 4, 3, channel=channel)
    oracle = exact(arrays)
    arrays[3] = np.maximum(arrays[3], decay_sums.LOWEST)

    def run(*arrays):
        *out, kept = tpu.forward(*arrays[:5], options=OPTIONS, keep=True)
        gradients = tpu.backward(*arrays[:4], kept, *arrays[5:], options=OPTIONS) if backward else ()
        return (*out, *gradients)

    n = 7 if backward else 2
    with dispatch.interpret(mode):
        agree(jax.jit(run)(*arrays), oracle[:n], FLOAT32, NAMES[:n])


def check_strictly(channel=False, backward=True, T=36):
    check(channel, pltpu.InterpretParams(**STRICT), backward, T)
    assert not interpret_pallas_call.races.races_found, "a race between two cores"


@pytest.mark.parametrize("channel", [False, True], ids=["head", "channel"])
def test_no_race_and_nothing_read_before_it_is_written(channel):
    check_strictly(channel)


MUTANTS = {
    "state not initialised": ("_forward_kernel", "state[here] = state0_ref[...]", "pass"),
    "gradient of the state not initialised": ("_backward_kernel", "dstate[here] = dstate_ref[...]", "pass"),
    "products of the first chunk alone": ("_forward_kernel", "@pl.when(j == 0)", "@pl.when(c == 0)"),
    "sums not zeroed": (
        "_backward_kernel", "dq[rows] = jnp.zeros((plan.C, plan.D), jnp.float32)", "pass"
    ),
    "chunks walked in the wrong order": ("_backward_kernel", "c = chunks - 1 - i", "c = i"),
    "a run begun without its state": ("_backward_kernel", "starts[0] = kept_ref[...]", "pass"),
    "states within a run not computed": ("_backward_kernel", "lax.fori_loop(0, chunks - 1, forth, None)", ""),
    "chunks past the end": ("_backward_kernel", "plan.chunks_of_step(step)", "plan.run"),
    "state of another head": (
        "_forward_kernel", "state[j * plan.heads + h] = next", "state[j * plan.heads + h + 1] = next"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MUTANTS)
def test_planted_bugs_are_caught(name, monkeypatch):
    function, old, new = MUTANTS[name]
    source = inspect.getsource(getattr(tpu, function))
    assert source.count(old) == 1
    space = dict(vars(tpu))
    exec(source.replace(old, new), space)
    monkeypatch.setattr(tpu, function, space[function])
    with pytest.raises((AssertionError, IndexError, ValueError, jax.errors.JaxRuntimeError)):
        check_strictly(backward="backward" in function)


def test_chunks_marked_parallel_are_caught(monkeypatch):
    monkeypatch.setattr(ssd_plan, "SEMANTICS", ("parallel", "parallel", "parallel", "arbitrary"))
    check(False, True)  # the fast interpreter sees nothing
    with pytest.raises((AssertionError, jax.errors.JaxRuntimeError)):
        check_strictly(backward=False, T=52)


SHARDED = """
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from pallas_kernels import dispatch, ssd

def run(implementation):
    def f(q, k, v, g):
        return jnp.sum(jnp.sin(ssd(q, k, v, g, chunk=16, implementation=implementation)[0]))
    return jax.jit(jax.value_and_grad(f, argnums=(0, 1, 2, 3)))

rng = np.random.default_rng(0)
for K, channel in ((1, False), (2, True)):
    q, k = rng.standard_normal((2, 2, 20, K, 4)).astype(np.float32)
    v = rng.standard_normal((2, 20, 4, 3)).astype(np.float32)
    g = -rng.random((2, 20, 4, 4)[: 3 + channel]).astype(np.float32)
    want = run("xla_chunked")(q, k, v, g)
    for kind in (AxisType.Auto, AxisType.Explicit):
        mesh = jax.make_mesh((2, 2), ("data", "model"), axis_types=(kind,) * 2)
        heads, shared = P("data", None, "model"), P("data", None, "model" if K > 1 else None)
        with jax.set_mesh(mesh), dispatch.interpret():
            put = [jax.device_put(x, NamedSharding(mesh, s))
                   for x, s in zip((q, k, v, g), (shared, shared, heads, heads))]
            step = run("pallas_tpu")
            got = step(*put)
            text = step.lower(*put).compile().as_text()
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
        assert "all-gather" not in text
        assert got[1][2].sharding.spec[2] == "model"
print("sharded agree")
"""


def test_sharded_over_batch_and_heads_nothing_is_gathered():
    env = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=4"}
    root = Path(__file__).parents[2]
    out = subprocess.run([sys.executable, "-c", SHARDED], capture_output=True, text=True, env=env, cwd=root)
    assert out.returncode == 0, out.stderr[-3000:]
    assert "sharded agree" in out.stdout


# Mamba-2 (one query-key head for all), one decay a head, gated linear attention: B, T, K, N, D, E, channel;
# and the memory that forward and gradient may take beside their arguments and results, in MiB. An array of
# 4096 x 16 x 128 is 16; v5p and tpu7x copy operands of four axes into rows of all heads, which a model that
# projects to such rows has anyway; v4, v5e and v6e copy next to none in the forward.
REAL = {
    "mamba": ((1, 4096, 1, 32, 128, 64, False), 40, 56),
    "heads": ((1, 4096, 16, 16, 128, 128, False), 88, 120),
    "channels": ((1, 4096, 16, 16, 128, 128, True), 120, 216),
}


@pytest.mark.aot
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")
@pytest.mark.parametrize(
    ("generation", "name"),
    # every generation once; of those that copy no operands and of those that do, one with every shape
    [(g, n) for g in dispatch.GENERATIONS for n in REAL if n == "heads" or g in ("v5e", "tpu7x")],
)
def test_compiles_for_tpu_within_its_memory(generation, name):
    (B, T, K, N, D, E, channel), forward, gradient = REAL[name]
    shapes = [(B, T, K, D), (B, T, K, D), (B, T, N, E)]
    shapes = [jax.ShapeDtypeStruct(s, jnp.bfloat16) for s in shapes]
    shapes.append(jax.ShapeDtypeStruct((B, T, N, D) if channel else (B, T, N), jnp.float32))

    def o(*arrays):
        return ssd(*arrays)[0]

    grad = jax.grad(lambda *a: jnp.sum(o(*a).astype(jnp.float32)), argnums=range(4))
    for f, calls, budget in ((o, 1, forward), (grad, 2, gradient)):
        compiled = aot.compile_tpu(f, *shapes, generation=generation)
        assert compiled.as_text().count('custom_call_target="tpu_custom_call"') == calls
        assert compiled.memory_analysis().temp_size_in_bytes <= budget * 2**20


@pytest.mark.parametrize("T,chunk", [(1, 16), (37, 16), (64, 32)])
def test_pairs_are_counted_one_by_one(T, chunk):
    one_by_one = sum(s <= t and s // chunk == t // chunk for s, t in itertools.product(range(T), repeat=2))
    assert cost.pairs(T, chunk) == one_by_one


def test_flops_and_bytes_of_a_case_by_hand():
    sizes = {"B": 1, "T": 5, "K": 1, "N": 3, "D": 5, "E": 7, "chunk": 2, "kept": 2}
    sizes |= {"channel": False, "itemsize": 2}
    # chunks of 2, 2 and 1 tokens have 7 pairs: one q k^T for all heads, A v a head; q S and v^T k a token
    # and head
    forward, training = (cost.forward(**sizes, keep=keep) for keep in (False, True))
    assert forward.flops == training.flops == 2 * (7 * 5 + 7 * 7 * 3 + 2 * 5 * 3 * 5 * 7)
    q, v, g, state = 5 * 5 * 2, 5 * 3 * 7 * 2, 5 * 3 * 4, 3 * 5 * 7 * 4
    assert forward.floor_bytes == 2 * q + 2 * v + g + 2 * state
    q, v, g = (x * 6 // 5 for x in (q, v, g))  # three chunks of two
    assert forward.bytes == 2 * q + 2 * v + 2 * g + 2 * state  # exact sums and rests
    assert training.bytes == forward.bytes + 2 * state
    backward = cost.backward(**sizes)
    assert backward.bytes == 4 * q + 3 * v + 3 * g + 4 * state
    # q k^T and the gradients of q and k, do v^T and A^T do; do S, v dS, k dS and do^T q; of the chunks, of 2,
    # 2 and 1, the first alone is followed by another before the state that is kept or the end
    assert backward.flops == 2 * (7 * 3 * 5 + 7 * 2 * 7 * 3 + (4 * 5 + 2) * 3 * 5 * 7)
    per_channel = cost.forward(**sizes | {"channel": True}, keep=False)
    assert per_channel.flops == 2 * (7 * (5 + 7) * 3 + 2 * 5 * 3 * 5 * 7)


MOST_OVER_FLOOR = 1.2


@pytest.mark.parametrize("name", [*REAL, "ragged"])
@pytest.mark.parametrize("generation", dispatch.GENERATIONS)
def test_the_bytes_stated_are_those_of_the_grid_and_near_the_floor(generation, name):
    """Counted from the kernels as they are traced: a block is moved where its index differs from the grid
    step before, and what of it lies beyond the array is not."""
    B, T, K, N, D, E, channel = REAL.get(name, [(2, 1300, 2, 16, 128, 64, False)])[0]
    shapes = [jax.ShapeDtypeStruct(s, jnp.bfloat16) for s in ((B, T, K, D), (B, T, K, D), (B, T, N, E))]
    shapes.append(jax.ShapeDtypeStruct((B, T, N, D) if channel else (B, T, N), jnp.float32))
    shapes.append(jax.ShapeDtypeStruct((B, N, D, E), jnp.float32))

    def f(*arrays):
        return ssd(*arrays[:4], state0=arrays[4], implementation="pallas_tpu")

    def train(*arrays):
        out, pull = jax.vjp(f, *arrays)
        return out, pull(out)

    with dispatch.target("tpu", generation):
        alone = list(kernels(jax.make_jaxpr(f)(*shapes).jaxpr))
        forward, backward = kernels(jax.make_jaxpr(train)(*shapes).jaxpr)
    inputs = sum(x.size * x.dtype.itemsize for x in shapes)
    outputs = shapes[2].size * 2 + shapes[4].size * 4
    floors = inputs + outputs, inputs + outputs, 2 * inputs + outputs
    for kernel, floor in zip((*alone, forward, backward), floors, strict=True):
        moved = moved_bytes(kernel.params["grid_mapping"])
        assert moved == kernel.params["cost_estimate"].bytes_accessed
        if name in REAL:
            assert moved <= MOST_OVER_FLOOR * floor


def kernels(jaxpr):
    """Equations of all ``pallas_call``s in it."""
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "pallas_call":
            yield eqn
        else:
            for value in jax.tree.leaves(eqn.params, is_leaf=lambda x: hasattr(x, "eqns")):
                value = getattr(value, "jaxpr", value)
                if hasattr(value, "eqns"):
                    yield from kernels(value)


def moved_bytes(mapping):
    steps = np.stack([x.ravel() for x in np.indices(mapping.grid)])
    total = 0
    for block in mapping.block_mappings:
        index_map = block.index_map_jaxpr
        index = jax.jit(jax.vmap(lambda *at, m=index_map: jax.core.eval_jaxpr(m.jaxpr, m.consts, *at)))
        at = np.stack([np.asarray(x) for x in index(*steps.astype(np.int32))])
        moves = np.append(True, (at[:, 1:] != at[:, :-1]).any(0))
        array = block.array_aval
        sizes = np.array([getattr(s, "block_size", s) if type(s).__name__ != "Squeezed" else 1
                          for s in block.block_shape])  # fmt: skip
        inside = np.minimum(sizes[:, None], np.array(array.shape)[:, None] - at * sizes[:, None])
        total += int(inside.prod(0)[moves].sum()) * array.dtype.itemsize
    return total
