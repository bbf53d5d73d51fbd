"""Flash attention forward on Hopper.

A block has two warpgroups of 64 queries of one head; keys and values come through a ring of buffers, and
the softmax is kept running (Dao 2023, algorithm 1). Key blocks outside the causal range and the window are
skipped; those inside take no mask. Lengths that are no multiple of a block rely on TMA: it reads zeros and
writes nothing out of bounds.
"""

import math

import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import sharding
from pallas_kernels.gpu import hopper
from pallas_kernels.gpu.attention_blocks import Problem
from pallas_kernels.gpu.attention_rows import QueryTiles, Walk
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
    tiles = QueryTiles(problem, T, keys, slots, WARPGROUPS, segments)

    def body(q_ref, *refs):
        inputs, refs = refs[: 2 + 2 * segments], refs[2 + 2 * segments :]
        out_ref, lse_ref, q_smem, lse_smem, *scratch = refs
        walk = Walk(tiles, inputs, scratch)
        batch, rows, head = walk.batch, walk.rows, walk.head
        q_smem, lse_smem = q_smem.at[walk.warpgroup], lse_smem.at[walk.warpgroup]
        walk.start((q_ref.at[batch, rows, head], q_smem))
        nothing = (
            hopper.filled((ROWS, H), 0.0),
            hopper.filled((ROWS,), -math.inf, hopper.PER_ROW),
            hopper.filled((ROWS,), 0.0, hopper.PER_ROW),
        )
        acc, highest, total = walk.fold(q_smem, _attend, nothing)
        inverse = 1 / jnp.where(total == 0, 1.0, total)
        q_smem[...] = (acc * hopper.over_columns(inverse, (ROWS, H))).astype(dtype)
        lse_smem[...] = highest * (1 / hopper.LOG2E) + jnp.log(total)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(q_smem, out_ref.at[batch, rows, head])
        plgpu.copy_smem_to_gmem(lse_smem, lse_ref.at[batch, head, rows])
        plgpu.wait_smem_to_gmem(0)

    return hopper.kernel(
        body,
        name="attention_forward",
        out_type=[
            sharding.out_shape((B, T, N, H), dtype, *arrays),
            sharding.out_shape((B, N, tiles.count * WARPGROUPS * ROWS), jnp.float32, *arrays),
        ],
        grid={"batch": B, "head": N, "tile": tiles.count},
        scratch_types=[
            hopper.operand(WARPGROUPS, ROWS, H, dtype=dtype),
            plgpu.SMEM((WARPGROUPS, ROWS), jnp.float32),
            *tiles.scratch(H, dtype, copied=1),
        ],
        warpgroups=WARPGROUPS,
    )(*arrays)


def _attend(carry, _, s, k, v, refill):
    """The running softmax: sums of weighted values, highest logit and sum of weights, a query."""
    acc, highest, total = carry
    new = jnp.maximum(highest, s.max(axis=1))
    # of a row that has seen no key yet; -inf less -inf would be NaN
    shift = jnp.where(new == -math.inf, 0.0, new)
    keep = jnp.exp2(highest - shift)
    p = jnp.exp2(s - hopper.over_columns(shift, s.shape))
    total = total * keep + p.sum(axis=1)
    acc = acc * hopper.over_columns(keep, acc.shape)
    refill()
    return hopper.add_matmul(acc, p.astype(v.dtype), v), new, total
