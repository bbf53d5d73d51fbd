"""One attempt at one cell: its data, its checkpoints, its lines and its result.

What is here is a cell's own, whether it trains alone or beside others in a pack
(``scaling.train``). No number depends on which.
"""

from __future__ import annotations

import dataclasses
import errno
import functools
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

from scaling import __version__, hosts
from scaling.checkpoint import Checkpoints
from scaling.config import ConfigError, cell_id
from scaling.data import MaskedStream, Stream, heldout_batches, masked_draws
from scaling.evaluate import held_out_loss
from scaling.files import (
    CellFolder,
    StorageError,
    StudyError,
    explain_os_error,
    read_jsonl,
    write_json,
    write_whole,
)
from scaling.flops import ledger
from scaling.layers import causal, mask_token
from scaling.models.flex_prefill import block_choice
from scaling.optim import hyper_parameters
from scaling.probes import probe
from scaling.program import Static, placed_shapes, upcycled_state
from scaling.records import read_result
from scaling.sparsity import is_adaptive
from scaling.spikes import count_spikes
from scaling.step import eval_params
from scaling.upcycle import dense_cell, filled

log = logging.getLogger(__name__)

LOGGED_POINTS = 200
"""About how many lines of metrics.jsonl a cell writes."""

ASKED_POINTS = 50
"""About how often processes of one job agree on whether it is time for a checkpoint."""


@dataclasses.dataclass(frozen=True)
class Job:
    """A cell to train, and where it stands among the others.

    Attributes:
      cell: a validated cell config.
      folder: where it lives; made if missing.
      trunk: folder of the cell whose checkpoint this one starts from, for a branch.
      fork: updates that the trunk has done at that checkpoint; 0 where there is no trunk. The branch's
        lines and evaluations begin after it.
      keep: steps whose checkpoints are never removed: where branches leave this cell.
    """

    cell: Mapping
    folder: CellFolder
    trunk: CellFolder | None = None
    fork: int = 0
    keep: tuple[int, ...] = ()


class Diverged(Exception):
    """The loss is not a number, or ran away, after ``steps`` updates."""

    def __init__(self, reason: str, steps: int):
        super().__init__(reason)
        self.steps = steps


