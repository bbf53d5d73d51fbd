"""What loss alone does not tell of a family: copying, recall, repeated n-grams and longer rows.

Each probe is rows like those of evaluation with a loss mask of its own, so that the evaluation that is
compiled already serves. All are nats per token of a trained model as it is; nothing is trained on them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from scaling.config import ConfigError
from scaling.data import heldout_batches

NGRAM = 4
"""Length of what counts as repeated: three tokens and the one that they predict."""


def probe(evaluate: Callable, params, batches: Sequence[Mapping], heldout, seq: int, streamed: bool) -> dict:
    """All probes of a model.

    Args:
      evaluate: (params, batch) to (nats_B, tokens_B), the rows' sums over their loss mask.
      params: what ``evaluate`` takes.
      batches: the held-out batches of evaluation, [B, seq] each.
      heldout: the held-out documents, of which longer rows are cut.
      seq: the length that the model was trained at.
      streamed: whether a row is one stream (``model.cross_document``), so that positions count along it.

    Returns:
      ``scaling.records.PROBES`` to nats, None where the data has no such tokens or the loss is not a number.
    """

    def mean(masked: Sequence[Mapping]) -> float | None:
        sums = [evaluate(params, batch) for batch in masked]
        nats, tokens = (sum(float(np.sum(np.asarray(s[i], np.float64))) for s in sums) for i in (0, 1))
        return nats / tokens if tokens and math.isfinite(nats) else None

    counts = frequencies(batches)
    B = len(batches[0]["inputs"])
    copied, recalled, repeated = copying(counts, B, seq), recall(counts, B, seq), ngrams(batches)
    first, copy_loss = mean([copied[0]]), mean([copied[1]])
    unknown, recall_loss = mean([recalled[0]]), mean([recalled[1]])
    return {
        "copy_loss": copy_loss,
        "copy_gain": None if None in (first, copy_loss) else first - copy_loss,
        "recall_loss": recall_loss,
        "recall_gain": None if None in (unknown, recall_loss) else unknown - recall_loss,
        "ngram_loss": mean(repeated[0]),
        "novel_loss": mean(repeated[1]),
        "loss_2x": mean(longer(heldout, seq, 2, B, streamed)),
        "loss_4x": mean(longer(heldout, seq, 4, B, streamed)),
    }


def frequencies(batches: Sequence[Mapping]) -> np.ndarray:
    """How often each token is a target, float64 [tokens up to the largest]."""
    targets = np.concatenate([b["targets"][b["loss_mask"] > 0] for b in batches])
    return np.bincount(targets).astype(np.float64)


def rows_of(tokens_BS: np.ndarray, masks: Sequence[np.ndarray]) -> list[dict]:
    """Rows [B, T + 1] as batches of one document a row, one for each mask [B, T]."""
    B, T = tokens_BS.shape[0], tokens_BS.shape[1] - 1
    tokens_BS = tokens_BS.astype(np.int32)
    shared = {
        "inputs": tokens_BS[:, :-1],
        "targets": tokens_BS[:, 1:],
        "segment_ids": np.ones((B, T), np.int32),
        "positions": np.broadcast_to(np.arange(T, dtype=np.int32), (B, T)),
    }
    return [{**shared, "loss_mask": mask.astype(np.float32)} for mask in masks]


def copying(counts: np.ndarray, rows: int, seq: int) -> list[dict]:
    """(first pass, second pass) over a passage of seq / 2 tokens, drawn alone by their frequency."""
    rng = np.random.default_rng(0)
    half = seq // 2
    passage = rng.choice(len(counts), (rows, half), p=counts / counts.sum())
    tokens = np.concatenate([passage, passage, passage[:, :2]], axis=1)[:, : seq + 1]
    place = np.arange(1, seq + 1)  # of the target in the row
    first = np.broadcast_to(place < half, (rows, seq))
    # the second pass is known by its first token
    second = np.broadcast_to((place > half) & (place < 2 * half), (rows, seq))
    return rows_of(tokens, [first, second])


def recall(counts: np.ndarray, rows: int, seq: int) -> list[dict]:
    """(values at the first time, when asked): seq / 4 pairs of a key and a value, then all again, shuffled.

    Keys of a row are different tokens; where there are too few tokens, there are fewer pairs.
    """
    rng = np.random.default_rng(1)
    known = np.flatnonzero(counts)
    pairs = max(1, min(seq // 4, len(known) // 2))
    tokens = np.zeros((rows, seq + 1), np.int64)
    for row in tokens:
        keys = rng.choice(known, pairs, replace=False)
        values = rng.choice(len(counts), pairs, p=counts / counts.sum())
        again = rng.permutation(pairs)
        told = np.stack([keys, values], 1).reshape(-1)
        asked = np.stack([keys[again], values[again]], 1).reshape(-1)
        row[: 4 * pairs] = np.concatenate([told, asked])
    place = np.arange(1, seq + 1)
    value = place % 2 == 1
    first = np.broadcast_to(value & (place < 2 * pairs), (rows, seq))
    second = np.broadcast_to(value & (place >= 2 * pairs) & (place < 4 * pairs), (rows, seq))
    return rows_of(tokens, [first, second])


def ngrams(batches: Sequence[Mapping]) -> tuple[list[dict], list[dict]]:
    """The evaluation's batches: targets that end an n-gram of their document's text before, and the rest."""
    seen, novel = [], []
    for batch in batches:
        repeated = np.zeros(batch["loss_mask"].shape, bool)
        for b, (inputs, targets, segments) in enumerate(
            zip(batch["inputs"], batch["targets"], batch["segment_ids"], strict=True)
        ):
            before = set()
            for t in range(NGRAM - 2, len(inputs)):
                if segments[t] != segments[t - NGRAM + 2]:
                    continue
                gram = (segments[t], *inputs[t - NGRAM + 2 : t + 1], targets[t])
                repeated[b, t] = gram in before
                before.add(gram)
        for out, kept in ((seen, repeated), (novel, ~repeated)):
            out.append({**batch, "loss_mask": batch["loss_mask"] * kept})
    return seen, novel


def longer(heldout, seq: int, times: int, rows: int, streamed: bool) -> list[dict]:
    """Held-out rows ``times`` as long, their loss at positions of the last half of that alone.

    Empty where the held-out documents are too few.
    """
    long = times * seq
    batch = max(1, rows // times)
    try:
        batches = heldout_batches(heldout, long, batch, batch)
    except ConfigError:
        return []
    place = np.arange(long) if streamed else None
    return [
        {**b, "loss_mask": b["loss_mask"] * ((b["positions"] if place is None else place) >= long // 2)}
        for b in batches
    ]
