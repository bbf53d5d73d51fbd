"""The attention mask as an array, for the implementations that hold it in memory."""

import jax.numpy as jnp


def attention_mask(T, S, *, mask, is_causal, window, q_segment_ids, kv_segment_ids):
    """Where query t may look at key s: the conjunction of every rule given.

    Args:
      T, S: numbers of queries and of keys.
      mask: None or bool, broadcastable to [B, N, T, S]; True takes part.
      is_causal: keys s <= t only (both counted from 0, as in ``jax.nn``, also where T != S).
      window: None or (left, right); keys with t - left <= s <= t + right only.
      q_segment_ids, kv_segment_ids: None or int [B, T] and [B, S]; equal ids only.

    Returns:
      bool [B or 1, N or 1, T, S], or None where no rule is given.
    """
    t, s = jnp.arange(T)[:, None], jnp.arange(S)[None, :]
    rules = []
    if mask is not None:
        rules.append(mask)
    if is_causal:
        rules.append((s <= t)[None, None])
    if window is not None:
        left, right = window
        rules.append(((s >= t - left) & (s <= t + right))[None, None])
    if q_segment_ids is not None:
        rules.append((q_segment_ids[:, :, None] == kv_segment_ids[:, None, :])[:, None])
    allowed = None
    for rule in rules:
        allowed = rule if allowed is None else allowed & rule
    return allowed


def spread_blocks(block_mask, sizes, T, S):
    """bool [B or 1, N or 1, blocks of T, blocks of S] to [B or 1, N or 1, T, S]."""
    rows = jnp.repeat(block_mask, sizes[0], axis=2)[:, :, :T]
    return jnp.repeat(rows, sizes[1], axis=3)[..., :S]
