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
    tiles = pl.cdiv(T, warpgroups * ROWS)
    shape = (ROWS, keys)

    def body(q_ref, k_ref, v_ref, dout_ref, lse_ref, delta_ref, *refs):
        q_ids_ref, kv_ids_ref = refs[:2] if segments else (None, None)
        dq_ref, q_smem, dout_smem, k_smem, v_smem, lse_smem, delta_smem, *refs = refs[2 * segments :]
        mine, full, free, *ids_smem = refs
        q_ids_smem, kv_ids_smem = ids_smem or (None, None)
        batch, head, warpgroup = (lax.axis_index(axis) for axis in ("batch", "head", "warpgroup"))
        tile = tiles - 1 - lax.axis_index("tile")  # longest first
        kv_head = lax.div(head, jnp.int32(problem.group))
        first = tile * (warpgroups * ROWS)
        low, high = problem.key_blocks(first, warpgroups * ROWS, keys)
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
        mine, q_smem, dout_smem = (x.at[warpgroup] for x in (mine, q_smem, dout_smem))
        lse_smem, delta_smem = lse_smem.at[warpgroup], delta_smem.at[warpgroup]
        plgpu.copy_gmem_to_smem(q_ref.at[batch, rows, head], q_smem, mine)
        plgpu.copy_gmem_to_smem(dout_ref.at[batch, rows, head], dout_smem, mine)
        plgpu.copy_gmem_to_smem(lse_ref.at[batch, head, rows], lse_smem, mine)
        plgpu.copy_gmem_to_smem(delta_ref.at[batch, head, rows], delta_smem, mine)
        if segments:
            plgpu.copy_gmem_to_smem(q_ids_ref.at[batch, rows], q_ids_smem.at[warpgroup], mine)
        plgpu.barrier_wait(mine)
        lse, delta = hopper.load(lse_smem, hopper.PER_ROW), hopper.load(delta_smem, hopper.PER_ROW)
        q_ids = hopper.load(q_ids_smem.at[warpgroup], hopper.PER_ROW) if segments else None

        def visit(step, acc):
            slot = ring.wait(step)
            s = problem.logits(hopper.matmul(q_smem, k_smem.at[slot].transpose((1, 0)), shape))
            masked = problem.mask(s, q0, (low + step) * keys)
            if segments:
                masked = mask_segments(masked, q_ids, hopper.load(kv_ids_smem.at[slot], hopper.PER_COLUMN))
            p = jnp.exp2(masked - hopper.over_columns(lse, shape))
            dp = hopper.matmul(dout_smem, v_smem.at[slot].transpose((1, 0)), shape)
            ds = p * (dp - hopper.over_columns(delta, shape))
            if problem.soft_cap is not None:
                ds = ds * problem.logits_slope(s)
            ring.refill(step, warpgroup)
            acc = hopper.add_matmul(acc, ds.astype(dtype), k_smem.at[slot])
            ring.release(step)
            return acc

        acc = lax.fori_loop(0, high - low, visit, hopper.filled((ROWS, H), 0.0))
        q_smem[...] = (acc * problem.scale).astype(dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(q_smem, dq_ref.at[batch, rows, head])
        plgpu.wait_smem_to_gmem(0)

    scratch = [
        hopper.operand(warpgroups, ROWS, H, dtype=dtype),
        hopper.operand(warpgroups, ROWS, H, dtype=dtype),
        hopper.operand(slots, keys, H, dtype=dtype),
        hopper.operand(slots, keys, H, dtype=dtype),
        plgpu.SMEM((warpgroups, ROWS), jnp.float32),
        plgpu.SMEM((warpgroups, ROWS), jnp.float32),
        hopper.barriers(warpgroups, 4 + segments),
        hopper.barriers(slots, 2 + segments),
        hopper.barriers(slots, warpgroups),
    ]
    if segments:
        scratch += [plgpu.SMEM((warpgroups, ROWS), jnp.int32), plgpu.SMEM((slots, keys), jnp.int32)]
    (result,) = hopper.kernel(
        body,
        name="attention_dq",
        out_type=[sharding.out_shape(q_BTNH.shape, dtype, *arrays)],
        grid={"batch": B, "head": N, "tile": tiles},
        scratch_types=scratch,
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
    tiles = pl.cdiv(S, warpgroups * ROWS)
    shape = (ROWS, queries)
    wanted = with_dk + with_dv

    def body(q_ref, k_ref, v_ref, dout_ref, lse_ref, delta_ref, *refs):
        q_ids_ref, kv_ids_ref = refs[:2] if segments else (None, None)
        refs = refs[2 * segments :]
        out_refs, refs = refs[:wanted], refs[wanted:]
        k_smem, v_smem, refs = (refs[0], refs[1], refs[2:]) if with_dk else (refs[0], None, refs[1:])
        q_smem, dout_smem, lse_smem, delta_smem, mine, full, free, *ids_smem = refs
        q_ids_smem, kv_ids_smem = ids_smem or (None, None)
        batch, kv_head, warpgroup = (lax.axis_index(axis) for axis in ("batch", "kv_head", "warpgroup"))
        first = lax.axis_index("tile") * (warpgroups * ROWS)
        low, high = problem.query_blocks(first, warpgroups * ROWS, queries)
        k0 = first + warpgroup * ROWS
        rows = pl.ds(k0, ROWS)

        def place(step):
            """Query head and first query of a step: all blocks of one head, then the next head."""
            count = jnp.maximum(high - low, 1)
            head = kv_head * problem.group + lax.div(step, count)
            return head, (low + lax.rem(step, count)) * queries

        def copies(step, slot):
            head, q0 = place(step)
            at = pl.ds(q0, queries)
            yield q_ref.at[batch, at, head], q_smem.at[slot]
            yield dout_ref.at[batch, at, head], dout_smem.at[slot]
            yield lse_ref.at[batch, head, at], lse_smem.at[slot]
            yield delta_ref.at[batch, head, at], delta_smem.at[slot]
            if segments:
                yield q_ids_ref.at[batch, at], q_ids_smem.at[slot]

        steps = (high - low) * problem.group
        ring = hopper.Ring(slots, steps, copies, full, free, loads=True)
        pl.when(warpgroup == 0)(ring.start)
        mine, k_smem = mine.at[warpgroup], k_smem.at[warpgroup]
        plgpu.copy_gmem_to_smem(k_ref.at[batch, rows, kv_head], k_smem, mine)
        if with_dk:
            v_smem = v_smem.at[warpgroup]
            plgpu.copy_gmem_to_smem(v_ref.at[batch, rows, kv_head], v_smem, mine)
        if segments:
            plgpu.copy_gmem_to_smem(kv_ids_ref.at[batch, rows], kv_ids_smem.at[warpgroup], mine)
        plgpu.barrier_wait(mine)
        kv_ids = hopper.load(kv_ids_smem.at[warpgroup], hopper.PER_ROW) if segments else None

        def visit(step, sums):
            dk, dv = sums if wanted == 2 else sums * 2
            _, q0 = place(step)
            slot = ring.wait(step)
            s = problem.logits(hopper.matmul(k_smem, q_smem.at[slot].transpose((1, 0)), shape))
            masked = problem.mask(s, q0, k0, transposed=True)
            if segments:
                masked = mask_segments(masked, kv_ids, hopper.load(q_ids_smem.at[slot], hopper.PER_COLUMN))
            p = jnp.exp2(masked - hopper.over_rows(hopper.load(lse_smem.at[slot], hopper.PER_COLUMN), shape))
            if with_dv:
                dv = hopper.add_matmul(dv, p.astype(dtype), dout_smem.at[slot])
            if with_dk:
                dp = hopper.matmul(v_smem, dout_smem.at[slot].transpose((1, 0)), shape)
                delta = hopper.load(delta_smem.at[slot], hopper.PER_COLUMN)
                ds = p * (dp - hopper.over_rows(delta, shape))
                if problem.soft_cap is not None:
                    ds = ds * problem.logits_slope(s)
            ring.refill(step, warpgroup)
            if with_dk:
                dk = hopper.add_matmul(dk, ds.astype(dtype), q_smem.at[slot])
            ring.release(step)
            return (dk,) * with_dk + (dv,) * with_dv

        sums = lax.fori_loop(0, steps, visit, (hopper.filled((ROWS, H), 0.0),) * wanted)
        results = ([sums[0] * problem.scale] if with_dk else []) + ([sums[-1]] if with_dv else [])
        for result, buffer, out_ref in zip(results, (k_smem, v_smem), out_refs, strict=False):
            buffer[...] = result.astype(dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(buffer, out_ref.at[batch, rows, kv_head])
        plgpu.wait_smem_to_gmem(0)

    scratch = [hopper.operand(warpgroups, ROWS, H, dtype=dtype)] * (2 if with_dk else 1)
    scratch += [
        hopper.operand(slots, queries, H, dtype=dtype),
        hopper.operand(slots, queries, H, dtype=dtype),
        plgpu.SMEM((slots, queries), jnp.float32),
        plgpu.SMEM((slots, queries), jnp.float32),
        hopper.barriers(warpgroups, (2 if with_dk else 1) + segments),
        hopper.barriers(slots, 4 + segments),
        hopper.barriers(slots, warpgroups),
    ]
    if segments:
        scratch += [plgpu.SMEM((slots, queries), jnp.int32), plgpu.SMEM((warpgroups, ROWS), jnp.int32)]
    return hopper.kernel(
        body,
        name="attention_" + "_".join(["dk"] * with_dk + ["dv"] * with_dv),
        out_type=[sharding.out_shape(k_BSKH.shape, dtype, *arrays)] * wanted,
        grid={"batch": B, "kv_head": K, "tile": tiles},
        scratch_types=scratch,
        warpgroups=warpgroups,
    )(*arrays)
