"""Flash attention for TPU: blocks, the order of visits and the three calls; bodies in ``attention_kernels``.

Arrays stay in the order batch, token, head: a block is a range of tokens and the lanes of one head, so
nothing is transposed. Which pairs of blocks are visited is a list in scalar memory: pairs that the masks
exclude are not in it, and cost neither a copy nor a step.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax.numpy as jnp

from pallas_kernels import dispatch, sharding
from pallas_kernels.tpu import attention_kernels as kernels
from pallas_kernels.tpu import attention_plan as plans
from pallas_kernels.tpu.attention_blocks import BLOCK_SIZES
from pallas_kernels.tpu.attention_call import Call, Sizes

LANES = 128
SCALAR_MEMORY = 2**19  # bytes that the list of visits may take; half of the smallest chip's


def block_sizes(kind, T, S, options):
    """(of queries, of keys) for the kernel ``forward``, ``backward_q`` or ``backward_kv``."""
    if options.block_sizes is not None:
        return options.block_sizes
    largest = dispatch.for_generation(BLOCK_SIZES)[kind]
    return tuple(_even(n, block) for n, block in zip((T, S), largest, strict=True))


def _even(n, largest):
    """Lanes in a block when n tokens are shared out over as few blocks as ``largest`` allows."""
    return -(-n // (-(-n // largest) * LANES)) * LANES


def refuses(q, k, v, bias, mask, q_segments, kv_segments, block_mask, *, options):
    """Why the kernels do not take these arguments, or None."""
    if q.dtype not in (jnp.float32, jnp.bfloat16):
        return f"q has dtype {q.dtype}; it must be float32 or bfloat16"
    if options.block_sizes and any(size % LANES for size in options.block_sizes):
        return f"block_sizes is {options.block_sizes}; both must be multiples of {LANES}"
    sizes = _sizes("backward_kv", q, k, options)
    rows, columns = sizes.blocks
    if max(rows * sizes.G, columns) >= plans.MOST:
        return f"block_sizes {sizes[-2:]} make {rows} x {columns} blocks; {plans.MOST} a side are too many"
    lists = 1 if block_mask is None else block_mask.shape[0] * block_mask.shape[1]
    if lists * rows * columns * 4 > SCALAR_MEMORY and block_mask is not None:
        return (
            f"block_mask has shape {block_mask.shape}; its list of blocks is over {SCALAR_MEMORY} bytes: "
            "larger blocks, or fewer heads and rows with masks of their own"
        )
    if rows * columns * sizes.G * 4 > 4 * SCALAR_MEMORY:
        return f"block_sizes {sizes[-2:]} make {rows * columns} pairs of blocks; the list is too long"
    return None


def forward(q, k, v, bias, mask, q_segments, kv_segments, block_mask, *, options):
    """Output [B, T, N, H] and log-sum-exp [B, T, N] of checked arguments."""
    operands = _Operands.of(q, k, v, bias, mask, q_segments, kv_segments)
    operands.visits(block_mask, ("forward",), q, k, options)
    outs = "b t (k g) h, b t (k g)"
    return operands.per_shard(functools.partial(_forward, options=options), (), outs)


def backward(q, k, v, bias, mask, q_segments, kv_segments, block_mask, out, lse, dout, dlse, *, options):
    """Gradients of q, k, v and bias (None where there is none)."""
    operands = _Operands.of(q, k, v, bias, mask, q_segments, kv_segments)
    operands.visits(block_mask, ("backward_q", "backward_kv"), q, k, options)
    # ds = p (dp - sum_s p dp + dlse), and sum_s p dp is the product of the output and its gradient
    delta = jnp.sum(out.astype(jnp.float32) * dout.astype(jnp.float32), axis=-1) - dlse
    lse = jnp.where(jnp.isneginf(lse), jnp.inf, lse)  # a query that sees no key: all its weights are 0
    more = (("b t (k g) h", dout), ("b t (k g)", lse), ("b t (k g)", delta))
    outs = "b t (k g) h, b s k h, b s k h" + ("" if bias is None else ", b (k g) t s")
    dq, dk, dv, *dbias = operands.per_shard(functools.partial(_backward, options=options), more, outs)
    if bias is None:
        return dq, dk, dv, None
    missing = [axis for axis in range(4) if bias.shape[axis] == 1]
    return dq, dk, dv, jnp.sum(dbias[0], axis=missing, keepdims=True).astype(bias.dtype)


class _Operands(NamedTuple):
    """The arrays that are there, by name, with the einsum names of their axes."""

    arrays: dict
    axes: dict
    K: int
    G: int

    @classmethod
    def of(cls, q, k, v, bias, mask, q_segments, kv_segments):
        (B, T, N, _), (_, S, K, _) = q.shape, k.shape
        arrays = {"q": q, "k": k, "v": v}
        axes = {"q": "b t (k g) h", "k": "b s k h", "v": "b s k h"}

        for name, x in (("bias", bias), ("mask", mask)):
            if x is not None:
                arrays[name] = jnp.broadcast_to(x, (*x.shape[:2], T, S))
                axes[name] = f"{_outer_axes(x, B, N)} t s"
        if q_segments is not None:
            arrays |= {"q_segments": q_segments, "kv_segments": kv_segments}
            axes |= {"q_segments": "b t", "kv_segments": "b s"}
        return cls(arrays, axes, K, N // K)

    def visits(self, block_mask, kinds, q, k, options):
        """Adds what the order of visits is made from: a list for each kernel, or the block mask."""
        for kind in kinds:
            sizes = _sizes(kind, q, k, options)
            ranges = plans.ranges(sizes, options)
            if block_mask is not None:
                self.arrays["block_mask"] = plans.possible(block_mask, ranges)
                self.axes["block_mask"] = f"{_outer_axes(block_mask, q.shape[0], q.shape[2])} i j"
                continue
            if kind == "backward_kv":
                codes = plans.fixed_by_keys(ranges, sizes.blocks[1], self.G)
            else:
                codes = plans.fixed_by_queries(ranges)
            self.arrays[f"{kind}_codes"] = jnp.array(codes, jnp.int32)
            self.axes[f"{kind}_codes"] = f"{kind}_steps"

    def per_shard(self, function, more, outs):
        """``function(arrays by name, *more)`` on each device's part."""
        names = list(self.arrays)

        def local(*arrays):
            return function(dict(zip(names, arrays, strict=False)), *arrays[len(names) :])

        ins = ", ".join([*self.axes.values(), *(axes for axes, _ in more)])
        used = {w.strip("()") for w in ins.replace(",", " ").split()} - {"b", "k", "g"}
        mapped = sharding.per_shard(local, f"{ins} -> {outs}", whole=tuple(sorted(used)), k=self.K, g=self.G)
        return mapped(*self.arrays.values(), *(x for _, x in more))


