"""What a chip costs an hour: a table that the user edits (``launch/prices.toml``)."""

from __future__ import annotations

import dataclasses
import tomllib
from pathlib import Path

from launch.preflight.hardware import GENERATIONS, GPUS
from scaling.config import ConfigError, check_keys

DEFAULT = Path(__file__).parents[1] / "prices.toml"


@dataclasses.dataclass(frozen=True)
class Prices:
    """Money for an hour of one chip.

    Attributes:
      chip_hour: by name of TPU generation or GPU. currency, dated: as the file says.
    """

    chip_hour: dict[str, float]
    currency: str
    dated: str


def read_prices(path: Path = DEFAULT) -> Prices:
    """The table in a file.

    Raises:
      ConfigError: no such file, not TOML, or a field that is missing, unknown or no positive number.
    """
    try:
        table = tomllib.loads(path.read_text())
    except OSError as error:
        raise ConfigError(
            f"prices {str(path)!r} cannot be read ({error.strerror}); give a .toml file"
        ) from error
    except ValueError as error:
        raise ConfigError(f"prices {str(path)!r} is not TOML ({error})") from error
    where = f"prices {str(path)!r}"
    check_keys(where, table, ["dated", "currency", "chip_hour"])
    for name in ("dated", "currency"):
        if not isinstance(table.get(name), str) or not table[name]:
            raise ConfigError(f"{where}: {name} is {table.get(name)!r}; it must be a text")
    chips = table.get("chip_hour")
    if not isinstance(chips, dict):
        raise ConfigError(f"{where}: chip_hour is {chips!r}; it must be a table of prices")
    check_keys(f"{where}: chip_hour", chips, [*GENERATIONS, *GPUS])
    for name, price in chips.items():
        if isinstance(price, bool) or not isinstance(price, (int, float)) or not 0 < price < 1e6:
            raise ConfigError(f"{where}: chip_hour.{name} is {price!r}; it must be a positive number")
    return Prices({name: float(price) for name, price in chips.items()}, table["currency"], table["dated"])
