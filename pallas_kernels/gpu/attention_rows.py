"""What attention's forward kernel and that of dq share: tiles of queries that go over blocks of keys."""

import dataclasses

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.gpu import hopper
from pallas_kernels.gpu.attention_blocks import Problem, mask_segments
from pallas_kernels.gpu.hopper import ROWS


@dataclasses.dataclass(frozen=True)
class QueryTiles:
    """A block has 64 queries of one head for each warpgroup; keys and values come through a ring.

    Attributes:
      T: queries, padded.
      keys, slots: in a block of keys, and of the ring.
      segments: whether there are segments of queries and keys.
    """

    problem: Problem
    T: int
    keys: int
    slots: int
    warpgroups: int
    segments: bool

    @property
    def count(self):
        return pl.cdiv(self.T, self.warpgroups * ROWS)

    def scratch(self, H, dtype, copied):
        """Shared memory that ``Walk`` takes; ``copied`` arrays of its own rows are brought to a warpgroup."""
        ids = [plgpu.SMEM((self.warpgroups, ROWS), jnp.int32), plgpu.SMEM((self.slots, self.keys), jnp.int32)]
        return [
            hopper.operand(self.slots, self.keys, H, dtype=dtype),
            hopper.operand(self.slots, self.keys, H, dtype=dtype),
            hopper.barriers(self.warpgroups, copied + self.segments),
            hopper.barriers(self.slots, 2 + self.segments),
            hopper.barriers(self.slots, self.warpgroups),
            *ids * self.segments,
        ]


class Walk:
    """Inside a kernel: where a warpgroup is, and its loop over the keys at which its block's queries look.

    Attributes:
      batch, head, warpgroup: of this warpgroup.
      rows: the tokens of its queries.
    """

    def __init__(self, tiles: QueryTiles, inputs, scratch):
        """``inputs`` are k, v and the segments of queries and keys, if any, in global memory."""
        self._tiles, self._inputs = tiles, inputs
        self._k, self._v, self._mine, full, free, *ids = scratch
        self._q_ids, self._kv_ids = ids or (None, None)
        self.batch, self.head, self.warpgroup = (
            lax.axis_index(axis) for axis in ("batch", "head", "warpgroup")
        )
        # the last queries have most keys before them: longest first, so that no block is left over at the end
        tile = tiles.count - 1 - lax.axis_index("tile")
        first = tile * (tiles.warpgroups * ROWS)
        self._low, high = tiles.problem.key_blocks(first, tiles.warpgroups * ROWS, tiles.keys)
        self._q0 = first + self.warpgroup * ROWS
        self.rows = pl.ds(self._q0, ROWS)
        self._ring = hopper.Ring(tiles.slots, high - self._low, self._copies, full, free, tiles.segments)

    def start(self, *pairs):
        """Fills the ring and copies pairs (global memory, shared memory) of this warpgroup."""
        pl.when(self.warpgroup == 0)(self._ring.start)
        mine = self._mine.at[self.warpgroup]
        if self._tiles.segments:
            self._q_ids = self._q_ids.at[self.warpgroup]
            pairs = (*pairs, (self._inputs[2].at[self.batch, self.rows], self._q_ids))
        for source, target in pairs:
            plgpu.copy_gmem_to_smem(source, target, mine)
        plgpu.barrier_wait(mine)

    def fold(self, q, visit, carry):
        """``visit(carry, logits, masked logits, k, v, refill)`` over the blocks of keys, in units of log 2.

        q, k and v are in shared memory. ``refill()`` starts copies, best before the last product.
        """
        problem, keys = self._tiles.problem, self._tiles.keys

        def step(i, carry):
            slot = self._ring.wait(i)
            k, v = self._k.at[slot], self._v.at[slot]
            logits = problem.logits(hopper.matmul(q, k.transpose((1, 0)), (ROWS, keys)))
            masked = problem.mask(logits, self._q0, (self._low + i) * keys)
            if self._tiles.segments:
                # those of the queries again each time: registers are scarcer than loads
                q_ids = hopper.load(self._q_ids, hopper.PER_ROW)
                masked = mask_segments(masked, q_ids, hopper.load(self._kv_ids.at[slot], hopper.PER_COLUMN))
            carry = visit(carry, logits, masked, k, v, lambda: self._ring.refill(i, self.warpgroup))
            self._ring.release(i)
            return carry

        return lax.fori_loop(0, self._ring.steps, step, carry)

    def _copies(self, step, slot):
        at = pl.ds((self._low + step) * self._tiles.keys, self._tiles.keys)
        head = lax.div(self.head, jnp.int32(self._tiles.problem.group))
        k, v, *ids = self._inputs
        yield k.at[self.batch, at, head], self._k.at[slot]
        yield v.at[self.batch, at, head], self._v.at[slot]
        if ids:
            yield ids[1].at[self.batch, at], self._kv_ids.at[slot]
