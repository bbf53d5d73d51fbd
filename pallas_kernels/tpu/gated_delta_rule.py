"""The gated delta rule on TPU: chunks in order, the state of a few heads in VMEM.

A step takes one chunk of some heads of one row; their solves do not wait for one another. Backward: chunks
in reverse, each differentiated from its own state, inside the kernel.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import delta_chunk, dispatch, sharding
from pallas_kernels.cost import gated_delta_rule as cost
from pallas_kernels.tpu.gated_delta_rule_blocks import BLOCK_SIZES

LANES = 128
VMEM = {"v4": 15 << 20, None: 15 << 20}  # bytes asked for; the others have more
MORE_VMEM = 40 << 20


def refuses(q, k, v, *, chunk, **_) -> str | None:
    """Why these arguments are not for TPU, or None."""
    if q.dtype not in (jnp.bfloat16, jnp.float32):
        return f"q has dtype {q.dtype}; it must be bfloat16 or float32"
    if chunk % 16:
        return f"chunk is {chunk}; it must be a multiple of 16"
    return None


def forward(q, k, v, beta, log_decay, reset, state0, *, scale, chunk, keep=True, heads=None):
    """``(o, state)``, and with ``keep`` the state before every chunk [B, chunks, N, D, E]."""
    inputs = q, k, v, beta, log_decay, reset, state0
    (B, T, N, D), E, C = q.shape, v.shape[-1], chunk
    q, k, v = (_tokens(x, C) for x in (q, k, v))
    numbers = _numbers(C, beta, log_decay, jnp.broadcast_to(reset[:, :, None], beta.shape))
    S = _features(_features(state0, 2), 3)
    n, P, R = numbers.shape[2], S.shape[2], S.shape[3]
    H = heads or heads_of_step("forward", N)
    spec = _specs(C, H, P, R, lambda c: c)
    out_specs = [spec["v"], spec["S"]] + [spec["start"]] * keep
    shapes = [((B, n * C, N * R), v.dtype), (S.shape, jnp.float32)]
    shapes += [((B, n, *S.shape[1:]), jnp.float32)] * keep
    work = cost.forward(B, T, N, P, R, chunk=C, itemsize=v.dtype.itemsize, keep=keep)
    o, state, *starts = pl.pallas_call(
        functools.partial(_forward_kernel, scale=scale, heads=H),
        grid=(B, N // H, n),
        in_specs=[spec["q"], spec["q"], spec["v"], spec["numbers"], spec["S"]],
        out_specs=out_specs,
        out_shape=[sharding.out_shape(*s, *inputs) for s in shapes],
        scratch_shapes=[pltpu.VMEM((H, P, R), jnp.float32)],
        name="gated_delta_rule_forward",
        **_how(work),
    )(q, k, v, numbers, S)
    o = o.reshape(B, n * C, N, R)[:, :T, :, :E]
    return o, state[..., :D, :E], *(s[..., :D, :E] for s in starts)


def backward(q, k, v, beta, log_decay, reset, starts, do, dstate, *, scale, chunk, heads=None):
    """Gradients of q, k, v, beta, log_decay and state0."""
    inputs = q, k, v, beta, log_decay, reset, starts, do, dstate
    (B, T, N, D), E, C = q.shape, v.shape[-1], chunk
    dtype = v.dtype
    q, k, v, do = (_tokens(x, C) for x in (q, k, v, do))
    numbers = _numbers(C, beta, log_decay, jnp.broadcast_to(reset[:, :, None], beta.shape))
    dS = _features(_features(dstate, 2), 3)
    starts = _features(_features(starts, 3), 4)
    n, P, R = numbers.shape[2], dS.shape[2], dS.shape[3]
    H = heads or heads_of_step("backward", N)
    spec = _specs(C, H, P, R, lambda c: n - 1 - c)
    shapes = [(q.shape, dtype), (k.shape, dtype), (v.shape, dtype), (numbers.shape, jnp.float32)]
    shapes += [(dS.shape, jnp.float32)]
    work = cost.backward(B, T, N, P, R, chunk=C, itemsize=dtype.itemsize)
    dq, dk, dv, dnumbers, dS = pl.pallas_call(
        functools.partial(_backward_kernel, scale=scale, heads=H),
        grid=(B, N // H, n),
        in_specs=[
            spec["q"], spec["q"], spec["v"], spec["numbers"], spec["start"], spec["v"], spec["S"],
        ],
        out_specs=[spec["q"], spec["q"], spec["v"], spec["numbers"], spec["S"]],
        out_shape=[sharding.out_shape(*s, *inputs) for s in shapes],
        scratch_shapes=[pltpu.VMEM((H, P, R), jnp.float32)],
        name="gated_delta_rule_backward",
        **_how(work),
    )(q, k, v, numbers, starts, do, dS)  # fmt: skip
    dq, dk = (x.reshape(B, n * C, N, P)[:, :T, :, :D] for x in (dq, dk))
    dv = dv.reshape(B, n * C, N, R)[:, :T, :, :E]
    dbeta, dlog_decay = (jnp.moveaxis(dnumbers[:, :, :, i].reshape(B, N, n * C), 1, 2)[:, :T] for i in (0, 1))
    return dq, dk, dv, dbeta, dlog_decay, dS[..., :D, :E]


def heads_of_step(which, N) -> int:
    """Heads that one step of the grid takes: this generation's number, or half of it as often as need be."""
    return math.gcd(N, dispatch.for_generation(BLOCK_SIZES)[which][1])


