"""The batch stream: the batch at a step is a pure function of (tokens, seq, batch, seed, step).

Documents lie end to end and are cut into rows of seq inputs; the target of a row's last input is the
first input of the next row, so every token but the first is a target exactly once an epoch. Samples are
numbered through the whole run: sample i is row ``permute(i mod S)`` of epoch ``i // S``, S rows an epoch.
Nothing is buffered, so nothing is lost: a resumed run asks for the next step.

The first token of a document is never predicted (its loss mask is 0). No token before it belongs to its
document, so its loss would measure how documents happen to follow each other; a vocabulary of 256 bytes
has no spare id for a begin-of-document token. A tokenised corpus may begin its documents with one: it is
then an input like any other, and the document's first real token is learnt after it.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from scaling.config import ConfigError
from scaling.data.permutation import permute
from scaling.data.tokens import Tokens

# Orders are computed for this many samples at once: NumPy's cost per call then vanishes from the step.
_ORDER_BLOCK = 4096


def pack(tokens_BL: np.ndarray, new_document_BL: np.ndarray) -> dict[str, np.ndarray]:
    """A batch from rows of tokens, as ``Tokens.rows`` cuts them with L = T + 1.

    Args:
      tokens_BL: int32 [B, T + 1].
      new_document_BL: bool [B, T + 1], True where a document begins within the row.

    Returns:
      inputs, targets: int32 [B, T]; targets are the inputs moved by one.
      segment_ids: int32 [B, T], the document of each input, from 1 within the row (0 would be padding).
      positions: int32 [B, T], from 0 at the row's beginning and at each document's.
      loss_mask: float32 [B, T], 0 where the target belongs to another document than its input.
    """
    new_BT = new_document_BL[:, :-1]
    columns_T = np.arange(new_BT.shape[1], dtype=np.int32)
    begin_BT = np.maximum.accumulate(np.where(new_BT, columns_T, np.int32(0)), axis=1)
    return {
        "inputs": np.ascontiguousarray(tokens_BL[:, :-1]),
        "targets": np.ascontiguousarray(tokens_BL[:, 1:]),
        "segment_ids": np.cumsum(new_BT, axis=1, dtype=np.int32) + np.int32(1),
        "positions": columns_T - begin_BT,
        "loss_mask": (~new_document_BL[:, 1:]).astype(np.float32),
    }


def _rows_of(tokens: Tokens, seq: int, which: str) -> int:
    """How many rows of ``seq`` inputs and targets the tokens hold; at least one."""
    rows = (len(tokens) - 1) // seq
    if rows < 1:
        raise ConfigError(
            f"data.seq is {seq}; the {which} documents hold {len(tokens)} tokens together, so it must be "
            f"at most {len(tokens) - 1} (a row of seq inputs needs seq + 1 tokens)"
        )
    return rows


class Stream:
    """Training batches by step number.

    Attributes:
      samples_per_epoch: S, the rows that the tokens hold.
      dropped_tokens: tokens at the end that fill no row; they are never a target, in any epoch.
      masked_targets: targets an epoch whose loss mask is 0 (the first tokens of documents).
    """

    def __init__(self, tokens: Tokens, seq: int, batch: int, seed: int, shuffle: bool = True):
        """Sets up the stream; reads nothing.

        Args:
          tokens: the training documents.
          seq: T, inputs in a row.
          batch: B, rows in the global batch (never per device or host).
          seed: decides the order of the rows, a different one in each epoch.
          shuffle: False reads the rows in their order on disk, every epoch.

        Raises:
          ConfigError: ``tokens`` are too few for one row, ``seq`` or ``batch`` is below 1, or the seed is
            outside 0 .. 2^64 - 1.
        """
        for name, value, least, most in (
            ("seq", seq, 1, 2**31 - 1),
            ("batch", batch, 1, 2**31 - 1),
            ("seed", seed, 0, 2**64 - 1),
        ):
            if not least <= value <= most:
                raise ConfigError(f"{name} is {value}; it must be from {least} to {most}")
        self.tokens, self.seq, self.batch, self.seed, self.shuffle = tokens, seq, batch, seed, shuffle
        self.samples_per_epoch = _rows_of(tokens, seq, "training")
        used = self.samples_per_epoch * seq
        self.dropped_tokens = len(tokens) - 1 - used
        self.masked_targets = int(np.searchsorted(tokens.offsets[1:-1], used, side="right"))
        self._order = (0, np.zeros(0, np.int64))

    def epochs_at(self, step: int) -> float:
        """Passes over the data in the steps before ``step``."""
        return step * self.batch / self.samples_per_epoch

    def unique_tokens_at(self, step: int) -> int:
        """Distinct places of the corpus that were targets in the steps before ``step``."""
        return min(step * self.batch, self.samples_per_epoch) * self.seq

    def rows_at(self, step: int) -> np.ndarray:
        """int64 [B]: which rows of the corpus the batch at ``step`` holds."""
        first = step * self.batch
        begin, order = self._order
        if not (begin <= first and first + self.batch <= begin + order.size):
            sample = np.arange(first, first + max(self.batch, _ORDER_BLOCK), dtype=np.int64)
            epoch, order = np.divmod(sample, self.samples_per_epoch)
            if self.shuffle:
                order = permute(order, self.samples_per_epoch, self.seed, epoch)
            begin = first
            self._order = (begin, order)  # one assignment, so that a second thread sees a whole pair
        return order[first - begin : first - begin + self.batch]

    def batch_at(self, step: int, rows: slice = slice(None)) -> dict[str, np.ndarray]:
        """The batch at ``step``, or some of its rows (those of one host).

        Args:
          step: from 0.
          rows: which rows of the global batch.

        Returns:
          The arrays of ``pack``: [B, seq], or [rows, seq].
        """
        if step < 0:
            raise ValueError(f"step is {step}; it must be zero or above")
        return pack(*self.tokens.rows(self.rows_at(step)[rows] * self.seq, self.seq + 1))

    def iterate(
        self, start_step: int, stop_step: int, prefetch: int = 2, rows: slice = slice(None)
    ) -> Batches:
        """The batches of ``range(start_step, stop_step)``, read ahead by a thread in the background.

        Args:
          start_step: the first step.
          stop_step: one past the last.
          prefetch: how many batches to keep ready; 0 reads each when it is asked for, without a thread.
          rows: as in ``batch_at``.
        """
        if not 0 <= start_step <= stop_step:
            raise ValueError(
                f"steps {start_step} to {stop_step}; they must not be negative nor run backwards"
            )
        if prefetch < 0:
            raise ValueError(f"prefetch is {prefetch}; it must be zero or above")
        return Batches(self, start_step, stop_step, prefetch, rows)


class Batches(Iterator):
    """An iterator over batches; ``close`` it (or use it in ``with``) to stop its thread."""

    def __init__(self, stream: Stream, start: int, stop: int, prefetch: int, rows: slice):
        import grain  # here, so that planning and opening data need not wait for it

        self._batches = None
        if start < stop:
            options = grain.ReadOptions(num_threads=min(prefetch, 1), prefetch_buffer_size=prefetch)
            steps = grain.MapDataset.range(start, stop)
            batches = steps.map(lambda step: stream.batch_at(int(step), rows))
            self._batches = iter(batches.to_iter_dataset(options))

    def __next__(self) -> dict[str, np.ndarray]:
        if self._batches is None:
            raise StopIteration
        try:
            return next(self._batches)
        except BaseException:  # the end, an error in reading, an interrupt: no thread stays behind
            self.close()
            raise

    def close(self) -> None:
        """Stops the thread; asking for more batches ends the iteration."""
        batches, self._batches = self._batches, None
        if batches is not None:
            batches.close()

    def __enter__(self) -> Batches:
        return self

    def __exit__(self, *exc) -> None:
        self.close()


def heldout_batches(tokens: Tokens, seq: int, batch: int, sequences: int) -> list[dict[str, np.ndarray]]:
    """A fixed evaluation set: ``sequences`` rows spread evenly over the held-out documents.

    Args:
      tokens: the held-out documents.
      seq: T, inputs in a row.
      batch: B, rows in each batch.
      sequences: how many rows in all; no row is taken twice.

    Returns:
      ceil(sequences / B) batches as ``pack`` gives them, all [B, T]; the last is filled up with rows of
      padding (zeros everywhere, so segment 0 and loss mask 0).

    Raises:
      ConfigError: the held-out documents hold fewer rows than ``sequences``.
    """
    available = _rows_of(tokens, seq, "held-out")
    if not 1 <= sequences <= available:
        raise ConfigError(
            f"eval.sequences is {sequences}; the held-out documents hold {available} rows of {seq} tokens; "
            f"it must be from 1 to {available} (or raise data.heldout_fraction)"
        )
    # The middles of equal spans: integer arithmetic, exact for any size.
    row = (2 * np.arange(sequences, dtype=np.int64) + 1) * available // (2 * sequences)
    batches = []
    for first in range(0, sequences, batch):
        part = pack(*tokens.rows(row[first : first + batch] * seq, seq + 1))
        short = batch - part["inputs"].shape[0]
        batches.append({k: np.pad(v, ((0, short), (0, 0))) for k, v in part.items()} if short else part)
    return batches
