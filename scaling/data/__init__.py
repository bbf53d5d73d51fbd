"""Sources of documents and the one deterministic batch stream."""

from scaling.data.corpus import Dataset, open_data
from scaling.data.shards import write_token_shards
from scaling.data.stream import Batches, Stream, heldout_batches
from scaling.data.tokens import Tokens

__all__ = ["Batches", "Dataset", "Stream", "Tokens", "heldout_batches", "open_data", "write_token_shards"]
