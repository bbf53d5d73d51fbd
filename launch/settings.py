"""The user's settings file (``--settings``): TOML, a table for each engine that is not this machine.

A study's folder keeps how it was last launched, ``launch.json`` with a copy of that file beside it, so that
``scaling relaunch`` needs neither.
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping
from pathlib import Path

from scaling.config import ConfigError, check_keys
from scaling.files import read_json, write_whole

ENGINES = ("slurm", "jobset", "skypilot")


def engine_table(path: Path | None, name: str) -> dict:
    """One engine's table, as written; empty where there is no file or no such table.

    Raises:
      ConfigError: a file that cannot be read or is not TOML, or a table of no engine.
    """
    if path is None:
        return {}
    try:
        whole = tomllib.loads(Path(path).read_text())
    except OSError as error:
        raise ConfigError(f"settings {str(path)!r} cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise ConfigError(f"settings {str(path)!r} is not TOML ({error})") from error
    check_keys(f"settings {str(path)!r}", whole, list(ENGINES))
    table = whole.get(name, {})
    if not isinstance(table, dict):
        raise ConfigError(f"settings {str(path)!r}: {name} is {table!r}; it must be a table")
    return table


def remember(study: Path, on: str, settings: Path | None, options: Mapping) -> None:
    """Keeps how a study is launched.

    Args:
      on: the engine. settings: the user's file, copied. options: of the command line, by their names.
    """
    copied = study / "launch.toml"
    if settings is not None and settings.resolve() != copied.resolve():
        write_whole(copied, settings.read_bytes())
    kept = {k: str(v.resolve()) if isinstance(v, Path) else v for k, v in options.items()}
    words = {"on": on, "settings": settings and copied.name, "options": kept}
    write_whole(study / "launch.json", json.dumps(words, indent=1) + "\n")


def last_launch(study: Path) -> tuple[str, dict]:
    """The engine of a study's last launch, and its options; ``local`` and none where there was no launch."""
    if not (study / "launch.json").exists():
        return "local", {}
    words = read_json(study / "launch.json")
    options = dict(words["options"])
    if options.get("out"):
        options["out"] = Path(options["out"])
    if words["settings"]:
        options["settings"] = study / words["settings"]
    return words["on"], options
