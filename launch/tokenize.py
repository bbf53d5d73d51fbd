"""``scaling tokenize``: documents from text files, JSON lines or a data set of the Hub, to token shards.

The tokenizer is Hugging Face ``tokenizers``': a byte-level BPE trained on the documents, or one loaded from a
``tokenizer.json``. It is written beside the shards, and its fingerprint into their manifest.
"""

from __future__ import annotations

import gzip
import hashlib
import itertools
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np

from scaling.config import ConfigError

SUFFIXES = (".txt", ".md", ".text", ".jsonl", ".ndjson")
COMPRESSED = (".gz", ".zst")
_BATCH = 256  # documents encoded at once: enough to keep the tokenizer's threads busy, small in memory


def need(package: str):
    """Imports a package of the extra ``data``.

    Raises:
      ConfigError: it is not installed.
    """
    import importlib

    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise ConfigError(
            f"scaling tokenize needs the package {package}; install the extra: pip install 'scaling[data]'"
        ) from error


def list_inputs(paths: Iterable[Path]) -> list[Path]:
    """The files to read: those named, and of a folder every text or JSON-lines file, sorted.

    Raises:
      ConfigError: a path that is not there, or a folder without such a file.
    """
    found = []
    for path in paths:
        if path.is_dir():
            inside = sorted(p for p in path.rglob("*") if p.is_file() and _plain_suffix(p) in SUFFIXES)
            inside = [
                p for p in inside if not any(part.startswith(".") for part in p.relative_to(path).parts)
            ]
            if not inside:
                raise ConfigError(
                    f"{str(path)!r} holds no file ending in {', '.join(SUFFIXES)} (or that and .gz, .zst)"
                )
            found += inside
        elif path.is_file():
            found.append(path)
        else:
            raise ConfigError(
                f"{str(path)!r} does not exist; give text files, JSON lines or a folder of them"
            )
    return found


def _plain_suffix(path: Path) -> str:
    return (path.with_suffix("") if path.suffix in COMPRESSED else path).suffix


def read_documents(files: Iterable[Path], field: str) -> Iterator[str]:
    """Documents in order: a text file is one, a line of JSON is one; empty ones are left out.

    Args:
      files: paths; .gz and .zst are read through their decompressors.
      field: the key of a JSON line that holds the text.

    Raises:
      ConfigError: not UTF-8, not JSON, a line without the field, or no decompressor for .zst.
    """
    for path in files:
        try:
            with _open(path) as f:
                if _plain_suffix(path) in (".jsonl", ".ndjson"):
                    texts = (_text_of(line, field, path, i) for i, line in enumerate(f, 1) if line.strip())
                else:
                    texts = iter([f.read().decode()])
                yield from (text for text in texts if text)
        except UnicodeDecodeError as error:
            raise ConfigError(f"{str(path)!r} is not UTF-8 text ({error}); it must be converted") from error
        except (OSError, EOFError) as error:
            raise ConfigError(f"{str(path)!r} cannot be read ({error})") from error


def _open(path: Path):
    if path.suffix == ".gz":
        return gzip.open(path, "rb")
    if path.suffix == ".zst":
        try:
            from compression import zstd  # Python 3.14 and newer
        except ImportError:
            try:
                import zstandard as zstd
            except ImportError as error:
                raise ConfigError(
                    f"{str(path)!r} needs Python 3.14 or the package zstandard: pip install zstandard"
                ) from error
        return zstd.open(path, "rb")
    return open(path, "rb")


def _text_of(line: bytes, field: str, path: Path, number: int) -> str:
    try:
        text = json.loads(line.decode())[field]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{str(path)!r}, line {number}: must be a JSON mapping with the key {field!r} ({error!r})"
        ) from error
    if not isinstance(text, str):
        raise ConfigError(
            f"{str(path)!r}, line {number}: {field!r} is {type(text).__name__}; it must be text"
        )
    return text


def read_hub(name: str, subset: str | None, split: str, field: str, limit: int | None) -> Iterator[str]:
    """Documents of a data set on the Hugging Face Hub (or a local folder that ``datasets`` reads), streamed.

    Raises:
      ConfigError: ``datasets`` is missing, the data set cannot be opened, or has no such field.
    """
    datasets = need("datasets")
    try:
        rows = datasets.load_dataset(name, subset, split=split, streaming=True)
        for row in itertools.islice(rows, limit):
            if not isinstance(row.get(field), str):
                raise ConfigError(
                    f"--hub {name!r}: a row has the keys {', '.join(row)}; --field {field!r} must name a text"
                )
            if row[field]:
                yield row[field]
    except (OSError, ValueError, RuntimeError, ConnectionError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"--hub {name!r} cannot be read ({type(error).__name__}: {error})") from error


def source(
    paths: Iterable[Path], hub: str | None, subset: str | None, split: str, field: str, limit: int | None
) -> Callable[[], Iterable[str]]:
    """The documents that the command's options name, as a function that gives them from the first on.

    Raises:
      ConfigError: neither files nor a data set of the Hub, or both.
    """
    if bool(paths) == (hub is not None):
        raise ConfigError("give one of PATHS (files or folders of text) and --hub (a data set's name)")
    if hub is not None:
        return lambda: read_hub(hub, subset, split, field, limit)
    files = list_inputs(paths)
    return lambda: read_documents(files, field)


