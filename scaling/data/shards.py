"""Pre-tokenised shards: how to write them, and how to read them safely.

A folder of shards holds ``manifest.json`` and, for each shard, its tokens (``.npy``, or ``.bin``: raw
little-endian) and ``documents``: int64 [documents + 1] offsets of its documents from 0 to the shard's
size (``.npy``). A document never crosses a shard. The manifest::

    {"format": "token-shards", "version": 1, "dtype": "uint16", "vocab": 50257, "bytes_per_token": 4.3,
     "shards": [{"tokens": "tokens-00000.npy", "count": 123, "documents": "documents-00000.npy"}, ...]}

``bytes_per_token`` (text bytes over tokens) turns loss into bits per byte. A shard may also name
``bytes``: int64 [documents], the text bytes of each document (``.npy``); where all do, the held-out
documents' own ratio is used instead of the mean over the corpus. ``digests`` names a hash of each document
(uint8 [documents, 16], ``.npy``, ``document_digest``): a remote folder that has them is opened without
reading its tokens. ``tokenizer`` of the manifest is the fingerprint of the tokenizer that made the ids.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from scaling.config import ConfigError, check_keys
from scaling.data.remote import RemoteFolder
from scaling.files import write_json

DTYPES = {"uint16": np.dtype("<u2"), "uint32": np.dtype("<u4")}
_MANIFEST_KEYS = ["format", "version", "dtype", "vocab", "bytes_per_token", "shards", "tokenizer"]
_SHARD_KEYS = ["tokens", "count", "documents", "bytes", "digests"]
_LARGEST_VOCAB = 2**31 - 1  # batches are int32


def write_token_shards(
    folder: Path | str,
    documents: Iterable[np.ndarray],
    vocab: int,
    *,
    bytes_per_token: float | None = None,
    document_bytes: Iterable[int] | None = None,
    dtype: str | None = None,
    shard_tokens: int = 2**28,
    suffix: str = ".npy",
    tokenizer: str | None = None,
) -> Path:
    """Writes documents of token ids as shards with a manifest; the manifest comes last.

    Args:
      folder: made where it is missing; it must not hold a manifest yet.
      documents: 1-D integer arrays (or lists), none empty, each id in 0 .. vocab - 1.
      vocab: how many token ids there are.
      bytes_per_token: text bytes over tokens, over the whole corpus.
      document_bytes: or the text bytes of each document (exact bits per byte on any split).
      dtype: ``uint16`` or ``uint32``; by default the smaller that holds the vocabulary.
      shard_tokens: a shard is closed when it holds this many tokens or more.
      suffix: ``.npy`` or ``.bin``, the tokens' file format.
      tokenizer: the fingerprint of the tokenizer, kept in the manifest.

    Returns:
      The manifest's path.

    Raises:
      ConfigError: an empty document, an id beyond the vocabulary, no documents, or a folder in use.
    """
    folder = Path(folder)
    manifest_path = folder / "manifest.json"
    dtype = dtype or ("uint16" if vocab <= 2**16 else "uint32")
    if dtype not in DTYPES or not 1 <= vocab <= min(2 ** (8 * DTYPES[dtype].itemsize), _LARGEST_VOCAB):
        raise ConfigError(
            f"vocab is {vocab} with dtype {dtype!r}; it must fit uint16 (to 65536) or uint32 (to 2^31 - 1)"
        )
    if suffix not in (".npy", ".bin"):
        raise ConfigError(f"suffix is {suffix!r}; it must be '.npy' or '.bin'")
    if (bytes_per_token is None) == (document_bytes is None):
        raise ConfigError("bytes_per_token or document_bytes must be given, and not both")
    if manifest_path.exists():
        raise ConfigError(
            f"folder is {str(folder)!r}, which holds a manifest already; it must be a new folder"
        )
    folder.mkdir(parents=True, exist_ok=True)
    byte_counts = None if document_bytes is None else iter(document_bytes)
    shards, pending, sizes, held, tokens_total, bytes_total = [], [], [], 0, 0, 0
    for d, document in enumerate(documents):
        pending.append(_checked_document(d, document, vocab, DTYPES[dtype]))
        sizes.append(0 if byte_counts is None else _next_bytes(byte_counts, d))
        held += pending[-1].size
        tokens_total += pending[-1].size
        bytes_total += sizes[-1]
        if held >= shard_tokens:
            told = None if byte_counts is None else sizes
            shards.append(_write_shard(folder, len(shards), pending, told, suffix))
            pending, sizes, held = [], [], 0
    if pending:
        shards.append(
            _write_shard(folder, len(shards), pending, None if byte_counts is None else sizes, suffix)
        )
    if not shards:
        raise ConfigError("documents is empty; at least one document must be given")
    manifest = {
        "format": "token-shards",
        "version": 1,
        "dtype": dtype,
        "vocab": int(vocab),
        "bytes_per_token": float(bytes_per_token) if byte_counts is None else bytes_total / tokens_total,
        "shards": shards,
        **({} if tokenizer is None else {"tokenizer": tokenizer}),
    }
    check_manifest(manifest, manifest_path)
    write_json(manifest_path, manifest)
    return manifest_path


def _write_shard(
    folder: Path, number: int, documents: list[np.ndarray], byte_counts: list[int] | None, suffix: str
) -> dict:
    """Writes one shard and returns its entry in the manifest."""
    tokens = np.concatenate(documents)
    shard = {
        "tokens": f"tokens-{number:05d}{suffix}",
        "count": tokens.size,
        "documents": f"documents-{number:05d}.npy",
    }
    if suffix == ".npy":
        np.save(folder / shard["tokens"], tokens)
    else:
        tokens.tofile(folder / shard["tokens"])
    np.save(folder / shard["documents"], np.cumsum([0, *map(len, documents)], dtype=np.int64))
    shard["digests"] = f"digests-{number:05d}.npy"
    digests = b"".join(map(document_digest, documents))
    np.save(folder / shard["digests"], np.frombuffer(digests, np.uint8).reshape(-1, 16))
    if byte_counts is not None:
        shard["bytes"] = f"bytes-{number:05d}.npy"
        np.save(folder / shard["bytes"], np.array(byte_counts, np.int64))
    return shard


def document_digest(tokens: np.ndarray) -> bytes:
    """16 bytes of BLAKE2b of a document's tokens as they lie on disk."""
    return hashlib.blake2b(tokens, digest_size=16).digest()


