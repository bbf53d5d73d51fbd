"""The TPU kernels of the gated delta rule: in the simulating interpreter, with planted bugs, and compiled."""

import functools
import importlib.util
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from jax.interpreters import partial_eval

from pallas_kernels import aot, delta_chunk, dispatch, gated_delta_rule
from pallas_kernels.cost import gated_delta_rule as cost
from pallas_kernels.reference import gated_delta_rule as reference
from pallas_kernels.tpu import gated_delta_rule as tpu

TOLERANCE = {
    "rtol": 1e-4,
    "atol": 5e-5,
}  # as in the tests of the values: float32 sums carried along 40 tokens


@functools.cache
def problem():
    """Inputs of three chunks of 16, the last ragged, and what the reference makes of them."""
    rng = np.random.default_rng(0)
    B, T, N, D, E = 1, 40, 2, 8, 8
    q, k, v, do = (rng.standard_normal((B, T, N, D)).astype(np.float32) / 2 for _ in range(4))
    beta = rng.uniform(0.5, 1, (B, T, N)).astype(np.float32)
    log_decay = -rng.uniform(0, 0.2, (B, T, N)).astype(np.float32)
    state, dstate = (rng.standard_normal((B, N, D, E)).astype(np.float32) for _ in range(2))
    reset = jnp.zeros((B, T), jnp.int32).at[0, 20].set(1)

    def f(q, k, v, beta, log_decay, state):
        return reference.gated_delta_rule(q, k, v, beta, log_decay, reset > 0, state, scale=0.3)

    arrays = q, k, v, beta, log_decay
    out, pull = jax.vjp(f, *arrays, state)
    return (*arrays, reset), state, do, dstate, (*out, *pull((do, dstate)))


def simulated(seed=None):
    """Outputs and gradients in the interpreter that starts memory as NaN and looks for races."""
    arrays, state, do, dstate, want = problem()
    params = pltpu.InterpretParams(
        detect_races=True,
        uninitialized_memory="nan",
        random_seed=seed,
        num_cores_or_threads=1 if seed is None else 2,
    )
    with dispatch.interpret(params):  # its ordered effects do not pass through custom_partitioning

        @jax.jit
        def run(arrays, state, do, dstate):
            o, last, starts = tpu.forward(*arrays, state, scale=0.3, chunk=16)
            return o, last, *tpu.backward(*arrays, starts, do, dstate, scale=0.3, chunk=16)

        got = jax.tree.map(np.asarray, run(arrays, state, do, dstate))
    return got, want


def agrees(got, want):
    return all(np.allclose(a, b, **TOLERANCE) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("seed", [None, 0])
def test_no_races_and_nothing_read_before_it_is_written(seed):
    assert agrees(*simulated(seed))


def scratch_not_initialised(monkeypatch):
    when, calls = tpu.pl.when, []

    def without_first(condition):
        calls.append(condition)
        return when(condition) if len(calls) % 2 == 0 else lambda body: None

    monkeypatch.setattr(tpu.pl, "when", without_first)


def time_axis_parallel(monkeypatch):
    how = tpu._how

    def parallel(work):
        all_parallel = pltpu.CompilerParams(dimension_semantics=("parallel",) * 3)
        return {**how(work), "compiler_params": all_parallel}

    monkeypatch.setattr(tpu, "_how", parallel)


def backward_in_order_of_time(monkeypatch):
    specs = tpu._specs
    monkeypatch.setattr(tpu, "_specs", lambda C, H, P, R, order: specs(C, H, P, R, lambda c: c))


def one_head_read_for_all(monkeypatch):
    head = tpu._head
    monkeypatch.setattr(tpu, "_head", lambda ref, h, heads: head(ref, 0, heads))


def decay_in_the_padding(monkeypatch):
    numbers = tpu._numbers

    def with_decay(C, beta, log_decay, reset):
        out = numbers(C, beta, log_decay, reset)
        return out.at[:, :, -1, 1, log_decay.shape[1] % C :].set(-1.0)

    monkeypatch.setattr(tpu, "_numbers", with_decay)


MUTANTS = [
    scratch_not_initialised,
    time_axis_parallel,
    backward_in_order_of_time,
    one_head_read_for_all,
    decay_in_the_padding,
]


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda f: f.__name__)
def test_planted_bugs_are_caught(mutant, monkeypatch):
    mutant(monkeypatch)
    seeds = range(4) if mutant is time_axis_parallel else [None]  # a lucky order of chunks is right
    try:
        caught = not all(agrees(*simulated(seed)) for seed in seeds)
    except Exception as e:
        caught = "race" in str(e).lower()
        if not caught:
            raise
    assert caught


def multiply_adds(jaxpr):
    total = 0
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            (contracted,), _ = eqn.params["dimension_numbers"][0]
            total += eqn.invars[0].aval.shape[contracted] * math.prod(eqn.outvars[0].aval.shape)
        for inner in eqn.params.values():
            inner = getattr(inner, "jaxpr", inner)
            total += multiply_adds(inner) if hasattr(inner, "eqns") else 0
    return total


def test_cost_counted_from_the_products_of_a_chunk():
    """Matrix products in the trace of a chunk, and in that of its derivative but for what nothing needs."""
    C, D, E = 64, 128, 256
    arrays = [jnp.zeros(s) for s in ((D, E), (C, D), (C, D), (C, E), (1, C), (1, C))]
    reset = jnp.zeros((1, C))

    def step(*a):
        return delta_chunk.chunk(*a, reset, scale=1.0)

    def backward(do, dstate, *a):
        return jax.vjp(step, *a)[1]((do, dstate))

    sizes = {"B": 2, "T": 4 * C, "N": 3, "D": D, "E": E, "chunk": C, "itemsize": 4}
    chunks = 2 * 4 * 3
    forward = jax.make_jaxpr(step)(*arrays).jaxpr
    assert cost.forward(**sizes, keep=False)["flops"] == 2 * chunks * multiply_adds(forward)
    trace = jax.make_jaxpr(backward)(arrays[3], arrays[0], *arrays).jaxpr
    needed, _ = partial_eval.dce_jaxpr(trace, [True] * 6)
    assert cost.backward(**sizes)["flops"] == 2 * chunks * multiply_adds(needed)


@pytest.mark.aot
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")
@pytest.mark.parametrize("generation", ["v4", "v5e", "v5p", "v6e", "tpu7x"])
def test_compiles_for_tpu_within_memory(generation):
    B, T, N, D = 1, 1024, 4, 128
    tokens = [jax.ShapeDtypeStruct((B, T, N, D), jnp.bfloat16)] * 3
    numbers = [jax.ShapeDtypeStruct((B, T, N), jnp.float32)] * 2

    def loss(*a):
        return jnp.sum(gated_delta_rule(*a)[0].astype(jnp.float32))

    forward = aot.compile_tpu(lambda *a: gated_delta_rule(*a), *tokens, *numbers, generation=generation)
    gradient = aot.compile_tpu(jax.grad(loss, range(5)), *tokens, *numbers, generation=generation)
    assert forward.as_text().count("tpu_custom_call") == 1
    assert gradient.as_text().count("tpu_custom_call") == 2
    array, state = 2 * B * T * N * D, 4 * B * N * D * D
    # q, k, v, o with heads side by side, and beta and decay by chunks
    assert forward.memory_analysis().temp_size_in_bytes < 4.5 * array
    # their gradients too, and a state a chunk
    assert gradient.memory_analysis().temp_size_in_bytes < 9 * array + T // 64 * state