def _outer_axes(x, B, N):
    return f"{'b' if x.shape[0] == B else 'one'} {'(k g)' if x.shape[1] == N else 'alone'}"


def _plan(kind, x, G, options):
    if "block_mask" not in x:
        codes = x[f"{kind}_codes"]
        return plans.Plan(codes, 1, 1, codes.size)
    if kind == "backward_kv":
        return plans.by_keys(x["block_mask"], G, options.most_active)
    return plans.by_queries(x["block_mask"], options.most_active)


def _sizes(kind, q, k, options) -> Sizes:
    (B, T, N, H), (_, S, K, _) = q.shape, k.shape
    return Sizes(B, T, S, K, N // K, -(-H // LANES) * LANES, *block_sizes(kind, T, S, options))


def _forward(x, *, options):
    q, f32 = x["q"], jnp.float32
    sizes = _sizes("forward", q, x["k"], options)
    call = Call("forward", sizes, options, _plan("forward", x, sizes.G, options))
    call.take(x)
    call.give("out", (sizes.B, sizes.padded[0], q.shape[2] * sizes.H), q.dtype, call.of_queries)
    call.give("lse", (sizes.B, q.shape[2], 1, sizes.padded[0]), f32, call.of_query_row)
    column, acc = ((sizes.block_q, 1), f32), ((sizes.block_q, sizes.H), f32)
    out, lse = call(kernels.forward, {"highest": column, "total": column, "acc": acc})
    return _heads(out, sizes.T, q.shape), lse[:, :, 0, : sizes.T].swapaxes(1, 2)


def _backward(x, dout, lse, delta, *, options):
    q, k, f32 = x["q"], x["k"], jnp.float32
    x = x | {"dout": dout, "lse": lse, "delta": delta}
    sizes = _sizes("backward_q", q, k, options)
    call = Call("backward_q", sizes, options, _plan("backward_q", x, sizes.G, options))
    call.take(x)
    call.give("dq", (sizes.B, sizes.padded[0], q.shape[2] * sizes.H), q.dtype, call.of_queries)
    if "bias" in x:
        shape = (sizes.B, q.shape[2], *sizes.padded)
        call.give("ds", shape, f32, call.of_logits(*shape[:2]), zeros_first=True)
    column, acc = ((sizes.block_q, 1), f32), ((sizes.block_q, sizes.H), f32)
    dq, *ds = call(kernels.backward_q, {"lse_column": column, "delta_column": column, "acc": acc})

    sizes = _sizes("backward_kv", q, k, options)
    call = Call("backward_kv", sizes, options, _plan("backward_kv", x, sizes.G, options))
    call.take(x)
    for name in ("dk", "dv"):
        call.give(name, (sizes.B, sizes.padded[1], sizes.K * sizes.H), k.dtype, call.of_keys)
    acc = ((sizes.block_kv, sizes.H), f32)
    dk, dv = call(kernels.backward_kv, {"dk_acc": acc, "dv_acc": acc})
    gradients = _heads(dq, sizes.T, q.shape), _heads(dk, sizes.S, k.shape), _heads(dv, sizes.S, k.shape)
    return (*gradients, *(d[:, :, : sizes.T, : sizes.S] for d in ds))


def _heads(x, tokens, shape):
    """[B, tokens padded, heads x lanes] to [B, tokens, heads, H]."""
    B, _, heads, H = shape
    return x.reshape(B, x.shape[1], heads, -1)[:, :tokens, :, :H]
