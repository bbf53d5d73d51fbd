"""Cross-entropy and z-loss over the tokens of a batch."""

import jax
import jax.numpy as jnp


def token_nats(logits_BTV, targets_BT):
    """Cross-entropy a token in nats and log Z, float32 [B, T] each."""
    log_z_BT = jax.nn.logsumexp(logits_BTV, axis=-1)
    picked_BT = jnp.take_along_axis(logits_BTV, targets_BT[:, :, None], axis=-1)[:, :, 0]
    return log_z_BT - picked_BT, log_z_BT


def loss_fn(apply, params, batch, z_loss: float):
    """Mean cross-entropy over the tokens with a loss, plus z-loss.

    The z-loss is ``z_loss * mean(log^2 Z)`` over the same tokens: PaLM (Chowdhery et al. 2022,
    section 5) with 1e-4; ST-MoE (Zoph et al. 2022) has the same term on the router.

    Args:
      apply, params: from ``scaling.models.lm.build``.
      batch: ``inputs, targets, segment_ids, positions`` int [B, T], ``loss_mask`` float32 [B, T].
      z_loss: its coefficient, >= 0.

    Returns:
      (loss, aux): float32 scalars; aux has ``nats`` (the mean cross-entropy, in nats a token),
      ``z_loss`` (the term as added) and ``tokens`` (the sum of the mask). A batch whose mask is
      all zero has no mean: NaN.
    """
    logits_BTV = apply(params, batch["inputs"], batch["segment_ids"], batch["positions"])
    nats_BT, log_z_BT = token_nats(logits_BTV, batch["targets"])
    mask_BT = batch["loss_mask"]
    tokens = jnp.sum(mask_BT)
    nats = jnp.sum(nats_BT * mask_BT) / tokens
    z_term = z_loss * jnp.sum(jnp.square(log_z_BT) * mask_BT) / tokens
    return nats + z_term, {"nats": nats, "z_loss": z_term, "tokens": tokens}


def eval_sums(apply, params, batch):
    """Summed cross-entropy (nats) and counted tokens of every sequence, float32 [B] each.

    A row with an all-zero mask gives (0, 0), so that a padded row drops out of any total.
    """
    logits_BTV = apply(params, batch["inputs"], batch["segment_ids"], batch["positions"])
    nats_BT, _ = token_nats(logits_BTV, batch["targets"])
    mask_BT = batch["loss_mask"]
    return jnp.sum(nats_BT * mask_BT, axis=-1), jnp.sum(mask_BT, axis=-1)
