"""What a compilation found, kept on disk: one JSON file a program.

The key is a hash of the lowered program's text, the target, the compilers' versions and this format's
version, so that nothing that could change a number can be missed. A file that cannot be read is as none.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
from pathlib import Path

from scaling.files import write_json

FORMAT = 1
"""Of the numbers kept: raised when what they mean changes."""


def default_folder() -> Path:
    """``$XDG_CACHE_HOME/scaling/preflight``, or the same under ``~/.cache``."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "scaling" / "preflight"


def versions() -> dict[str, str | None]:
    """Of the packages that decide what is compiled; None where one is missing."""
    found = {}
    for name in ("jax", "jaxlib", "libtpu"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def key(program: str, target: str) -> str:
    """The name of a program's entry: 32 hex digits.

    Args:
      program: its text as lowered, before it is compiled. target: the slice's topology.
    """
    facts = {"format": FORMAT, "target": target, "versions": versions()}
    text = json.dumps(facts, sort_keys=True) + "\n" + program
    return hashlib.sha256(text.encode()).hexdigest()[:32]


class Cache:
    """Entries in a folder. With folder None nothing is kept.

    Attributes:
      hits, misses: of this object so far.
    """

    def __init__(self, folder: Path | None):
        self.folder = folder
        self.hits = self.misses = 0

    def get(self, name: str) -> dict | None:
        """An entry's numbers, or None where there is none that can be read."""
        value = self._read(name)
        if value is None:
            self.misses += 1
        else:
            self.hits += 1
        return value

    def _read(self, name: str) -> dict | None:
        if self.folder is None:
            return None
        try:
            value = json.loads((self.folder / f"{name}.json").read_text())
        except (OSError, ValueError):
            return None
        whole = (
            isinstance(value, dict) and value.get("format") == FORMAT and isinstance(value.get("found"), dict)
        )
        return value["found"] if whole else None

    def put(self, name: str, found: dict) -> None:
        """Keeps an entry, written whole or not at all."""
        if self.folder is not None:
            write_json(
                self.folder / f"{name}.json", {"format": FORMAT, "versions": versions(), "found": found}
            )
