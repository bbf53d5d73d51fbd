"""Flash attention backward on Hopper: one kernel for dq, one for dk and dv (Dao 2023, algorithm 2).

Probabilities come again from the logsumexp. Each kernel owns the blocks that it writes and sums them in
registers, over the query heads of a key-value head too: no atomics, the same bits at every run.
``lse2_BNT`` is the logsumexp in units of log 2 and ``delta_BNT`` the row sums of out * dout; both are 0 past
the end and where a query looks at nothing.
"""

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import sharding
from pallas_kernels.gpu import hopper
from pallas_kernels.gpu.attention_blocks import Problem, mask_segments
from pallas_kernels.gpu.attention_rows import QueryTiles, Walk
from pallas_kernels.gpu.hopper import ROWS

# head size -> (keys in a block, slots of the ring, warpgroups)
DQ_BLOCKS = {64: (128, 4, 2), 128: (64, 4, 2), 256: (64, 2, 1)}
# head size -> (queries in a block, slots of the ring, warpgroups)
DKV_BLOCKS = {64: (64, 4, 2), 128: (64, 4, 2)}
# 256 channels of dk and of dv are more than the registers hold: one pass for each
DK_BLOCKS = {256: (64, 2, 1)}
DV_BLOCKS = {256: (64, 2, 2)}


