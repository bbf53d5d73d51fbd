"""The user's settings file (``--settings``): TOML, a table for each engine that is not this machine."""

from __future__ import annotations

import tomllib
from pathlib import Path

from scaling.config import ConfigError, check_keys

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
