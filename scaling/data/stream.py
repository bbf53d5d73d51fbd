"""The batch stream: the batch at a step is a pure function of (tokens, seq, batch, seed, step).

Documents lie end to end and are cut into rows of seq inputs; the target of a row's last input is the
first input of the next row, so every token but the first is a target exactly once an epoch. Samples are
numbered through the whole run: sample i is row ``permute(i mod S)`` of epoch ``i // S``, S rows an epoch.
Nothing is buffered, so nothing is lost: a resumed run asks for the next step.

The first token of a document is never predicted (its loss mask is 0). No token before it belongs to its
document, so its loss would measure how documents happen to follow each other; a vocabulary of 256 bytes
has no spare id for a begin-of-document token. A tokenised corpus may begin its documents with one: it is
then an input like any other, and the document's first real token is learnt after it.

Of a mixture, sample i is number j of a component (``mixture.Proportions``), and j stands for i above: every
component has its own rows, order and epochs.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from scaling.config import ConfigError
from scaling.data.mixture import Mixture, Proportions
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


def first_repeat(tokens: Tokens | Mixture, seq: int, which: str = "training") -> int:
    """How many rows of ``seq`` a stream takes before it takes one again; of a mixture, one of any component.

    Raises:
      ConfigError: the tokens (or a component's) fill no row.
    """
    if not isinstance(tokens, Mixture):
        return _rows_of(tokens, seq, which)
    rows = [_rows_of(part, seq, f"{which} (components[{c}])") for c, part in enumerate(tokens.parts)]
    return min(tokens.proportions.sample_of(c, n) for c, n in enumerate(rows))


class Stream:
    """Training batches by step number.

    Attributes:
      samples_per_epoch: S, the rows that the tokens hold; of a mixture, the samples until the first row of
        any component comes again.
      dropped_tokens: tokens at the end (of each component) that fill no row; they are never a target.
      masked_targets: targets in one pass over every row whose loss mask is 0 (the first tokens of documents).
    """

    def __init__(
        self,
        tokens: Tokens | Mixture,
        seq: int,
        batch: int,
        seed: int,
        shuffle: bool = True,
        first_sample: int = 0,
    ):
        """Sets up the stream; reads nothing.

        Args:
          tokens: the training documents.
          seq: T, inputs in a row.
          batch: B, rows in the global batch (never per device or host).
          seed: decides the order of the rows, a different one in each epoch.
          shuffle: False reads the rows in their order on disk, every epoch.
          first_sample: the sample that step 0 begins with.

        Raises:
          ConfigError: ``tokens`` are too few for one row, ``seq`` or ``batch`` is below 1, or the seed is
            outside 0 .. 2^64 - 1.
        """
        for name, value, least, most in (
            ("seq", seq, 1, 2**31 - 1),
            ("batch", batch, 1, 2**31 - 1),
            ("seed", seed, 0, 2**64 - 1),
            ("first_sample", first_sample, 0, 2**62),
        ):
            if not least <= value <= most:
                raise ConfigError(f"{name} is {value}; it must be from {least} to {most}")
        self.tokens, self.seq, self.batch, self.seed, self.shuffle = tokens, seq, batch, seed, shuffle
        self.first_sample = first_sample
        self.samples_per_epoch = first_repeat(tokens, seq)
        if isinstance(tokens, Mixture):
            parts, self._begin_C, self._proportions = tokens.parts, tokens.begin_C, tokens.proportions
        else:
            parts, self._begin_C, self._proportions = (tokens,), np.zeros(1, np.int64), Proportions([1.0])
        self._rows_C = np.array([(len(part) - 1) // seq for part in parts], np.int64)
        self._first_row_C = np.cumsum(self._rows_C) - self._rows_C
        used_C = self._rows_C * seq
        self.dropped_tokens = sum(len(part) - 1 - int(n) for part, n in zip(parts, used_C, strict=True))
        self.masked_targets = sum(
            int(np.searchsorted(part.offsets[1:-1], n, side="right"))
            for part, n in zip(parts, used_C, strict=True)
        )
        self._order = (0, np.zeros(0, np.int64))

    def component_epochs_at(self, step: int) -> list[float]:
        """Passes over each component (of one corpus: over it) in the steps before ``step``."""
        return (self._counts(step) / self._rows_C).tolist()

    def epochs_at(self, step: int) -> float:
        """Passes over the data before ``step``; of a mixture, over its most repeated component."""
        return max(self.component_epochs_at(step))

    def unique_tokens_at(self, step: int) -> int:
        """Distinct places of the corpus that were targets in the steps before ``step``.

        At most so many where a ``first_sample`` within an epoch lets the steps cross into the next.
        """
        return int(np.minimum(self._counts(step), self._rows_C).sum()) * self.seq

    def _counts(self, step: int) -> np.ndarray:
        """int64 [C]: samples of each component in the steps before ``step``."""
        end = self._proportions.counts(self.first_sample + step * self.batch)
        return end - self._proportions.counts(self.first_sample)

    def rows_at(self, step: int) -> np.ndarray:
        """int64 [B]: which rows the batch at ``step`` holds; a mixture's are numbered through."""
        first = self.first_sample + step * self.batch
        begin, order = self._order
        if not (begin <= first and first + self.batch <= begin + order.size):
            begin = first
            order = self._rows_of_samples(
                np.arange(first, first + max(self.batch, _ORDER_BLOCK), dtype=np.int64)
            )
            self._order = (begin, order)  # one assignment, so that a second thread sees a whole pair
        return order[first - begin : first - begin + self.batch]

    def _rows_of_samples(self, sample: np.ndarray) -> np.ndarray:
        component, number = (
            self._proportions.place(sample) if self._rows_C.size > 1 else (np.zeros_like(sample), sample)
        )
        epoch, row = np.divmod(number, self._rows_C[component])
        if self.shuffle:
            for c, rows in enumerate(self._rows_C.tolist()):
                here = component == c
                row[here] = permute(row[here], rows, self.seed, epoch[here])
        return row + self._first_row_C[component]

    def _begins(self, row_B: np.ndarray) -> np.ndarray:
        """int64 [B]: the place of each row's first token."""
        component_B = np.searchsorted(self._first_row_C, row_B, side="right") - 1
        return self._begin_C[component_B] + (row_B - self._first_row_C[component_B]) * self.seq

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
        return pack(*self.tokens.rows(self._begins(self.rows_at(step)[rows]), self.seq + 1))

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


def heldout_batches(
    tokens: Tokens | Mixture, seq: int, batch: int, sequences: int
) -> list[dict[str, np.ndarray]]:
    """A fixed evaluation set: ``sequences`` rows spread evenly over the held-out documents.

    Args:
      tokens: the held-out documents; of a mixture, rows are taken in its proportions, component by component.
      seq: T, inputs in a row.
      batch: B, rows in each batch.
      sequences: how many rows in all; no row is taken twice.

    Returns:
      ceil(sequences / B) batches as ``pack`` gives them, all [B, T]; the last is filled up with rows of
      padding (zeros everywhere, so segment 0 and loss mask 0).

    Raises:
      ConfigError: the held-out documents hold fewer rows than ``sequences``.
    """
    available = first_repeat(tokens, seq, "held-out")
    if not 1 <= sequences <= available:
        raise ConfigError(
            f"eval.sequences is {sequences}; the held-out documents hold {available} rows of {seq} tokens; "
            f"it must be from 1 to {available} (or raise data.heldout_fraction)"
        )
    if isinstance(tokens, Mixture):
        counts = tokens.proportions.counts(sequences).tolist()
        begins = [
            begin + _spread(count, (len(part) - 1) // seq) * seq
            for begin, count, part in zip(tokens.begin_C, counts, tokens.parts, strict=True)
        ]
        begin_S = np.concatenate(begins)
    else:
        begin_S = _spread(sequences, available) * seq
    batches = []
    for first in range(0, sequences, batch):
        part = pack(*tokens.rows(begin_S[first : first + batch], seq + 1))
        short = batch - part["inputs"].shape[0]
        batches.append({k: np.pad(v, ((0, short), (0, 0))) for k, v in part.items()} if short else part)
    return batches


def _spread(count: int, available: int) -> np.ndarray:
    """int64 [count]: the middles of equal spans of 0 .. available - 1, in integers: exact for any size."""
    return (2 * np.arange(count, dtype=np.int64) + 1) * available // (2 * max(count, 1))
