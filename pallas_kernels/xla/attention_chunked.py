"""Attention a block of queries and a block of keys at a time: memory O(T), for any platform.

The online softmax of Milakov and Gimelshein 2018 over key blocks, as in FlashAttention (Dao et al. 2022,
algorithms 1 and 4); the backward pass computes the probabilities again from the log-sum-exp. Blocks that
the causal mask and the window exclude are not visited, nor those that a block mask does.
"""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels.cost import attention as cost
from pallas_kernels.xla import attention_blocks as blocks


def forward(q, k, v, bias, mask, q_segments, kv_segments, block_mask, *, options):
    """Output [B, T, N, H] and log-sum-exp [B, T, N] of checked arguments."""
    x, visits = _prepare(q, k, v, bias, mask, q_segments, kv_segments, block_mask, options)
    B, K, _, G, H = x.q.shape
    rows, dtype = x.block_q, x.dtype
    product = functools.partial(jnp.einsum, preferred_element_type=dtype)

    def of_queries(_, at):
        def step(c, carry):
            highest, total, acc = carry
            s, _ = _logits(x, visits, at, c, options)
            now = jnp.maximum(highest, jnp.max(s, axis=-1))
            # where no key has been seen yet the highest is -inf; 0 stands for it, all weights being 0
            base = jnp.where(jnp.isneginf(now), 0, now)
            weights = jnp.exp(s - base[..., None])
            kept = jnp.exp(highest - base)
            v_j = visits.keys(x.v, at, c)
            mixed = product("bktgs,bksh->bktgh", weights.astype(v.dtype), v_j)
            return now, total * kept + jnp.sum(weights, axis=-1), acc * kept[..., None] + mixed

        empty = jnp.zeros((B, K, rows, G), dtype)
        start = (empty - jnp.inf, empty, jnp.zeros((B, K, rows, G, H), dtype))
        highest, total, acc = jax.lax.fori_loop(at.low, at.high, step, start)
        out = (acc / jnp.where(total == 0, 1, total)[..., None]).astype(q.dtype)
        return None, (out, jnp.where(total == 0, -jnp.inf, highest + jnp.log(total)))

    _, (out, lse) = jax.lax.scan(of_queries, None, visits.rows)
    out, lse = (blocks.ungroup(blocks.joined(a))[:, : x.T] for a in (out, lse))
    return out, lse


def backward(q, k, v, bias, mask, q_segments, kv_segments, block_mask, out, lse, dout, dlse, *, options):
    """Gradients of q, k, v and bias (None where there is none)."""
    x, visits = _prepare(q, k, v, bias, mask, q_segments, kv_segments, block_mask, options)
    B, K, _, G, H = x.q.shape
    rows, dtype = x.block_q, x.dtype
    # ds = p (dp - sum_s p dp + dlse), and sum_s p dp is the product of the output and its gradient
    delta = jnp.sum(out.astype(dtype) * dout.astype(dtype), axis=-1) - dlse
    lse = jnp.where(jnp.isneginf(lse), jnp.inf, lse)  # a query that sees no key: all its weights are 0
    product = functools.partial(jnp.einsum, preferred_element_type=dtype)
    fills = ((dout, 0), (delta, 0), (lse, jnp.inf))
    dout, delta, lse = (blocks.pad(blocks.group(a, K), 2, x.q.shape[2], fill) for a, fill in fills)

    def of_queries(sums, at):
        q_i, dout_i, delta_i, lse_i = (
            jax.lax.dynamic_slice_in_dim(a, at.i * rows, rows, 2) for a in (x.q, dout, delta, lse)
        )

        def step(c, carry):
            dq, (dk, dv, dbias) = carry
            k_j, v_j = visits.keys(x.k, at, c), visits.keys(x.v, at, c)
            s, slope = _logits(x, visits, at, c, options)
            p = jnp.exp(s - lse_i[..., None])
            dv_j = product("bktgs,bktgh->bksh", p.astype(dout.dtype), dout_i)
            dp = product("bktgh,bksh->bktgs", dout_i, v_j)
            ds = p * (dp - delta_i[..., None])
            if dbias is not None:
                dbias = _add_to_bias(dbias, ds, at.i * rows, c * x.block_kv)
            ds = (ds if slope is None else ds * slope).astype(q.dtype)
            dk_j = product("bktgs,bktgh->bksh", ds, q_i)
            dq = dq + product("bktgs,bksh->bktgh", ds, k_j)
            return dq, (visits.add(dk, dk_j, at, c), visits.add(dv, dv_j, at, c), dbias)

        start = (jnp.zeros((B, K, rows, G, H), dtype), sums)
        dq, sums = jax.lax.fori_loop(at.low, at.high, step, start)
        return sums, dq

    zeros = jnp.zeros(x.k.shape, dtype)
    sums = (zeros, zeros, None if bias is None else jnp.zeros(x.bias.shape, dtype))
    (dk, dv, dbias), dq = jax.lax.scan(of_queries, sums, visits.rows)
    dq = blocks.ungroup(blocks.joined(dq))[:, : x.T] * options.scale
    dk, dv = (
        jnp.sum(a.reshape(B, k.shape[2], -1, *a.shape[2:]), axis=2)[:, :, : x.S].swapaxes(1, 2)
        for a in (dk * options.scale, dv)
    )
    if dbias is not None:
        dbias = blocks.ungroup_logits(dbias, bias.shape).astype(bias.dtype)
    return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype), dbias


