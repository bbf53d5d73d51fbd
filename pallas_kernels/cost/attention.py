"""Attention's account: pairs that the masks keep, blocks that a kernel visits, FLOPs and bytes.

Letters: B batch, T queries, S keys, N query heads, K key-value heads, H head size. A window is None or
(left, right) as in ``dot_product_attention``. Segments and masks known only at run time are not
subtracted: the cost is that of one segment a row.
"""

from __future__ import annotations

import dataclasses
import math

# Queries times keys up to which a CPU keeps the logits in full for the backward pass: it is faster.
FULL_LOGITS_ON_CPU = 256 * 256
# Of queries and of keys in XLA's chunks. On a CPU 128 beats 64 and 256 from 512 tokens on: a block of
# logits stays in its cache.
CHUNKS = (128, 128)


@dataclasses.dataclass(frozen=True)
class Cost:
    """Of one kernel call.

    Attributes:
      flops: 2 for each multiply-add of a matrix product, over the pairs kept; nothing else counts.
      transcendentals: one exponential a pair kept, one tanh more with a soft-cap.
      bytes: what the kernel reads and writes in main memory, blocks read again included.
      floor_bytes: every operand and result once.
    """

    flops: int
    transcendentals: int
    bytes: int
    floor_bytes: int


def pairs(T: int, S: int, *, is_causal: bool = False, window: tuple[int, int] | None = None) -> int:
    """Query-key pairs that the causal mask and the window keep, exactly, in closed form."""
    left, right = window or (T, S + T)
    return _ramp(T, S, 1 + (0 if is_causal else right)) - _ramp(T, S, -left)


def _ramp(T, S, shift):
    """The sum over t < T of t + shift cut to between 0 and S: keys before a limit that moves with t."""
    first = min(max(-shift, 0), T)
    last = min(max(S - shift, first), T)
    rising = (last - first) * (first + last - 1 + 2 * shift) // 2
    return rising + (T - last) * S


def key_blocks(T, S, block_q, block_kv, *, is_causal=False, window=None) -> list[tuple[int, int]]:
    """For each block of queries the range [low, high) of key blocks that hold a pair kept; maybe empty."""
    left, right = window or (T, S + T)
    right = 0 if is_causal else right
    ranges = []
    for first in range(0, T, block_q):
        last = min(first + block_q, T) - 1
        low, high = min(max(0, first - left), S), min(S, last + right + 1)  # keys, never high < low
        ranges.append((low // block_kv, math.ceil(high / block_kv) if low < high else low // block_kv))
    return ranges


def is_whole(first_q, last_q, first_kv, last_kv, *, is_causal, window):
    """Whether the masks keep every pair of a block; of ints or of traced scalars."""
    whole = True
    if is_causal:
        whole &= last_kv <= first_q
    if window is not None:
        left, right = window
        whole &= (first_kv >= last_q - left) & (last_kv <= first_q + right)
    return whole


def forward(B, T, S, N, K, H, *, block_q, block_kv, itemsize, is_causal=False, window=None, soft_cap=False,
            bias_bytes=0) -> Cost:  # fmt: skip
    """Scores and values: 2 products. Every query block is read once, every key block visited again."""
    kept = pairs(T, S, is_causal=is_causal, window=window)
    visited = sum(
        h - low for low, h in key_blocks(T, S, block_q, block_kv, is_causal=is_causal, window=window)
    )
    queries, keys, lse = B * T * N * H * itemsize, B * S * K * H * itemsize, B * T * N * 4
    return Cost(
        flops=2 * 2 * B * N * H * kept,
        transcendentals=(2 if soft_cap else 1) * B * N * kept,
        bytes=2 * queries + lse + B * N * visited * 2 * block_kv * H * itemsize + bias_bytes,
        floor_bytes=2 * queries + lse + 2 * keys + bias_bytes,
    )


def backward_q(B, T, S, N, K, H, *, block_q, block_kv, itemsize, is_causal=False, window=None,
               soft_cap=False, bias_bytes=0) -> Cost:  # fmt: skip
    """Gradient of the queries: 3 products (scores, dp, dq); reads q, dout and two rows of statistics."""
    kept = pairs(T, S, is_causal=is_causal, window=window)
    visited = sum(
        h - low for low, h in key_blocks(T, S, block_q, block_kv, is_causal=is_causal, window=window)
    )
    queries, keys, row = B * T * N * H * itemsize, B * S * K * H * itemsize, B * T * N * 4
    return Cost(
        flops=2 * 3 * B * N * H * kept,
        transcendentals=(2 if soft_cap else 1) * B * N * kept,
        bytes=3 * queries + 2 * row + B * N * visited * 2 * block_kv * H * itemsize + bias_bytes,
        floor_bytes=3 * queries + 2 * row + 2 * keys + bias_bytes,
    )


def backward_kv(B, T, S, N, K, H, *, block_q, block_kv, itemsize, is_causal=False, window=None,
                soft_cap=False, bias_bytes=0) -> Cost:  # fmt: skip
    """Gradients of keys and values: 4 products (scores, dp, dk, dv); key blocks stay, queries pass by."""
    kept = pairs(T, S, is_causal=is_causal, window=window)
    visited = sum(
        h - low for low, h in key_blocks(T, S, block_q, block_kv, is_causal=is_causal, window=window)
    )
    queries, keys, row = B * T * N * H * itemsize, B * S * K * H * itemsize, B * T * N * 4
    a_visit = 2 * block_q * H * itemsize + 2 * block_q * 4
    return Cost(
        flops=2 * 4 * B * N * H * kept,
        transcendentals=(2 if soft_cap else 1) * B * N * kept,
        bytes=4 * keys + B * N * visited * a_visit + bias_bytes,
        floor_bytes=4 * keys + 2 * queries + 2 * row + bias_bytes,
    )


def blocks(T: int, S: int, block_q: int, block_kv: int) -> tuple[int, int]:
    """Numbers of query and key blocks."""
    return math.ceil(T / block_q), math.ceil(S / block_kv)
