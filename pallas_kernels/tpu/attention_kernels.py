"""Bodies of the attention kernels for TPU: what one step does with one pair of blocks.

Statistics of a query stand in a column where logits are [queries, keys] and in a row where they are
[keys, queries], as the kernel for keys and values has them: its products then need no transposes.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels.cost import attention as cost
from pallas_kernels.tpu import attention_plan as plans

LANES = 128


class Position(NamedTuple):
    """A grid point: its blocks, and whether they are the first and the last of what is accumulated."""

    i: jax.Array
    j: jax.Array
    first: jax.Array
    last: jax.Array
    computed: jax.Array


def forward(call, r):
    """out and lse of a block of queries, by the online softmax over its key blocks."""
    at = _position(call, r)

    @pl.when(at.first)
    def _():
        r.highest[...] = jnp.full_like(r.highest, -jnp.inf)
        r.total[...] = jnp.zeros_like(r.total)
        r.acc[...] = jnp.zeros_like(r.acc)

    def visit(masked):
        s, _ = _logits(call, r, at, masked)
        before = r.highest[...]
        now = jnp.maximum(before, jnp.max(s, axis=1, keepdims=True))
        # where no key has been seen yet the highest is -inf; 0 stands for it, all weights being 0
        base = jnp.where(now == -jnp.inf, 0.0, now)
        weights = jnp.exp(s - base)
        kept = jnp.exp(before - base)
        r.highest[...] = now
        r.total[...] = r.total[...] * kept + jnp.sum(weights, axis=1, keepdims=True)
        r.acc[...] = r.acc[...] * kept + _product(weights.astype(r.v.dtype), r.v[...], 1, 0)

    _visit(call, at, visit)

    @pl.when(at.last)
    def _():
        total = r.total[...]
        safe = jnp.where(total == 0, 1.0, total)
        r.out[...] = (r.acc[...] / safe).astype(r.out.dtype)
        r.lse[...] = _row(jnp.where(total == 0, -jnp.inf, r.highest[...] + jnp.log(safe)))


def backward_q(call, r):
    """dq of a block of queries, and the gradient of its logits where a bias wants it."""
    at = _position(call, r)

    @pl.when(at.first)
    def _():
        r.lse_column[...], r.delta_column[...] = _column(r.lse[...]), _column(r.delta[...])
        r.acc[...] = jnp.zeros_like(r.acc)

    def visit(masked):
        s, slope = _logits(call, r, at, masked)
        p = jnp.exp(s - r.lse_column[...])
        ds = p * (_product(r.dout[...], r.v[...], 1, 1) - r.delta_column[...])
        if hasattr(r, "ds"):
            r.ds[...] = ds
        ds = ds if slope is None else ds * slope
        r.acc[...] += _product(ds.astype(r.k.dtype), r.k[...], 1, 0)

    _visit(call, at, visit)
    if hasattr(r, "ds"):

        @pl.when(~at.computed)
        def _():
            r.ds[...] = jnp.zeros_like(r.ds)

    @pl.when(at.last)
    def _():
        r.dq[...] = (r.acc[...] * call.options.scale).astype(r.dq.dtype)


def backward_kv(call, r):
    """dk and dv of a block of keys, over the query blocks and heads that look at it; logits are turned."""
    at = _position(call, r)

    @pl.when(at.first)
    def _():
        r.dk_acc[...] = jnp.zeros_like(r.dk_acc)
        r.dv_acc[...] = jnp.zeros_like(r.dv_acc)

    def visit(masked):
        s, slope = _logits(call, r, at, masked)
        p = jnp.exp(s - r.lse[...])
        r.dv_acc[...] += _product(p.astype(r.dout.dtype), r.dout[...], 1, 0)
        ds = p * (_product(r.v[...], r.dout[...], 1, 1) - r.delta[...])
        ds = ds if slope is None else ds * slope
        r.dk_acc[...] += _product(ds.astype(r.q.dtype), r.q[...], 1, 0)

    _visit(call, at, visit)

    @pl.when(at.last)
    def _():
        r.dk[...] = (r.dk_acc[...] * call.options.scale).astype(r.dk.dtype)
        r.dv[...] = r.dv_acc[...].astype(r.dv.dtype)


def _position(call, r) -> Position:
    b, h, step = pl.program_id(0), pl.program_id(1), pl.program_id(2)
    start, steps = call.plan.start(b, h), call.plan.steps
    code = r.codes[start + step]
    major, _, computed = plans.decode(code)
    major_before = plans.decode(r.codes[start + jnp.maximum(step - 1, 0)])[0]
    major_after = plans.decode(r.codes[start + jnp.minimum(step + 1, steps - 1)])[0]
    _, _, _, i, j = call.place(b, h, code)
    if call.has("q_segments"):
        # ids that lie apart have no pair in common, in whatever order they stand
        nq, nkv = call.sizes.blocks
        q, kv = b * nq + i, b * nkv + j
        computed &= (r.q_low[q] <= r.kv_high[kv]) & (r.kv_low[kv] <= r.q_high[q])
    first, last = (step == 0) | (major_before != major), (step == steps - 1) | (major_after != major)
    return Position(i, j, first, last, computed)


def _visit(call, at, visit):
    """Runs ``visit(masked)`` where the pair is computed; without masks where they keep every pair."""
    sizes, options = call.sizes, call.options
    if call.has("mask") or call.has("q_segments"):
        pl.when(at.computed)(lambda: visit(True))
        return
    first_q, first_kv = at.i * sizes.block_q, at.j * sizes.block_kv
    last_q, last_kv = first_q + sizes.block_q - 1, first_kv + sizes.block_kv - 1
    whole = cost.is_whole(
        first_q, last_q, first_kv, last_kv, is_causal=options.is_causal, window=options.window
    )
    if sizes.padded[1] != sizes.S:
        whole &= last_kv < sizes.S
    if whole is True:
        pl.when(at.computed)(lambda: visit(False))
        return
    pl.when(at.computed & whole)(lambda: visit(False))
    pl.when(at.computed & ~whole)(lambda: visit(True))


def _logits(call, r, at, masked):
    """Logits in float32, -inf where the masks exclude; the slope of the soft-cap or None."""
    turned, options, sizes = call.by_keys, call.options, call.sizes
    s = _product(*((r.k[...], r.q[...]) if turned else (r.q[...], r.k[...])), 1, 1) * options.scale
    slope = None
    if options.logits_soft_cap is not None:
        capped = jnp.tanh(s * (1 / options.logits_soft_cap))
        s, slope = options.logits_soft_cap * capped, 1 - capped * capped
    if call.has("bias"):
        bias = r.bias[...]
        s += bias.T if turned else bias
    if not masked:
        return s, slope
    t_axis, s_axis = (1, 0) if turned else (0, 1)
    t = at.i * sizes.block_q + jax.lax.broadcasted_iota(jnp.int32, s.shape, t_axis)
    key = at.j * sizes.block_kv + jax.lax.broadcasted_iota(jnp.int32, s.shape, s_axis)
    rules = []
    if options.is_causal:
        rules.append(key <= t)
    if options.window is not None:
        left, right = options.window
        rules += [key >= t - left] + ([] if options.is_causal else [key <= t + right])
    if sizes.padded[1] != sizes.S:
        rules.append(key < sizes.S)
    if call.has("mask"):
        kept = r.mask[...].astype(jnp.int32)
        rules.append((kept.T if turned else kept) != 0)
    if call.has("q_segments"):
        rows, columns = (r.kv_segments, r.q_segments) if turned else (r.q_segments, r.kv_segments)
        rules.append(_column(rows[...]) == columns[...])
    for rule in rules:
        s = jnp.where(rule, s, -jnp.inf)
    return s, slope


def _product(a, b, a_axis, b_axis):
    return jax.lax.dot_general(a, b, (((a_axis,), (b_axis,)), ((), ())), preferred_element_type=jnp.float32)


def _row(column):
    """[n, 1] to [1, n]."""
    return jnp.broadcast_to(column, (column.shape[0], LANES)).T[:1]


def _column(row):
    """[1, n] to [n, 1]."""
    return jnp.broadcast_to(row, (LANES, row.shape[1])).T[:, :1]
