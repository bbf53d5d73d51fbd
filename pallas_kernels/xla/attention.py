"""Attention for XLA to compile: logits in full, query heads grouped over their key-value head."""

import jax
import jax.numpy as jnp

from pallas_kernels.masks import attention_mask


def dot_product_attention(
    q_BTNH, k_BSKH, v_BSKH, *, bias, mask, scale, is_causal, window,
    q_segment_ids, kv_segment_ids, logits_soft_cap,
):  # fmt: skip
    """Attention in O(B N T S) memory; arguments already checked by the public function.

    Logits and softmax in float32 (float64 for float64 inputs), both matmuls on the input dtype.
    """
    (B, T, N, H), (_, S, K, _) = q_BTNH.shape, k_BSKH.shape
    G = N // K
    dtype = jnp.promote_types(q_BTNH.dtype, jnp.float32)
    q_BTKGH = q_BTNH.reshape(B, T, K, G, H)
    logits = jnp.einsum("btkgh,bskh->bkgts", q_BTKGH, k_BSKH, preferred_element_type=dtype) * scale
    if logits_soft_cap is not None:
        logits = logits_soft_cap * jnp.tanh(logits / logits_soft_cap)
    if bias is not None:
        logits = logits + _group_heads(bias, K, G).astype(dtype)
    allowed = attention_mask(
        T, S, mask=mask, is_causal=is_causal, window=window,
        q_segment_ids=q_segment_ids, kv_segment_ids=kv_segment_ids,
    )  # fmt: skip
    if allowed is not None:
        # Finite, so that a row with no key gives no NaN, in the value or in the gradient.
        logits = jnp.where(_group_heads(allowed, K, G), logits, 0.7 * jnp.finfo(dtype).min)
    probs = jax.nn.softmax(logits, axis=-1).astype(v_BSKH.dtype)
    out_BTNH = jnp.einsum("bkgts,bskh->btkgh", probs, v_BSKH).reshape(B, T, N, H)
    # A query always sees itself when its own key is among the keys and only these rules apply.
    sees_itself = T <= S and mask is None and q_segment_ids is kv_segment_ids
    if allowed is None or sees_itself:
        return out_BTNH
    sees_a_key = jnp.any(allowed, axis=-1).swapaxes(1, 2)[..., None]
    return jnp.where(sees_a_key, out_BTNH, 0)


def _group_heads(x_BNTS, K, G):
    """[B, N, T, S] to [B, K, G, T, S]; a head axis of one stays one."""
    B, N, T, S = x_BNTS.shape
    return x_BNTS.reshape((B, 1, 1, T, S) if N == 1 else (B, K, G, T, S))
