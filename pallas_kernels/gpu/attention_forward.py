"""Flash attention forward on Hopper.

A block has two warpgroups of 64 queries of one head; keys and values come through a ring of buffers, and
the softmax is kept running (Dao 2023, algorithm 1). Key blocks outside the causal range and the window are
skipped; those inside take no mask. Lengths that are no multiple of a block rely on TMA: it reads zeros and
writes nothing out of bounds.
"""

import math

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import sharding
from pallas_kernels.gpu import hopper
from pallas_kernels.gpu.attention_blocks import Problem, mask_segments
from pallas_kernels.gpu.hopper import ROWS

WARPGROUPS = 2
# head size -> (keys in a block, slots of the ring); with segments, whose ids need room too, the second
BLOCKS = {64: (128, 4), 128: (128, 3), 256: (64, 2)}
BLOCKS_SEGMENTS = {64: (128, 4), 128: (64, 5), 256: (64, 2)}


def forward(problem: Problem, q_BTNH, k_BSKH, v_BSKH, q_ids_BT=None, kv_ids_BS=None):
    """Returns out [B, T, N, H] and the logsumexp of the logits, [B, N, T rounded up], float32, natural."""
    arrays = [x for x in (q_BTNH, k_BSKH, v_BSKH, q_ids_BT, kv_ids_BS) if x is not None]
    B, T, N, H = q_BTNH.shape
    dtype, segments = q_BTNH.dtype, q_ids_BT is not None
    keys, slots = (BLOCKS_SEGMENTS if segments else BLOCKS)[H]
    tiles = pl.cdiv(T, WARPGROUPS * ROWS)
    shape = (ROWS, keys)

    def body(*refs):
        q_ref, k_ref, v_ref, *refs = refs
        q_ids_ref, kv_ids_ref = refs[:2] if segments else (None, None)
        refs = refs[2 * segments :]
        out_ref, lse_ref, q_smem, k_smem, v_smem, lse_smem, q_full, full, free, *ids_smem = refs
        q_ids_smem, kv_ids_smem = ids_smem or (None, None)
        batch, head, warpgroup = (lax.axis_index(axis) for axis in ("batch", "head", "warpgroup"))
        # the last queries have most keys before them: longest first, so that no block is left over at the end
        tile = tiles - 1 - lax.axis_index("tile")
        kv_head = lax.div(head, jnp.int32(problem.group))
        first = tile * (WARPGROUPS * ROWS)
        low, high = problem.key_blocks(first, WARPGROUPS * ROWS, keys)
        q0 = first + warpgroup * ROWS
        rows = pl.ds(q0, ROWS)

        def copies(step, slot):
            at = pl.ds((low + step) * keys, keys)
            yield k_ref.at[batch, at, kv_head], k_smem.at[slot]
            yield v_ref.at[batch, at, kv_head], v_smem.at[slot]
            if segments:
                yield kv_ids_ref.at[batch, at], kv_ids_smem.at[slot]

        ring = hopper.Ring(slots, high - low, copies, full, free, loads=segments)
        pl.when(warpgroup == 0)(ring.start)
        q_full, q_smem, lse_smem = q_full.at[warpgroup], q_smem.at[warpgroup], lse_smem.at[warpgroup]
        plgpu.copy_gmem_to_smem(q_ref.at[batch, rows, head], q_smem, q_full)
        if segments:
            q_ids_smem = q_ids_smem.at[warpgroup]
            plgpu.copy_gmem_to_smem(q_ids_ref.at[batch, rows], q_ids_smem, q_full)
        plgpu.barrier_wait(q_full)

        def attend(step, carry):
            acc, highest, total = carry
            slot = ring.wait(step)
            s = problem.logits(hopper.matmul(q_smem, k_smem.at[slot].transpose((1, 0)), shape))
            s = problem.mask(s, q0, (low + step) * keys)
            if segments:
                q_ids = hopper.load(q_ids_smem, hopper.PER_ROW)  # again each time: registers are scarcer
                s = mask_segments(s, q_ids, hopper.load(kv_ids_smem.at[slot], hopper.PER_COLUMN))
            new = jnp.maximum(highest, s.max(axis=1))
            # of a row that has seen no key yet; -inf less -inf would be NaN
            shift = jnp.where(new == -math.inf, 0.0, new)
            keep = jnp.exp2(highest - shift)
            p = jnp.exp2(s - hopper.over_columns(shift, shape))
            total = total * keep + p.sum(axis=1)
            acc = acc * hopper.over_columns(keep, (ROWS, H))
            ring.refill(step, warpgroup)
            acc = hopper.add_matmul(acc, p.astype(dtype), v_smem.at[slot])
            ring.release(step)
            return acc, new, total

        nothing = (
            hopper.filled((ROWS, H), 0.0),
            hopper.filled((ROWS,), -math.inf, hopper.PER_ROW),
            hopper.filled((ROWS,), 0.0, hopper.PER_ROW),
        )
        acc, highest, total = lax.fori_loop(0, high - low, attend, nothing)
        inverse = 1 / jnp.where(total == 0, 1.0, total)
        q_smem[...] = (acc * hopper.over_columns(inverse, (ROWS, H))).astype(dtype)
        lse_smem[...] = highest * (1 / hopper.LOG2E) + jnp.log(total)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(q_smem, out_ref.at[batch, rows, head])
        plgpu.copy_smem_to_gmem(lse_smem, lse_ref.at[batch, head, rows])
        plgpu.wait_smem_to_gmem(0)

    scratch = [
        hopper.operand(WARPGROUPS, ROWS, H, dtype=dtype),
        hopper.operand(slots, keys, H, dtype=dtype),
        hopper.operand(slots, keys, H, dtype=dtype),
        plgpu.SMEM((WARPGROUPS, ROWS), jnp.float32),
        hopper.barriers(WARPGROUPS, 1 + segments),
        hopper.barriers(slots, 2 + segments),
        hopper.barriers(slots, WARPGROUPS),
    ]
    if segments:
        scratch += [plgpu.SMEM((WARPGROUPS, ROWS), jnp.int32), plgpu.SMEM((slots, keys), jnp.int32)]
    return hopper.kernel(
        body,
        name="attention_forward",
        out_type=[
            sharding.out_shape((B, T, N, H), dtype, *arrays),
            sharding.out_shape((B, N, tiles * WARPGROUPS * ROWS), jnp.float32, *arrays),
        ],
        grid={"batch": B, "head": N, "tile": tiles},
        scratch_types=scratch,
        warpgroups=WARPGROUPS,
    )(*arrays)
