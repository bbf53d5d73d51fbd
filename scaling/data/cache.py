"""Built corpora in the user's cache folder: written whole or not at all, checked when opened."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
import uuid
import warnings
from collections.abc import Callable
from pathlib import Path

from scaling.config import ConfigError
from scaling.files import explain_os_error

_VERSION = 1
# Up to this size every open checks the content (about 0.1 s); above it, the sizes of the files alone.
_CHECKED_BYTES = 256 * 2**20
_ABANDONED_SECONDS = 86_400


def cache_root() -> Path:
    """``$SCALING_CACHE``, or ``~/.cache/scaling``."""
    return Path(os.environ.get("SCALING_CACHE") or Path.home() / ".cache" / "scaling")


def cached(key: str, build: Callable[[Path], dict]) -> tuple[Path, dict]:
    """A folder of built files, made at the first call and found at the next.

    Safe when several processes ask at once: each builds in a folder of its own, and the first rename wins.
    A damaged entry is built again.

    Args:
      key: names the entry; everything that decides the content must be in it.
      build: writes files into the folder that it is given and returns a JSON value about them.

    Returns:
      The entry's folder and what ``build`` returned.

    Raises:
      ConfigError: the cache folder cannot be written, or the disk is full.
    """
    folder = cache_root() / "data" / key
    aside = folder.with_name(f".{key}.{os.getpid()}.{uuid.uuid4().hex}")
    try:
        found = _read(folder)
        if found is not None:
            return folder, found
        aside.mkdir(parents=True)
        _remove_abandoned(folder.parent)
        about = build(aside)
        files = {path.name: [path.stat().st_size, _sha256(path)] for path in sorted(aside.iterdir())}
        text = json.dumps({"version": _VERSION, "files": files, "about": about}, allow_nan=False)
        (aside / "entry.json").write_text(text)
        for path in aside.iterdir():
            with open(path, "rb+") as f:
                os.fsync(f.fileno())
        _move_into_place(aside, folder)
    except OSError as error:
        raise ConfigError(
            f"the data cache failed: {explain_os_error(error, error.filename or folder)}; "
            "SCALING_CACHE names another cache folder"
        ) from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return folder, about


def _move_into_place(aside: Path, folder: Path) -> None:
    """Renames the built folder; where another process was first, its equal entry stays."""
    for _ in range(3):  # a damaged entry may come in between when several processes replace it at once
        try:
            os.rename(aside, folder)
            return
        except OSError:
            if not folder.exists():
                raise
            if _read(folder) is not None:
                return
            damaged = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}")
            try:
                os.rename(folder, damaged)
            except FileNotFoundError:
                continue
            shutil.rmtree(damaged, ignore_errors=True)
    raise OSError(f"{folder} keeps changing")


def _read(folder: Path) -> dict | None:
    """What was stored with the entry; None where there is none or it is damaged."""
    try:
        text = (folder / "entry.json").read_text()
    except (FileNotFoundError, NotADirectoryError):
        if folder.exists():
            warnings.warn(f"the cached data in {folder} are incomplete; building them again", stacklevel=4)
        return None
    try:
        entry = json.loads(text)
        files, about = entry["files"], entry["about"]
        whole = entry["version"] == _VERSION and all(
            os.path.getsize(folder / name) == size for name, (size, _) in files.items()
        )
        if whole and sum(size for size, _ in files.values()) <= _CHECKED_BYTES:
            whole = all(_sha256(folder / name) == digest for name, (_, digest) in files.items())
    except (OSError, ValueError, KeyError, TypeError):
        whole = False
    if not whole:
        warnings.warn(f"the cached data in {folder} are damaged; building them again", stacklevel=4)
        return None
    return about


def _sha256(path: Path) -> str:
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def _remove_abandoned(parent: Path) -> None:
    """Removes what builders killed more than a day ago left behind."""
    for path in parent.glob(".*"):
        try:
            if time.time() - path.stat().st_mtime > _ABANDONED_SECONDS:
                shutil.rmtree(path, ignore_errors=True)
        except FileNotFoundError:
            continue
