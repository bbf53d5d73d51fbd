"""Opening token shards: every file checked against the manifest, every document placed."""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path

import numpy as np

from scaling.config import ConfigError
from scaling.data.permutation import mix
from scaling.data.remote import RemoteFolder, RemoteTokens
from scaling.data.shards import DTYPES, document_digest
from scaling.data.split import choose_heldout, name_hashes


def list_files(folder: Path | RemoteFolder, manifest: dict) -> list[list]:
    """``[name, bytes, mtime_ns]`` of every file that the manifest names; its version in place of the time
    where the folder is remote.

    Raises:
      ConfigError: one is missing or unreadable.
    """
    found = []
    for shard in manifest["shards"]:
        for key in ("tokens", "documents", "bytes"):
            if key not in shard:
                continue
            if isinstance(folder, RemoteFolder):
                found.append([shard[key], *folder.stat(shard[key])])
                continue
            try:
                info = (folder / shard[key]).stat()
            except OSError as error:
                raise ConfigError(
                    f"data.path: the file {str(folder / shard[key])!r} that manifest.json names cannot be "
                    f"read ({error.strerror}); it must stay where it is"
                ) from error
            found.append([shard[key], info.st_size, info.st_mtime_ns])
    return found


def map_tokens(folder: Path | RemoteFolder, manifest: dict, shard: dict) -> np.ndarray | RemoteTokens:
    """The shard's tokens, memory-mapped or fetched as they are read: uint16 or uint32 [count].

    Raises:
      ConfigError: another size or dtype than the manifest says, or an unreadable file.
    """
    path, dtype = folder / shard["tokens"], DTYPES[manifest["dtype"]]
    if isinstance(folder, RemoteFolder):
        tokens = folder.tokens(shard["tokens"], dtype)
    elif path.suffix == ".npy":
        tokens = _load_npy(path, mapped=True)
        if tokens.dtype != dtype or tokens.ndim != 1:
            raise ConfigError(
                f"{path} holds {tokens.dtype} {tokens.shape}; the manifest says {manifest['dtype']} in one "
                "dimension, and both must agree"
            )
    else:
        tokens = _map_raw(path, dtype)
    if tokens.size != shard["count"]:
        raise ConfigError(
            f"{path} holds {tokens.size} tokens of {manifest['dtype']}; the manifest says {shard['count']}, "
            "and both must agree (is the shard cut short, or of another dtype?)"
        )
    return tokens if isinstance(tokens, RemoteTokens) else np.asarray(tokens)


def _map_raw(path: Path, dtype: np.dtype) -> np.ndarray:
    try:
        size = path.stat().st_size
        if size == 0 or size % dtype.itemsize:
            raise ConfigError(f"{path} holds {size} bytes; it must hold whole {dtype.name} tokens")
        return np.memmap(path, dtype, "r")
    except OSError as error:
        raise ConfigError(f"{path} cannot be read ({error.strerror}); it must stay where it is") from error


def _load_npy(path: Path, mapped: bool = False) -> np.ndarray:
    try:
        return np.load(path, mmap_mode="r" if mapped else None, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise ConfigError(f"{path} is not a whole .npy file ({error}); it must be written again") from error


def _document_array(folder: Path | RemoteFolder, name: str, size: int | None, what: str) -> np.ndarray:
    array = folder.array(name) if isinstance(folder, RemoteFolder) else _load_npy(folder / name)
    if array.dtype != np.int64 or array.ndim != 1 or (size is not None and array.size != size):
        raise ConfigError(
            f"{folder / name} holds {array.dtype} {array.shape}; it must hold {what} as int64"
            + (f" [{size}]" if size is not None else "")
        )
    return array


@dataclasses.dataclass(frozen=True)
class _Documents:
    """Every document of the shards, in their order."""

    starts_D: np.ndarray  # int64, where each begins in the shards laid end to end
    sizes_D: np.ndarray  # int64, tokens
    digests: list[bytes]  # 16 bytes of content hash each
    bytes_D: np.ndarray | None  # int64, text bytes, where every shard tells them


def _read_documents(folder: Path | RemoteFolder, manifest: dict) -> _Documents:
    """Reads every token once and checks it; of a remote shard that has digests, those alone."""
    starts, sizes, digests, text_bytes, begin = [], [], [], [], 0
    for shard in manifest["shards"]:
        tokens = map_tokens(folder, manifest, shard)
        offsets = _document_array(folder, shard["documents"], None, "document offsets")
        if offsets.size < 2 or offsets[0] != 0 or offsets[-1] != tokens.size or (np.diff(offsets) <= 0).any():
            raise ConfigError(
                f"{folder / shard['documents']}: the offsets must increase strictly from 0 to the shard's "
                f"{tokens.size} tokens"
            )
        known = isinstance(folder, RemoteFolder) and "digests" in shard
        if known:
            digests += _read_digests(folder, shard["digests"], offsets.size - 1)
        spans = [] if known else zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True)
        for b, e in spans:
            digests.append(document_digest(tokens[b:e]))
            highest = int(tokens[b:e].max())
            if highest >= manifest["vocab"]:
                raise ConfigError(
                    f"{folder / shard['tokens']} holds the token id {highest} (document {len(digests) - 1}); "
                    f"ids must be below vocab = {manifest['vocab']}"
                )
        starts.append(begin + offsets[:-1])
        sizes.append(np.diff(offsets))
        if "bytes" in shard:
            counts = _document_array(folder, shard["bytes"], offsets.size - 1, "the bytes of each document")
            if counts.min() < 0:
                raise ConfigError(
                    f"{folder / shard['bytes']} holds {counts.min()}; counts must be 0 or above"
                )
            text_bytes.append(counts)
        begin += tokens.size
    all_told = len(text_bytes) == len(manifest["shards"])
    return _Documents(
        np.concatenate(starts),
        np.concatenate(sizes),
        digests,
        np.concatenate(text_bytes) if all_told else None,
    )