class Lane:
    """A job under way.

    Attributes:
      done: updates so far. first_step: those behind it when this attempt began. active: whether it has
        steps left to do.
      wall_seconds, device_seconds: of all attempts that led here; cells of a pack share the device's time.
      stepping_seconds: of these the device's in this attempt's ``timed_steps``: without compiling,
        evaluations and saves.
    """

    def __init__(self, job: Job, dataset, on_metrics: Callable[[dict], None] | None):
        cell = job.cell
        self.job, self.cell, self.name, self.folder = job, cell, cell_id(cell), job.folder
        self.dataset, self.on_metrics = dataset, on_metrics
        self.steps, self.batch, self.seq = cell["train"]["steps"], cell["train"]["batch"], cell["data"]["seq"]
        self.stream = stream_of(cell, dataset.train)
        self.heldout = heldout_batches(
            dataset.heldout, self.seq, eval_batch(self.batch, self.seq), cell["eval"]["sequences"]
        )
        self.draws = 1
        if not causal(cell["model"]):
            self.draws = cell["eval"]["draws"]
            self.heldout = masked_draws(self.heldout, self.draws, mask_token(cell["model"]))
        self.hp = hyper_parameters(cell)
        self.account = ledger(cell["model"], self.seq)
        self.is_relu_routed = is_adaptive(cell["model"])
        self.checkpoints = Checkpoints(self.folder.checkpoints, self.name, keep_steps=job.keep)
        self.log_every = max(1, self.steps // LOGGED_POINTS)
        self.eval_steps = eval_steps(cell, job.fork)
        self.done, self.first_step, self.active = 0, 0, True
        self.evals: list[dict] = []
        self.file = None
        self.wall_seconds = self.device_seconds = self.stepping_seconds = 0.0
        self.timed_steps = 0
        self.last_save = time.perf_counter()

    def start(self, first_state, mesh=None):
        """The state to go on from: the newest whole checkpoint, the trunk's, one up-cycled, or the initial.

        Args:
          first_state: the state before the first step; its shapes are those of every checkpoint.
          mesh: where its arrays lie; None: on one device.
        """
        restored = self.checkpoints.restore(first_state)
        if restored is not None and not hosts.agree(self.metrics_reach(int(restored[0].step))):
            log.warning(
                "%s lacks lines from before its checkpoint; the cell starts again", self.folder.metrics
            )
            self.checkpoints.discard()
            restored = None
        if restored is not None:
            state, metadata = restored
            self.wall_seconds = metadata["seconds"]
            self.device_seconds = metadata.get("device_seconds", metadata["seconds"])
        else:
            state = self.from_trunk(first_state)
            if state is first_state and self.cell["upcycle"]["cell"] is not None:
                state = self.from_dense(mesh)
        if state is not first_state:
            state = jax.tree.map(jax.numpy.array, state)  # buffers of our own: the step donates them
        self.done = self.first_step = int(state.step)
        self.open_metrics()
        return state

    def from_trunk(self, first_state):
        """The trunk's state where this branch leaves it.

        Where the trunk kept no whole checkpoint there, the branch trains from its own beginning: the same
        numbers, for more compute.

        Raises:
          Diverged: the trunk ran away before the fork, as this cell would have.
          StudyError: the cell has a parent (``train.parent``), so that it has no beginning of its own, and
            the checkpoint that it goes on from is not there.
        """
        parent = self.cell["train"]["parent"]
        if self.job.trunk is None and parent is None:
            return first_state
        if self.job.trunk is None:
            raise StudyError(
                f"train.parent of cell {self.name} is {parent!r}: it goes on from that cell's checkpoint and "
                "can be trained in its study alone, by `scaling search` or `scaling run`"
            )
        state = self.checkpoints.restore_from(self.job.trunk.checkpoints, self.job.fork, first_state)
        if state is not None:
            return state
        if self.job.trunk.result.exists():
            end = read_result(self.job.trunk)
            if end["status"] == "diverged" and end["steps"] <= self.job.fork:
                raise Diverged(f"its trunk diverged: {end['reason']}", end["steps"])
        if parent is not None:
            raise StudyError(
                f"{self.job.trunk.checkpoints} has no checkpoint of step {self.job.fork} that reads back "
                f"whole, and cell {self.name} goes on from it (train.parent is {parent!r})"
            )
        log.warning(
            "%s has no checkpoint of step %d to branch from; %s trains from its beginning",
            self.job.trunk.checkpoints, self.job.fork, self.name,
        )  # fmt: skip
        return first_state

    def from_dense(self, mesh):
        """The state before the first step, its experts copies of the dense cell's feed-forwards.

        Raises:
          ConfigError: the folder holds another cell, or a model that this one cannot start from.
          StudyError: the dense cell's checkpoint is not there, or does not read back whole.
        """
        own = self.cell["upcycle"]
        for key, value in filled(self.cell)["upcycle"].items():  # the folder may have changed since the plan
            if key != "dense" and own[key] != value:
                raise ConfigError(f"upcycle.{key} is {own[key]!r}; by {own['dense']} it must be {value!r}")
        static = Static.of(dense_cell(own["dense"]))
        like = placed_shapes(static, mesh)
        state = self.checkpoints.restore_from(Path(own["dense"]) / "checkpoints", own["step"], like)
        if state is None:
            raise StudyError(
                f"{own['dense']} has no whole checkpoint of step {own['step']}, from which {self.name} is to "
                "start; train the dense cell again"
            )
        params = eval_params(static, state)
        return upcycled_state(static, Static.of(self.cell), params, self.cell["train"]["seed"], self.hp, mesh)

    def open_metrics(self) -> None:
        """Cuts the metrics back to the resumed step and opens them for appending."""
        rows = [r for r in read_jsonl(self.folder.metrics) if r["step"] <= self.done]
        self.evals = hosts.agree([r["eval"] for r in rows if "eval" in r])
        if not hosts.is_main():
            return
        write_whole(self.folder.metrics, "".join(to_line(r) for r in rows))
        self.file = open(self.folder.metrics, "ab", buffering=0)  # noqa: SIM115 (``close`` closes it)

    def metrics_reach(self, step: int) -> bool:
        """Whether every line that was written up to a step is there: a damaged file may have lost some."""
        rows = [r for r in read_jsonl(self.folder.metrics) if r["step"] <= step]
        logged = {s for s in range(self.job.fork + 1, step + 1) if self.logs(s)}
        evaluated = {s for s in self.eval_steps if s <= step and s < self.steps}
        return {r["step"] for r in rows if "loss" in r} >= logged and {
            r["step"] for r in rows if "eval" in r
        } >= evaluated

    def logs(self, done: int) -> bool:
        """Whether the update that makes ``done`` of them has a line."""
        return done > self.job.fork and (done % self.log_every == 0 or done == self.steps)

    def save_due(self, execution) -> bool:
        if self.done == self.steps or self.done in self.job.keep:
            return True
        every = execution.checkpoint_steps
        if every is not None and self.done % every == 0:
            return True
        if hosts.several() and self.done % max(1, self.steps // ASKED_POINTS):
            return False  # to ask the others at every step would cost more than a save now and then
        return hosts.agree(time.perf_counter() - self.last_save > execution.checkpoint_seconds)

    def saved_now(self) -> bool:
        """Whether the newest checkpoint is of this very step."""
        return self.checkpoints.manager.latest_step() == self.done

    def save(self, state) -> None:
        """A checkpoint, whole or not at all, never before the lines that lead to it."""
        if self.file is not None:
            os.fsync(self.file.fileno())
        self.checkpoints.save(state, self.wall_seconds, self.device_seconds)
        self.last_save = time.perf_counter()

    def check_and_log(self, done: int, metrics: Mapping) -> None:
        """Reads the numbers of the update that made ``done`` of them; writes a line where one is due.

        Raises:
          Diverged: the loss or the gradient is not a number, or the loss ran away.
        """
        loss, grad_norm = float(metrics["loss"]), float(metrics["grad_norm"])
        runaway = 2 * math.log(self.cell["model"]["vocab"])
        if not math.isfinite(loss):
            raise Diverged(f"the training loss was {loss} at step {done}", done)
        if not math.isfinite(grad_norm):
            raise Diverged(f"the gradient's norm was {grad_norm} at step {done}", done)
        if done > self.cell["schedule"]["warmup_steps"] and loss > runaway:
            raise Diverged(
                f"the training loss was {loss:.3f} at step {done}, "
                f"over twice that of a uniform guess ({runaway / 2:.3f})",
                done,
            )
        if self.logs(done):
            line = {"step": done, "tokens": done * self.batch * self.seq, "loss": loss}
            line |= {"grad_norm": grad_norm, "lr": float(metrics["lr"])}
            if "skipped" in metrics:
                line["skipped"] = int(metrics["skipped"])
            line |= {k: float(metrics[k]) for k in ("router_l1", "open_experts") if k in metrics}
            self.write(line)
            if self.on_metrics is not None:
                self.on_metrics({**line, "seconds": self.wall_seconds})

    def evaluate(self, eval_fn, params) -> None:
        """The held-out loss at this step, kept and written.

        Raises:
          Diverged: it is not a number, or no better than a uniform guess at the end.
        """
        scores = held_out_loss(eval_fn, params, self.heldout, self.dataset.bytes_per_token, self.draws)
        if not np.isfinite(scores["loss"]) or not np.isfinite(scores["loss_stderr"]):
            raise Diverged(f"the held-out loss was {scores['loss']} at step {self.done}", self.done)
        if self.done == self.steps and scores["loss"] > math.log(self.cell["model"]["vocab"]):
            words = f"the final held-out loss, {scores['loss']:.3f}, is worse than a uniform guess"
            raise Diverged(words, self.done)
        score = {"step": self.done, "tokens": self.done * self.batch * self.seq, **scores}
        if self.cell["eval"]["probes"] and self.done == self.steps:
            streamed = self.cell["model"]["cross_document"]
            score["probes"] = probe(eval_fn, params, self.heldout, self.dataset.heldout, self.seq, streamed)
        if self.cell["eval"]["block_threshold"] is not None and self.done == self.steps:
            by_blocks = functools.partial(eval_fn, blocks=block_choice(self.cell["eval"]))
            score["block_loss"] = held_out_loss(
                by_blocks, params, self.heldout, self.dataset.bytes_per_token
            )["loss"]
        self.evals = [*self.evals, score]
        if self.done < self.steps:
            self.write({"step": self.done, "eval": score})

    def write(self, row: dict) -> None:
        if self.file is not None:
            write_line(self.file, row)

    def end(self, status: str, steps: int, reason: str | None, devices: int) -> dict:
        """Writes the result: numbers of the cell and its devices alone; timings go to another file."""
        self.active = False
        self.close()
        tokens = steps * self.batch * self.seq
        evals = self.evals if status == "finished" else []
        final = evals[-1] if evals else {}
        lines = [r for r in read_jsonl(self.folder.metrics) if "loss" in r]
        result = {
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
            "flops": self.account.train_flops(tokens, "exact"),
            "spikes": count_spikes([r["loss"] for r in lines]),
            "skipped_steps": lines[-1].get("skipped", 0) if lines else 0,
            **({"open_experts": mean_of(lines, "open_experts")} if self.is_relu_routed else {}),
            "evals": evals,
            "data": self.dataset.fingerprint,
            **where_it_ran(devices),
        }
        if hosts.is_main():
            write_json(self.folder.timing, self.timing(max(0, steps - self.job.fork)))
            write_json(self.folder.result, result)
        hosts.wait_for_all(f"{self.name} has ended")
        return result

    def timing(self, steps: int) -> dict:
        """Time of all attempts that led to this result, speed of its steps, and memory where it is told."""
        memory = jax.devices()[0].memory_stats() or {}
        if self.timed_steps:
            steps, seconds = self.timed_steps, self.stepping_seconds
        else:  # one step, or none
            seconds = self.device_seconds
        speed = steps * self.batch * self.seq / seconds if seconds else None
        return {
            "wall_seconds": self.wall_seconds,
            "device_seconds": self.device_seconds,
            "tokens_per_second": speed,
            "flops_per_second": None if speed is None else self.account.train_flops(speed),
            "resumed_from_step": self.first_step,
            "peak_bytes": memory.get("peak_bytes_in_use"),
            "finished_at": time.time(),
        }

    def close(self) -> None:
        """Lets go of the files; safe to call twice."""
        if self.file is not None:
            self.file.close()
        self.checkpoints.close()


def stream_of(cell: Mapping, train) -> Stream:
    """The training batches of a cell: tokens as they are, or hidden in part under masked diffusion."""
    of = train, cell["data"]["seq"], cell["train"]["batch"], cell["train"]["seed"]
    first = {"first_sample": cell["upcycle"]["first_row"]}
    if causal(cell["model"]):
        return Stream(*of, **first)
    return MaskedStream(*of, **first, mask_token=mask_token(cell["model"]))


def eval_steps(cell: Mapping, fork: int = 0) -> set[int]:
    """After how many updates a cell is evaluated: evenly spaced to its end, none before the fork."""
    steps, points = cell["train"]["steps"], cell["eval"]["points"]
    return {s for s in (round(steps * (i + 1) / points) for i in range(points)) if s > fork}


def mean_of(lines: list[dict], key: str) -> float | None:
    """The mean of a number over the logged lines; None where there is none."""
    return float(np.mean([line[key] for line in lines])) if lines else None


def where_it_ran(devices: int) -> dict:
    """What a result keeps of the machine: the kind and number of devices, CPU cores, versions."""
    return {
        "device_kind": jax.devices()[0].device_kind,
        "devices": devices,
        "cpu_cores": cpu_cores(),
        "versions": {
            "scaling": __version__,
            "jax": jax.__version__,
            "numpy": np.__version__,
            "python": platform.python_version(),
        },
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