def _prepare(q, k, v, bias, mask, q_segments, kv_segments, block_mask, options):
    """Arrays padded to whole blocks, and the order of visits."""
    T, S = q.shape[1], k.shape[1]
    block_q, block_kv = options.block_sizes or cost.CHUNKS
    block_q, block_kv = min(block_q, T), min(block_kv, S)
    sizes = (T, S, block_q, block_kv)
    ranges = cost.key_blocks(*sizes, is_causal=options.is_causal, window=options.window)
    heads = k.shape[2]
    if block_mask is None:
        visits = blocks.InOrder(ranges, block_kv)
    else:
        # every query head has key blocks of its own: none share a key head's
        k, v = (jnp.repeat(a, q.shape[2] // heads, axis=2) for a in (k, v))
        heads = q.shape[2]
        visits = blocks.Listed(block_mask, ranges, block_kv, q.shape[0], heads)
    return blocks.Arrays.of(q, k, v, bias, mask, q_segments, kv_segments, sizes, heads), visits


def _logits(x, visits, at, c, options):
    """Logits of one block, -inf where the masks exclude; the slope of the soft-cap or None."""
    first_q, rows = at.i * x.block_q, x.block_q
    q_i = jax.lax.dynamic_slice_in_dim(x.q, first_q, rows, 2)
    k_j = visits.keys(x.k, at, c)
    s = jnp.einsum("bktgh,bksh->bktgs", q_i, k_j, preferred_element_type=x.dtype) * options.scale
    slope = None
    if options.logits_soft_cap is not None:
        capped = jnp.tanh(s / options.logits_soft_cap)
        s, slope = options.logits_soft_cap * capped, 1 - capped * capped
    if x.bias is not None:
        s = s + blocks.cut_logits(x.bias, first_q, rows, c * x.block_kv, x.block_kv).astype(x.dtype)
    rules = []
    t_at = (first_q + jnp.arange(rows))[:, None, None]
    s_at = visits.first_key(at, c) + jnp.arange(x.block_kv)
    if options.is_causal:
        rules.append(s_at <= t_at)
    if options.window is not None:
        left, right = options.window
        rules.append((s_at >= t_at - left) & (s_at <= t_at + right))
    if x.k.shape[2] != x.S:
        rules.append(s_at < x.S)
    if x.mask is not None:
        rules.append(blocks.cut_logits(x.mask, first_q, rows, c * x.block_kv, x.block_kv))
    if x.q_segments is not None:
        t_ids = jax.lax.dynamic_slice_in_dim(x.q_segments, first_q, rows, 2)[..., None, None]
        rules.append(t_ids == visits.keys(x.kv_segments, at, c)[:, :, None, None, :])
    rules += visits.rules(at, c)
    return jnp.where(functools.reduce(jnp.logical_and, rules), s, -jnp.inf) if rules else s, slope


def _add_to_bias(total, ds, first_q, first_kv):
    """Adds the block to the gradient of the bias, summed over the axes that the bias lacks."""
    part = jnp.sum(ds, axis=[a for a in range(5) if total.shape[a] == 1], keepdims=True)
    at = [0, 0, first_q if total.shape[2] > 1 else 0, 0, first_kv if total.shape[4] > 1 else 0]
    now = jax.lax.dynamic_slice(total, at, part.shape)
    return jax.lax.dynamic_update_slice(total, now + part, at)
