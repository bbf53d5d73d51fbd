"""Cross-entropy and z-loss over the tokens of a batch, the logits never held in full."""

import jax
import jax.numpy as jnp

from pallas_kernels import linear_cross_entropy
from scaling.models.moe import Density


def loss_fn(apply, params, batch, z_loss: float, tokens=None, router_l1=0.0):
    """Mean cross-entropy over the tokens with a loss, plus z-loss.

    The z-loss is ``z_loss * mean(log^2 Z)`` over the same tokens: PaLM (Chowdhery et al. 2022,
    section 5) with 1e-4; ST-MoE (Zoph et al. 2022) has the same term on the router.

    Args:
      apply, params: from ``scaling.models.lm.build``.
      batch: ``inputs, targets, segment_ids, positions`` int [B, T], ``loss_mask`` float32 [B, T] of
        0 and 1. ``weights`` float32 [B, T], where given: the loss is the sum of weight x cross-entropy over
        that of the mask (masked diffusion: ``scaling.data.masking``).
      z_loss: its coefficient, >= 0.
      tokens: what the sums are divided by, for a part of a batch: then the parts' losses add up to the
        batch's. None: those of this batch.
      router_l1: what the L1 norm of ReLU gates is multiplied by, >= 0 (``scaling.sparsity``).

    Returns:
      (loss, aux): float32 scalars; aux has ``nats`` (the mean cross-entropy, in nats a token),
      ``z_loss`` (the term as added), ``tokens`` (the divisor) and, where there are routers, ``router`` (what
      they add, rows weighed by their tokens), of ReLU routers also ``open`` (share of the gates that are
      open, weighed alike). A batch whose mask is all zero has no mean: NaN.
    """
    (total, lse_BT), extra_B = _cross_entropy(
        apply, params, batch, training=True, z_loss=z_loss, reduction="sum", return_lse=True
    )
    mask_BT = batch["loss_mask"]
    tokens = jnp.sum(mask_BT) if tokens is None else tokens
    loss = total / tokens
    squares_BT = jnp.square(jax.lax.stop_gradient(lse_BT)) * batch.get("weights", mask_BT)
    z_term = z_loss * jnp.sum(squares_BT) / tokens
    aux = {"nats": loss - z_term, "z_loss": z_term, "tokens": tokens}
    if extra_B is not None:
        by_tokens = lambda x_B: jnp.sum(x_B * jnp.sum(mask_BT, axis=-1)) / tokens  # noqa: E731
        if isinstance(extra_B, Density):
            aux["router"] = router_l1 * by_tokens(extra_B.l1) + by_tokens(extra_B.other)
            aux["open"] = by_tokens(extra_B.share)
        else:
            aux["router"] = by_tokens(extra_B)
        loss = loss + aux["router"]
    return loss, aux


def eval_sums(apply, params, batch):
    """Summed cross-entropy (nats) and counted tokens of every sequence, float32 [B] each.

    A row with an all-zero mask gives (0, 0), so that a padded row drops out of any total. No token sees a
    later one: routed layers take the tokens that their predictors choose.
    """
    nats_BT, _ = _cross_entropy(apply, params, batch, reduction="none")
    return jnp.sum(nats_BT, axis=-1), jnp.sum(batch["loss_mask"], axis=-1)


def _cross_entropy(apply, params, batch, training=False, **options):
    """What ``linear_cross_entropy`` gives, and what routers add to the loss."""
    x_BTD, head_DV, extra_B = apply.features(
        params, batch["inputs"], batch["segment_ids"], batch["positions"], training=training
    )
    weights_BT = batch.get("weights")
    counted_BT = (batch["loss_mask"] if weights_BT is None else weights_BT) > 0
    labels_BT = jnp.where(counted_BT, batch["targets"], -1)
    nats = linear_cross_entropy(
        x_BTD, head_DV, labels_BT, weights=weights_BT, soft_cap=apply.soft_cap, ignore_index=-1, **options
    )
    return nats, extra_B
