"""The causal convolution on TPU: time in sequence, every array moved once.

Tokens lie along the sublanes and channels along the lanes, as the arrays are, so that nothing is padded or
laid out anew. Sixteen tokens at a time are taken with the sixteen beside them, before (forward) or after
(dx), and a tap is a shift within the pair. Forward walks the blocks from the first to the last with the last
tokens carried in VMEM; backward from the last to the first with the first tokens' gradients carried.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import dispatch, sharding
from pallas_kernels.cost import causal_conv1d as cost
from pallas_kernels.tpu.causal_conv1d_blocks import BLOCK_SIZES

LANES = 128
ROWS = cost.EDGE  # tokens at a time: a tile of bfloat16 memory, and the most that a tap may be off
GROUP, BITS = 8, 4  # tokens whose reach, below 16, shares one word
FORWARD_SEMANTICS = ("parallel", "parallel", "arbitrary")  # channels, rows, time
BACKWARD_SEMANTICS = ("parallel", "arbitrary", "arbitrary")  # dw and dbias are summed over rows too


def refuses(x_BTC, w_WC, bias_C, state_BKC, reach_BT, *, activation, block_sizes):
    """Why these arguments are not for this kernel, or None."""
    if x_BTC.dtype not in (jnp.float32, jnp.bfloat16):
        return f"x has dtype {x_BTC.dtype}; the kernel takes float32 and bfloat16"
    if w_WC.shape[0] > ROWS:
        return f"w has {w_WC.shape[0]} taps; the kernel takes at most {ROWS}"
    return None


def forward(x_BTC, w_WC, bias_C, state_BKC, reach_BT, *, activation, block_sizes):
    """y."""
    call = functools.partial(_forward, silu=activation == "silu", block_sizes=block_sizes)
    reach, rule = _optional(reach_BT)
    rule = f"b t c, w c, c, b e c{rule} -> b t c"
    operands = x_BTC, w_WC, bias_C, _edge(state_BKC, x_BTC.dtype), *reach
    return sharding.per_shard(call, rule, whole=("t", "w", "e"))(*operands)[0]


def backward(x_BTC, w_WC, bias_C, state_BKC, reach_BT, dy_BTC, *, activation, block_sizes):
    """dx, dw, dbias, dstate."""
    call = functools.partial(_backward, silu=activation == "silu", block_sizes=block_sizes)
    reach, rule = _optional(reach_BT)
    rule = f"b t c, b t c, w c, c, b e c{rule} -> b t c, w c, c, b e c"
    operands = x_BTC, dy_BTC, w_WC, bias_C, _edge(state_BKC, x_BTC.dtype), *reach
    dx, dw, dbias, dstate = sharding.per_shard(call, rule, whole=("t", "w", "e"), sums=("b",))(*operands)
    dstate = dstate[:, ROWS - state_BKC.shape[1] :].astype(state_BKC.dtype)
    return dx, dw.astype(w_WC.dtype), dbias.astype(bias_C.dtype), dstate


def _edge(state_BKC, dtype):
    """The state as ROWS tokens, zeros before it."""
    return jnp.pad(state_BKC.astype(dtype), ((0, 0), (ROWS - state_BKC.shape[1], 0), (0, 0)))


def _optional(reach_BT):
    return ((), "") if reach_BT is None else ((reach_BT,), ", b t")


def _forward(x_BTC, w_WC, bias_C, edge_BEC, reach_BT=None, *, silu, block_sizes):
    plan = _Plan("forward", x_BTC, w_WC, block_sizes, descending=False)
    reach, reach_spec = plan.words(reach_BT)
    count = cost.forward(*x_BTC.shape, plan.W, x_BTC.dtype.itemsize, **plan.kinds(reach_BT))
    w_WC, bias_1C = w_WC.astype(jnp.float32), bias_C.astype(jnp.float32)[None]
    operands = x_BTC, w_WC, bias_1C, edge_BEC, *reach
    y = pl.pallas_call(
        functools.partial(_forward_kernel, plan=plan, silu=silu, has_reach=reach_BT is not None),
        grid=plan.grid,
        in_specs=[plan.token_spec, plan.w_spec, plan.bias_spec, plan.edge_spec, *reach_spec],
        out_specs=plan.token_spec,
        out_shape=sharding.out_shape(x_BTC.shape, x_BTC.dtype, *operands),
        scratch_shapes=[plan.carry],
        name="causal_conv1d",
        **plan.how(count, FORWARD_SEMANTICS, silu),
    )(*operands)
    return (y,)


def _forward_kernel(x, w, bias, edge, *refs, plan, silu, has_reach):
    reach, (y, carry) = (refs[0], refs[1:]) if has_reach else (None, refs)

    @pl.when(pl.program_id(2) == 0)
    def _start():
        carry[...] = edge[...].astype(jnp.float32)

    def body(n, before):
        at = _rows(n)
        here = x[at, :].astype(jnp.float32)
        z = _linear(before, here, w, bias, _unpack(reach, 0, n))
        y[at, :] = (z * jax.nn.sigmoid(z) if silu else z).astype(y.dtype)
        return here

    carry[...] = jax.lax.fori_loop(0, plan.parts, body, carry[...])


def _backward(x_BTC, dy_BTC, w_WC, bias_C, edge_BEC, reach_BT=None, *, silu, block_sizes):
    plan = _Plan("backward", x_BTC, w_WC, block_sizes, descending=True)
    reach, reach_spec = plan.words(reach_BT, both=True)
    count = cost.backward(
        *x_BTC.shape, plan.W, x_BTC.dtype.itemsize, block_tokens=plan.block_tokens, silu=silu,
        **plan.kinds(reach_BT),
    )  # fmt: skip
    w_WC, bias_1C = w_WC.astype(jnp.float32), bias_C.astype(jnp.float32)[None]
    operands = x_BTC, x_BTC, dy_BTC, w_WC, bias_1C, edge_BEC, *reach
    weights = plan.w_spec, plan.bias_spec
    sums = [(a.shape, jnp.float32) for a in (w_WC, bias_1C, edge_BEC)]
    dx, dw, dbias, dedge = pl.pallas_call(
        functools.partial(_backward_kernel, plan=plan, silu=silu, has_reach=reach_BT is not None),
        grid=plan.grid,
        in_specs=[plan.token_spec, plan.before_spec, plan.token_spec, *weights, plan.edge_spec, *reach_spec],
        out_specs=[plan.token_spec, *weights, plan.edge_spec],
        out_shape=[sharding.out_shape(*a, *operands) for a in [(x_BTC.shape, x_BTC.dtype), *sums]],
        scratch_shapes=[plan.carry],
        name="causal_conv1d_backward",
        **plan.how(count, BACKWARD_SEMANTICS, silu),
    )(*operands)
    return dx, dw, dbias[0], dedge


def _backward_kernel(x, x_before, dy, w, bias, edge, *refs, plan, silu, has_reach):
    reach, (dx, dw, dbias, dedge, carry) = (refs[0], refs[1:]) if has_reach else (None, refs)
    row, k = pl.program_id(1), pl.program_id(2)
    is_first = k == plan.grid[2] - 1  # of the tokens: the block met last

    @pl.when(k == 0)
    def _start():
        carry[...] = jnp.zeros_like(carry)

    @pl.when((k == 0) & (row == 0))
    def _start_sums():
        dw[...] = jnp.zeros_like(dw)
        dbias[...] = jnp.zeros_like(dbias)

    before_block = jnp.where(is_first, edge[...], x_before[...]).astype(jnp.float32)

    def body(i, state):
        after, sums = state
        n = plan.parts - 1 - i
        at = _rows(n)
        here, dz = (plan.valid(ref[at, :].astype(jnp.float32), k, n) for ref in (x, dy))
        before = x[_rows(jnp.maximum(n - 1, 0)), :].astype(jnp.float32)
        before = jnp.where(n == 0, before_block, plan.valid(before, k, n - 1))
        back = _unpack(reach, 0, n)
        if silu:
            z = _linear(before, here, w, bias, back)
            gate = jax.nn.sigmoid(z)
            dz = dz * (gate * (1 + z * (1 - gate)))
        dx[at, :] = _transposed(dz, after, w, _unpack(reach, 1, n)).astype(dx.dtype)
        parts = [_masked(dz, back, j) * _shifted(before, here, j) for j in range(plan.W)] + [dz]
        # halves added up, or the sums leave the registers
        return dz, tuple(s + p[:half] + p[half:] for s, p in zip(sums, parts, strict=True))

    half = ROWS // 2
    zeros = jnp.zeros((half, carry.shape[1]), jnp.float32)
    first, sums = jax.lax.fori_loop(0, plan.parts, body, (carry[...], (zeros,) * (plan.W + 1)))
    carry[...] = first
    for j in range(plan.W):
        tap = pl.ds(plan.W - 1 - j, 1)
        dw[tap, :] += jnp.sum(sums[j], axis=0, keepdims=True)
    dbias[...] += jnp.sum(sums[-1], axis=0, keepdims=True)

    @pl.when(is_first)
    def _finish():
        ahead = None
        if reach is not None:
            # tokens of the state are of the first token's segment: as far ahead as it sees, and to it
            ahead = _unpack(reach, 1, 0)[:1] + ROWS - _iota()
        dedge[...] = _transposed(jnp.zeros_like(first), first, w, ahead)


def _linear(before, here, w, bias, reach):
    """bias + sum_j w_{W-1-j} x_{t-j} for the tokens of ``here``; float32 [ROWS, channels]."""
    W = w.shape[0]
    z = bias[...] + w[W - 1 : W, :] * here
    for j in range(1, W):
        z += _masked(w[W - 1 - j : W - j, :] * _shifted(before, here, j), reach, j)
    return z


def _transposed(dz, after, w, ahead):
    """sum_j w_{W-1-j} dz_{t+j}, the gradient of the tokens that ``dz`` belongs to."""
    W = w.shape[0]
    dx = w[W - 1 : W, :] * dz
    for j in range(1, W):
        dx += _masked(w[W - 1 - j : W - j, :] * _shifted(dz, after, ROWS - j), ahead, j)
    return dx


def _shifted(first, second, back):
    """The ROWS tokens that begin ``back`` tokens before ``second``, which follows ``first``."""
    if back == 0:
        return second
    return jnp.concatenate([first, second], axis=0)[ROWS - back : 2 * ROWS - back]


def _masked(x, reach, distance):
    if reach is None or distance == 0:
        return x
    return jnp.where(reach >= distance, x, 0.0)


def _rows(n):
    return pl.ds(pl.multiple_of(n * ROWS, ROWS), ROWS)


def _iota():
    return jax.lax.broadcasted_iota(jnp.int32, (ROWS, 1), 0)


def _unpack(words, which, n):
    """Reach of the tokens of part n, int32 [ROWS, 1]; None where there are no segments."""
    if words is None:
        return None
    row, groups = _iota(), ROWS // GROUP
    word = words[which, n * groups]
    for g in range(1, groups):
        word = jnp.where(row >= g * GROUP, words[which, n * groups + g], word)
    return jax.lax.shift_right_logical(word, BITS * (row % GROUP)) & (2**BITS - 1)


class _Plan:
    """How one call lies in the grid.

    Attributes:
      block_tokens, parts: tokens of a block, and how many times ROWS that is.
      descending: whether the blocks are met from the last tokens to the first.
    """

    def __init__(self, name, x_BTC, w_WC, block_sizes, descending):
        (self.B, self.T, self.C), self.W = x_BTC.shape, w_WC.shape[0]
        self.descending = descending
        if block_sizes is None:
            block_sizes = dispatch.for_generation(BLOCK_SIZES)[name]
        tokens, channels = block_sizes
        self.block_tokens = min(tokens, pl.cdiv(self.T, ROWS) * ROWS)
        self.parts = self.block_tokens // ROWS
        # blocks of channels as equal as whole tiles allow; all of them where one block does
        blocks = pl.cdiv(self.C, channels)
        channels = self.C if blocks == 1 else pl.cdiv(pl.cdiv(self.C, LANES), blocks) * LANES
        self.grid = (pl.cdiv(self.C, channels), self.B, pl.cdiv(self.T, self.block_tokens))
        self.carry = pltpu.VMEM((ROWS, channels), jnp.float32)
        self.token_spec = pl.BlockSpec(
            (None, self.block_tokens, channels), lambda c, b, k: (b, self._block(k), c)
        )
        self.before_spec = pl.BlockSpec(
            (None, ROWS, channels), lambda c, b, k: (b, jnp.maximum(self._block(k) * self.parts - 1, 0), c)
        )
        self.edge_spec = pl.BlockSpec((None, ROWS, channels), lambda c, b, k: (b, 0, c))
        self.w_spec = pl.BlockSpec((self.W, channels), lambda c, b, k: (0, c))
        self.bias_spec = pl.BlockSpec((1, channels), lambda c, b, k: (0, c))

    def kinds(self, reach_BT):
        return {"segments": reach_BT is not None, "channel_blocks": self.grid[0]}

    def how(self, count, semantics, silu):
        """Options of ``pl.pallas_call`` that both kernels have alike."""
        return {
            "compiler_params": pltpu.CompilerParams(dimension_semantics=semantics),
            "cost_estimate": pl.CostEstimate(
                flops=count.flops, bytes_accessed=count.bytes,
                transcendentals=self.B * self.T * self.C if silu else 0,
            ),
            "interpret": dispatch.interpret_mode(),
        }  # fmt: skip

    def _block(self, k):
        return self.grid[2] - 1 - k if self.descending else k

    def valid(self, x, k, n):
        """Zero beyond the last token, where part n of block k reaches there: sums must not see it."""
        if self.T % self.block_tokens == 0:
            return x
        return jnp.where(self._block(k) * self.block_tokens + n * ROWS + _iota() < self.T, x, 0.0)

    def words(self, reach_BT, both=False):
        """Operand and spec: int32 [B, blocks, 1 or 2, words of a block] in scalar memory, or none.

        A word holds how many tokens back the GROUP tokens see; with ``both`` a second row says how many
        tokens ahead see each.
        """
        if reach_BT is None:
            return (), ()
        rows = [reach_BT]
        if both:
            sees = [jnp.pad(reach_BT[:, j:] >= j, ((0, 0), (0, min(j, self.T)))) for j in range(1, self.W)]
            rows.append(sum((s.astype(jnp.int32) for s in sees), jnp.zeros_like(reach_BT)))
        x = jnp.stack(rows, axis=1)
        x = jnp.pad(x, ((0, 0), (0, 0), (0, self.grid[2] * self.block_tokens - self.T)))
        x = x.reshape(self.B, len(rows), self.grid[2], self.block_tokens // GROUP, GROUP)
        x = jnp.sum(x << (BITS * jnp.arange(GROUP, dtype=jnp.int32)), axis=-1, dtype=jnp.int32).swapaxes(1, 2)
        spec = pl.BlockSpec(
            (None, None, *x.shape[2:]), lambda c, b, k: (b, self._block(k), 0, 0), memory_space=pltpu.SMEM
        )
        return (x,), (spec,)
