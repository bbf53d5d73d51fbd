"""Attention written out in full: the oracle that every implementation is held against."""

import jax.numpy as jnp

from pallas_kernels.masks import attention_mask, spread_blocks


def dot_product_attention(
    q_BTNH, k_BSKH, v_BSKH, *, bias, mask, scale, is_causal, window,
    q_segment_ids, kv_segment_ids, logits_soft_cap, block_mask=None, block_sizes=None,
):  # fmt: skip
    """Attention with every key-value head repeated and every probability kept.

    Same meaning as :func:`pallas_kernels.dot_product_attention`, arguments already checked.
    Computes in float32, or in float64 where the inputs are, at the highest matmul precision,
    in O(B N T S) memory. Returns [B, T, N, H] in the dtype of the queries and the log-sum-exp [B, T, N].
    A block mask is blown up to tokens.
    """
    dtype = jnp.promote_types(q_BTNH.dtype, jnp.float32)
    q, k, v = (x.astype(dtype) for x in (q_BTNH, k_BSKH, v_BSKH))
    (_, T, N, _), (_, S, K, _) = q.shape, k.shape
    k, v = (jnp.repeat(x, N // K, axis=2) for x in (k, v))
    logits = jnp.einsum("btnh,bsnh->bnts", q, k, precision="highest") * scale
    if logits_soft_cap is not None:
        logits = logits_soft_cap * jnp.tanh(logits / logits_soft_cap)
    if bias is not None:
        logits = logits + bias.astype(dtype)
    if block_mask is not None:
        mask = spread_blocks(block_mask, block_sizes, T, S)
    allowed = attention_mask(
        T, S, mask=mask, is_causal=is_causal, window=window,
        q_segment_ids=q_segment_ids, kv_segment_ids=kv_segment_ids,
    )  # fmt: skip
    if allowed is None:
        allowed = jnp.ones((1, 1, T, S), bool)
    lowest = jnp.finfo(dtype).min
    highest = jnp.max(logits, axis=-1, where=allowed, initial=lowest, keepdims=True)
    weights = jnp.where(allowed, jnp.exp(jnp.where(allowed, logits - highest, 0)), 0)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    probs = weights / jnp.where(total == 0, 1, total)
    out = jnp.einsum("bnts,bsnh->btnh", probs, v, precision="highest").astype(q_BTNH.dtype)
    lse = jnp.where(total == 0, -jnp.inf, highest + jnp.log(jnp.where(total == 0, 1, total)))
    return out, lse[..., 0].swapaxes(1, 2)
