"""Attention to checkpoints alone: the last token of every segment, and the query's own."""

import jax
import jax.numpy as jnp
from flax import nnx

from pallas_kernels import dot_product_attention
from scaling import layers
from scaling.models.attention import Attention
from scaling.models.gather import take, the_chosen_first
from scaling.models.recurrence import starts


class CheckpointAttention(Attention):
    """A query looks at itself and at the checkpoints before it (SCOUT: Jafari et al. 2025, arXiv 2509.00935).

    A checkpoint is the last of every ``segment_length`` tokens of a document; what it knows of its segment
    the layers before have mixed into it, a recurrence or a local window (theirs: Mamba or a window). Nothing
    else is compressed. Segments of one token are causal attention.

    Keys and values are projected for all tokens, since each sees its own; decoding keeps the checkpoints'.
    """

    def __init__(self, cfg, rngs: nnx.Rngs):
        super().__init__(cfg, rngs, None)
        self.segment = cfg["segment_length"]

    def mix(self, q_BTNH, k_BTKH, v_BTKH, segment_ids_BT):
        B, T, N, _ = q_BTNH.shape
        at = jnp.arange(T)
        begins_BT = jax.lax.cummax(jnp.where(starts(segment_ids_BT, (B, T)), at, 0), axis=1)
        ends_BT = (at - begins_BT + 1) % self.segment == 0
        places_BC = the_chosen_first(ends_BT)[:, : layers.checkpoints(self.segment, T)]
        before_BTC = take(ends_BT, places_BC)[:, None] & (places_BC[:, None] < at[:, None])
        # grouped heads share their keys; checkpoints of other documents are not seen
        k_BCKH, v_BCKH = (take(a, places_BC) for a in (k_BTKH, v_BTKH))
        others = {} if segment_ids_BT is None else {
            "q_segment_ids": segment_ids_BT, "kv_segment_ids": take(segment_ids_BT, places_BC)
        }  # fmt: skip
        seen_BTNH, sum_BTN = dot_product_attention(
            q_BTNH, k_BCKH, v_BCKH, mask=before_BTC[:, None], scale=self.scale,
            logits_soft_cap=self.soft_cap, return_lse=True, **others,
        )  # fmt: skip
        k_BTNH, v_BTNH = (jnp.repeat(a, N // a.shape[2], axis=2) for a in (k_BTKH, v_BTKH))
        scale = self.head_dim**-0.5 if self.scale is None else self.scale
        own_BTN = scale * jnp.sum(q_BTNH.astype(jnp.float32) * k_BTNH.astype(jnp.float32), axis=-1)
        if self.soft_cap is not None:
            own_BTN = self.soft_cap * jnp.tanh(own_BTN / self.soft_cap)
        # one softmax over both: the log of the others' sum is -inf where there are none
        share_BTN1 = jax.nn.sigmoid(own_BTN - sum_BTN)[..., None]
        mixed = share_BTN1 * v_BTNH.astype(jnp.float32) + (1 - share_BTN1) * seen_BTNH.astype(jnp.float32)
        return mixed.astype(q_BTNH.dtype)
