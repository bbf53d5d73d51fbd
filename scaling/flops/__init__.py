"""The account of a model: parameters, FLOPs and an estimate of memory; light (no jax, no flax)."""

from scaling.flops.entries import FEED_FORWARDS, MIXERS, Entry, pairs_per_token
from scaling.flops.ledger import CONVENTIONS, Ledger, ledger
from scaling.flops.memory import Memory, memory_bytes

__all__ = [
    "CONVENTIONS",
    "FEED_FORWARDS",
    "MIXERS",
    "Entry",
    "Ledger",
    "Memory",
    "ledger",
    "memory_bytes",
    "pairs_per_token",
]
