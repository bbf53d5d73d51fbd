"""Training one cell: resume, step, evaluate, record.

``train(cell, folder)`` may be killed at any moment and called again: it goes on from the newest
whole checkpoint and ends with the same ``result.json`` and ``metrics.jsonl``, byte for byte on
CPU. Timings live in ``timing.json``, apart from the numbers.
"""

from __future__ import annotations

import dataclasses
import errno
import json
import logging
import math
import os
import platform
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import jax
import numpy as np

from scaling import __version__, data
from scaling.checkpoint import Checkpoints
from scaling.config import ConfigError, cell_id, validate_cell
from scaling.data import Stream, heldout_batches
from scaling.evaluate import held_out_loss
from scaling.files import (
    CellFolder,
    StorageError,
    StudyError,
    explain_os_error,
    read_json,
    read_jsonl,
    write_json,
    write_whole,
)
from scaling.flops import CONVENTIONS, ledger
from scaling.optim import hyper_parameters
from scaling.program import Static, compiled, first_state
from scaling.records import read_result
from scaling.tracking import Tracker

log = logging.getLogger(__name__)

LOGGED_POINTS = 200
"""About how many lines of metrics.jsonl a cell writes."""


@dataclasses.dataclass(frozen=True)
class Execution:
    """How a cell runs, not what it computes: no field changes a number."""

    remat: str = "none"
    checkpoint_seconds: float = 60.0
    """Save when this much time has passed since the last save."""
    checkpoint_steps: int | None = None
    """Save also every so many steps."""
    prefetch: int | None = None
    """Batches read ahead in a thread; by default 2, and none on CPU, where the thread costs more."""
    wandb: str = "off"
    """``off``, ``offline`` or ``online``: mirror the metrics to Weights & Biases."""


class Diverged(Exception):
    """The loss is not a number, or ran away, after ``steps`` updates."""

    def __init__(self, reason: str, steps: int):
        super().__init__(reason)
        self.steps = steps


def train(
    cell: Mapping,
    folder: CellFolder,
    execution: Execution | None = None,
    on_metrics: Callable[[dict], None] | None = None,
) -> dict:
    """Trains a cell to its end and writes its result; a finished cell is only read.

    Args:
      cell: a cell config (validated again here).
      folder: where it lives; made if missing.
      execution: how to run it.
      on_metrics: called with every logged line.

    Returns:
      The content of ``result.json``: ``status`` is ``finished`` or ``diverged`` (then ``loss`` is None).

    Raises:
      ConfigError: the cell cannot be run, or the data is not the data it was planned on.
      StudyError: the folder is of another cell, cannot be written, or the disk is full.
    """
    cell, execution = validate_cell(cell), execution or Execution()
    name = cell_id(cell)
    if folder.config.exists():
        stored = cell_id(validate_cell(read_json(folder.config)))
        if stored != name:
            raise StudyError(f"{folder.path} holds cell {stored}, not {name}; use another study folder")
    if folder.result.exists():
        return read_result(folder)
    write_json(folder.config, cell)

    dataset = open_planned_data(cell)
    tracker = Tracker(execution.wandb, folder.path.parent.parent, name, tracked_config(cell, name))
    result = None
    try:
        run = Run(cell, name, folder, execution, dataset, on_metrics or tracker.log)
        try:
            result = run.to_the_end()
        except Diverged as end:
            result = run.result("diverged", end.steps, [], str(end))
        finally:
            run.checkpoints.close()
    finally:
        tracker.finish(result)
    write_json(folder.timing, run.timing())
    write_json(folder.result, result)
    folder.failure.unlink(missing_ok=True)
    return result


def tracked_config(cell: Mapping, name: str) -> dict:
    """What the tracker keeps beside the metrics: the config and the ledger, in the run table's names."""
    account = ledger(cell["model"], cell["data"]["seq"])
    fields = ("params_total", "params_active", "params_embedding", "params_nonembedding")
    return {
        **cell,
        "cell": name,
        "family": cell["model"]["family"],
        "seed": cell["train"]["seed"],
        "lr": cell["optim"]["lr"],
        "batch_tokens": cell["train"]["batch"] * cell["data"]["seq"],
        "params": account.params_total,
        **{f: getattr(account, f) for f in fields},
        "flops_per_token": {c: account.train_flops_per_token(c) for c in CONVENTIONS},
    }


def open_planned_data(cell: Mapping):
    """The cell's data set.

    Raises:
      ConfigError: its content is not what the cell was planned on, or the vocabulary is too small.
    """
    dataset = data.open_data(cell["data"])
    if dataset.vocab > cell["model"]["vocab"]:
        raise ConfigError(
            f"model.vocab is {cell['model']['vocab']} but the data has token ids up to {dataset.vocab - 1}; "
            f"it must be at least {dataset.vocab}"
        )
    return dataset


