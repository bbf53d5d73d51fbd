"""Attention for XLA to compile: logits in full, query heads grouped over their key-value head."""

import jax
import jax.numpy as jnp

from pallas_kernels.masks import attention_mask, spread_blocks


def forward(
    q_BTNH, k_BSKH, v_BSKH, bias, mask, q_segment_ids, kv_segment_ids, block_mask, *, options, with_lse=True
):  # fmt: skip
    """Attention in O(B N T S) memory; arguments already checked by the public function.

    Logits and softmax in float32 (float64 for float64 inputs), both matmuls on the input dtype.
    Returns the output and, ``with_lse``, the log-sum-exp [B, T, N]; differentiation is JAX's.
    """
    scale, logits_soft_cap = options.scale, options.logits_soft_cap
    if block_mask is not None:
        mask = spread_blocks(block_mask, options.block_sizes, q_BTNH.shape[1], k_BSKH.shape[1])
    (B, T, N, H), (_, S, K, _) = q_BTNH.shape, k_BSKH.shape
    G = N // K
    dtype = jnp.promote_types(q_BTNH.dtype, jnp.float32)
    q_BTKGH = q_BTNH.reshape(B, T, K, G, H)
    # [B, K, T, G, S] is the order in which the matmul leaves its output: no copy to transpose it.
    logits = jnp.einsum("btkgh,bskh->bktgs", q_BTKGH, k_BSKH, preferred_element_type=dtype) * scale
    if logits_soft_cap is not None:
        logits = logits_soft_cap * jnp.tanh(logits / logits_soft_cap)
    if bias is not None:
        logits = logits + _group_heads(bias, K, G).astype(dtype)
    allowed = attention_mask(
        T, S, mask=mask, is_causal=options.is_causal, window=options.window,
        q_segment_ids=q_segment_ids, kv_segment_ids=kv_segment_ids,
    )  # fmt: skip
    allowed = jnp.ones((1,) * 5, bool) if allowed is None else _group_heads(allowed, K, G)
    probs = _masked_softmax(logits, allowed)
    # Each query sees itself, whatever the window and its segment, where its own key is among the keys.
    sees_itself = T <= S and mask is None and q_segment_ids is kv_segment_ids
    if not sees_itself:
        probs = jnp.where(allowed, probs, 0)
    out = jnp.einsum("bktgs,bskh->btkgh", probs.astype(v_BSKH.dtype), v_BSKH).reshape(B, T, N, H)
    if not with_lse:
        return (out,)
    return out, _masked_lse(logits, allowed).swapaxes(1, 2).reshape(B, T, N)


def _group_heads(x_BNTS, K, G):
    """[B, N, T, S] to [B, K, T, G, S]; a head axis of one stays one."""
    B, N, T, S = x_BNTS.shape
    return x_BNTS.reshape((B, 1, 1, T, S) if N == 1 else (B, K, G, T, S)).swapaxes(2, 3)


@jax.custom_jvp
def _masked_softmax(logits, allowed):
    """Softmax over the last axis of the logits allowed; uniform in a row with nothing allowed.

    Its own derivative rule keeps one array for the backward pass, the probabilities;
    differentiating through the masking and the exponentials keeps three or four.
    """
    # Finite, so that a row with nothing allowed has no NaN in its value or its gradient.
    logits = jnp.where(allowed, logits, 0.7 * jnp.finfo(logits.dtype).min)
    weights = jnp.exp(logits - jnp.max(logits, axis=-1, keepdims=True))
    return weights * (1 / jnp.sum(weights, axis=-1, keepdims=True))


@_masked_softmax.defjvp
def _masked_softmax_jvp(primals, tangents):
    probs = _masked_softmax(*primals)
    return probs, probs * (tangents[0] - jnp.sum(probs * tangents[0], axis=-1, keepdims=True))


def _masked_lse(logits, allowed):
    """Log-sum-exp over the last axis of the logits allowed; -inf in a row with nothing allowed."""
    lowest = jnp.finfo(logits.dtype).min
    highest = jax.lax.stop_gradient(jnp.max(logits, axis=-1, where=allowed, initial=lowest, keepdims=True))
    # Where first, so that what is not allowed has no gradient of NaN either.
    weights = jnp.where(allowed, jnp.exp(jnp.where(allowed, logits - highest, 0)), 0)
    total = jnp.sum(weights, axis=-1)
    lse = highest[..., 0] + jnp.log(jnp.where(total == 0, 1, total))
    return jnp.where(total == 0, -jnp.inf, lse)
