"""Tokens on disk or in memory, and rows cut from them. Imports numpy alone."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

TOKEN_DTYPES = (np.dtype(np.uint8), np.dtype(np.uint16), np.dtype(np.uint32))


class Tokens:
    """Documents laid end to end: a sequence of tokens with the places where documents begin.

    The sequence may be scattered: document ``d`` holds the tokens ``offsets[d] : offsets[d + 1]`` of this
    sequence and lies at ``starts[d]`` of the shards laid end to end. No document crosses a shard.

    Attributes:
      shards: 1-D arrays of uint8, uint16 or uint32, all of one dtype; memory-mapped or not, or fetched as
        they are read (``remote.RemoteTokens``).
      offsets: int64 [documents + 1], strictly increasing from 0; where each document begins.
      starts: int64 [documents], or None where the documents lie in one shard in this very order.
    """

    def __init__(
        self,
        shards: np.ndarray | Sequence[np.ndarray],
        offsets: np.ndarray,
        starts: np.ndarray | None = None,
    ):
        """Checks the arrays against each other.

        Raises:
          ValueError: arrays of another shape or dtype than stated above, or documents outside the shards.
        """
        shards = (shards,) if isinstance(shards, np.ndarray) else tuple(shards)
        # A memmap's own indexing is several times slower than that of the plain array over the same pages.
        # One that is fetched as it is read stays as it is.
        self.shards = tuple(np.asarray(s) if isinstance(s, np.ndarray) else s for s in shards)
        self.offsets = np.asarray(offsets)
        self.starts = None if starts is None else np.asarray(starts)
        dtypes = {shard.dtype for shard in self.shards}
        if len(dtypes) != 1 or not dtypes <= set(TOKEN_DTYPES) or any(s.ndim != 1 for s in self.shards):
            raise ValueError(
                f"shards are {[(s.dtype.name, s.shape) for s in self.shards]}; "
                "they must be 1-D arrays of one dtype: uint8, uint16 or uint32"
            )
        if self.offsets.dtype != np.int64 or self.offsets.ndim != 1 or self.offsets.size == 0:
            raise ValueError(
                f"offsets is {self.offsets.dtype} {self.offsets.shape}; it must be int64 [documents + 1]"
            )
        if self.offsets[0] != 0 or (np.diff(self.offsets) <= 0).any():
            raise ValueError("offsets must increase strictly from 0 (no document is empty)")
        self._shard_ends = np.cumsum([shard.size for shard in self.shards], dtype=np.int64)
        if self.starts is None:
            if len(self.shards) != 1 or self.offsets[-1] > self.shards[0].size:
                raise ValueError("without starts the documents must lie in one shard, in order")
        else:
            self._check_starts()

    def _check_starts(self) -> None:
        if self.starts.dtype != np.int64 or self.starts.shape != (self.documents,):
            raise ValueError(
                f"starts is {self.starts.dtype} {self.starts.shape}; it must be int64 [{self.documents}]"
            )
        if not self.documents:
            return
        if self.starts.min() < 0 or self.starts.max() >= self._shard_ends[-1]:
            raise ValueError(f"starts must lie within the {self._shard_ends[-1]} tokens of the shards")
        ends = self._shard_ends[np.searchsorted(self._shard_ends, self.starts, side="right")]
        if (self.starts + np.diff(self.offsets) > ends).any():
            raise ValueError("a document reaches beyond the end of its shard")

    def __len__(self) -> int:
        return int(self.offsets[-1])

    @property
    def documents(self) -> int:
        """How many documents there are."""
        return self.offsets.size - 1

    @property
    def dtype(self) -> np.dtype:
        """The dtype on disk."""
        return self.shards[0].dtype

    def document(self, d: int) -> np.ndarray:
        """The tokens of document ``d`` as a 1-D view."""
        if not 0 <= d < self.documents:
            raise IndexError(f"document {d} of {self.documents}")
        begin = int(self.offsets[d] if self.starts is None else self.starts[d])
        shard = int(np.searchsorted(self._shard_ends, begin, side="right"))
        begin -= int(self._shard_ends[shard]) - self.shards[shard].size
        return self.shards[shard][begin : begin + int(self.offsets[d + 1] - self.offsets[d])]

    def prefix(self, count: int) -> Tokens:
        """The first ``count`` tokens; the last document is cut where needed."""
        if not 0 < count <= len(self):
            raise ValueError(f"count is {count}; it must be between 1 and {len(self)}")
        documents = int(np.searchsorted(self.offsets, count, side="left"))
        offsets = np.append(self.offsets[:documents], np.int64(count))
        return Tokens(self.shards, offsets, None if self.starts is None else self.starts[:documents])

    def rows(self, begin_B: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
        """Cuts rows out of the sequence.

        Args:
          begin_B: int64 [B], the place of each row's first token.
          length: L, the tokens in a row; every row must end within the sequence.

        Returns:
          (tokens_BL, new_document_BL): the tokens int32 [B, L], and bool [B, L], True where a token is the
          first of its document and another document's token stands before it in the row.
        """
        offsets = self.offsets
        first_B = np.searchsorted(offsets, begin_B, side="right") - 1
        crossings_B = np.searchsorted(offsets, begin_B + (length - 1), side="right") - 1 - first_B
        new_document_BL = np.zeros((begin_B.size, length), bool)
        total = int(crossings_B.sum())
        if total:
            row = np.repeat(np.arange(begin_B.size), crossings_B)
            nth = np.arange(1, total + 1) - np.repeat(np.cumsum(crossings_B) - crossings_B, crossings_B)
            new_document_BL[row, offsets[first_B[row] + nth] - begin_B[row]] = True
        place_BL = begin_B[:, None] + np.arange(length)
        if self.starts is not None:
            document_BL = first_B[:, None] + np.cumsum(new_document_BL, axis=1)
            place_BL += (self.starts - offsets[:-1])[document_BL]
        return self._gather(place_BL), new_document_BL

    def _gather(self, place_BL: np.ndarray) -> np.ndarray:
        if len(self.shards) == 1:
            return self.shards[0][place_BL].astype(np.int32)
        shard_BL = np.searchsorted(self._shard_ends, place_BL, side="right")
        tokens_BL = np.empty(place_BL.shape, np.int32)
        for s in np.unique(shard_BL):
            here = shard_BL == s
            begin = self._shard_ends[s] - self.shards[s].size
            tokens_BL[here] = self.shards[s][place_BL[here] - begin]
        return tokens_BL
