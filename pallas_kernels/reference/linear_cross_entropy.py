"""Cross-entropy of a linear head with every logit held: the oracle of every implementation."""

import jax
import jax.numpy as jnp


def linear_cross_entropy(x, w_DV, labels, *, z_loss, soft_cap, ignore_index, reduction):
    """Loss and log-sum-exp; same meaning as :func:`pallas_kernels.linear_cross_entropy`.

    Computes in float32, or in float64 where the inputs are, at the highest matmul precision,
    in O(tokens V) memory. Returns (loss, lse), lse of the shape of ``labels``.
    """
    dtype = jnp.promote_types(x.dtype, jnp.float32)
    V = w_DV.shape[1]
    logits = jnp.matmul(x.astype(dtype), w_DV.astype(dtype), precision="highest")
    if soft_cap is not None:
        logits = soft_cap * jnp.tanh(logits / soft_cap)
    lse = jax.nn.logsumexp(logits, axis=-1)
    ignored = jnp.zeros(labels.shape, bool) if ignore_index is None else labels == ignore_index
    inside = (labels >= 0) & (labels < V)
    picked = jnp.take_along_axis(logits, jnp.where(inside, labels, 0)[..., None], axis=-1)[..., 0]
    loss = lse - picked + z_loss * jnp.square(lse)
    loss = loss * jnp.where(inside, 1, jnp.nan)  # a product, so that the gradient is NaN as well
    loss = jnp.where(ignored, 0, loss)
    if reduction == "mean":
        return jnp.sum(loss) / jnp.maximum(jnp.sum(~ignored), 1), lse
    return (jnp.sum(loss) if reduction == "sum" else loss), lse
