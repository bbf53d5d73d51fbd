"""`scaling fit --by COLUMN`: the frontier's exponents of each group of a table, beside the truth if known."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from rich.table import Table

import fits
from fits.exponents import frontier_exponents
from launch.fitting import is_study, reading_options
from scaling.config import ConfigError
from scaling.files import write_json
from scaling.records import read_manifest, read_table

SIGMAS = 3.0
"""Standard errors that a measured exponent may be off, where the runs are noisy."""
READING = 0.01
"""What parabolas through seven sizes a factor of 1.4 apart may misread of an exponent, noise apart."""


def frontiers(path: Path, by: str, options: dict) -> list[dict]:
    """One row a group: exponents with standard errors, what is known of them, and whether they agree.

    Args:
      path: a study folder or a table. by: the column whose values are the groups.

    Returns:
      Dicts with group, a, loss, their ``_stderr``, points; truth (``scaling.theory.cells.plrf_truths``) and
      holds, both None where nothing is known. A group that cannot be read has ``refused``, the reason.

    Raises:
      ConfigError: no such column.
    """
    return of_groups(path, by, options["seed"], options["bootstraps"], reading_options(options))


def of_groups(path: Path, by: str, seed: int, draws: int, reading: dict) -> list[dict]:
    """``frontiers`` with the seed and number of simulated tables; reading: see ``fits.fit_table``."""
    table = read_table(path)
    if by not in table:
        raise ConfigError(f"--by is {by!r}; the table has the columns {', '.join(table.columns)}")
    truths = read_manifest(path).get("truths", {}) if is_study(path) else {}
    rows = []
    for group, part in table.groupby(by, sort=False):
        row = {"group": str(group), "truth": truths.get(str(group)), "holds": None, "refused": None}
        try:
            found = frontier_exponents(part, seed=seed, draws=draws, **reading)
        except fits.FitError as error:
            rows.append({**row, "refused": str(error), "holds": None if row["truth"] is None else False})
            continue
        row |= dataclasses.asdict(found)
        if row["truth"] is not None:
            here = row["truth"]["here"]
            row["holds"] = all(abs(row[k] - here[k]) <= allowed(row, k) for k in ("a", "loss"))
        rows.append(row)
    return rows


def allowed(row: dict, key: str) -> float:
    """How far a measured exponent may be from its value at these budgets."""
    return READING + SIGMAS * row[f"{key}_stderr"]


def save(rows: list[dict], path: Path, by: str, out: Path | None) -> Path:
    """Writes the rows beside the study's fits, or beside the table."""
    name = f"by_{by}.frontiers.json"
    target = out or (path / "fits" / name if is_study(path) else Path(f"{path.stem}.{name}"))
    write_json(target, rows)
    return target


def as_table(rows: list[dict]) -> Table:
    """Measured exponents; of a known law those at these budgets ("here") and without bound ("limit")."""
    grid = Table(header_style="bold")
    grid.add_column("group")
    for name in ("a", "here", "limit", "loss", "here", "limit"):
        grid.add_column(name, justify="right")
    grid.add_column("")
    for row in rows:
        truth, cells = row["truth"], []
        for key in ("a", "loss"):
            said = "-" if row["refused"] else f"{row[key]:.4f}"
            error = 0.0 if row["refused"] else row[f"{key}_stderr"]
            cells += [said + (f" ± {error:.4f}" if error else "")]
            cells += [f"{truth[t][key]:.4f}" if truth else "-" for t in ("here", "limit")]
        verdict = {None: "", True: "[green]pass[/]", False: "[red]FAIL[/]"}[row["holds"]]
        words = row["refused"] or (truth or {}).get("words", "")
        grid.add_row(row["group"], *cells, f"{verdict} {words}".strip())
    return grid