def _read_digests(folder: RemoteFolder, name: str, documents: int) -> list[bytes]:
    array = folder.array(name)
    if array.dtype != np.uint8 or array.shape != (documents, 16):
        raise ConfigError(
            f"{folder / name} holds {array.dtype} {array.shape}; it must hold the documents' digests as "
            f"uint8 [{documents}, 16]"
        )
    return [row.tobytes() for row in array]


def build_index(folder: Path | RemoteFolder, manifest: dict, fraction: float, seed: int, out: Path) -> dict:
    """Reads every shard once: checks it, splits the documents, and writes where each lies.

    Documents are held out and ordered by hashes of their own tokens and the seed, so copies of one
    document fall on one side of the split. Near copies are not looked for: a tokenised corpus is taken as
    its maker left it.

    Args:
      folder: the shards.
      manifest: as ``read_manifest`` gives it.
      fraction: the most of all tokens that may be held out.
      seed: decides the split and the order.
      out: where to write ``{train,heldout}_{offsets,starts}.npy``.

    Returns:
      Counts for the reports, bytes per token, and the content's fingerprint.

    Raises:
      ConfigError: a shard that is not as its manifest says, or a token id beyond the vocabulary.
    """
    documents = _read_documents(folder, manifest)
    sizes_D = documents.sizes_D
    content_D = np.frombuffer(b"".join(documents.digests), "<u8").reshape(-1, 2)[:, 0].astype(np.uint64)
    split_salt, order_salt = (name_hashes([""], seed, purpose) for purpose in ("split", "order"))
    heldout_D = choose_heldout(sizes_D, mix(content_D ^ split_salt), fraction)
    # Copies of a document must not stand side by side, so its number enters the order too.
    number_D = np.arange(sizes_D.size, dtype=np.uint64)
    order_D = np.lexsort((mix(mix(content_D ^ order_salt) + mix(number_D)), ~heldout_D))
    parts = {"heldout": order_D[: heldout_D.sum()], "train": order_D[heldout_D.sum() :]}
    fingerprint = hashlib.sha256(f"documents of {manifest['dtype']}".encode())
    for part, chosen in parts.items():
        offsets = np.concatenate([[0], np.cumsum(sizes_D[chosen])]).astype(np.int64)
        np.save(out / f"{part}_offsets.npy", offsets)
        np.save(out / f"{part}_starts.npy", documents.starts_D[chosen])
        fingerprint.update(part.encode() + offsets.astype("<i8").tobytes())
        fingerprint.update(b"".join(documents.digests[d] for d in chosen))
    ratio = float(manifest["bytes_per_token"])
    if documents.bytes_D is not None:
        ratio = int(documents.bytes_D[heldout_D].sum()) / int(sizes_D[heldout_D].sum())
        if not ratio:
            raise ConfigError(f"{folder}: the held-out documents hold 0 bytes of text; they must hold some")
    return {
        "fingerprint": fingerprint.hexdigest()[:32],
        "bytes_per_token": ratio,
        "bytes_per_token_of": "corpus" if documents.bytes_D is None else "heldout",
        "shards": len(manifest["shards"]),
        "copied_documents": len(documents.digests) - len(set(documents.digests)),
    }
