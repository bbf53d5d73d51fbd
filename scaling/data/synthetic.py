"""Sources that are drawn from a seed and whose entropy rate is known exactly.

Train and held-out documents are independent draws from one stationary source. What a fitted floor E is to be
compared with is the *ideal loss*: the expected loss of the true model on the held-out rows as the stream cuts
them. It exceeds the entropy rate where a row's first targets have less context than the source remembers.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np

from scaling.config import SYNTHETIC_SOURCES, ConfigError
from scaling.data.chains import Chain, markov, random_walk
from scaling.data.grammar import Grammar, grammar
from scaling.data.stream import pack
from scaling.data.tokens import Tokens

_ROWS_AT_ONCE = 4096


def make_source(cfg: dict) -> Chain | Grammar:
    """The true model of a ``data`` section; its structure depends on the section's fields alone.

    Raises:
      ConfigError: fields that cannot go together.
    """
    if cfg["source"] == "markov":
        return markov(cfg["vocab"], cfg["order"], cfg["concentration"], cfg["seed"])
    if cfg["source"] == "random_walk":
        return random_walk(cfg["vocab"], cfg["degree"], cfg["zipf"], cfg["concentration"], cfg["seed"])
    return grammar(
        cfg["vocab"], cfg["depth"], cfg["branching"], cfg["rules"], cfg["concentration"], cfg["seed"]
    )


def decides(cfg: dict) -> dict:
    """The fields that decide the tokens, for the cache's key."""
    keys = ("source", "seed", "heldout_fraction", *SYNTHETIC_SOURCES[cfg["source"]])
    return {key: cfg[key] for key in keys}


def build_synthetic(cfg: dict, out: Path) -> dict:
    """Draws the train and held-out tokens.

    Args:
      cfg: the ``data`` section, every field present.
      out: where to write ``{train,heldout}.npy`` and ``{train,heldout}_offsets.npy``.

    Returns:
      Counts, the content's fingerprint, ``entropy_rate`` (nats per token of the source), and what the ideal
      loss follows from: ``entropies`` (those of ``Chain.conditional_entropies``; a grammar's mean over a
      document's predicted tokens, whatever the context) and ``aligned``, which rows a grammar needs.

    Raises:
      ConfigError: fields that cannot go together, or fewer tokens than one document for each part.
    """
    source = make_source(cfg)
    if isinstance(source, Chain):
        length = cfg["document"]
        entropies, facts = source.conditional_entropies(), dict(source.facts)
        rate = entropies[-1]
    else:
        length = source.length
        total = source.entropy()
        rate = total / length
        entropies = [(total - source.first_token_entropy()) / (length - 1)]
        facts = {"aligned": length, "document_entropy": total}
    heldout = round(cfg["tokens"] * cfg["heldout_fraction"] / length)
    counts = {"heldout": heldout, "train": cfg["tokens"] // length - heldout}
    if min(counts.values()) < 1:
        raise ConfigError(
            f"data.tokens is {cfg['tokens']} with data.heldout_fraction = {cfg['heldout_fraction']:g}; "
            f"documents of this source have {length} tokens, and at least one must be held out and one left "
            "to train on"
        )
    dtype = np.uint8 if cfg["vocab"] <= 2**8 else np.uint16 if cfg["vocab"] <= 2**16 else np.uint32
    digest = hashlib.sha256(f"documents of {np.dtype(dtype).name}".encode())
    for part, documents in counts.items():
        if isinstance(source, Chain):
            tokens_NL = source.sample(documents, length, cfg["seed"], part)
        else:
            tokens_NL = source.sample(documents, cfg["seed"], part)
        tokens = tokens_NL.astype(np.dtype(dtype).newbyteorder("<")).reshape(-1)
        offsets = np.arange(documents + 1, dtype=np.int64) * length
        np.save(out / f"{part}.npy", tokens)
        np.save(out / f"{part}_offsets.npy", offsets)
        digest.update(part.encode() + offsets.astype("<i8").tobytes() + tokens.tobytes())
    return {
        "fingerprint": digest.hexdigest()[:32],
        "bytes_per_token": 1.0,
        "entropy_rate": rate,
        "entropies": entropies,
        **facts,
    }


def ideal_loss(heldout: Tokens, seq: int, about: dict) -> float:
    """The expected loss of the true model over every held-out row of ``seq`` inputs, in nats per target.

    A target that c tokens of its document stand before in its row costs H(X_c+1 | X_1 .. X_c); the first
    token of a document is no target. Documents of chains are stationary, so it does not matter which tokens
    of a document a row holds.

    Raises:
      ConfigError: rows that would cut a grammar's documents apart: what is then known of a document has no
        closed form.
    """
    entropies = np.array(about["entropies"])
    if "aligned" in about and seq % about["aligned"]:
        raise ConfigError(
            f"data.seq is {seq}; it must be a multiple of data.branching^data.depth = {about['aligned']}, "
            "so that a row holds whole documents of the grammar"
        )
    if entropies.size == 1:
        return float(entropies[0])
    total, targets = 0.0, 0.0
    rows = np.arange((len(heldout) - 1) // seq, dtype=np.int64)
    for first in range(0, rows.size, _ROWS_AT_ONCE):
        batch = pack(*heldout.rows(rows[first : first + _ROWS_AT_ONCE] * seq, seq + 1))
        context = np.minimum(batch["positions"], entropies.size - 1)  # position 0: one token of context
        total += float((entropies[context] * batch["loss_mask"]).sum())
        targets += float(batch["loss_mask"].sum())
    return total / targets
