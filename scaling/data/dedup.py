"""Removes passages that another document holds already, so that nothing held out is trained on.

The measure is that of Lee et al. 2022, "Deduplicating Training Data Makes Language Models Better"
(ExactSubstr): a passage of 200 bytes (about their 50 tokens) or more that occurs in two documents is kept
in the earlier of them alone. Passages are found by winnowing (Schleimer, Wilkerson and Aiken 2003): of
every 73 successive windows of 128 bytes the least hash is a fingerprint, so that any two documents
sharing 73 + 128 - 1 = 200 bytes share a fingerprint. Whole copies, near copies and headers that stand in
every file all fall under this one rule. Repeats within a document stay.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from scaling.data.permutation import mix

WINDOW = 128  # a power of two: window hashes are built by doubling
WINNOW = 73
GUARANTEE = WINDOW + WINNOW - 1
# Bytes hashed at once: the arrays of 64-bit hashes then stay in cache.
_CHUNK = 1 << 16

_BYTE_CODES = mix(np.arange(1, 257, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15))


def _window_hashes(text: np.ndarray) -> np.ndarray:
    """uint64 [n - WINDOW + 1]: a hash of each window of ``text``, uint8 [n]."""
    h = _BYTE_CODES[text]
    width = 1
    while width < WINDOW:
        # An odd factor of its own at each level, and a shift, so that order matters and no bits align.
        h = h[:-width] * (_BYTE_CODES[width] | np.uint64(1)) + h[width:]
        h ^= h >> np.uint64(29)
        width *= 2
    return mix(h)


def _sliding(x: np.ndarray, width: int, best: np.ufunc) -> np.ndarray:
    """``best`` (np.minimum or np.maximum) over each ``width`` successive values of ``x``."""
    n, span = x.size - width + 1, 1
    while 2 * span <= width:
        x = best(x[:-span], x[span:])
        span *= 2
    return best(x[:n], x[width - span : width - span + n])


def fingerprints(text: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The winnowed fingerprints of a document.

    Args:
      text: uint8 [n].

    Returns:
      (hashes uint64 [f], places int64 [f]): the hash of each chosen window and where it begins, in order of
      place; none where n < 200.
    """
    hashes, places = [np.zeros(0, np.uint64)], [np.zeros(0, np.int64)]
    for begin in range(0, text.size - GUARANTEE + 1, _CHUNK):
        h = _window_hashes(text[begin : begin + _CHUNK + GUARANTEE - 1])
        least = _sliding(h, WINNOW, np.minimum)
        # A window is chosen where it is the least of some WINNOW successive ones that include it.
        edge = np.zeros(WINNOW - 1, np.uint64)
        chosen = _sliding(np.concatenate([edge, least, edge]), WINNOW, np.maximum) == h
        hashes.append(h[chosen])
        places.append(begin + np.flatnonzero(chosen))
    places_F, first = np.unique(np.concatenate(places), return_index=True)  # chunks overlap
    return np.concatenate(hashes)[first], places_F


def _kept_spans(size: int, repeated: np.ndarray) -> list[tuple[int, int]]:
    """What is left of ``size`` bytes when the windows that begin at ``repeated`` (sorted) are cut out."""
    if not repeated.size:
        return [(0, size)]
    gaps = np.flatnonzero(repeated[1:] > repeated[:-1] + WINDOW)
    begins = [0, *(repeated[gaps] + WINDOW).tolist(), int(repeated[-1]) + WINDOW]
    ends = [int(repeated[0]), *repeated[gaps + 1].tolist(), size]
    # A remnant shorter than the guarantee is mostly the frayed end of a repeated passage.
    return [(b, e) for b, e in zip(begins, ends, strict=True) if e - b >= GUARANTEE]


def unrepeated_spans(documents: Sequence[bytes]) -> list[list[tuple[int, int]]]:
    """What to keep of each document, so that no two documents share a passage of 200 bytes.

    Args:
      documents: in order of precedence; the first that holds a passage keeps it.

    Returns:
      For each document the (begin, end) spans to keep, in order. A document without repeats is one span; a
      copy of an earlier document is none; remnants under 200 bytes are left out.
    """
    seen: set[bytes] = set()
    hashes, places, owner = [], [], []
    copies = set()
    for d, text in enumerate(documents):
        if text in seen:
            copies.add(d)
            continue
        seen.add(text)
        h, p = fingerprints(np.frombuffer(text, np.uint8))
        hashes.append(h)
        places.append(p)
        owner.append(np.full(h.size, d))
    if not hashes:
        return [[] for _ in documents]
    owner_F, places_F = np.concatenate(owner), np.concatenate(places)
    # Documents come in order of precedence, so the first occurrence of a hash is that of its keeper.
    _, first_U, unique_F = np.unique(np.concatenate(hashes), return_index=True, return_inverse=True)
    repeated_F = owner_F[first_U[unique_F]] < owner_F
    bounds = np.searchsorted(owner_F, np.arange(len(documents) + 1))
    return [
        []
        if d in copies or not text
        else _kept_spans(
            len(text), places_F[bounds[d] : bounds[d + 1]][repeated_F[bounds[d] : bounds[d + 1]]]
        )
        for d, text in enumerate(documents)
    ]
