"""Weights & Biases as a mirror: the study folder stays the source, wandb gets the same fields.

Off unless switched on (`scaling run --wandb offline`); offline runs are written below the study
(``STUDY/wandb``) and need no server. wandb has no public reader for its offline files, so
``read_wandb`` reads the format itself: LevelDB log blocks that hold wandb's protobuf records.
"""

from __future__ import annotations

import json
import struct
import time
import warnings
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from scaling.files import StudyError

if TYPE_CHECKING:  # as in scaling.records
    import pandas as pd

BLOCK = 32768
FULL, FIRST, MIDDLE, LAST = 1, 2, 3, 4
FILE_HEADER = 7
RECORD_HEADER = 7


class Tracker:
    """Mirrors one attempt at a cell to wandb; does nothing when ``mode`` is ``off``.

    Args:
      mode: ``off``, ``offline`` or ``online``.
      study: the study folder; its name is the wandb project and group.
      cell: the cell's id: the wandb run id, so that a resumed cell continues the same run.
      config: the cell's config, with what else should stand beside it.
    """

    def __init__(self, mode: str, study: Path, cell: str, config: Mapping):
        self.run, self.mode = None, mode
        if mode == "off":
            return
        try:
            import wandb
        except ImportError as error:
            raise StudyError("--wandb needs the package wandb; install the extra: scaling[wandb]") from error
        self.run = wandb.init(
            project=study.name,
            group=study.name,
            name=cell,
            id=cell,
            resume="allow",
            mode=mode,
            dir=str(study),
            config=dict(config),
            settings=wandb.Settings(console="off", silent=True, x_disable_stats=True),
        )

    def log(self, row: Mapping) -> None:
        """One logged line of the cell, at its own step; the training loss is ``train_loss`` there."""
        if self.run is not None:
            names = {"loss": "train_loss", "lr": "train_lr"}  # `loss` and `lr` are the run table's
            self.run.log({names.get(k, k): v for k, v in row.items() if k != "step"}, step=row["step"])

    def finish(self, result: Mapping | None) -> None:
        """Writes the result as the summary and closes the run."""
        if self.run is None:
            return
        if result is not None:
            self.run.summary.update({k: v for k, v in result.items() if not isinstance(v, (list, dict))})
        path = Path(self.run.settings.sync_file)
        self.run.finish(exit_code=0 if result is not None else 1)
        self.run = None
        if self.mode == "offline":
            wait_until_written(path)


def wait_until_written(path: Path, seconds: float = 60.0) -> None:
    """Returns once an offline file ends with its exit record: wandb's service writes on after finish()."""
    from wandb.proto import wandb_internal_pb2

    deadline, pause = time.monotonic() + seconds, 0.01
    while True:
        data = path.read_bytes() if path.exists() else b""
        whole = list(log_records(data)) if len(data) > FILE_HEADER else []
        if whole:
            record = wandb_internal_pb2.Record.FromString(whole[-1])
            if record.WhichOneof("record_type") == "exit":
                return
        if time.monotonic() > deadline:
            message = f"{path} was not written to its end within {seconds:g} s of finishing"
            warnings.warn(message, stacklevel=3)
            return
        time.sleep(pause)
        pause = min(2 * pause, 0.5)


def read_wandb(folder: Path | str) -> pd.DataFrame:
    """The run table of offline wandb runs: one row a run, from its config and summary.

    Nested config keys become ``section.key``. Runs of one id (the attempts at a cell) are one row, the
    newest summary winning.

    Args:
      folder: a folder with ``offline-run-*`` or ``run-*`` folders, or one above it.

    Raises:
      StudyError: no wandb file below the folder, or wandb is not installed.
    """
    import pandas as pd

    rows: dict[str, dict] = {}
    for run in read_attempts(folder):
        row = rows.setdefault(run["id"], {"run_id": run["id"]})
        row.update(flatten(run["config"]))
        row.update(flatten(run["summary"]))
    table = pd.DataFrame(rows.values())
    return table.drop(columns=[c for c in table.columns if c.startswith("_")])


