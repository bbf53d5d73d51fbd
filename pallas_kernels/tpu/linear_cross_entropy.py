"""Cross-entropy of a linear head on TPU: logits live in VMEM alone, a block at a time.

Forward: for a block of tokens the vocabulary goes by in order, under a running maximum and a running sum of
exponentials of each lane; lanes are joined once, at the end. Backward: two kernels that compute the logits
again, dx with the vocabulary as the inner axis and dw with the tokens as the inner axis, each with its sum
in a float32 scratch. Rows of tokens are padded to whole blocks; columns past V are masked.
"""

import functools
import math

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import dispatch, sharding
from pallas_kernels.cost import linear_cross_entropy as cost
from pallas_kernels.tpu.linear_cross_entropy_blocks import BLOCK_SIZES

LANES = 128
LOWEST = -2.0e38  # stands for minus infinity: finite, so that differences are no NaN
# Bytes of VMEM asked for, by generation (a core of v4 has 16 MiB, of v5p and tpu7x 64, of the others 128).
VMEM = {
    "v4": 15 << 20,
    "v5e": 64 << 20,
    "v5p": 48 << 20,
    "v6e": 64 << 20,
    "tpu7x": 48 << 20,
    "default": 15 << 20,
}
# Seen beyond what ``vmem_bytes`` counts: 3.4 MiB, on v5p with blocks of 1,024 x 512 and 3,072 features.
SPARE = 4 << 20


def refuses(x, w, labels, *, block_sizes) -> str | None:
    """Why these arguments are not for TPU, or None."""
    if x.dtype not in (jnp.bfloat16, jnp.float32):
        return f"x has dtype {x.dtype}; it must be bfloat16 or float32"
    for name, size in block_sizes.items():
        if isinstance(size, int) and size % LANES:
            return f"block_sizes has {name} {size}; it must be a multiple of {LANES}"
    return None


