"""Sources of documents and the one deterministic batch stream."""

from scaling.data.corpus import Dataset, open_data
from scaling.data.masking import MaskedStream, masked_draws
from scaling.data.mixture import Mixture
from scaling.data.shards import write_token_shards
from scaling.data.stream import Batches, Stream, first_repeat, heldout_batches
from scaling.data.tokens import Tokens

__all__ = [
    "Batches",
    "Dataset",
    "MaskedStream",
    "Mixture",
    "Stream",
    "Tokens",
    "first_repeat",
    "heldout_batches",
    "masked_draws",
    "open_data",
    "write_token_shards",
]
