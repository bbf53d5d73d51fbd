"""Where a study stands, read from its folder alone: no process is asked, so a laptop will do.

That a cell is *training* is told by its steps: its attempt's file says at which heartbeat the step last
grew. A process that lives and takes no steps is starting, or stalled.
"""

from __future__ import annotations

import time
from pathlib import Path

from scaling.attempts import attempts_of, tally
from scaling.branches import spent_flops
from scaling.claims import PATIENCE, attempt_name, outcome
from scaling.files import CellFolder, read_json
from scaling.records import mfu, read_manifest, read_result
from scaling.trainers import account_of, tokens_per_step

STALLED_BEATS = 6
"""Heartbeats without a step after which a cell that was training is called stalled."""


def study_status(study: Path | str, price: float | None = None) -> dict:
    """The state of every cell and of the whole.

    Args:
      study: the folder. price: of a device-hour, for the cost.

    Returns:
      ``cells``: rows of ``cell_status``. ``study``: counts by state, share of FLOPs done, device_hours
      (spent, planned), eta_seconds, cost (spent, planned), each None where not known yet.
    """
    rows = [cell_status(study, entry) for entry in read_manifest(study)["cells"]]
    return {"cells": rows, "study": summary(rows, price)}


def cell_status(study: Path | str, entry: dict) -> dict:
    """One cell: see ``docs/launch.md`` for the fields."""
    folder, config = CellFolder(study, entry["id"]), entry["config"]
    attempts = attempts_of(folder)
    counts = list(map(outcome, attempts))
    last = attempts[-1] if attempts else None
    row = {
        "cell": entry["id"],
        "role": entry.get("role", "cell"),
        "state": "waiting",
        "step": entry.get("fork", 0),
        "steps": config["train"]["steps"],
        "first": entry.get("fork", 0),
        "durable_step": durable_step(folder),
        "loss": None,
        "tokens_per_second": None,
        "mfu": None,
        "attempts": sum(c != "released" for c in counts),
        "preemptions": counts.count("preempted"),
        "failures": counts.count("failed"),
        "eta_seconds": None,
        "device_seconds": sum(map(claimed_seconds, attempts)),
        "flops": spent_flops(entry),
        "reason": None,
        "log": [],
    }
    if folder.result.exists():
        result = read_result(folder)
        timing = read_json(folder.timing) if folder.timing.exists() else {}
        kind = result.get("device_kind", "")
        return row | {
            "state": result["status"],
            "step": result["steps"],
            "durable_step": result["steps"] if result["status"] == "finished" else row["durable_step"],
            "loss": result["loss"],
            "tokens_per_second": timing.get("tokens_per_second"),
            "mfu": mfu(timing.get("flops_per_second"), kind),
            "reason": result["reason"],
        }
    # a trainer's cell counts the steps of its blocks together
    row["step"] = min(row["steps"], max(row["first"], row["durable_step"] or 0))
    if last is None:
        return row
    if counts[-1] is not None:
        words = tally(folder, attempts)
        failed = words.last == "failed"
        log = last.get("log", []) if failed else []
        return row | {"state": "failed" if failed else "preempted", "reason": words.reason, "log": log}
    row["state"] = state_of(last, seconds_since(folder, last["attempt"]))
    row["step"] = max(row["step"], last["step"] or 0)
    if row["state"] == "training" and (rate := last.get("steps_per_second")):
        tokens = tokens_per_step(config)
        speed = account_of(config).train_flops(rate * tokens)
        row |= {
            "tokens_per_second": rate * tokens,
            "mfu": mfu(speed / last.get("devices", 1), last.get("device_kind", "")),
            "eta_seconds": (row["steps"] - row["step"]) / rate,
        }
    return row


def state_of(attempt: dict, silent_seconds: float) -> str:
    """``starting``, ``training``, ``stalled`` or ``silent``, of an attempt that has not ended.

    Args:
      attempt: its record. silent_seconds: since its last heartbeat, by clocks that may differ: a hint for
        the reader, on which no claim is taken over.
    """
    if silent_seconds > PATIENCE * attempt["heartbeat"]:
        return "silent"
    if attempt["step_beat"] is None:
        return "starting"
    return "training" if attempt["beat"] - attempt["step_beat"] < STALLED_BEATS else "stalled"


def seconds_since(folder: CellFolder, number: int) -> float:
    return time.time() - (folder.attempts / attempt_name(number)).stat().st_mtime


def durable_step(folder: CellFolder) -> int | None:
    """The newest checkpoint's step."""
    steps = [int(p.name) for p in folder.checkpoints.glob("[0-9]*") if p.name.isdigit()]
    return max(steps, default=None)


def claimed_seconds(attempt: dict) -> float:
    """Device-seconds that an attempt held, its share of a pack; all of it, wasted or not."""
    beats = attempt["beat"] * attempt["heartbeat"]
    wall = attempt["ended"] - attempt["began"] if attempt.get("ended") else beats
    return max(0.0, wall) * attempt.get("devices", 1) / attempt.get("pack", 1)


def summary(rows: list[dict], price: float | None) -> dict:
    """The study as a whole. What is left is taken to cost what the finished cells did, FLOP for FLOP."""
    states = [r["state"] for r in rows]
    total = sum(r["flops"] for r in rows)
    done = sum(r["flops"] * share_done(r) for r in rows)
    spent = sum(r["device_seconds"] for r in rows)
    ended = [r for r in rows if r["state"] == "finished" and r["device_seconds"] > 0]
    rate = sum(r["device_seconds"] for r in ended) / sum(r["flops"] for r in ended) if ended else None
    left = None if rate is None else (total - done) * rate
    planned = None if left is None else spent + left
    at_work = states.count("training") + states.count("starting")
    hours = {"spent": spent / 3600, "planned": None if planned is None else planned / 3600}
    return {
        "states": {s: states.count(s) for s in dict.fromkeys(states)},
        "done": done / total if total else 1.0,
        "device_hours": hours,
        "eta_seconds": left / at_work if left is not None and at_work else None,
        "cost": None if price is None else {k: None if h is None else h * price for k, h in hours.items()},
    }


def share_done(row: dict) -> float:
    """How much of its own steps a cell has done."""
    if row["state"] in ("finished", "diverged"):
        return 1.0
    return max(0, row["step"] - row["first"]) / max(1, row["steps"] - row["first"])
