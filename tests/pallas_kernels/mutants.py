"""Pallas TPU kernels with planted bugs, and the interpreter that must notice: a harness for any kernel.

``strict()`` simulates memory spaces and copies, fills fresh memory with NaN, lets copies happen as late as
they may, walks parallel axes in random order and looks for races. A mutant is a context in which every
``pl.pallas_call`` is built with one bug; ``caught`` says by what a bug shows.
"""

import contextlib

import jax
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import dispatch, sharding


def strict(seed=0, cores=1):
    """Parameters of the interpreter that simulates memory; 100 times slower than ``interpret()``."""
    return pltpu.InterpretParams(
        dma_execution_mode="on_wait", detect_races=True, out_of_bounds_reads="raise",
        uninitialized_memory="nan", random_seed=seed, num_cores_or_threads=cores,
    )  # fmt: skip


def caught(run, expected, tolerance, seed=0, cores=1):
    """How ``run()``, its kernels interpreted strictly, differs from ``expected``: words, or None.

    Args:
      run: gives a pytree of arrays; called once, so whatever it jits must be traced in it.
      expected: the same pytree, right.
      tolerance: rtol and atol.
    """
    jax.clear_caches()  # a kernel traced before, without the bug or with it, is not to be run again
    try:
        # the ordered effects of the strict interpreter do not pass through the partitioner
        alone = _patched(sharding, "per_shard", lambda function, *_, **__: function)
        with alone, dispatch.interpret(strict(seed, cores)):
            found = jax.tree.map(np.asarray, jax.jit(run)())
    except Exception as e:
        pltpu.reset_tpu_interpret_mode_state()
        return f"{type(e).__name__}: {e}"
    finally:
        jax.clear_caches()
    from jax._src.pallas.mosaic.interpret import interpret_pallas_call as state

    if state.races is not None and getattr(state.races, "races_found", False):
        pltpu.reset_tpu_interpret_mode_state()
        return "race"
    pltpu.reset_tpu_interpret_mode_state()
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        if np.isnan(a).any() and not np.isnan(b).any():
            return "NaN"
        if not np.allclose(a, b, **tolerance):
            return "other values"
    return None


@contextlib.contextmanager
def _patched(module, name, value):
    before = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, before)


def parallel_axis(axis):
    """The grid axis ``axis`` marked parallel: its steps come in any order, on any core."""
    plain = pltpu.CompilerParams

    def params(**options):
        semantics = list(options["dimension_semantics"])
        semantics[axis] = "parallel"
        return plain(**options | {"dimension_semantics": tuple(semantics)})

    return _patched(pltpu, "CompilerParams", params)


def without_when(which):
    """The ``which``-th ``pl.when`` of every kernel does nothing: 0 is mostly where scratch is set up."""
    plain_call, plain_when = pl.pallas_call, pl.when

    def pallas_call(body, *args, **options):
        def bugged(*refs):
            seen = iter(range(1_000_000))

            def when(condition):
                return (lambda f: None) if next(seen) == which else plain_when(condition)

            with _patched(pl, "when", when):
                return body(*refs)

        return plain_call(bugged, *args, **options)

    return _patched(pl, "pallas_call", pallas_call)


def moved_block(shift, axis, operand=0):
    """Input ``operand`` is read ``shift`` blocks off along ``axis``: past the end, or the wrong block."""

    def spec(block):
        plain = block.index_map

        def index_map(*at):
            index = list(plain(*at))
            index[axis] = index[axis] + shift
            return tuple(index)

        return pl.BlockSpec(block.block_shape, index_map)

    return _with_grid_spec(lambda inputs: [spec(b) if n == operand else b for n, b in enumerate(inputs)])


def reversed_axis(axis):
    """Blocks of inputs come in the reverse of the order that the kernel counts in, along a grid axis."""

    def specs(inputs, size):
        def turned(block):
            plain = block.index_map
            if plain is None:
                return block
            return pl.BlockSpec(
                block.block_shape,
                lambda *at: plain(*at[:axis], size - 1 - at[axis], *at[axis + 1 :]),
            )

        return [turned(b) for b in inputs]

    return _with_grid_spec(specs, axis)


def _with_grid_spec(change, axis=None):
    plain = pl.pallas_call

    def pallas_call(body, *args, **options):
        spec = options.get("grid_spec")
        if spec is None:
            grid, inputs = options["grid"], options["in_specs"]
            more = () if axis is None else (grid[axis],)
            options["in_specs"] = change(inputs, *more)
        else:
            more = () if axis is None else (spec.grid[axis],)
            options["grid_spec"] = pltpu.PrefetchScalarGridSpec(
                num_scalar_prefetch=spec.num_scalar_prefetch, grid=spec.grid,
                in_specs=change(list(spec.in_specs), *more), out_specs=spec.out_specs,
                scratch_shapes=spec.scratch_shapes,
            )  # fmt: skip
        return plain(body, *args, **options)

    return _patched(pl, "pallas_call", pallas_call)
