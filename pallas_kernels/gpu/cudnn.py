"""Attention by cuDNN, through ``jax.nn.dot_product_attention``; differentiation is JAX's own.

cuDNN keeps to flash attention's arguments and, unlike the other implementations here, JAX asks the device
for its version when it traces: it cannot be compiled ahead of time where no GPU is.
"""

import jax
import jax.numpy as jnp

from pallas_kernels import dispatch

DTYPES = (jnp.bfloat16, jnp.float16)
LARGEST_HEAD = 256


def refuses(q, k, v, bias, mask, q_segments, kv_segments, block_mask, *, options):
    """Why cuDNN does not take these arguments, or None. Limits of the GPU at hand are left to JAX."""
    (_, T, N, H), S = q.shape, k.shape[1]
    if q.dtype not in DTYPES:
        return f"q has dtype {q.dtype}; it must be bfloat16 or float16"
    if H > LARGEST_HEAD or H % 8:
        return f"q has head size {H}; it must be a multiple of 8 up to {LARGEST_HEAD}"
    if bias is not None and (bias.shape[1] not in (1, N) or bias.shape[2:] != (T, S)):
        return f"bias has shape {bias.shape}; its last axes must be {(T, S)}, none broadcast"
    if bias is not None and T % 2 + S % 2:
        return f"bias is given with {T} queries and {S} keys; both must be even then"
    for name, x in (("mask", mask), ("q_segment_ids", q_segments), ("block_mask", block_mask)):
        if x is not None:
            return f"{name} is given; cuDNN would take it only as a bias of T x S"
    if options.logits_soft_cap is not None:
        return f"logits_soft_cap is {options.logits_soft_cap}; cuDNN has none"
    if getattr(options, "block_sizes", None) is not None:
        return f"block_sizes is {options.block_sizes}; cuDNN chooses its own"
    if options.window is not None:
        if options.window[1] and not options.is_causal:
            return f"local_window_size is {options.window}; to the right it must be 0"
        if T != S:  # a query may be left without keys, which gives zeros here and a mean of values there
            return f"local_window_size is given with {T} queries and {S} keys; they must be as many"
    return None


def forward(q, k, v, bias, mask, q_segments, kv_segments, block_mask, *, options, with_lse=True):
    """(output,) or, ``with_lse``, (output, log-sum-exp [B, T, N] float32).

    JAX rounds the log-sum-exp to the dtype of the queries and leaves its gradient out: what is returned has
    that precision, and asking for its gradient is an error.
    """
    out = jax.nn.dot_product_attention(
        q,
        k,
        v,
        bias=bias,
        scale=options.scale,
        is_causal=options.is_causal,
        local_window_size=options.window,
        implementation="cudnn",
        return_residual=with_lse,
    )
    if not with_lse:
        return (out,)
    out, lse = out
    return out, _without_gradient(lse.astype(jnp.float32), q, k)


IMPLEMENTATION = dispatch.Implementation(forward, None, refuses)


@jax.custom_vjp
def _without_gradient(lse, *arrays):
    """``lse``, of which the gradient by any of ``arrays`` is an error rather than zero."""
    return lse


def _without_gradient_fwd(lse, *arrays):
    return lse.value, tuple(jnp.zeros_like(x.value) for x in (lse, *arrays))


def _without_gradient_bwd(zeros, cotangent):
    if not isinstance(cotangent, jax.custom_derivatives.SymbolicZero):
        raise NotImplementedError(
            "implementation 'cudnn' has no gradient of the log-sum-exp; 'pallas_gpu' and 'xla_chunked' have"
        )
    return zeros


_without_gradient.defvjp(_without_gradient_fwd, _without_gradient_bwd, symbolic_zeros=True)