def show(console, done: dict) -> None:
    """What a person sees at the end."""
    console.print(
        f"{done['documents']} documents, {done['tokens']} tokens of {done['vocab']} ids, "
        f"{done['bytes_per_token']:.3f} bytes per token; tokenizer {done['tokenizer'][:12]}"
    )
    console.print(
        f"written to {done['folder']}; next, in a study config: "
        f"data = dict(source='tokens', path='{done['folder']}')",
        soft_wrap=True,
    )


def train_tokenizer(documents: Iterable[str], vocab: int, special: list[str]):
    """A byte-level BPE (Sennrich et al. 2016; on bytes, Radford et al. 2019): any text, and back, exactly.

    Args:
      documents: the text to train on.
      vocab: how many token ids there may be, the 256 bytes and the special tokens among them.
      special: special tokens, the first ids.

    Returns:
      A ``tokenizers.Tokenizer``.

    Raises:
      ConfigError: ``vocab`` is too small to hold the bytes.
    """
    tokenizers = need("tokenizers")
    if vocab < 256 + len(special):
        raise ConfigError(
            f"--vocab is {vocab}; it must be at least {256 + len(special)}: "
            f"256 bytes and {len(special)} special tokens"
        )
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=special,
        initial_alphabet=sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    return tokenizer


def load_tokenizer(path: Path):
    """A tokenizer from a ``tokenizer.json``.

    Raises:
      ConfigError: no such file, or not a tokenizer.
    """
    tokenizers = need("tokenizers")
    try:
        return tokenizers.Tokenizer.from_str(path.read_text())
    except Exception as error:  # the library raises bare Exceptions
        raise ConfigError(f"--tokenizer {str(path)!r} is not a tokenizer.json ({error})") from error


def special_id(tokenizer, option: str, token: str | None) -> list[int]:
    """The id of a special token as a list, empty for None.

    Raises:
      ConfigError: the tokenizer does not have it.
    """
    if token is None:
        return []
    number = tokenizer.token_to_id(token)
    if number is None:
        raise ConfigError(f"{option} is {token!r}, which the tokenizer does not have")
    return [number]


def encode(tokenizer, documents: Iterable[str], begin: list[int], end: list[int]):
    """Yields (ids int64 [tokens], text bytes) for each document; those without a token are left out.

    A special token stands for no text: a document's bytes are those of its text alone.
    """
    documents = iter(documents)
    while batch := list(itertools.islice(documents, _BATCH)):
        for text, encoded in zip(batch, tokenizer.encode_batch(batch, add_special_tokens=False), strict=True):
            if encoded.ids:
                yield np.array([*begin, *encoded.ids, *end], np.int64), len(text.encode())


def fingerprint(tokenizer) -> str:
    """32 hex digits of SHA-256 over the tokenizer's own JSON: another tokenizer, another fingerprint."""
    return hashlib.sha256(tokenizer.to_str().encode()).hexdigest()[:32]


def tokenize(
    documents: Callable[[], Iterable[str]],
    out: Path,
    tokenizer: Path | None = None,
    vocab: int | None = None,
    begin: str | None = None,
    end: str | None = None,
    shard_tokens: int = 2**28,
    train_documents: int | None = None,
) -> dict:
    """Writes documents as token shards with their tokenizer.

    Args:
      documents: gives the documents from the first on, each time it is called (twice where one is trained).
      out: a new folder, for ``manifest.json``, the shards and ``tokenizer.json``.
      tokenizer: a ``tokenizer.json`` to load.
      vocab: or train one of so many ids on the documents.
      begin, end: special tokens put before and after each document; None for none.
      shard_tokens: as in ``write_token_shards``.
      train_documents: train on so many of the first documents; None for all.

    Returns:
      ``folder, documents, tokens, bytes_per_token, vocab, tokenizer`` (its fingerprint).

    Raises:
      ConfigError: bad input, or a folder in use.
    """
    from scaling.data import write_token_shards
    from scaling.data.shards import read_manifest
    from scaling.files import write_whole

    if (tokenizer is None) == (vocab is None):
        raise ConfigError(
            "give one of --tokenizer (a tokenizer.json to load) and --vocab (train one of that size)"
        )
    if (out / "manifest.json").exists():
        raise ConfigError(f"--out is {str(out)!r}, which holds shards already; it must be a new folder")
    if tokenizer is None:
        special = list(dict.fromkeys(token for token in (end, begin) if token is not None))
        made = train_tokenizer(itertools.islice(documents(), train_documents), vocab, special)
    else:
        made = load_tokenizer(tokenizer)
        made.no_truncation()
        made.no_padding()
    made.encode_special_tokens = True  # text that spells a special token is text
    ids = special_id(made, "--begin", begin), special_id(made, "--end", end)
    encoded, counted = itertools.tee(encode(made, documents(), *ids))
    out.mkdir(parents=True, exist_ok=True)
    write_whole(out / "tokenizer.json", made.to_str())
    write_token_shards(
        out,
        (tokens for tokens, _ in encoded),
        max(made.get_vocab().values()) + 1,
        document_bytes=(count for _, count in counted),
        shard_tokens=shard_tokens,
        tokenizer=fingerprint(made),
    )
    manifest = read_manifest(out)
    return {
        "folder": str(out),
        "documents": sum(np.load(out / s["documents"]).size - 1 for s in manifest["shards"]),
        "tokens": sum(s["count"] for s in manifest["shards"]),
        "bytes_per_token": manifest["bytes_per_token"],
        "vocab": manifest["vocab"],
        "tokenizer": manifest["tokenizer"],
    }
