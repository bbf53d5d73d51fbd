"""What the Hopper kernels share: launching under either version of the API, and a ring of buffers.

Every warpgroup of a block computes; the first also starts the copies. A warpgroup that only moves memory
would need ``setmaxnreg`` to leave its registers to the others, and the linker that JAX's wheels compile
with ignores it ("to maintain compatibility across compilation units"): 168 registers a thread and spills.
With two warpgroups a thread has 255 in any case.
"""

import dataclasses
import functools
import inspect
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import dispatch

ROWS = 64  # of a wgmma, hence of a warpgroup
SHARED_MEMORY = 227 * 1024  # bytes that a block may have
LOG2E = math.log2(math.e)

MATRIX = plgpu.Layout.WGMMA  # registers of an accumulator
PER_ROW = plgpu.Layout.WGMMA.reduce(1)  # of a vector that has a value for each of its rows
PER_COLUMN = plgpu.Layout.WGMMA.reduce(0)


def kernel(body, *, name, out_type, grid, scratch_types, warpgroups):
    """``plgpu.kernel`` over ``grid``, a dict of axes and sizes, with ``warpgroups`` along that axis."""
    return plgpu.kernel(
        body,
        out_type=out_type,
        scratch_types=scratch_types,
        grid=tuple(grid.values()),
        grid_names=tuple(grid),
        num_threads=warpgroups,
        thread_name="warpgroup",
        kernel_name=name,
        # exp2 in one instruction; the semantics by name, as the default is another from jax 0.11 on
        compiler_params=plgpu.CompilerParams(
            approx_math=True,
            lowering_semantics=plgpu.LoweringSemantics.Lane,
            reduction_scratch_bytes=512,  # no reduction here crosses warps
        ),
        interpret=_interpret(),
    )


def _interpret():
    mode = dispatch.interpret_mode()
    if mode is not True:
        return mode or None
    if not hasattr(plgpu, "InterpretGPUParams"):
        raise NotImplementedError("the interpreter of GPU kernels is public from jax 0.12 on")
    return plgpu.InterpretGPUParams()


def operand(*shape, dtype):
    """Shared memory of [..., row, channel] as ``wgmma`` reads it: tiles of 8 x 64, 16 bits, swizzled."""
    transforms = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))
    return plgpu.SMEM(shape, dtype, transforms=transforms)


def barriers(count, arrivals=1):
    return plgpu.Barrier(num_arrivals=arrivals, num_barriers=count)


def load(ref, layout, *, optimized=True):
    """Shared memory in registers; global memory too where not ``optimized``."""
    index = ((),) if "idx" in inspect.signature(plgpu.load).parameters else ()  # until jax 0.11
    return plgpu.load(ref, *index, layout=layout, optimized=optimized)


def filled(shape, value, layout=MATRIX):
    return plgpu.layout_cast(jnp.full(shape, value, jnp.float32), layout)


def iota(shape, axis):
    return plgpu.broadcasted_iota(jnp.int32, shape, axis, layout=MATRIX)


def over_columns(x, shape):
    """A value per row, repeated over the columns."""
    return lax.broadcast_in_dim(x, shape, [0])


def over_rows(x, shape):
    """A value per column, repeated over the rows."""
    return lax.broadcast_in_dim(x, shape, [1])


def matmul(a, b, shape):
    """a @ b of ``shape`` [64, n]; both in shared memory."""

    def product(accumulator):
        plgpu.wgmma(accumulator, a, b)
        return accumulator[...]

    return pl.run_scoped(product, plgpu.ACC(shape, jnp.float32))


def add_matmul(total, a, b):
    """total + a @ b in the registers of ``total``; a in registers, b in shared memory."""
    if dispatch.interpret_mode():  # which has neither run_state nor wgmma from registers
        product = jnp.dot(a, b[...], preferred_element_type=jnp.float32)
        plgpu.commit_smem()  # a load, unlike wgmma, is not ordered before the copies that follow
        return total + product
    return pl.run_state(lambda accumulator: plgpu.wgmma(accumulator, a, b))(plgpu.ACC.init(total))


def add_outer(total, a, b):
    """total + a^T @ b in the registers of ``total``; both in shared memory."""
    if dispatch.interpret_mode():
        return total + jnp.dot(a[...].T, b[...], preferred_element_type=jnp.float32)
    a = a.transpose((1, 0))
    return pl.run_state(lambda accumulator: plgpu.wgmma(accumulator, a, b))(plgpu.ACC.init(total))


def tanh(x):
    """By exp2: the GPU's own tanh instruction has 11 bits, few for logits times a cap of 50."""
    return 1 - 2 / (1 + jnp.exp2(x * (2 * LOG2E)))


@dataclasses.dataclass(frozen=True)
class Ring:
    """Buffers of ``slots`` slots, refilled by TMA while earlier slots are read.

    Attributes:
      steps: how many steps the loop has, traced.
      copies: ``copies(step, slot)``: pairs (global memory, shared memory) that a step needs.
      full: barrier per slot, one arrival per pair.
      free: barrier per slot, one arrival per warpgroup.
      loads: whether slots are read by loads too, which a fence must order before the next copy.
    """

    slots: int
    steps: jax.Array
    copies: Callable
    full: object
    free: object
    loads: bool

    def start(self):
        """Fills every slot. Called by the first warpgroup alone."""
        for step in range(self.slots):
            pl.when(step < self.steps)(functools.partial(self._fill, jnp.int32(step)))

    def wait(self, step):
        """The slot that holds ``step``, when it is full."""
        slot = self._slot(step)
        plgpu.barrier_wait(self.full.at[slot])
        return slot

    def release(self, step):
        """This warpgroup has read the slot of ``step``."""
        if self.loads:
            plgpu.commit_smem()
        plgpu.barrier_arrive(self.free.at[self._slot(step)])

    def refill(self, step, warpgroup):
        """During ``step``: the slot of the step before it gets what comes next, when all have read it."""
        ahead = step - 1 + self.slots

        @pl.when((warpgroup == 0) & (step > 0) & (ahead < self.steps))
        def _():
            plgpu.barrier_wait(self.free.at[self._slot(step - 1)])
            self._fill(ahead)

    def _slot(self, step):
        return lax.rem(step, jnp.int32(self.slots))

    def _fill(self, step):
        slot = self._slot(step)
        for source, target in self.copies(step, slot):
            plgpu.copy_gmem_to_smem(source, target, self.full.at[slot])