def _forward_kernel(q_ref, k_ref, v_ref, numbers_ref, S0_ref, o_ref, state_ref, *rest, scale, heads):
    *starts_ref, S_ref = rest
    c = pl.program_id(2)

    @pl.when(c == 0)
    def _():
        S_ref[...] = S0_ref[0]

    for h in range(heads):
        S = S_ref[h]
        for ref in starts_ref:
            ref[0, 0, h] = S
        tokens = (_head(ref, h, heads) for ref in (q_ref, k_ref, v_ref))
        numbers = (numbers_ref[0, h, 0, i : i + 1] for i in range(3))
        o, S_ref[h] = delta_chunk.chunk(S, *tokens, *numbers, scale=scale)
        _set_head(o_ref, h, heads, o)

    @pl.when(c == pl.num_programs(2) - 1)
    def _():
        state_ref[0] = S_ref[...]


def _backward_kernel(
    q_ref, k_ref, v_ref, numbers_ref, start_ref, do_ref, dstate_ref,
    dq_ref, dk_ref, dv_ref, dnumbers_ref, dS0_ref, dS_ref, *, scale, heads,
):  # fmt: skip
    c = pl.program_id(2)

    @pl.when(c == 0)
    def _():
        dS_ref[...] = dstate_ref[0]

    for h in range(heads):
        tokens = (_head(ref, h, heads) for ref in (q_ref, k_ref, v_ref))
        beta, log_decay, reset = (numbers_ref[0, h, 0, i : i + 1] for i in range(3))

        def step(S, q, k, v, beta, log_decay, reset=reset):
            return delta_chunk.chunk(S, q, k, v, beta, log_decay, reset, scale=scale)

        _, pull = jax.vjp(step, start_ref[0, 0, h], *tokens, beta, log_decay)
        do = _head(do_ref, h, heads).astype(jnp.float32)
        dS_ref[h], dq, dk, dv, dbeta, dlog_decay = pull((do, dS_ref[h]))
        for ref, g in ((dq_ref, dq), (dk_ref, dk), (dv_ref, dv)):
            _set_head(ref, h, heads, g)
        dnumbers_ref[0, h, 0, 0:1] = dbeta
        dnumbers_ref[0, h, 0, 1:2] = dlog_decay
        dnumbers_ref[0, h, 0, 2:3] = jnp.zeros_like(reset)

    @pl.when(c == pl.num_programs(2) - 1)
    def _():
        dS0_ref[0] = dS_ref[...]


def _head(ref, h, heads):
    width = ref.shape[2] // heads
    return ref[0, :, h * width : (h + 1) * width]


def _set_head(ref, h, heads, x):
    width = ref.shape[2] // heads
    ref[0, :, h * width : (h + 1) * width] = x.astype(ref.dtype)


def _specs(C, H, P, R, order):
    """Blocks by name; ``order`` maps the step along the inner axis to a chunk."""
    return {
        "q": pl.BlockSpec((1, C, H * P), lambda b, h, c: (b, order(c), h)),
        "v": pl.BlockSpec((1, C, H * R), lambda b, h, c: (b, order(c), h)),
        "numbers": pl.BlockSpec((1, H, 1, 3, C), lambda b, h, c: (b, h, order(c), 0, 0)),
        "S": pl.BlockSpec((1, H, P, R), lambda b, h, c: (b, h, 0, 0)),
        "start": pl.BlockSpec((1, 1, H, P, R), lambda b, h, c: (b, order(c), h, 0, 0)),
    }


def _tokens(x, C):
    """[B, T, N, D] to [B, chunks C, N P]: heads side by side in whole lanes, zeros added."""
    x = _features(jnp.pad(x, ((0, 0), (0, -x.shape[1] % C), (0, 0), (0, 0))), 3)
    return x.reshape(*x.shape[:2], -1)


def _features(x, axis):
    width = [(0, 0)] * x.ndim
    width[axis] = (0, -x.shape[axis] % LANES)
    return jnp.pad(x, width)


def _numbers(C, *xs):
    """Numbers of a token, [B, T, N] each, to [B, N, chunks, 3, C]."""
    stacked = jnp.stack([x.astype(jnp.float32) for x in xs])
    stacked = jnp.pad(stacked, ((0, 0), (0, 0), (0, -stacked.shape[2] % C), (0, 0)))
    _, B, T, N = stacked.shape
    return jnp.transpose(stacked.reshape(3, B, T // C, C, N), (1, 4, 2, 0, 3))


def _how(work):
    return {
        "compiler_params": pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"),
            vmem_limit_bytes=VMEM.get(dispatch.tpu_generation(), MORE_VMEM),
        ),
        "cost_estimate": pl.CostEstimate(
            flops=work["flops"], transcendentals=work["transcendentals"], bytes_accessed=work["bytes"]
        ),
        "interpret": dispatch.interpret_mode(),
    }
