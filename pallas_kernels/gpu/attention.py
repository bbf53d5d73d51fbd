"""Flash attention on Hopper GPUs (H100, H200): what it takes, and its kernels over padded, local arrays.

Forward and backward are Mosaic GPU kernels with TMA and ``wgmma``, an instruction that GPUs before and
after Hopper lack. Source: Dao 2023, algorithms 1 and 2; Shah et al. 2024 for the use of TMA and ``wgmma``.
"""

import functools

import jax.numpy as jnp

from pallas_kernels import dispatch, sharding
from pallas_kernels.gpu import attention_backward, attention_forward, hopper
from pallas_kernels.gpu.attention_blocks import Problem

DTYPES = (jnp.bfloat16, jnp.float16)
HEAD_SIZES = tuple(attention_forward.BLOCKS)
TOKENS = 128  # that every block size of queries and of keys divides


def refuses(q, k, v, bias, mask, q_segments, kv_segments, block_mask, *, options):
    """Why the kernels do not take these arguments, or None."""
    if q.dtype not in DTYPES:
        return f"q has dtype {q.dtype}; it must be bfloat16 or float16"
    if q.shape[-1] not in HEAD_SIZES:
        return f"q has head size {q.shape[-1]}; it must be one of {', '.join(map(str, HEAD_SIZES))}"
    for name, x in (("bias", bias), ("mask", mask), ("block_mask", block_mask)):
        if x is not None:
            return f"{name} is given; causal, window and segments are the masks of this kernel"
    if getattr(options, "block_sizes", None) is not None:
        return f"block_sizes is {options.block_sizes}; this kernel has its own for each head size"
    return None


def forward(q, k, v, bias, mask, q_segments, kv_segments, block_mask, *, options):
    """Output [B, T, N, H] and log-sum-exp [B, T, N] float32 of checked arguments."""
    segments = () if q_segments is None else (q_segments, kv_segments)
    rule = f"{_inputs(segments)} -> b t (k g) h, b t (k g)"
    return _per_shard(functools.partial(_forward, options), rule, q, k)(q, k, v, *segments)


def backward(q, k, v, bias, mask, q_segments, kv_segments, block_mask, out, lse, dout, dlse, *, options):
    """Gradients of q, k, v, and None for the bias that there is not."""
    segments = () if q_segments is None else (q_segments, kv_segments)
    # ds = p (dp - sum_s p dp + dlse), and sum_s p dp is the product of the output and its gradient
    delta = jnp.sum(out.astype(jnp.float32) * dout.astype(jnp.float32), axis=-1) - dlse
    # any finite number for a query that looks at no key: all its logits are -inf
    lse2 = jnp.where(jnp.isneginf(lse), 0, lse * hopper.LOG2E)
    rows = "b t (k g) h, b t (k g), b t (k g)"
    rule = f"{rows}, {_inputs(segments)} -> b t (k g) h, b s k h, b s k h"
    function = functools.partial(_backward, options)
    return *_per_shard(function, rule, q, k)(dout.astype(q.dtype), lse2, delta, q, k, v, *segments), None


IMPLEMENTATION = dispatch.Implementation(forward, backward, refuses)


def _inputs(segments):
    return "b t (k g) h, b s k h, b s k h" + (", b t, b s" if segments else "")


def _per_shard(function, rule, q, k):
    if dispatch.interpret_mode():  # its ordered effects cannot be partitioned
        return function
    K = k.shape[2]
    return sharding.per_shard(function, rule, whole=("t", "s", "h"), k=K, g=q.shape[2] // K)


def _problem(options, q, k):
    return Problem.of(
        q,
        k,
        scale=options.scale,
        is_causal=options.is_causal,
        window=options.window,
        logits_soft_cap=options.logits_soft_cap,
    )


def _forward(options, q, k, v, *segments):
    T = q.shape[1]
    operands = (_tiled(x) for x in (q, k, v))
    out, lse_BNT = attention_forward.forward(
        _problem(options, q, k), *operands, *(_padded(x) for x in segments)
    )
    return out[:, :T], lse_BNT[..., :T].swapaxes(1, 2)


def _backward(options, dout, lse2, delta, q, k, v, *segments):
    T, S = q.shape[1], k.shape[1]
    arrays = (
        *(_tiled(x) for x in (q, k, v, dout)),
        *(_padded(x.swapaxes(1, 2)) for x in (lse2, delta)),
        *(_padded(x) for x in segments),
    )
    problem = _problem(options, q, k)
    dq = attention_backward.dq(problem, *arrays)
    dk, dv = attention_backward.dk_dv(problem, *arrays)
    return dq[:, :T], dk[:, :S], dv[:, :S]


def _tiled(x_BTNH):
    """Tokens to a multiple of the 8 rows of a tile, and to one block: beyond, TMA keeps to the bounds."""
    T = x_BTNH.shape[1]
    more = max(TOKENS, -(-T // 8) * 8) - T
    return jnp.pad(x_BTNH, ((0, 0), (0, more), (0, 0), (0, 0))) if more else x_BTNH


def _padded(x):
    """The last axis to whole blocks, by zeros; segment ids as int32."""
    x = x.astype(jnp.int32) if jnp.issubdtype(x.dtype, jnp.integer) else x
    more = -x.shape[-1] % TOKENS
    return jnp.pad(x, ((0, 0),) * (x.ndim - 1) + ((0, more),)) if more else x
