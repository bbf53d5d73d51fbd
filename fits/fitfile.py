"""The fit file: one JSON document with everything needed to use a fit, and to doubt it."""

from __future__ import annotations

import base64
import json
import math
import os
import pathlib
import tempfile
from collections.abc import Mapping
from typing import Any

import numpy as np

from fits.errors import FitError
from fits.fit import Fit
from fits.laws import LAWS, Law

SCHEMA = 1
SOUND = ("converged", "boundary")
STATUSES = (*SOUND, "not identified", "unconverged")
PLAIN = (
    "params", "status", "reasons", "flags", "intervals", "objective", "fixed", "method", "diagnostics",
    "sensitivity", "rows", "data", "versions",
)  # fmt: skip
ENCODING = "base64, little-endian float64, row-major"


def to_dict(fit: Fit) -> dict:
    """The fit as plain JSON values; a number that is not finite becomes null."""
    names = list(fit.law.parameters)
    return {
        "schema": SCHEMA, "kind": "fit",
        "law": {
            "name": fit.law.name, "formula": fit.law.formula, "source": fit.law.source, "parameters": names,
            "variables": list(fit.law.variables),
        },
        "covariance": {"names": names, "matrix": _plain(fit.covariance)},
        "draws": {
            "names": names, "count": len(fit.draws), "encoding": ENCODING,
            "data": base64.b64encode(np.ascontiguousarray(fit.draws, "<f8").tobytes()).decode(),
        },
        **{k: _plain(getattr(fit, k)) for k in PLAIN},
    }  # fmt: skip


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if isinstance(value, np.generic):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value


def from_dict(data: Mapping[str, Any], law: Law | None = None) -> Fit:
    """The inverse of ``to_dict``; ``law`` gives the object for a law that is not in the library.

    Raises:
      FitError: not a fit, another schema, an unknown law, or a damaged part.
    """
    if not isinstance(data, Mapping) or data.get("kind") != "fit":
        raise FitError('this is not a fit file: it has no "kind": "fit"')
    if data.get("schema") != SCHEMA:
        raise FitError(f"the fit file has schema {data.get('schema')!r}; this version reads schema {SCHEMA}")
    try:
        name = data["law"]["name"]
        law = law or LAWS.get(name)
        if law is None:
            raise FitError(
                f"the fit file has the law {name!r}, which is not in the library; pass law= to read it"
            )
        if list(law.parameters) != list(data["law"]["parameters"]):
            raise FitError(
                f"the fit file's {name!r} has parameters {data['law']['parameters']}, "
                f"the library's has {list(law.parameters)}"
            )
        _check_parts(data, law)
        packed = data["draws"]
        draws = np.frombuffer(base64.b64decode(packed["data"], validate=True), "<f8").astype(np.float64)
        draws = draws.reshape(packed["count"], len(packed["names"]))
        return Fit(
            law=law, draws=draws, covariance=data["covariance"]["matrix"],
            **{k: data[k] for k in PLAIN},
        )  # fmt: skip
    except FitError:
        raise
    except (KeyError, TypeError, ValueError) as error:
        raise FitError(f"the fit file is damaged: {type(error).__name__}: {error}") from error


def _check_parts(data: Mapping[str, Any], law: Law) -> None:
    """Raises ``FitError`` where a part that every answer reads is not there, or of another kind."""
    status = data["status"]
    if status not in STATUSES:
        raise FitError(f"the fit file has the status {status!r}; it must be one of {', '.join(STATUSES)}")
    sound = status in SOUND  # an unsound fit may have stopped at values that are no numbers
    for name in law.parameters:
        value = data["params"][name]
        if not (isinstance(value, int | float) or (value is None and not sound)):
            raise FitError(f"the fit file is damaged: the parameter {name} is {value!r}, not a number")
    for key in ("intervals", "fixed", "method", "diagnostics", "data"):
        if not isinstance(data[key], Mapping):
            raise FitError(f"the fit file is damaged: {key} is a {type(data[key]).__name__}, not an object")
    for part, key in (("diagnostics", "range"), ("diagnostics", "rows_used"), ("data", "columns")):
        if key not in data[part]:
            raise FitError(f"the fit file is damaged: {part} has no {key}")


def write_whole(path: pathlib.Path, data: bytes) -> None:
    """Writes a file aside and renames it: whole or not at all, readable by others.

    Raises:
      FitError: the folder cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, aside = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(aside, 0o644)  # mkstemp makes a private file; results are to be shared
            os.replace(aside, path)
        finally:
            pathlib.Path(aside).unlink(missing_ok=True)
    except OSError as error:
        raise FitError(f"{path} cannot be written: {error.strerror or error}") from error


def write_fit(fit: Fit, path: str | os.PathLike) -> pathlib.Path:
    """Writes the fit file whole or not at all.

    Raises:
      FitError: the folder cannot be written.
    """
    path = pathlib.Path(path)
    write_whole(path, json.dumps(to_dict(fit), allow_nan=False).encode())
    return path


def read_fit(path: str | os.PathLike, law: Law | None = None) -> Fit:
    """Reads a fit file.

    Raises:
      FitError: no such file, not JSON, or not a fit.
    """
    try:
        data = json.loads(pathlib.Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise FitError(f"{path} cannot be read: {error.strerror or error}") from error
    except ValueError as error:
        raise FitError(f"{path} is not a fit file: {error}") from error
    return from_dict(data, law)