def _checked_document(d: int, document, vocab: int, dtype: np.dtype) -> np.ndarray:
    tokens = np.asarray(document)
    if tokens.ndim != 1 or not tokens.size or tokens.dtype.kind not in "ui":
        raise ConfigError(
            f"document {d} is {tokens.dtype} {tokens.shape}; it must be a 1-D array of integers, not empty"
        )
    low, high = int(tokens.min()), int(tokens.max())
    if low < 0 or high >= vocab:
        raise ConfigError(
            f"document {d} holds the token id {high if high >= vocab else low}; "
            f"ids must be from 0 to vocab - 1 = {vocab - 1}"
        )
    return tokens.astype(dtype)


def _next_bytes(byte_counts, d: int) -> int:
    count = next(byte_counts, None)
    if count is None or count < 0:
        raise ConfigError(f"document_bytes gives {count} for document {d}; it must give a count for each")
    return int(count)


def read_manifest(folder: Path | RemoteFolder) -> dict:
    """Reads and checks ``manifest.json``.

    Raises:
      ConfigError: it is missing, not JSON, has unknown or missing keys, or a value out of range.
    """
    path = folder / "manifest.json"
    try:
        text = folder.read("manifest.json") if isinstance(folder, RemoteFolder) else path.read_bytes()
        manifest = json.loads(text)
    except OSError as error:
        raise ConfigError(
            f"data.path is {str(folder)!r}; it must be a folder of token shards with a manifest.json "
            f"({error.strerror})"
        ) from error
    except ValueError as error:
        raise ConfigError(f"{path} is not valid JSON ({error}); it must be written whole") from error
    check_manifest(manifest, path)
    return manifest


def check_manifest(manifest: dict, path: Path | str) -> None:
    """Raises ``ConfigError`` where the manifest is not as this module's docstring says."""

    def need(ok: bool, what: str, value, valid: str) -> None:
        if not ok:
            raise ConfigError(f"{path}: {what} is {value!r}; it must be {valid}")

    need(isinstance(manifest, dict), "the manifest", type(manifest).__name__, "a mapping")
    check_keys(str(path), manifest, _MANIFEST_KEYS)
    get = manifest.get
    need(get("format") == "token-shards", "format", get("format"), "'token-shards'")
    need(get("version") == 1, "version", get("version"), "1")
    need(
        isinstance(get("dtype"), str) and get("dtype") in DTYPES,
        "dtype",
        get("dtype"),
        "'uint16' or 'uint32'",
    )
    need(
        _is_int(get("vocab"))
        and 1 <= get("vocab") <= min(2 ** (8 * DTYPES[get("dtype")].itemsize), _LARGEST_VOCAB),
        "vocab",
        get("vocab"),
        f"a positive integer whose ids fit {get('dtype')} and int32",
    )
    ratio = get("bytes_per_token")
    is_ratio = isinstance(ratio, (int, float)) and not isinstance(ratio, bool)
    need(is_ratio and 0 < ratio < math.inf, "bytes_per_token", ratio, "a positive number")
    need(isinstance(manifest.get("tokenizer", ""), str), "tokenizer", get("tokenizer"), "a fingerprint")
    need(isinstance(get("shards"), list) and get("shards"), "shards", get("shards"), "a list of shards")
    for i, shard in enumerate(get("shards")):
        need(isinstance(shard, dict), f"shards[{i}]", shard, "a mapping")
        check_keys(f"{path}: shards[{i}]", shard, _SHARD_KEYS)
        for key in ("tokens", "documents"):
            need(isinstance(shard.get(key), str), f"shards[{i}].{key}", shard.get(key), "a file's name")
        need(
            shard["tokens"].endswith((".npy", ".bin")), f"shards[{i}].tokens", shard["tokens"], ".npy or .bin"
        )
        for key in ("bytes", "digests"):
            need(isinstance(shard.get(key, ""), str), f"shards[{i}].{key}", shard.get(key), "a file's name")
        count = shard.get("count")
        need(_is_int(count) and count > 0, f"shards[{i}].count", count, "a positive integer")


def _is_int(value) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