class Run:
    """One attempt at a cell."""

    def __init__(self, cell, name, folder, execution, dataset, on_metrics):
        self.cell, self.name, self.folder, self.execution = cell, name, folder, execution
        self.dataset, self.on_metrics = dataset, on_metrics
        train_cfg = cell["train"]
        self.steps, self.batch, self.seq = train_cfg["steps"], train_cfg["batch"], cell["data"]["seq"]
        self.stream = Stream(dataset.train, self.seq, self.batch, train_cfg["seed"])
        self.heldout = heldout_batches(
            dataset.heldout, self.seq, eval_batch(self.batch, self.seq), cell["eval"]["sequences"]
        )
        self.account = ledger(cell["model"], self.seq)
        self.checkpoints = Checkpoints(folder.checkpoints, name)
        self.log_every = max(1, self.steps // LOGGED_POINTS)
        self.seconds_before = 0.0
        self.started = time.perf_counter()
        self.first_step = 0

    def to_the_end(self) -> dict:
        """Steps, evaluations and checkpoints from wherever the cell stands to its last step."""
        cell = self.cell
        self.static = Static.of(cell)
        step_fn, self.eval_fn = compiled(self.static, self.execution.remat)
        hp = hyper_parameters(cell)
        state = self.start(hp)
        metrics_file = self.open_metrics()
        evals = self.evals_so_far
        log_every, eval_steps = self.log_every, self.eval_steps()
        pending = None
        last_save = time.perf_counter()
        prefetch = self.execution.prefetch
        if prefetch is None:
            prefetch = 0 if jax.default_backend() == "cpu" else 2
        batches = self.stream.iterate(self.first_step, self.steps, prefetch=prefetch)
        with metrics_file:
            for step, batch in zip(range(self.first_step, self.steps), batches, strict=True):
                state, metrics = step_fn(state, batch, hp)
                if pending is not None:  # one step late, so that the device never waits for Python
                    self.check_and_log(*pending, log_every, metrics_file)
                pending = (step, metrics)
                done = step + 1
                if done in eval_steps:
                    self.check_and_log(*pending, log_every, metrics_file)
                    pending = None
                    evals = [*evals, self.evaluate(done, state.params)]
                    if done < self.steps:
                        write_line(metrics_file, {"step": done, "eval": evals[-1]})
                if self.save_due(done, last_save) or done == self.steps:
                    if pending is not None:
                        self.check_and_log(*pending, log_every, metrics_file)
                        pending = None
                    os.fsync(metrics_file.fileno())  # a checkpoint never outlives the metrics before it
                    self.checkpoints.save(state, self.seconds())
                    last_save = time.perf_counter()
            if self.first_step == self.steps:  # killed between the last save and the result
                evals = [*evals, self.evaluate(self.steps, state.params)]
        return self.result("finished", self.steps, evals, None)

    def start(self, hp):
        """The restored state, or the initial one."""
        state = first_state(self.static, self.cell["train"]["seed"], hp)
        restored = self.checkpoints.restore(state)
        if restored is not None and not self.metrics_reach(int(restored[0].step)):
            log.warning(
                "%s lacks lines from before its checkpoint; the cell starts again", self.folder.metrics
            )
            self.checkpoints.discard()
            restored = None
        if restored is not None:
            state, self.seconds_before = restored
            state = jax.tree.map(jax.numpy.array, state)  # buffers of our own: the step donates them
            self.first_step = int(state.step)
        return state

    def open_metrics(self):
        """Cuts the metrics back to the resumed step and opens them for appending."""
        rows = [r for r in read_jsonl(self.folder.metrics) if r["step"] <= self.first_step]
        self.evals_so_far = [r["eval"] for r in rows if "eval" in r]
        write_whole(self.folder.metrics, "".join(to_line(r) for r in rows))
        return open(self.folder.metrics, "ab", buffering=0)

    def metrics_reach(self, step: int) -> bool:
        """Whether every line that was written up to a step is there: a damaged file may have lost some."""
        rows = [r for r in read_jsonl(self.folder.metrics) if r["step"] <= step]
        logged = {s for s in range(1, step + 1) if s % self.log_every == 0 or s == self.steps}
        evaluated = {s for s in self.eval_steps() if s <= step and s < self.steps}
        return {r["step"] for r in rows if "loss" in r} >= logged and {
            r["step"] for r in rows if "eval" in r
        } >= evaluated

    def eval_steps(self) -> set[int]:
        points = self.cell["eval"]["points"]
        return {round(self.steps * (i + 1) / points) for i in range(points)} - {0}

    def save_due(self, done: int, last_save: float) -> bool:
        every = self.execution.checkpoint_steps
        if every is not None and done % every == 0:
            return True
        return time.perf_counter() - last_save > self.execution.checkpoint_seconds

    def check_and_log(self, step: int, metrics, log_every: int, file) -> None:
        """Reads one step's metrics, ends a run that diverged, writes every ``log_every``-th."""
        loss, grad_norm = float(metrics["loss"]), float(metrics["grad_norm"])
        runaway = 2 * math.log(self.cell["model"]["vocab"])
        if not math.isfinite(loss):
            raise Diverged(f"the training loss was {loss} at step {step + 1}", step + 1)
        if not math.isfinite(grad_norm):
            raise Diverged(f"the gradient's norm was {grad_norm} at step {step + 1}", step + 1)
        if step >= self.cell["schedule"]["warmup_steps"] and loss > runaway:
            raise Diverged(
                f"the training loss was {loss:.3f} at step {step + 1}, "
                f"over twice that of a uniform guess ({runaway / 2:.3f})",
                step + 1,
            )
        if (step + 1) % log_every == 0 or step + 1 == self.steps:
            line = {
                "step": step + 1,
                "tokens": (step + 1) * self.batch * self.seq,
                "loss": loss,
                "grad_norm": grad_norm,
                "lr": float(metrics["lr"]),
            }
            write_line(file, line)
            if self.on_metrics is not None:
                self.on_metrics({**line, "seconds": self.seconds()})

    def evaluate(self, done: int, params) -> dict:
        scores = held_out_loss(self.eval_fn, params, self.heldout, self.dataset.bytes_per_token)
        if not np.isfinite(scores["loss"]) or not np.isfinite(scores["loss_stderr"]):
            raise Diverged(f"the held-out loss was {scores['loss']} at step {done}", done)
        if done == self.steps and scores["loss"] > math.log(self.cell["model"]["vocab"]):
            words = f"the final held-out loss, {scores['loss']:.3f}, is worse than a uniform guess"
            raise Diverged(words, done)
        return {"step": done, "tokens": done * self.batch * self.seq, **scores}

    def result(self, status: str, steps: int, evals: list[dict], reason: str | None) -> dict:
        """The result file after ``steps`` updates: numbers of the cell and the device kind alone."""
        account, tokens = self.account, steps * self.batch * self.seq
        final = evals[-1] if evals else {}
        return {
            "cell": self.name,
            "status": status,
            "reason": reason,
            "loss": final.get("loss"),
            "loss_stderr": final.get("loss_stderr"),
            "bits_per_byte": final.get("bits_per_byte"),
            "steps": steps,
            "tokens": tokens,
            "unique_tokens": int(self.stream.unique_tokens_at(steps)),
            "epochs": float(self.stream.epochs_at(steps)),
            "flops": account.train_flops(tokens, "exact"),
            "evals": evals,
            "data": self.dataset.fingerprint,
            "device_kind": jax.devices()[0].device_kind,
            "devices": 1,
            "cpu_cores": cpu_cores(),
            "versions": {
                "scaling": __version__,
                "jax": jax.__version__,
                "numpy": np.__version__,
                "python": platform.python_version(),
            },
        }

    def seconds(self) -> float:
        return self.seconds_before + time.perf_counter() - self.started

    def timing(self) -> dict:
        """Wall time of all attempts that led to this result, and memory where the device tells."""
        memory = jax.devices()[0].memory_stats() or {}
        return {
            "wall_seconds": self.seconds(),
            "device_seconds": self.seconds(),
            "resumed_from_step": self.first_step,
            "peak_bytes": memory.get("peak_bytes_in_use"),
            "finished_at": time.time(),
        }


def cpu_cores() -> int | None:
    """Cores that XLA's CPU backend splits its sums over; None on an accelerator."""
    if jax.default_backend() != "cpu":
        return None
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def eval_batch(batch: int, seq: int) -> int:
    """Sequences in one evaluation batch: about 16,384 tokens, or those of a training batch if it has more."""
    return max(1, min(64, max(batch, 16384 // seq)))


def to_line(row: dict) -> str:
    return json.dumps(row, allow_nan=False) + "\n"


def write_line(file, row: dict) -> None:
    """Appends one whole line.

    Raises:
      StorageError: the disk is full.
    """
    data = to_line(row).encode()
    try:
        if file.write(data) != len(data):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    except OSError as error:
        raise StorageError(explain_os_error(error, Path(file.name))) from error