def dq(problem: Problem, q_BTNH, k_BSKH, v_BSKH, dout_BTNH, lse2_BNT, delta_BNT, *ids):
    """Gradient of the queries, [B, T, N, H]; ``ids`` are the segments of queries and keys, or nothing."""
    arrays = (q_BTNH, k_BSKH, v_BSKH, dout_BTNH, lse2_BNT, delta_BNT, *ids)
    B, T, N, H = q_BTNH.shape
    dtype, segments = q_BTNH.dtype, bool(ids)
    keys, slots, warpgroups = DQ_BLOCKS[H]
    tiles = QueryTiles(problem, T, keys, slots, warpgroups, segments)

    def body(q_ref, k_ref, v_ref, dout_ref, lse_ref, delta_ref, *refs):
        ids, refs = refs[: 2 * segments], refs[2 * segments :]
        dq_ref, q_smem, dout_smem, lse_smem, delta_smem, *scratch = refs
        walk = Walk(tiles, (k_ref, v_ref, *ids), scratch)
        batch, rows, head = walk.batch, walk.rows, walk.head
        mine = (q_smem, dout_smem, lse_smem, delta_smem)
        q_smem, dout_smem, lse_smem, delta_smem = (x.at[walk.warpgroup] for x in mine)
        walk.start(
            (q_ref.at[batch, rows, head], q_smem),
            (dout_ref.at[batch, rows, head], dout_smem),
            (lse_ref.at[batch, head, rows], lse_smem),
            (delta_ref.at[batch, head, rows], delta_smem),
        )
        lse, delta = hopper.load(lse_smem, hopper.PER_ROW), hopper.load(delta_smem, hopper.PER_ROW)

        def visit(acc, s, masked, k, v, refill):
            p = jnp.exp2(masked - hopper.over_columns(lse, s.shape))
            dp = hopper.matmul(dout_smem, v.transpose((1, 0)), s.shape)
            ds = p * (dp - hopper.over_columns(delta, s.shape))
            if problem.soft_cap is not None:
                ds = ds * problem.logits_slope(s)
            refill()
            return hopper.add_matmul(acc, ds.astype(dtype), k)

        acc = walk.fold(q_smem, visit, hopper.filled((ROWS, H), 0.0))
        q_smem[...] = (acc * problem.scale).astype(dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(q_smem, dq_ref.at[batch, rows, head])
        plgpu.wait_smem_to_gmem(0)

    (result,) = hopper.kernel(
        body,
        name="attention_dq",
        out_type=[sharding.out_shape(q_BTNH.shape, dtype, *arrays)],
        grid={"batch": B, "head": N, "tile": tiles.count},
        scratch_types=[
            *[hopper.operand(warpgroups, ROWS, H, dtype=dtype)] * 2,
            *[plgpu.SMEM((warpgroups, ROWS), jnp.float32)] * 2,
            *tiles.scratch(H, dtype, copied=4),
        ],
        warpgroups=warpgroups,
    )(*arrays)
    return result


def dk_dv(problem: Problem, *arrays):
    """Gradients of keys and values, each [B, S, K, H]; ``arrays`` as of ``dq``."""
    H = arrays[0].shape[-1]
    if H in DKV_BLOCKS:
        return tuple(_dk_dv(problem, DKV_BLOCKS[H], True, True, *arrays))
    return (
        *_dk_dv(problem, DK_BLOCKS[H], True, False, *arrays),
        *_dk_dv(problem, DV_BLOCKS[H], False, True, *arrays),
    )


def _dk_dv(problem, blocks, with_dk, with_dv, q_BTNH, k_BSKH, v_BSKH, dout_BTNH, lse2_BNT, delta_BNT, *ids):
    """Logits are [key, query] here, so that sums over queries are matmuls from registers."""
    arrays = (q_BTNH, k_BSKH, v_BSKH, dout_BTNH, lse2_BNT, delta_BNT, *ids)
    B, S, K, H = k_BSKH.shape
    dtype, segments = q_BTNH.dtype, bool(ids)
    queries, slots, warpgroups = blocks
    wanted = with_dk + with_dv
    mine = 1 + with_dk  # arrays of a warpgroup's own: keys, and values if they are needed

    def body(q_ref, k_ref, v_ref, dout_ref, lse_ref, delta_ref, *refs):
        ids, refs = refs[: 2 * segments], refs[2 * segments :]
        out_refs, smem, scratch = refs[:wanted], refs[wanted : wanted + mine], refs[wanted + mine :]
        walk = _WalkBack(problem, blocks, (q_ref, dout_ref, lse_ref, delta_ref, *ids), scratch)
        smem = [x.at[walk.warpgroup] for x in smem]
        at = walk.batch, walk.rows, walk.kv_head
        walk.start(*((ref.at[at], x) for ref, x in zip((k_ref, v_ref), smem, strict=False)))

        def visit(sums, s, masked, block, refill):
            q, dout, lse, delta = block
            dk, dv = sums if wanted == 2 else sums * 2
            p = jnp.exp2(masked - hopper.over_rows(hopper.load(lse, hopper.PER_COLUMN), s.shape))
            if with_dv:
                dv = hopper.add_matmul(dv, p.astype(dtype), dout)
            if with_dk:
                dp = hopper.matmul(smem[1], dout.transpose((1, 0)), s.shape)
                ds = p * (dp - hopper.over_rows(hopper.load(delta, hopper.PER_COLUMN), s.shape))
                if problem.soft_cap is not None:
                    ds = ds * problem.logits_slope(s)
            refill()
            if with_dk:
                dk = hopper.add_matmul(dk, ds.astype(dtype), q)
            return (dk,) * with_dk + (dv,) * with_dv

        sums = walk.fold(smem[0], visit, (hopper.filled((ROWS, H), 0.0),) * wanted)
        results = ([sums[0] * problem.scale] if with_dk else []) + ([sums[-1]] if with_dv else [])
        for result, buffer, out_ref in zip(results, smem, out_refs, strict=False):
            buffer[...] = result.astype(dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(buffer, out_ref.at[at])
        plgpu.wait_smem_to_gmem(0)

    return hopper.kernel(
        body,
        name="attention_" + "_".join(["dk"] * with_dk + ["dv"] * with_dv),
        out_type=[sharding.out_shape(k_BSKH.shape, dtype, *arrays)] * wanted,
        grid={"batch": B, "kv_head": K, "tile": pl.cdiv(S, warpgroups * ROWS)},
        scratch_types=[
            *[hopper.operand(warpgroups, ROWS, H, dtype=dtype)] * mine,
            *[hopper.operand(slots, queries, H, dtype=dtype)] * 2,
            *[plgpu.SMEM((slots, queries), jnp.float32)] * 2,
            hopper.barriers(warpgroups, mine + segments),
            hopper.barriers(slots, 4 + segments),
            hopper.barriers(slots, warpgroups),
            *[plgpu.SMEM((slots, queries), jnp.int32), plgpu.SMEM((warpgroups, ROWS), jnp.int32)] * segments,
        ],
        warpgroups=warpgroups,
    )(*arrays)


class _WalkBack:
    """Inside a kernel: where a warpgroup is, and its loop over the queries that look at its block's keys.

    Attributes:
      batch, kv_head, warpgroup: of this warpgroup.
      rows: the tokens of its keys.
    """

    def __init__(self, problem, blocks, inputs, scratch):
        """``inputs`` are q, dout, lse, delta and the segments of queries and keys, if any."""
        self._problem, self._inputs, self._ids = problem, inputs[:4], inputs[4:]
        self._queries, slots, warpgroups = blocks
        self._smem, (self._mine, full, free, *ids) = scratch[:4], scratch[4:]
        self._q_ids, self._kv_ids = ids or (None, None)
        self.batch, self.kv_head, self.warpgroup = (
            lax.axis_index(axis) for axis in ("batch", "kv_head", "warpgroup")
        )
        first = lax.axis_index("tile") * (warpgroups * ROWS)
        self._low, self._high = problem.query_blocks(first, warpgroups * ROWS, self._queries)
        self._k0 = first + self.warpgroup * ROWS
        self.rows = pl.ds(self._k0, ROWS)
        steps = (self._high - self._low) * problem.group
        self._ring = hopper.Ring(slots, steps, self._copies, full, free, loads=True)

    def start(self, *pairs):
        """Fills the ring and copies pairs (global memory, shared memory) of this warpgroup."""
        pl.when(self.warpgroup == 0)(self._ring.start)
        mine = self._mine.at[self.warpgroup]
        if self._ids:
            self._kv_ids = self._kv_ids.at[self.warpgroup]
            pairs = (*pairs, (self._ids[1].at[self.batch, self.rows], self._kv_ids))
        for source, target in pairs:
            plgpu.copy_gmem_to_smem(source, target, mine)
        plgpu.barrier_wait(mine)

    def fold(self, k, visit, sums):
        """``visit(sums, logits, masked logits, (q, dout, lse, delta), refill)`` over the blocks of queries.

        All of them and k are in shared memory. ``refill()`` starts copies, best before the last product.
        """

        def step(i, sums):
            _, q0 = self._place(i)
            slot = self._ring.wait(i)
            block = [x.at[slot] for x in self._smem]
            shape = (ROWS, self._queries)
            logits = self._problem.logits(hopper.matmul(k, block[0].transpose((1, 0)), shape))
            masked = self._problem.mask(logits, q0, self._k0, transposed=True)
            if self._ids:
                kv_ids = hopper.load(self._kv_ids, hopper.PER_ROW)
                masked = mask_segments(masked, kv_ids, hopper.load(self._q_ids.at[slot], hopper.PER_COLUMN))
            sums = visit(sums, logits, masked, block, lambda: self._ring.refill(i, self.warpgroup))
            self._ring.release(i)
            return sums

        return lax.fori_loop(0, self._ring.steps, step, sums)

    def _place(self, step):
        """Query head and first query of a step: all blocks of one head, then the next head."""
        count = jnp.maximum(self._high - self._low, 1)
        head = self.kv_head * self._problem.group + lax.div(step, count)
        return head, (self._low + lax.rem(step, count)) * self._queries

    def _copies(self, step, slot):
        head, q0 = self._place(step)
        at = pl.ds(q0, self._queries)
        q, dout, lse, delta = self._inputs
        places = (q.at[self.batch, at, head], dout.at[self.batch, at, head])
        places += (lse.at[self.batch, head, at], delta.at[self.batch, head, at])
        yield from zip(places, (x.at[slot] for x in self._smem), strict=True)
        if self._ids:
            yield self._ids[0].at[self.batch, at], self._q_ids.at[slot]
