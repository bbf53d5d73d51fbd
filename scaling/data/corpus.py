"""Opening data: from the ``data`` section of a cell config to train and held-out tokens."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from scaling.config import (
    SCHEMA,
    SYNTHETIC_SOURCES,
    ConfigError,
    canonical_json,
    check_data,
    check_field,
    check_keys,
    component_section,
)
from scaling.data import shard_index, shards, synthetic, text
from scaling.data.cache import cached
from scaling.data.mixture import BLOCK, Mixture, Proportions
from scaling.data.remote import RemoteFolder, is_remote
from scaling.data.tokens import Tokens

# Part of every cache key: raise it when the split, the order or the removal of repeats changes.
_FORMAT = 1


@dataclasses.dataclass(frozen=True)
class Dataset:
    """Opened data.

    Attributes:
      train: the training documents, at most ``data.unique_tokens`` tokens of them.
      heldout: the held-out documents; none of their files or documents is in ``train``.
      vocab: token ids are below it.
      fingerprint: 32 hex digits of SHA-256 over every document's tokens and length, in order, train and
        held-out apart. It is taken before ``data.unique_tokens`` cuts the training part; a mixture's covers
        its components' fingerprints, shares and cuts.
      bytes_per_token: text bytes over tokens, of the held-out documents; 1.0 where tokens are bytes or
        synthetic (bits per byte are then bits per token).
      facts: what ``describe`` returns.
      entropy_rate: nats per token of a synthetic source, exact; None where it is not known.
      ideal_loss: expected loss of the true model on the held-out rows of ``data.seq`` inputs, in nats per
        target: what a fitted floor E should come to; None where it is not known.
    """

    train: Tokens | Mixture
    heldout: Tokens | Mixture
    vocab: int
    fingerprint: str
    bytes_per_token: float
    facts: dict = dataclasses.field(repr=False)
    entropy_rate: float | None = None
    ideal_loss: float | None = None

    def describe(self) -> dict:
        """Counts and settings for a report, as JSON values."""
        return dict(self.facts)


def open_data(data_cfg: Mapping) -> Dataset:
    """Opens the data of a cell config; builds the corpus the first time and finds it in the cache later.

    Args:
      data_cfg: the ``data`` section; missing fields take the schema's defaults.

    Returns:
      The dataset, memory-mapped.

    Raises:
      ConfigError: a bad field, an empty, unreadable or damaged folder, too few tokens, or content that no
        longer matches ``data.fingerprint``.
    """
    check_keys("data", data_cfg, SCHEMA["data"])
    cfg = {
        key: check_field(f"data.{key}", field, data_cfg.get(key, field.default))
        for key, field in SCHEMA["data"].items()
    }
    check_data(cfg)
    if cfg["source"] == "mixture":
        return _open_mixture(cfg)
    if cfg["source"] in SYNTHETIC_SOURCES:
        path, opened = None, _open_synthetic(cfg)
    else:
        path = _folder(cfg)
        opened = _open_shards(path, cfg) if cfg["source"] == "tokens" else _open_bytes(path, cfg)
    train, heldout, vocab, about = opened
    _check_fingerprint(cfg, about["fingerprint"], path)
    facts = {
        "source": cfg["source"],
        "path": path and str(path),
        "seed": cfg["seed"],
        "vocab": vocab,
        **about,
    }
    total = len(train) + len(heldout)
    facts |= {"tokens": total, "heldout_share": len(heldout) / total, "unique_tokens": cfg["unique_tokens"]}
    if cfg["unique_tokens"] is not None:
        if cfg["unique_tokens"] > len(train):
            raise ConfigError(
                f"data.unique_tokens is {cfg['unique_tokens']}; the training documents hold {len(train)} "
                f"tokens, so it must be at most that, or None for all"
            )
        train = train.prefix(cfg["unique_tokens"])
    for part, tokens in (("train", train), ("heldout", heldout)):
        facts |= {f"{part}_tokens": len(tokens), f"{part}_documents": tokens.documents}
    known = {key: facts.get(key) for key in ("entropy_rate", "ideal_loss")}
    return Dataset(train, heldout, vocab, about["fingerprint"], about["bytes_per_token"], facts, **known)


def _folder(cfg: dict) -> Path | RemoteFolder:
    if cfg["source"] == "stdlib":
        return text.stdlib_folder()
    if not is_remote(cfg["path"]):
        return Path(cfg["path"]).expanduser().absolute()
    if cfg["source"] == "text":
        raise ConfigError(
            f"data.path is {cfg['path']!r}; data.source = 'text' reads local folders: `scaling tokenize` "
            "makes shards of text, and data.source = 'tokens' reads those from a bucket"
        )
    return RemoteFolder(cfg["path"])


def _open_mixture(cfg: dict) -> Dataset:
    opened = [open_data(component_section(cfg, component)) for component in cfg["components"]]
    proportions = Proportions([component["weight"] for component in cfg["components"]])
    shares = (proportions.shares_C / BLOCK).tolist()
    content = [
        {"share": share, "fingerprint": d.fingerprint, "unique_tokens": d.facts["unique_tokens"]}
        for share, d in zip(shares, opened, strict=True)
    ]
    fingerprint = _key(mixture=content)
    _check_fingerprint(cfg, fingerprint, None)
    tokenizers = {d.facts.get("tokenizer") for d in opened} - {None}
    if len(tokenizers) > 1:
        raise ConfigError(
            f"data.components were written with {len(tokenizers)} tokenizers "
            f"({', '.join(sorted(tokenizers))}); "
            "a token id must mean the same in all of them"
        )
    train, heldout = (
        Mixture([getattr(d, part) for d in opened], proportions) for part in ("train", "heldout")
    )
    ratio = sum(share * d.bytes_per_token for share, d in zip(shares, opened, strict=True))
    vocab, total = max(d.vocab for d in opened), len(train) + len(heldout)
    facts = {"source": "mixture", "path": None, "seed": cfg["seed"], "vocab": vocab}
    facts |= {"fingerprint": fingerprint, "bytes_per_token": ratio, "tokens": total}
    facts |= {"heldout_share": len(heldout) / total, "unique_tokens": None}
    for part, tokens in (("train", train), ("heldout", heldout)):
        facts |= {f"{part}_tokens": len(tokens), f"{part}_documents": tokens.documents}
    facts["components"] = [{"share": s, **d.facts} for s, d in zip(shares, opened, strict=True)]
    return Dataset(train, heldout, vocab, fingerprint, ratio, facts)


def _check_fingerprint(cfg: dict, found: str, path: Path | None) -> None:
    if cfg["fingerprint"] not in (None, found):
        raise ConfigError(
            f"data.fingerprint is {cfg['fingerprint']!r}; the data in {str(path or cfg['source'])!r} have "
            f"{found!r}, so they changed (or another Python's library is read) since the "
            "study was planned: restore them, or plan the study again"
        )


def _key(**decides) -> str:
    return hashlib.sha256(canonical_json({"format": _FORMAT, **decides}).encode()).hexdigest()[:32]


def _open_bytes(path: Path, cfg: dict) -> tuple[Tokens, Tokens, int, dict]:
    files = text.list_files(path, cfg["source"])
    split = {"fraction": cfg["heldout_fraction"], "seed": cfg["seed"]}
    key = _key(source=cfg["source"], path=str(path), files=files, **split)
    folder, about = cached(key, lambda out: text.build_bytes(path, files, cfg["source"], out=out, **split))
    parts = [
        Tokens(np.memmap(folder / f"{part}.bin", np.uint8, "r"), np.load(folder / f"{part}_offsets.npy"))
        for part in ("train", "heldout")
    ]
    if cfg["source"] == "stdlib":
        about = {"python": text.stdlib_python(), **about}
    return *parts, text.VOCAB, about


def _open_synthetic(cfg: dict) -> tuple[Tokens, Tokens, int, dict]:
    folder, about = cached(
        _key(**synthetic.decides(cfg)), lambda out: synthetic.build_synthetic(cfg, out=out)
    )
    train, heldout = (
        Tokens(np.load(folder / f"{part}.npy", mmap_mode="r"), np.load(folder / f"{part}_offsets.npy"))
        for part in ("train", "heldout")
    )
    about = {**about, "ideal_loss": synthetic.ideal_loss(heldout, cfg["seq"], about)}
    return train, heldout, cfg["vocab"], about


def _open_shards(path: Path | RemoteFolder, cfg: dict) -> tuple[Tokens, Tokens, int, dict]:
    manifest = shards.read_manifest(path)
    files = shard_index.list_files(path, manifest)
    split = {"fraction": cfg["heldout_fraction"], "seed": cfg["seed"]}
    key = _key(source="tokens", path=str(path), files=files, manifest=manifest, **split)
    folder, about = cached(key, lambda out: shard_index.build_index(path, manifest, out=out, **split))
    arrays = [shard_index.map_tokens(path, manifest, shard) for shard in manifest["shards"]]
    parts = [
        Tokens(
            arrays, *(np.load(folder / f"{part}_{name}.npy", mmap_mode="r") for name in ("offsets", "starts"))
        )
        for part in ("train", "heldout")
    ]
    if "tokenizer" in manifest:
        about = {**about, "tokenizer": manifest["tokenizer"]}
    return *parts, manifest["vocab"], about