def forward(x, w_DV, labels, *, soft_cap, tokens=None, vocab=None):
    """``(lse, picked)`` of every token, float32."""
    D, V = w_DV.shape
    bm, bv = blocks("forward", labels.size, D, V, x.dtype, w_DV.dtype, tokens, vocab)
    x_MD, w, label_M1 = _rows(bm, x.reshape(-1, D)), _columns(w_DV, x.dtype), _labels(bm, labels)
    M = x_MD.shape[0]
    out = pl.pallas_call(
        functools.partial(_forward_kernel, V=V, soft_cap=soft_cap),
        grid=(M // bm, pl.cdiv(V, bv)),
        in_specs=[
            pl.BlockSpec((bm, D), lambda i, j: (i, 0)),
            pl.BlockSpec((D, bv), lambda i, j: (0, j)),
            pl.BlockSpec((bm, 1), lambda i, j: (i, 0)),
        ],
        out_specs=pl.BlockSpec((bm, 2), lambda i, j: (i, 0)),
        out_shape=sharding.out_shape((M, 2), jnp.float32, x, w_DV, labels),
        scratch_shapes=[pltpu.VMEM((bm, LANES), jnp.float32)] * 3,
        name="linear_cross_entropy_forward",
        **_how(cost.forward(M, D, V, tokens=bm, itemsize=x.dtype.itemsize, soft_cap=bool(soft_cap))),
    )(x_MD, w, label_M1)
    lse, picked = (out[: labels.size, k].reshape(labels.shape) for k in (0, 1))
    return lse, picked


def backward(x, w_DV, labels, lse, dlse, dpicked, *, soft_cap, tokens=None, vocab=None):
    """``(dx, dw)``."""
    D, V = w_DV.shape
    arrays = x, w_DV, labels, lse, dlse, dpicked

    def call(kernel, dims, out_shape, out_block, acc):
        sizes = tokens, vocab
        bm, bv = blocks(kernel.__name__.strip("_"), labels.size, D, V, x.dtype, w_DV.dtype, *sizes)
        x_MD, w, label_M1 = _rows(bm, x.reshape(-1, D)), _columns(w_DV, x.dtype), _labels(bm, labels)
        stats_M3 = _rows(bm, jnp.stack([a.reshape(-1) for a in (lse, dlse, dpicked)], axis=1))
        M = x_MD.shape[0]
        steps = {"m": M // bm, "v": pl.cdiv(V, bv)}
        order = dims.index("m"), dims.index("v")

        def spec(shape, axes):
            return pl.BlockSpec(shape, lambda *ij: tuple(ij[order["mv".index(a)]] if a else 0 for a in axes))

        itemsize, capped = x.dtype.itemsize, bool(soft_cap)
        if dims == "mv":
            work = cost.backward_x(M, D, V, tokens=bm, itemsize=itemsize, soft_cap=capped)
        else:
            sizes = {"itemsize": itemsize, "w_itemsize": w_DV.dtype.itemsize}
            work = cost.backward_w(M, D, V, vocab=bv, soft_cap=capped, **sizes)
        shape, dtype = out_shape(M, w.shape[1])
        return pl.pallas_call(
            functools.partial(kernel, V=V, soft_cap=soft_cap),
            grid=tuple(steps[d] for d in dims),
            in_specs=[
                spec((bm, D), ("m", "")),
                spec((D, bv), ("", "v")),
                spec((bm, 1), ("m", "")),
                spec((bm, 3), ("m", "")),
            ],
            out_specs=spec(*out_block(bm, bv)),
            out_shape=sharding.out_shape(shape, dtype, *arrays),
            scratch_shapes=[pltpu.VMEM(acc(bm, bv), jnp.float32)],
            name=f"linear_cross_entropy{kernel.__name__}",
            **_how(work),
        )(x_MD, w, label_M1, stats_M3)

    dx_MD = call(
        _backward_x,
        "mv",
        lambda M, W: ((M, D), x.dtype),
        lambda bm, bv: ((bm, D), ("m", "")),
        lambda bm, bv: (bm, D),
    )
    dw = call(
        _backward_w,
        "vm",
        lambda M, W: ((D, W), w_DV.dtype),
        lambda bm, bv: ((D, bv), ("", "v")),
        lambda bm, bv: (D, bv),
    )
    return dx_MD[: labels.size].reshape(x.shape), dw[:, :V]


def forward_and_gradients(x, w_DV, labels, weights, squares, *, soft_cap, **sizes):
    """``(lse, picked, dx, dw)`` of sum(weights (lse - picked) + squares lse^2): forward, then backward."""
    lse, picked = forward(x, w_DV, labels, soft_cap=soft_cap, **sizes)
    dlse = weights + 2 * squares * lse
    return lse, picked, *backward(x, w_DV, labels, lse, dlse, -weights, soft_cap=soft_cap, **sizes)


def _forward_kernel(x_ref, w_ref, label_ref, out_ref, high_ref, sum_ref, picked_ref, *, V, soft_cap):
    j = pl.program_id(1)

    @pl.when(j == 0)
    def _():
        high_ref[...] = jnp.full_like(high_ref, LOWEST)
        sum_ref[...] = jnp.zeros_like(sum_ref)
        picked_ref[...] = jnp.zeros_like(picked_ref)

    logits, _ = _logits(x_ref[...], w_ref[...], soft_cap)
    column = _column(j, logits.shape)
    if V % logits.shape[1]:
        logits = jnp.where(column < V, logits, LOWEST)
    picked_ref[...] += sum(_by_lane(jnp.where(column == label_ref[...], logits, 0)))
    slices = _by_lane(logits)
    high = functools.reduce(jnp.maximum, slices, high_ref[...])
    sum_ref[...] = sum_ref[...] * jnp.exp(high_ref[...] - high) + sum(jnp.exp(s - high) for s in slices)
    high_ref[...] = high

    @pl.when(j == pl.num_programs(1) - 1)
    def _():
        highest = jnp.max(high_ref[...], axis=1, keepdims=True)
        total = jnp.sum(sum_ref[...] * jnp.exp(high_ref[...] - highest), axis=1, keepdims=True)
        out_ref[:, 0:1] = highest + jnp.log(total)
        out_ref[:, 1:2] = jnp.sum(picked_ref[...], axis=1, keepdims=True)


def _backward_x(x_ref, w_ref, label_ref, stats_ref, dx_ref, acc_ref, *, V, soft_cap):
    j = pl.program_id(1)

    @pl.when(j == 0)
    def _():
        acc_ref[...] = jnp.zeros_like(acc_ref)

    dlogits = _dlogits(x_ref, w_ref, label_ref, stats_ref, j, V, soft_cap)
    w = w_ref[...]
    if V % w.shape[1]:  # what is read past the end may be NaN, and 0 NaN is NaN
        w = jnp.where(_column(j, (1, w.shape[1])) < V, w, jnp.zeros_like(w))
    acc_ref[...] += lax.dot_general(dlogits, w, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)

    @pl.when(j == pl.num_programs(1) - 1)
    def _():
        dx_ref[...] = acc_ref[...].astype(dx_ref.dtype)


def _backward_w(x_ref, w_ref, label_ref, stats_ref, dw_ref, acc_ref, *, V, soft_cap):
    i = pl.program_id(1)

    @pl.when(i == 0)
    def _():
        acc_ref[...] = jnp.zeros_like(acc_ref)

    dlogits = _dlogits(x_ref, w_ref, label_ref, stats_ref, pl.program_id(0), V, soft_cap)
    acc_ref[...] += lax.dot_general(
        x_ref[...], dlogits, (((0,), (0,)), ((), ())), preferred_element_type=jnp.float32
    )

    @pl.when(i == pl.num_programs(1) - 1)
    def _():
        dw_ref[...] = acc_ref[...].astype(dw_ref.dtype)


def _dlogits(x_ref, w_ref, label_ref, stats_ref, j, V, soft_cap):
    lse, dlse, dpicked = stats_ref[:, 0:1], stats_ref[:, 1:2], stats_ref[:, 2:3]
    logits, slope = _logits(x_ref[...], w_ref[...], soft_cap)
    column = _column(j, logits.shape)
    dlogits = jnp.exp(logits - lse) * dlse + jnp.where(column == label_ref[...], dpicked, 0)
    if slope is not None:
        dlogits *= slope
    if V % logits.shape[1]:
        dlogits = jnp.where(column < V, dlogits, 0)
    return dlogits.astype(x_ref.dtype)


def _logits(x, w, soft_cap):
    logits = jnp.dot(x, w, preferred_element_type=jnp.float32)
    if soft_cap is None:
        return logits, None
    bent = jnp.tanh(logits * (1 / soft_cap))
    return soft_cap * bent, 1 - bent * bent


def _column(j, shape):
    return j * shape[1] + lax.broadcasted_iota(jnp.int32, shape, 1)


def _by_lane(x):
    return [x[:, k : k + LANES] for k in range(0, x.shape[1], LANES)]


def _rows(bm, x):
    """Rows of zeros up to a whole number of blocks."""
    return jnp.pad(x, ((0, -x.shape[0] % bm), (0, 0)))


def _labels(bm, labels):
    flat = labels.reshape(-1, 1)
    return jnp.pad(flat, ((0, -flat.shape[0] % bm), (0, 0)), constant_values=-1)


def _columns(w_DV, dtype):
    """In the dtype of x; no narrower than one block of lanes."""
    return jnp.pad(w_DV.astype(dtype), ((0, 0), (0, max(LANES - w_DV.shape[1], 0))))


def _how(work):
    return {
        "compiler_params": pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"),
            vmem_limit_bytes=dispatch.for_generation(VMEM),
        ),
        "cost_estimate": pl.CostEstimate(
            flops=work["flops"], transcendentals=work["transcendentals"], bytes_accessed=work["bytes"]
        ),
        "interpret": dispatch.interpret_mode(),
    }


def blocks(kernel, M, D, V, dtype, w_dtype, tokens=None, vocab=None) -> tuple[int, int]:
    """(tokens, vocab) of a kernel's block: the caller's, or the largest that fit this generation's VMEM."""
    room = dispatch.for_generation(VMEM)
    room -= SPARE if room > 16 << 20 else 0
    bm, bv = dispatch.for_generation(BLOCK_SIZES)[kernel]
    bm, bv = (min(b, math.ceil(n / LANES) * LANES) for b, n in ((tokens or bm, M), (vocab or bv, V)))
    while vmem_bytes(kernel, bm, bv, D, dtype.itemsize, w_dtype.itemsize) > room:
        may = [(n, k) for n, k, fixed in ((bm, 0, tokens), (bv, 1, vocab)) if not fixed and n > LANES]
        if not may:
            break  # the compiler has the last word
        bm, bv = (bm // 2, bv) if max(may)[1] == 0 else (bm, bv // 2)
        bm, bv = (math.ceil(n / LANES) * LANES for n in (bm, bv))
    return bm, bv


def vmem_bytes(kernel, bm, bv, D, itemsize, w_itemsize) -> int:
    """VMEM of one step: blocks twice, for the copies ahead, and what lives between matmuls."""
    moved = 2 * itemsize * (bm * D + D * bv) + 3 * 2 * 4 * bm * LANES
    live = 3 * 4 * bm * bv
    kept = {
        "forward": 3 * 4 * bm * LANES,
        "backward_x": bm * D * (4 + 2 * itemsize),
        "backward_w": D * bv * (4 + 2 * w_itemsize),
    }[kernel]
    return moved + live + kept