def read_wandb_history(folder: Path | str) -> pd.DataFrame:
    """What offline runs logged: one row a (``run_id``, ``step``); of a step taken again, the newest.

    Args, raises: as ``read_wandb``.
    """
    import pandas as pd

    rows: dict[tuple, dict] = {}
    for run in read_attempts(folder):
        for item in run["history"]:
            key = (run["id"], item.get("_step", -1))
            rows.setdefault(key, {"run_id": key[0], "step": key[1]}).update(flatten(item))
    table = pd.DataFrame([rows[key] for key in sorted(rows)], columns=None if rows else ["run_id", "step"])
    return table.drop(columns=[c for c in table.columns if c.startswith("_")])


def read_attempts(folder: Path | str) -> list[dict]:
    """Every offline file below a folder as ``read_wandb_run`` reads it, oldest first, if it has an id."""
    # a folder is named run-DATE_TIME-ID: file times are lost where somebody copies them
    names = [(p.parent.name.removeprefix("offline-"), p) for p in Path(folder).rglob("run-*.wandb")]
    files = [path for _, path in sorted(names)]
    if not files:
        raise StudyError(f"{folder} holds no wandb run (no run-*.wandb file below it)")
    return [run for path in files if (run := read_wandb_run(path))["id"] is not None]


def read_wandb_run(path: Path | str) -> dict:
    """One ``.wandb`` file: ``id``, ``config``, ``summary`` and ``history`` (a list of dicts).

    A file cut off by a kill is read as far as it is whole; one damaged in the middle is read on behind that.
    ``id`` is None where the run's own record is missing.
    """
    try:
        from wandb.proto import wandb_internal_pb2
    except ImportError as error:
        raise StudyError("reading wandb files needs the package wandb: scaling[wandb]") from error
    out: dict = {"id": None, "config": {}, "summary": {}, "history": []}
    for data in log_records(Path(path).read_bytes()):
        record = wandb_internal_pb2.Record.FromString(data)
        kind = record.WhichOneof("record_type")
        if kind == "run":
            out["id"] = record.run.run_id
            out["config"].update(items(record.run.config.update))
        elif kind == "config":
            out["config"].update(items(record.config.update))
        elif kind == "summary":
            out["summary"].update(items(record.summary.update))
        elif kind == "history":
            out["history"].append(items(record.history.item))
    return out


def items(entries) -> dict:
    """Keys and JSON values of a protobuf list; nested keys are joined with dots."""
    return {e.key or ".".join(e.nested_key): json.loads(e.value_json) for e in entries}


def log_records(data: bytes) -> Iterator[bytes]:
    """The whole records of a LevelDB log with wandb's file header, each checked by its CRC-32 (of IEEE).

    Blocks of 32 KiB hold parts: checksum, length and kind, then data; a record has one (FULL) or several
    (FIRST, MIDDLE, ..., LAST). A damaged part ends its block and its record; the next block is read.
    LevelDB's own files have a checksum of another polynomial.
    """
    if data[:4] != b":W&B":
        raise StudyError("a .wandb file does not begin with ':W&B'; it is not a wandb run file")
    position, parts = FILE_HEADER, None
    while position + RECORD_HEADER <= len(data):
        left = BLOCK - position % BLOCK
        if left < RECORD_HEADER:  # the tail of a block is padding
            position += left
            continue
        checksum, length, kind = struct.unpack_from("<IHB", data, position)
        part = data[position + RECORD_HEADER : position + RECORD_HEADER + length]
        whole = kind in (FULL, FIRST, MIDDLE, LAST) and len(part) == length <= left - RECORD_HEADER
        if not whole or zlib.crc32(part, zlib.crc32(bytes([kind]))) != checksum:
            position, parts = position + left, None
            continue
        if kind in (FULL, FIRST):
            parts = [part]
        elif parts is not None:  # else the record's beginning is lost
            parts.append(part)
        if kind in (FULL, LAST):
            if parts is not None:
                yield b"".join(parts)
            parts = None
        position += RECORD_HEADER + length


def flatten(value: Mapping, prefix: str = "") -> dict:
    """Nested mappings as one level, keys joined with dots."""
    out = {}
    for key, inner in value.items():
        if isinstance(inner, Mapping):
            out.update(flatten(inner, f"{prefix}{key}."))
        else:
            out[f"{prefix}{key}"] = inner
    return out
