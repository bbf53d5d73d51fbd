"""The TPU kernels interpreted strictly, and planted bugs that the interpreter must catch."""

import attention_cases as cases
import jax
import jax.numpy as jnp
import mutants
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import dispatch, dot_product_attention

ARRAYS, _, (DOUT, _) = cases.problem(1, T=384, N=1, K=1, H=128)


def attend(q, k, v):
    return dot_product_attention(q, k, v, is_causal=True, implementation="pallas_tpu", block_sizes=128)


def gradients():
    out, pull = jax.vjp(attend, *(jnp.asarray(x) for x in ARRAYS.values()))
    return out, pull(jnp.asarray(DOUT))


@pytest.fixture(scope="module")
def expected():
    with dispatch.interpret():
        return jax.tree.map(np.asarray, gradients())


@pytest.mark.slow
def test_the_kernels_are_clean(expected):
    assert mutants.caught(gradients, expected, cases.FLOAT32) is None


BUGS = {
    "scratch not initialised": lambda: mutants.without_when(0),
    "time axis parallel": lambda: mutants.parallel_axis(2),
    "wrong grid order": lambda: mutants.reversed_axis(2),
    "read past the block": lambda: mutants.moved_block(1, 1),
}


@pytest.mark.slow
@pytest.mark.parametrize("bug", BUGS)
def test_a_bug_is_caught(bug, expected):
    with BUGS[bug]():
        assert mutants.caught(gradients, expected, cases.FLOAT32, seed=1) is not None


def test_a_read_before_the_copy_arrived_is_caught():
    def kernel(waits, x, out, scratch, semaphore):
        copy = pltpu.make_async_copy(x, scratch, semaphore)
        copy.start()
        if waits:
            copy.wait()
        out[...] = scratch[...] + 1

    def run(waits):
        x = jnp.ones((8, 128), jnp.float32)
        return pl.pallas_call(
            lambda *refs: kernel(waits, *refs),
            in_specs=[pl.BlockSpec(memory_space=pl.ANY)],
            out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype),
            scratch_shapes=[pltpu.VMEM(x.shape, x.dtype), pltpu.SemaphoreType.DMA],
            interpret=dispatch.interpret_mode(),
        )(x)

    twos = np.full((8, 128), 2, np.float32)
    assert mutants.caught(lambda: run(True), twos, cases.FLOAT32) is None
    assert mutants.caught(lambda: run(False), twos, cases.FLOAT32) is not None
