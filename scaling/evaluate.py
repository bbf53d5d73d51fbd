"""Held-out loss of a model, with its standard error."""

from __future__ import annotations

import math

import numpy as np


def held_out_loss(eval_sums, params, batches, bytes_per_token: float, draws: int = 1) -> dict:
    """Cross-entropy on the fixed held-out set.

    The standard error is that of a ratio estimator over sequences (Cochran 1977, eq. 6.10): tokens
    of one sequence share a document, so they are not independent.

    Args:
      eval_sums: ``eval_sums(params, batch) -> (nats_B, tokens_B)``, jitted.
      params: the parameter tree.
      batches: the held-out batches, rows without tokens are padding.
      bytes_per_token: of the held-out set.
      draws: how often the batches hold every sequence, in one order each time; their mean counts.

    Returns:
      ``loss`` and ``loss_stderr`` in nats per token, ``bits_per_byte``, ``eval_tokens`` and
      ``eval_sequences``; ``loss`` is NaN where any sequence's is.
    """
    sums = [eval_sums(params, batch) for batch in batches]
    nats = np.concatenate([np.asarray(s[0], np.float64) for s in sums])
    tokens = np.concatenate([np.asarray(s[1], np.float64) for s in sums])
    nats, tokens = nats.reshape(draws, -1).mean(axis=0), tokens[: len(tokens) // draws]
    nats, tokens = nats[tokens > 0], tokens[tokens > 0]
    loss = nats.sum() / tokens.sum()
    n = len(nats)
    spread = np.sum((nats - loss * tokens) ** 2) * n / max(1, n - 1)
    return {
        "loss": float(loss),
        "loss_stderr": float(math.sqrt(spread) / tokens.sum()) if np.isfinite(spread) else math.nan,
        "bits_per_byte": float(loss / math.log(2) / bytes_per_token),
        "eval_tokens": int(tokens.sum()),
        "eval_sequences": n,
    }
