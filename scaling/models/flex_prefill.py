"""FlexPrefill's choice of blocks: every head decides by itself which of two patterns its attention has."""

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from scaling.config import ConfigError
from scaling.models.block_choice import BlockChoice, XAttention, fewest, reachable


@dataclasses.dataclass(frozen=True)
class FlexPrefill(BlockChoice):
    """FlexPrefill's choice of blocks (Lai et al. 2025, section 3 and algorithms 1 to 4).

    The last ``block`` queries of a row stand for all. Where the attention to blocks of keys that the means of
    queries and keys would give is near their true attention, the means can be trusted: the square root of the
    Jensen-Shannon divergence of both, in nats, is below ``divergence``, and the head is *query-aware*: it
    keeps the fewest blocks of its whole map that hold ``threshold`` of what the means give. Any other head is
    *vertical-slash*: of the attention of the last queries it keeps the fewest columns that hold
    ``threshold``, and the fewest diagonals that do, for all queries. Blocks that any of these passes through
    are computed. Every head keeps its own tokens' blocks and the row's first, as the authors' code does.

    A row of several documents is beyond the paper: queries whose document the last ones do not share take
    the query-aware choice in every head, since no column or diagonal of theirs was seen.

    ``divergence``: from 0, no head query-aware, to 1, all of them (the square root of ln 2 at the most).
    """

    divergence: float = 0.1

    def __post_init__(self):
        super().__post_init__()
        if not 0 <= self.divergence <= 1:
            raise ConfigError(f"divergence is {self.divergence!r}; it must be a number from 0 to 1")

    def __call__(self, q_BTNH, k_BTKH, segment_ids_BT=None, *, scale=None, window: int | None = None):
        B, T, N, H = q_BTNH.shape
        G = -(-T // self.block)
        there = reachable(G, self.block, segment_ids_BT, window)
        if self.threshold == 1:
            return jnp.broadcast_to(there, (B, N, G, G))
        q_BTNH = q_BTNH.astype(jnp.float32) * (H**-0.5 if scale is None else scale)
        k_BTNH = jnp.repeat(k_BTKH.astype(jnp.float32), N // k_BTKH.shape[2], axis=2)
        last = min(self.block, T)
        ids_BT = jnp.zeros((B, T), jnp.int32) if segment_ids_BT is None else segment_ids_BT
        true_BNLT, seen_BLT = attention_of_last(q_BTNH, k_BTNH, ids_BT, last, window)
        means_BNG = jnp.einsum("bnh,bgnh->bng", jnp.mean(q_BTNH[:, T - last :], axis=1), self.mean(k_BTNH))
        true_BNG = self.in_blocks(jnp.mean(true_BNLT, axis=2)).sum(-1)
        seen_BG = self.in_blocks(jnp.any(seen_BLT, axis=1)).any(-1)
        means_BNG = jax.nn.softmax(jnp.where(seen_BG[:, None], means_BNG, -jnp.inf))
        aware_BN = jnp.sqrt(jensen_shannon(means_BNG, true_BNG)) < self.divergence
        # a block is for the last queries to judge where its last token's document is one of theirs
        ends_BG = ids_BT[:, jnp.minimum(jnp.arange(1, G + 1) * self.block, T) - 1]
        judged_BG = jnp.any(ends_BG[:, :, None] == ids_BT[:, None, T - last :], axis=-1)
        kept = jnp.where(
            (judged_BG[:, None, :] & ~aware_BN[:, :, None])[..., None],
            self.vertical_slash(true_BNLT),
            self.query_aware(q_BTNH, k_BTNH, there),
        )
        always = jnp.eye(G, dtype=bool) | (jnp.arange(G) == 0)
        return (kept | always) & there

    def query_aware(self, q_BTNH, k_BTNH, there):
        """The fewest blocks of a whole map that hold the threshold of it, bool [B, N, G, G] (algorithm 4)."""
        logits = jnp.einsum("bgnh,bjnh->bngj", self.mean(q_BTNH), self.mean(k_BTNH))
        mass = jax.nn.softmax(jnp.where(there, logits, -jnp.inf))
        return fewest(mass.reshape(*mass.shape[:2], -1), self.threshold).reshape(mass.shape)

    def vertical_slash(self, true_BNLT):
        """Blocks that the fewest columns and the fewest diagonals pass through, bool [B, N, G, G]
        (algorithm 3)."""
        L, T = true_BNLT.shape[2:]
        offsets = jnp.arange(T)
        keys = jnp.arange(T - L, T)[:, None] - offsets  # of each of the last queries, so far behind it
        by_offset = jnp.take_along_axis(true_BNLT, jnp.maximum(keys, 0)[None, None], axis=-1)
        diagonals = fewest(jnp.sum(jnp.where(keys >= 0, by_offset, 0), axis=2), self.threshold)
        columns = fewest(jnp.sum(true_BNLT, axis=2), self.threshold)
        columns_BNG = self.in_blocks(columns).any(-1)
        inside = self.in_blocks(diagonals)
        # blocks d apart hold offsets from (d - 1) block + 1 to (d + 1) block - 1
        apart_BNG = inside.any(-1) | jnp.pad(inside[..., 1:].any(-1), ((0, 0), (0, 0), (1, 0)))[..., :-1]
        G = apart_BNG.shape[-1]
        distance = jnp.arange(G)[:, None] - jnp.arange(G)
        return columns_BNG[:, :, None] | jnp.where(distance >= 0, apart_BNG[..., distance], False)

    def in_blocks(self, a_T):
        """The last axis, over tokens, as blocks and their tokens."""
        more = -a_T.shape[-1] % self.block
        padded = jnp.pad(a_T, ((0, 0),) * (a_T.ndim - 1) + ((0, more),))
        return padded.reshape(*a_T.shape[:-1], -1, self.block)

    def mean(self, a_BTNH):
        """The mean over the tokens of each block, [B, G, N, H]."""
        T = a_BTNH.shape[1]
        sums_BGNH = jnp.moveaxis(self.in_blocks(jnp.moveaxis(a_BTNH, 1, -1)).sum(-1), -1, 1)
        first = jnp.arange(sums_BGNH.shape[1]) * self.block
        return sums_BGNH / jnp.minimum(self.block, T - first)[:, None, None]


def attention_of_last(q_BTNH, k_BTNH, ids_BT, last: int, window: int | None):
    """Causal attention's probabilities of the ``last`` queries of a row, [B, N, last, T], and whom each sees,
    bool [B, last, T]."""
    T = q_BTNH.shape[1]
    behind = jnp.arange(T - last, T)[:, None] - jnp.arange(T)
    seen = (behind >= 0) & (True if window is None else behind < window)
    seen = seen & (ids_BT[:, T - last :, None] == ids_BT[:, None])
    logits = jnp.einsum("blnh,btnh->bnlt", q_BTNH[:, T - last :], k_BTNH)
    return jax.nn.softmax(jnp.where(seen[:, None], logits, -jnp.inf)), seen


def jensen_shannon(p, q):
    """The Jensen-Shannon divergence over the last axis, in nats (Lin 1991, eq. 4.1)."""
    middle = (p + q) / 2

    def to_middle(x):
        return jnp.sum(jnp.where(x > 0, x * jnp.log(jnp.where(x > 0, x / middle, 1)), 0), axis=-1)

    # equal distributions to rounding, which may fall below zero
    return jnp.maximum((to_middle(p) + to_middle(q)) / 2, 0)


def block_choice(evaluation: Mapping) -> BlockChoice:
    """The rule that an ``eval`` section of a cell config names, its threshold given."""
    threshold, block = evaluation["block_threshold"], evaluation["block"]
    if evaluation["block_choice"] == "flexprefill":
        return FlexPrefill(threshold, block, evaluation["block_divergence"])
    return XAttention(threshold, block)
