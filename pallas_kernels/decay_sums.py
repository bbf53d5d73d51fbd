"""Sums of log_decay within a chunk, and products weighted by their exponentials, with no overflow.

What is exponentiated is always the sum of log_decay over a run of tokens, so at most 0 where decays are
at most 1; never the difference of two exponentials.
"""

import math

import jax
import jax.numpy as jnp

from pallas_kernels.cost.ssd import chunk_for

# exp(-100) is 0 beside anything in float32. A log_decay below it, and the reset where a new segment
# begins, are taken to be this: then sums stay finite and exact enough.
LOWEST = -100.0
LONGEST = 512  # tokens a chunk, for ``exact_cumsum`` to be exact


def chunks_for(T: int, chunk: int, span: int) -> tuple[int, int, int, int]:
    """Tokens a chunk; chunks; states that are kept, one each ``span`` tokens at most; chunks from one of
    them to the next. ``chunk`` and ``span`` are powers of two; a chunk is not longer than a span."""
    C = min(chunk_for(T, chunk), span)
    n, count = math.ceil(T / C), math.ceil(T / span)
    return C, n, count, math.ceil(n / count)


def split(g):
    """log_decay as a multiple of 1/256 and the rest, whose sums are to be subtracted one by one.

    A float32 sum of a few hundred decays may be 1e4 with an error of 1e-3, and so would be its
    differences. Sums of the first part are exact up to ``LONGEST`` tokens of at least ``LOWEST``; those of
    the second are at most 1 for 512 tokens.
    """
    coarse = jax.lax.stop_gradient(jnp.round(g * 256) / 256)
    return coarse, g - coarse


def exact_cumsum(g):
    """Cumulative sums over the last axis of the two parts of ``split``."""
    return tuple(jnp.cumsum(x, -1) for x in split(g))


def within(g):
    """Sums over a chunk [..., C, D]: from its first token to t inclusive, from t exclusive to its last."""
    c, r = g[..., None, :], jnp.zeros_like(g)[..., None, :]
    while c.shape[-3] > 1:
        c, r = _pair_up(c, r)
    return c[..., 0, :, :], r[..., 0, :, :]


def _pair_up(c, r):
    """Sums over blocks [..., n, h, D] to sums over blocks of twice the length, [..., n/2, 2h, D]."""
    c, r = (x.reshape(*x.shape[:-3], -1, 2, *x.shape[-2:]) for x in (c, r))
    first, second = c[..., 0, :, :], c[..., 1, :, :]
    c = jnp.concatenate([first, second + first[..., -1:, :]], -2)
    r = jnp.concatenate([r[..., 0, :, :] + second[..., -1:, :], r[..., 1, :, :]], -2)
    return c, r


def weighted_products(q, k, g):
    """sum_d q_td k_sd exp(sum of g over s < j <= t) for s <= t else 0, with the sums of ``within``.

    By halves, as the secondary chunks of Yang et al. 2023 (section 4.3) but down to single tokens: where
    s is in the first and t in the second half of a block, both factors exp(sum from the middle to t) and
    exp(sum from s to the middle) are at most 1, so each block is one product of matrices.

    Args:
      q, k: [..., C, D], C a power of two; g: [..., C, D].

    Returns:
      [..., C, C] in float32 at least, c and r.
    """
    dtype, highest = jnp.promote_types(q.dtype, jnp.float32), jax.lax.Precision.HIGHEST
    shape = jnp.broadcast_shapes(q.shape, g.shape)
    q, k = (jnp.broadcast_to(x, shape) for x in (q, k))
    A = jnp.sum((q.astype(dtype) * k.astype(dtype)), -1)[..., None, None]  # [..., C, 1, 1]
    c, r = g[..., None, :], jnp.zeros_like(g)[..., None, :]
    while c.shape[-3] > 1:
        halves = [x.reshape(*shape[:-2], -1, 2, c.shape[-2], shape[-1]) for x in (q, k, c, r)]
        qt, ct = (x[..., 1, :, :] for x in (halves[0], halves[2]))
        ks, rs = (x[..., 0, :, :] for x in (halves[1], halves[3]))
        qt, ks = (qt * jnp.exp(ct)).astype(q.dtype), (ks * jnp.exp(rs)).astype(q.dtype)
        across = jnp.einsum("...td,...sd->...ts", qt, ks, preferred_element_type=dtype,
                            precision=None if q.dtype == jnp.bfloat16 else highest)  # fmt: skip
        A = A.reshape(*A.shape[:-3], -1, 2, *A.shape[-2:])
        upper = jnp.concatenate([A[..., 0, :, :], jnp.zeros_like(across)], -1)
        A = jnp.concatenate([upper, jnp.concatenate([across, A[..., 1, :, :]], -1)], -2)
        c, r = _pair_up(c, r)
    return A[..., 0, :, :], c[..., 0, :, :], r[..., 0, :, :]
