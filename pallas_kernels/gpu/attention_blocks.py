"""Which blocks of an attention matrix a kernel visits, and what it does to one block of logits."""

import dataclasses
import math

import jax.numpy as jnp
from jax import lax

from pallas_kernels.gpu import hopper


@dataclasses.dataclass(frozen=True)
class Problem:
    """What all blocks share; hashable.

    Attributes:
      T, S: queries and keys.
      group: query heads of a key-value head.
      scale, soft_cap: of the logits.
      left, right: query t looks at t - left <= s <= t + right; None is no limit.
    """

    T: int
    S: int
    group: int
    scale: float
    soft_cap: float | None
    left: int | None
    right: int | None

    @classmethod
    def of(cls, q_BTNH, k_BSKH, *, scale, is_causal, window, logits_soft_cap):
        T, S = q_BTNH.shape[1], k_BSKH.shape[1]
        far = max(T, S)  # as good as no limit, and no overflow
        left, right = (None, None) if window is None else (min(w, far) for w in window)
        if is_causal:
            right = 0
        return cls(T, S, q_BTNH.shape[2] // k_BSKH.shape[2], float(scale), logits_soft_cap, left, right)

    def key_blocks(self, q0, queries, keys):
        """(first, last + 1) of the blocks of ``keys`` keys at which queries q0, q0 + 1, ... look."""
        low, high = jnp.int32(0), jnp.int32(self.S)
        if self.left is not None:
            low = jnp.maximum(low, q0 - self.left)
        if self.right is not None:
            high = jnp.minimum(high, q0 + queries + self.right)
        return _blocks(low, high, keys)

    def query_blocks(self, k0, keys, queries):
        """(first, last + 1) of the blocks of ``queries`` queries that look at keys k0, k0 + 1, ..."""
        low, high = jnp.int32(0), jnp.int32(self.T)
        if self.right is not None:
            low = jnp.maximum(low, k0 - self.right)
        if self.left is not None:
            high = jnp.minimum(high, k0 + keys + self.left)
        return _blocks(low, high, queries)

    def logits(self, products):
        """q k^T to logits in units of log 2."""
        if self.soft_cap is None:
            return products * (self.scale * hopper.LOG2E)
        return hopper.tanh(products * (self.scale / self.soft_cap)) * (self.soft_cap * hopper.LOG2E)

    def logits_slope(self, logits):
        """d logits / d (scale q k^T) where there is a soft-cap."""
        ratio = logits * (1 / (self.soft_cap * hopper.LOG2E))
        return 1 - ratio * ratio

    def mask(self, logits, q0, k0, *, transposed=False):
        """-inf where query q0 + i may not look at key k0 + j; [i, j], or [j, i] where transposed.

        Keys past the end count only where a query that there is can see one and they are columns, as rows
        past the end are written nowhere.
        """
        shape = logits.shape
        queries, keys = shape[::-1] if transposed else shape
        q_axis, k_axis = (1, 0) if transposed else (0, 1)
        seen = self.right is None or self.T + self.right > self.S
        ragged = self.S % keys != 0 and seen and not transposed

        def masked(x):
            # two bounds a row, not a position an element: the latter took registers that spilled
            row, position = hopper.iota(shape, q_axis), hopper.iota(shape, k_axis)
            allowed = high = None
            if self.right is not None:
                high = row + (q0 - k0 + self.right)
            if ragged:
                high = self.S - 1 - k0 if high is None else jnp.minimum(high, self.S - 1 - k0)
            if high is not None:
                allowed = position <= high
            if self.left is not None:
                within = position >= row + (q0 - k0 - self.left)
                allowed = within if allowed is None else allowed & within
            return jnp.where(allowed, x, -math.inf)

        partial = jnp.bool_(False)
        if self.right is not None:
            partial |= k0 + keys - 1 > q0 + self.right
        if self.left is not None:
            partial |= k0 < q0 + queries - 1 - self.left
        if ragged:
            partial |= k0 + keys > self.S
        limited = self.right is not None or self.left is not None or ragged
        return lax.cond(partial, masked, lambda x: x, logits) if limited else logits


def mask_segments(logits, row_ids, column_ids):
    """-inf where a query and a key are of different segments."""
    same = hopper.over_columns(row_ids, logits.shape) == hopper.over_rows(column_ids, logits.shape)
    return jnp.where(same, logits, -math.inf)


def _blocks(low, high, size):
    first = lax.div(low, jnp.int32(size))
    return first, jnp.maximum(first, lax.div(high + (size - 1), jnp.int32(size)))
