"""Runs a cell that is not a language model, and leaves the files that every cell leaves."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

from scaling import trainers
from scaling.config import cell_id, validate_cell
from scaling.files import write_json, write_whole
from scaling.lane import Job, to_line, where_it_ran
from scaling.records import read_result
from scaling.train import Preempted, check_folder


def run_trainer(job: Job, on_step: Callable[[dict[str, int]], bool] | None = None) -> dict:
    """Runs a trainer's cell to its end and writes its result; a finished cell is only read.

    There are no checkpoints: a cell that is cut off begins again.

    Args:
      job: a cell and its folder. on_step: called with the cell's id to its steps done; true: stop.

    Returns:
      The content of ``result.json``.

    Raises:
      ConfigError, StudyError: as ``scaling.train.train``. Preempted: ``on_step`` asked to stop.
    """
    cell, folder = validate_cell(job.cell), job.folder
    name, trainer = cell_id(cell), trainers.of(cell)
    check_folder(job)
    if folder.result.exists():
        return read_result(folder)
    began = time.perf_counter()
    tell = (lambda steps: False) if on_step is None else (lambda steps: bool(on_step({name: steps})))
    evals = None if tell(0) else trainers.load(trainer.run)(cell, tell)
    if evals is None:
        raise Preempted
    seconds = time.perf_counter() - began
    each = trainers.tokens_per_step(cell)
    evals = [{**e, "tokens": e["step"] * each} for e in evals]
    bad = next((e for e in evals if not math.isfinite(e["loss"])), None)
    steps = cell["train"]["steps"] if bad is None else bad["step"]
    final, tokens, account = evals[-1] if bad is None else {}, steps * each, trainers.account_of(cell)
    result = {
        "cell": name,
        "status": "finished" if bad is None else "diverged",
        "reason": None if bad is None else f"the loss was {bad['loss']} at step {steps}",
        "loss": final.get("loss"),
        "loss_stderr": final.get("loss_stderr"),
        "bits_per_byte": None,
        "steps": steps,
        "tokens": tokens,
        "unique_tokens": tokens,
        "epochs": 1.0,
        "flops": account.train_flops(tokens),
        "evals": evals if bad is None else [],
        **where_it_ran(1),
    }
    speed = tokens / seconds
    timing = {
        "wall_seconds": seconds,
        "device_seconds": seconds,
        "tokens_per_second": speed,
        "flops_per_second": account.train_flops(speed),
        "finished_at": time.time(),
    }
    rows = [{"step": e["step"], "tokens": e["tokens"], "loss": e["loss"]} for e in result["evals"]]
    write_whole(folder.metrics, "".join(map(to_line, rows)))
    write_json(folder.timing, timing)
    write_json(folder.result, result)
    return result
