"""Where commands print, for people or for programs."""

from __future__ import annotations

import json
import sys

import click
from rich.console import Console

console = Console(highlight=False, width=None if sys.stdout.isatty() else 150)
stderr = Console(stderr=True, highlight=False)

json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON for programs, nothing else.")


def emit(as_json: bool, value, show) -> None:
    """JSON for programs, or what ``show`` prints for people."""
    if as_json:
        click.echo(json.dumps(value, indent=1, allow_nan=False))
    else:
        show()
