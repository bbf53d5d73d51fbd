"""Built corpora in the user's cache folder: written whole or not at all, checked when opened."""

from __future__ import annotations

import fcntl
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
# Up to this size every open checks the content (0.3 s at most); above it, the sizes of the files alone.
_CHECKED_BYTES = 256 * 2**20
_ABANDONED_SECONDS = 86_400


def cache_root() -> Path:
    """``$SCALING_CACHE``, or ``~/.cache/scaling``."""
    return Path(os.environ.get("SCALING_CACHE") or Path.home() / ".cache" / "scaling")


def cached(key: str, build: Callable[[Path], dict]) -> tuple[Path, dict]:
    """A folder of built files, made at the first call and found at the next.

    Safe when several processes ask at once: one builds under a lock that dies with it, the others wait. A
    damaged entry is built again; a whole one is never touched, so readers need no lock.

    Args:
      key: names the entry; everything that decides the content must be in it.
      build: writes files into the folder that it is given and returns a JSON value about them.

    Returns:
      The entry's folder and what ``build`` returned.

    Raises:
      ConfigError: the cache folder cannot be written, or the disk is full.
    """
    folder = cache_root() / "data" / key
    try:
        found = _read(folder)
        if found is None:
            folder.parent.mkdir(parents=True, exist_ok=True)
            with open(folder.with_name(f".{key}.lock"), "w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                found = _read(folder, warn=True)
                if found is None:
                    found = _build(folder, build)
    except OSError as error:
        raise ConfigError(
            f"the data cache failed: {explain_os_error(error, error.filename or folder)}; "
            "SCALING_CACHE names another cache folder"
        ) from error
    return folder, found


def _build(folder: Path, build: Callable[[Path], dict]) -> dict:
    """Builds aside and renames; called under the entry's lock."""
    _remove_abandoned(folder.parent)
    aside, damaged = (folder.with_name(f".{folder.name}.{uuid.uuid4().hex}") for _ in range(2))
    aside.mkdir()
    try:
        about = build(aside)
        files = {path.name: [path.stat().st_size, _sha256(path)] for path in sorted(aside.iterdir())}
        text = json.dumps({"version": _VERSION, "files": files, "about": about}, allow_nan=False)
        (aside / "entry.json").write_text(text)
        for path in aside.iterdir():
            with open(path, "rb+") as f:
                os.fsync(f.fileno())
        if folder.exists():
            os.rename(folder, damaged)
        os.rename(aside, folder)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
        shutil.rmtree(damaged, ignore_errors=True)
    return about


def _read(folder: Path, warn: bool = False) -> dict | None:
    """What was stored with the entry; None where there is none or it is damaged."""
    try:
        entry = json.loads((folder / "entry.json").read_text())
        files, about = entry["files"], entry["about"]
        whole = entry["version"] == _VERSION and all(
            os.path.getsize(folder / name) == size for name, (size, _) in files.items()
        )
        if whole and sum(size for size, _ in files.values()) <= _CHECKED_BYTES:
            whole = all(_sha256(folder / name) == digest for name, (_, digest) in files.items())
    except (FileNotFoundError, NotADirectoryError, ValueError, KeyError, TypeError):
        whole = False
    if whole:
        return about
    if warn and folder.exists():
        warnings.warn(f"the cached data in {folder} are damaged; building them again", stacklevel=4)
    return None


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
