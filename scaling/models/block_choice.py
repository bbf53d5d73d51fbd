"""Which blocks of the attention logits evaluation computes: those that hold most of an estimate of them."""

import abc
import dataclasses

import jax
import jax.numpy as jnp

from pallas_kernels import block_sparse_attention
from scaling.config import ConfigError


def reachable(tiles: int, size: int, segment_ids_BT, window: int | None):
    """Tiles of ``size`` x ``size`` logits that a causal query of theirs sees, bool [B or 1, 1, tiles, tiles].

    Args:
      tiles: of a row, filled up where it is shorter.
      segment_ids_BT: documents, each in one piece; None: one a row.
      window: keys that a query sees, itself included; None: all before it.
    """
    row, column = jnp.arange(tiles)[:, None], jnp.arange(tiles)
    seen = column <= row
    if window is not None:
        seen &= (row - column - 1) * size + 1 < window
    seen = seen[None, None]
    if segment_ids_BT is None:
        return seen
    more = tiles * size - segment_ids_BT.shape[1]
    ids = jnp.pad(segment_ids_BT, ((0, 0), (0, more)), constant_values=-1).reshape(-1, tiles, size)
    # documents lie in one piece: tiles share one where it reaches from the one's end to the other
    same = ids[:, :, None, 0] == ids[:, None, :, -1]
    return seen & (same | (row == column))[:, None]


def fewest(mass, threshold: float):
    """The fewest entries along the last axis that hold the share ``threshold`` of its sum, bool."""
    order = jnp.argsort(-mass, axis=-1)
    largest = jnp.take_along_axis(mass, order, -1)
    before = jnp.cumsum(largest, axis=-1) - largest
    enough = threshold * jnp.sum(mass, axis=-1, keepdims=True)
    return jnp.take_along_axis(before < enough, jnp.argsort(order, axis=-1), -1)


@dataclasses.dataclass(frozen=True)
class BlockChoice(abc.ABC):
    """A rule of which blocks are computed, for a trained model as it is; called, it gives them.

    All queries of a block have a say, the later ones too: what is chosen for a token may depend on tokens
    after it, though it attends to none of them. A loss that is evaluated so says what pre-filling in blocks
    costs; it is no likelihood. Estimates are of the logits before a soft-cap.

    Attributes:
      threshold: share of the estimated probability that is kept, above 0; 1 keeps every block: attention
        itself.
      block: tokens of a block.

    Raises:
      ConfigError: a value out of range.
    """

    threshold: float
    block: int = 128

    def __post_init__(self):
        if not 0 < self.threshold <= 1:
            raise ConfigError(f"threshold is {self.threshold!r}; it must be a number above 0, at most 1")
        if self.block < 1:
            raise ConfigError(f"block is {self.block}; it must be a positive number of tokens")

    @abc.abstractmethod
    def __call__(self, q_BTNH, k_BTKH, segment_ids_BT=None, *, scale=None, window: int | None = None):
        """The blocks to compute, bool [B, N, blocks, blocks], of causal attention.

        Args:
          q_BTNH, k_BTKH: queries and keys as attention takes them; N a multiple of K.
          segment_ids_BT: documents; no block is kept for another document's sake.
          scale: factor of q k^T; None: 1/sqrt(H).
          window: keys that a query sees, itself included; None: all before it.
        """

    def attention(self, q_BTNH, k_BTKH, v_BTKH, segment_ids_BT, *, scale, window: int | None, soft_cap):
        """Causal attention over the chosen blocks alone, [B, T, N, H]."""
        return block_sparse_attention(
            q_BTNH,
            k_BTKH,
            v_BTKH,
            self(q_BTNH, k_BTKH, segment_ids_BT, scale=scale, window=window),
            block_size=self.block,
            scale=scale,
            is_causal=True,
            local_window_size=None if window is None else (window - 1, 0),
            q_segment_ids=segment_ids_BT,
            logits_soft_cap=soft_cap,
        )


@dataclasses.dataclass(frozen=True)
class XAttention(BlockChoice):
    """XAttention's choice of blocks (Xu et al. 2025, section 2).

    Tiles of ``stride`` x ``stride`` logits are estimated by the mean of their antidiagonal, softmax over a
    row of tiles gives each its probability, and a block's is the sum of its tiles'. Every row of blocks, of
    every head, keeps the fewest that hold ``threshold`` of it, and the block of its own tokens. ``block`` is
    a multiple of ``stride``.
    """

    stride: int = 8

    def __post_init__(self):
        super().__post_init__()
        if self.stride < 1 or self.block % self.stride:
            raise ConfigError(
                f"block is {self.block} with stride {self.stride}; it must be a multiple of it, both positive"
            )

    def __call__(self, q_BTNH, k_BTKH, segment_ids_BT=None, *, scale=None, window: int | None = None):
        s, inside = self.stride, self.block // self.stride
        T, H = q_BTNH.shape[1], q_BTNH.shape[-1]
        more = -T % self.block
        k_BTNH = jnp.repeat(k_BTKH, q_BTNH.shape[2] // k_BTKH.shape[2], axis=2)
        q, k = (
            jnp.pad(a.astype(jnp.float32), ((0, 0), (0, more), (0, 0), (0, 0))).reshape(
                len(a), -1, s, *a.shape[2:]
            )
            for a in (q_BTNH, k_BTNH)
        )
        # an antidiagonal: the last query of a tile with its first key, and so on
        logits = jnp.einsum("bgsnh,bjsnh->bngj", q[:, :, ::-1], k) * (H**-0.5 if scale is None else scale) / s
        G = logits.shape[-1]
        seen = reachable(G, s, segment_ids_BT, window)
        # rows that fill up the last block have no say
        in_row = jnp.arange(G)[:, None] * s < T
        probabilities = jnp.where(in_row, jax.nn.softmax(jnp.where(seen, logits, -jnp.inf)), 0)
        blocks = G // inside
        tiles = (*logits.shape[:2], blocks, inside, blocks, inside)
        mass = jnp.sum(probabilities.reshape(tiles), axis=(3, 5))
        there = jnp.any(jnp.broadcast_to(seen, logits.shape).reshape(tiles), axis=(3, 5))
        if self.threshold == 1:
            return there
        return (fewest(mass, self.threshold) & there) | jnp.eye(blocks, dtype=bool)
