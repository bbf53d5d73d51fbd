"""Which documents are held out, and in what order documents stand: by hashes, never by chance."""

from __future__ import annotations

import hashlib

import numpy as np

from scaling.config import ConfigError


def name_hashes(names: list[str], seed: int, purpose: str) -> np.ndarray:
    """uint64 [names]: a hash of each name, another for each seed and purpose."""
    digests = [
        hashlib.blake2b(f"{seed}\0{purpose}\0{name}".encode(), digest_size=8).digest() for name in names
    ]
    return np.frombuffer(b"".join(digests), "<u8").astype(np.uint64)


def choose_heldout(sizes: np.ndarray, hashes: np.ndarray, fraction: float) -> np.ndarray:
    """Chooses the held-out documents in order of their hashes.

    A document is taken while the held-out part stays within ``fraction`` of all tokens; one too large for
    what is left is passed over, so that no single document can make up the held-out set. Documents of one
    hash (copies) go together.

    Args:
      sizes: int64 [documents], tokens in each.
      hashes: uint64 [documents].
      fraction: the most that may be held out, between 0 and 1.

    Returns:
      bool [documents], True where held out.

    Raises:
      ConfigError: every document is larger than the held-out part may be.
    """
    _, group = np.unique(hashes, return_inverse=True)  # groups in order of hash
    group_sizes = np.zeros(group.max(initial=-1) + 1, np.int64)
    np.add.at(group_sizes, group, sizes)
    room = int(fraction * int(sizes.sum()))
    taken = np.zeros(group_sizes.size, bool)
    smallest = int(group_sizes.min(initial=0))
    for g, size in enumerate(group_sizes.tolist()):
        if room < smallest:
            break
        if size <= room:
            taken[g] = True
            room -= size
    if not taken.any():
        total = int(sizes.sum())
        raise ConfigError(
            f"data.heldout_fraction is {fraction}, {int(fraction * total)} of the {total} tokens, and the "
            f"smallest of the {sizes.size} documents holds {smallest}; the data must be in more and smaller "
            "documents (files), or the fraction larger, for documents to be held out whole"
        )
    return taken[group]
