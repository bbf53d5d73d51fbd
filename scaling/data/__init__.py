"""Sources of documents and the one deterministic batch stream. Imports numpy alone."""

from scaling.data.stream import Stream, heldout_batches
from scaling.data.tokens import Tokens

__all__ = ["Stream", "Tokens", "heldout_batches"]
