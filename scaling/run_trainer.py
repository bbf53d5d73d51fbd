"""Runs a cell that is not a language model, and leaves the files that every cell leaves."""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Callable

from scaling import hosts, trainers
from scaling.checkpoint import Checkpoints
from scaling.config import cell_id, validate_cell
from scaling.files import write_json, write_whole
from scaling.lane import Job, to_line, where_it_ran
from scaling.records import read_result
from scaling.train import Preempted, check_folder


class Keep:
    """The checkpoints of a trainer's cell, made when the first one is due: most cells end before.

    Args:
      seconds: between two of them. In a job of several processes nothing is kept: one of them runs the cell,
        and a checkpoint is written by all.
    """

    def __init__(self, job: Job, name: str, seconds: float):
        self.folder, self.name, self.every = job.folder.checkpoints, name, seconds
        self.began = self.last = time.perf_counter()
        self.before, self.manager = 0.0, None

    @property
    def seconds(self) -> float:
        """Spent on the cell, in this attempt and in those that it goes on from."""
        return self.before + time.perf_counter() - self.began

    def _checkpoints(self) -> Checkpoints:
        self.manager = self.manager or Checkpoints(self.folder, self.name, keep=1)
        return self.manager

    def restore(self, like):
        """What was saved last, or None.

        Args:
          like: a pytree of arrays with its structure, shapes and dtypes.
        """
        if hosts.several() or not self.folder.exists():
            return None
        found = self._checkpoints().restore(like)
        if found is None:
            return None
        state, metadata = found
        self.before = metadata["seconds"]
        return state

    def due(self) -> bool:
        return time.perf_counter() - self.last > self.every

    def save(self, state) -> None:
        """Saves a pytree of arrays with an attribute ``step``, which grows."""
        if not hosts.several():
            self._checkpoints().save(state, self.seconds)
        self.last = time.perf_counter()

    def close(self) -> None:
        if self.manager is not None:
            self.manager.close()


def run_trainer(
    job: Job,
    on_step: Callable[[dict[str, int]], bool] | None = None,
    checkpoint_seconds: float = 60.0,
) -> dict:
    """Runs a trainer's cell to its end and writes its result; a finished cell is only read.

    A cell that is cut off goes on from its last checkpoint, to the same result.

    Args:
      job: a cell and its folder. on_step: called with the cell's id to its steps done; true: stop.
      checkpoint_seconds: between two checkpoints.

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
    tell = (lambda steps: False) if on_step is None else (lambda steps: bool(on_step({name: steps})))
    keep, evals = Keep(job, name, checkpoint_seconds), None
    try:
        evals = None if tell(0) else trainers.load(trainer.run)(cell, tell, keep)
    finally:
        keep.close()
    if evals is None:
        raise Preempted
    seconds = keep.seconds
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
    shutil.rmtree(folder.checkpoints, ignore_errors=True)
    return result
