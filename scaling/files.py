"""Files written whole or not at all, and the layout of a study folder."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any


class StudyError(RuntimeError):
    """A study folder that cannot be used as asked; the message says what to do."""


class StorageError(StudyError):
    """The disk is full, or the folder cannot be written: nothing in the study could go on."""


def write_whole(path: Path | str, data: str | bytes) -> None:
    """Writes a file aside and renames it, so that a reader sees the old file or the new one.

    Raises:
      StorageError: the folder cannot be written, or the disk is full; the old file stays as it was.
    """
    path = Path(path)
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(aside, "wb") as f:
            f.write(data.encode() if isinstance(data, str) else data)
            f.flush()
            os.fsync(f.fileno())
        os.replace(aside, path)
    except OSError as error:
        aside_exists = os.access(path.parent, os.W_OK) and aside.exists()
        if aside_exists:
            aside.unlink(missing_ok=True)
        raise StorageError(explain_os_error(error, path)) from error


def explain_os_error(error: OSError, path: Path | str) -> str:
    """One sentence for a failed write."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"the disk is full: {path} was not written; free some space and run the same command again"
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return f"{path} cannot be written ({error.strerror}); choose a folder that you may write to"
    return f"{path} cannot be written ({error.strerror})"


def write_json(path: Path | str, value: Any) -> None:
    """Writes JSON whole or not at all; NaN and infinities are refused (use null)."""
    write_whole(path, json.dumps(value, indent=1, allow_nan=False) + "\n")


def read_json(path: Path | str) -> Any:
    """Reads a JSON file.

    Raises:
      StudyError: the file is missing or is not JSON.
    """
    try:
        return json.loads(Path(path).read_text())
    except FileNotFoundError as error:
        raise StudyError(f"{path} does not exist") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise StudyError(f"{path} is not valid JSON ({error}); restore it or remove it") from error
    except OSError as error:
        raise StudyError(f"{path} cannot be read ({error.strerror})") from error


def read_jsonl(path: Path | str) -> list[dict]:
    """The whole lines of a JSON-lines file; a torn last line is left out."""
    try:
        lines = Path(path).read_bytes().split(b"\n")
    except FileNotFoundError:
        return []
    rows = []
    for line in lines[:-1]:
        try:
            rows.append(json.loads(line))
        except (json.JSONDecodeError, UnicodeDecodeError):
            return rows  # a write torn by a kill: what follows cannot be trusted in order
    return rows


class CellFolder:
    """Paths of one cell's files, all under ``cells/<id>/``."""

    def __init__(self, study: Path | str, cell: str):
        self.path = Path(study) / "cells" / cell
        self.config = self.path / "config.json"
        self.metrics = self.path / "metrics.jsonl"
        self.result = self.path / "result.json"
        self.timing = self.path / "timing.json"
        self.checkpoints = self.path / "checkpoints"
        self.log = self.path / "log.txt"
        self.attempts = self.path / "attempts"
        self.renewed = self.path / "renewed.json"
