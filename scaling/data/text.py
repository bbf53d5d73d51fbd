"""Documents from files: bytes as tokens, split by file, without repeats between documents."""

from __future__ import annotations

import hashlib
import os
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from scaling.config import ConfigError
from scaling.data.dedup import GUARANTEE, unrepeated_spans
from scaling.data.split import choose_heldout, name_hashes

VOCAB = 256
_NOT_THE_LIBRARY = {"site-packages", "dist-packages", "__pycache__"}
# Written by the machine's own build or administrator, so not text that another machine would have.
_MACHINE_FILES = ("_sysconfigdata", "_sysconfig_vars", "sitecustomize.py", "usercustomize.py")


def stdlib_folder() -> Path:
    """Where the running interpreter keeps its standard library."""
    return Path(sysconfig.get_paths()["stdlib"])


def stdlib_python() -> str:
    """The interpreter whose library it is, as in ``CPython 3.13.0``."""
    return f"{sys.implementation.name} {sys.version.split()[0]}"


def list_files(folder: Path, source: str) -> list[list]:
    """The files of a source, sorted by name.

    Args:
      folder: the folder, read with all folders below it.
      source: ``stdlib`` takes the .py files outside site-packages; ``text`` every file not hidden.

    Returns:
      ``[name, bytes, mtime_ns]`` for each file, ``name`` relative to ``folder`` with forward slashes.

    Raises:
      ConfigError: the folder is missing, unreadable or holds no such file, or a file vanished.
    """
    found = sorted(_walk(folder, folder, source))
    if not found:
        wanted = ".py files" if source == "stdlib" else "files with text in them"
        raise ConfigError(f"data.path is {str(folder)!r}; it must be a folder that holds {wanted}")
    return found


def _walk(folder: Path, root: Path, source: str) -> Iterator[list]:
    try:
        entries = list(os.scandir(folder))
    except OSError as error:
        raise ConfigError(
            f"data.path is {str(root)!r}; it must be a readable folder ({error.strerror}: {folder})"
        ) from error
    for entry in entries:
        if entry.is_dir(follow_symlinks=False):
            hidden = entry.name in _NOT_THE_LIBRARY if source == "stdlib" else entry.name.startswith(".")
            if not hidden:
                yield from _walk(Path(entry.path), root, source)
        elif _wanted(entry, source):
            try:
                info = entry.stat()
            except OSError as error:
                raise _vanished(entry.path, error) from error
            if info.st_size:
                yield [Path(entry.path).relative_to(root).as_posix(), info.st_size, info.st_mtime_ns]


def _wanted(entry: os.DirEntry, source: str) -> bool:
    if source == "text":
        return not entry.name.startswith(".")
    return entry.name.endswith(".py") and not entry.name.startswith(_MACHINE_FILES) and entry.is_file()


def _vanished(path: str | Path, error: OSError) -> ConfigError:
    return ConfigError(
        f"data.path: the file {str(path)!r} cannot be read ({error.strerror}); it must stay where it is and "
        "be readable while the data are in use"
    )


def _read(folder: Path, name: str, source: str) -> bytes:
    try:
        text = (folder / name).read_bytes()
    except OSError as error:
        raise _vanished(folder / name, error) from error
    if source == "text":
        try:
            text.decode()
        except UnicodeDecodeError as error:
            raise ConfigError(
                f"data.path: {str(folder / name)!r} is not UTF-8 text (byte {text[error.start]:#04x} at "
                f"{error.start}); it must be converted or moved out of the folder"
            ) from error
    return text


def build_bytes(folder: Path, files: list[list], source: str, fraction: float, seed: int, out: Path) -> dict:
    """Builds the train and held-out bytes of a folder of files.

    Files are held out by a hash of their name and the seed. Held-out files come first in the order of
    precedence, so they keep what they share with training files, and training loses it. Each part stands
    in the order of another hash of the names: any prefix of it is a random sample of its files.

    Args:
      folder: the folder.
      files: as ``list_files`` gives them.
      source: ``stdlib`` or ``text``.
      fraction: the most of all bytes that may be held out.
      seed: decides the split and the order.
      out: where to write ``{train,heldout}.bin`` and ``{train,heldout}_offsets.npy``.

    Returns:
      Counts for the reports, and the content's fingerprint.
    """
    names = [name for name, _, _ in files]
    texts = [_read(folder, name, source) for name in names]
    sizes = np.array([len(text) for text in texts], np.int64)
    heldout = choose_heldout(sizes, name_hashes(names, seed, "split"), fraction)
    order = np.lexsort((name_hashes(names, seed, "order"), ~heldout))
    spans = unrepeated_spans([texts[i] for i in order])
    digest = hashlib.sha256(b"documents of bytes")
    counts = {}
    for part, begin, end in (
        ("heldout", 0, int(heldout.sum())),
        ("train", int(heldout.sum()), len(order)),
    ):
        pieces = [
            texts[order[d]][b:e] for d in range(begin, end) for b, e in spans[d]
        ]  # a cut file is several documents: nothing pretends that its parts followed each other
        if not pieces:
            raise ConfigError(
                f"data.path is {str(folder)!r}; nothing is left for the {part} documents once passages of "
                f"{GUARANTEE} bytes that other files hold too are removed: the files must differ more"
            )
        (out / f"{part}.bin").write_bytes(b"".join(pieces))
        offsets = np.cumsum([0, *map(len, pieces)], dtype=np.int64)
        np.save(out / f"{part}_offsets.npy", offsets)
        digest.update(part.encode() + offsets.astype("<i8").tobytes())
        for piece in pieces:
            digest.update(piece)
        counts[f"{part}_files"] = sum(1 for d in range(begin, end) if spans[d])
    kept = sum(e - b for document in spans for b, e in document)
    return {
        "fingerprint": digest.hexdigest()[:32],
        "bytes_per_token": 1.0,
        "files": len(names),
        **counts,
        "repeated_files": sum(1 for document in spans if not document),
        "cut_files": sum(1 for document, i in zip(spans, order, strict=True) if _is_cut(document, sizes[i])),
        "removed_bytes": int(sizes.sum()) - kept,
    }


def _is_cut(spans: list[tuple[int, int]], size: int) -> bool:
    return bool(spans) and spans != [(0, size)]
