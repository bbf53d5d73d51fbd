"""Training cells: resume, step, evaluate, record; one alone, or a pack of one shape side by side.

``train(cell, folder)`` may be killed at any moment and called again: it goes on from the newest
whole checkpoint and ends with the same ``result.json`` and ``metrics.jsonl``, byte for byte on
CPU. Timings live in ``timing.json``, apart from the numbers.
"""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Callable, Mapping, Sequence

import jax

from scaling import data, hosts
from scaling.config import ConfigError, canonical_json, cell_id, validate_cell
from scaling.files import CellFolder, StudyError, read_json, write_json
from scaling.flops import CONVENTIONS, ledger
from scaling.lane import Diverged, Job, Lane
from scaling.layers import least_vocab
from scaling.memory import choose_plan
from scaling.mesh import MeshShape, make_mesh
from scaling.pack import program_for
from scaling.program import Plan, Static, placed_first_state, program_key
from scaling.records import read_result
from scaling.step import eval_params
from scaling.tracking import Tracker
from scaling.watchdog import Watchdog

log = logging.getLogger(__name__)

USABLE = 0.92
"""Of a device's memory: the rest is the runtime's, and what evaluation and data hold beside a step."""


@dataclasses.dataclass(frozen=True)
class Execution:
    """How a cell runs, not what it computes: no field changes a number, but ``accumulate`` and ``mesh`` the
    order of sums."""

    remat: str = "none"
    """What the backward pass recomputes; ``auto``: this and ``accumulate`` are the cheapest that fit."""
    accumulate: int = 1
    """Parts that a batch is taken in, one after another, where its activations do not fit together."""
    memory_bytes: int | None = None
    """What ``auto`` may use of each device; by default 92 % of what the device says that it has."""
    mesh: MeshShape | None = None
    """Devices that a cell is split over; None: one device, or all of them (as fsdp) in a job of several
    processes."""
    checkpoint_seconds: float = 60.0
    """Save when this much time has passed since the last save."""
    checkpoint_steps: int | None = None
    """Save also every so many steps."""
    prefetch: int | None = None
    """Batches read ahead in a thread; by default 2, and none on CPU, where the thread costs more."""
    wandb: str = "off"
    """``off``, ``offline`` or ``online``: mirror the metrics to Weights & Biases."""
    together: str | None = None
    """How a pack's cells share the device: ``vmap``, one program over all of them, or ``turns``, the single
    cell's program for each in turn. By default turns on CPU, where they are faster and give the bits of a
    cell alone, and vmap elsewhere."""
    watchdog_seconds: float = 1800.0
    """End the process, with a stack trace, when no step has ended for so long; 0: never."""


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
    return train_pack([Job(cell, folder)], execution, on_metrics)[0]


class Preempted(BaseException):
    """Training was asked to stop, and has saved what it could."""


def train_pack(
    jobs: Sequence[Job],
    execution: Execution | None = None,
    on_metrics: Callable[[dict], None] | None = None,
    on_step: Callable[[dict[str, int]], bool] | None = None,
) -> list[dict]:
    """Trains cells of one shape side by side, each as if it were alone.

    They may differ in whatever is traced: seed, data, learning rate, weight decay, warm-up, schedule length.
    Each keeps its own lines, checkpoints and result; one that ends, or diverges, leaves the others to go
    on; what is killed resumes from each cell's own checkpoint, in this pack or another or alone.

    On CPU the numbers are those of the cell alone, bit for bit. Under ``vmap`` (the default elsewhere) XLA
    orders the sums of a batched product differently: the losses agree to float32 rounding, grown by
    training (see tests/scaling/test_pack.py).

    Args:
      jobs: at least one; their compiled parts (``Static``, batch, sequence length) must be equal.
      execution: how to run them. on_metrics: called with every logged line of every cell.
      on_step: called after every step, before anything of it is written, with cell id to steps done of the
        cells under way; once before the first. True: save them and stop. A job of several processes does so
        where one of them was sent SIGTERM (``hosts.asked_to_stop``), and all of them at one step.

    Returns:
      The content of each ``result.json``, in order.

    Raises:
      ConfigError: cells of different shapes; otherwise as ``train``.
      StudyError: as ``train``.
      Preempted: asked to stop.
    """
    execution = execution or Execution()
    jobs = [dataclasses.replace(job, cell=validate_cell(job.cell)) for job in jobs]
    for job in jobs:
        check_folder(job)
    todo = [jobs[j] for j in hosts.agree([j for j, job in enumerate(jobs) if not job.folder.result.exists()])]
    if todo:
        Pack(todo, execution, on_metrics, on_step).to_the_end()
    return [read_result(job.folder) for job in jobs]


def check_folder(job: Job) -> None:
    """Raises ``StudyError`` where the folder is another cell's; else leaves the config there."""
    folder, name = job.folder, cell_id(job.cell)
    if folder.config.exists():
        stored = cell_id(validate_cell(read_json(folder.config)))
        if stored != name:
            raise StudyError(f"{folder.path} holds cell {stored}, not {name}; use another study folder")
    if hosts.is_main() and not folder.result.exists():
        write_json(folder.config, job.cell)


def plan_of(execution: Execution, cell: Mapping) -> Plan:
    """How a cell's step runs on the devices that are here.

    Raises:
      ConfigError: parts below one, a mesh that is not of these devices, or nothing fits their memory.
    """
    if execution.accumulate < 1:
        raise ConfigError(f"accumulate is {execution.accumulate}; it must be a positive integer")
    shape = execution.mesh
    if shape is None and hosts.several():
        shape = MeshShape(fsdp=jax.device_count())
    if shape is not None:
        shape.check(cell["model"])
    # of one machine a cell may take a part; processes that join must all have one
    devices = None if hosts.several() or shape is None else jax.devices()[: shape.devices]
    mesh = None if shape is None else make_mesh(shape, devices)
    if execution.remat != "auto":
        return Plan(execution.remat, execution.accumulate, mesh)
    budget = execution.memory_bytes or usable_bytes()
    plan, choice = choose_plan(cell, budget, mesh)
    if not choice.fits:
        raise ConfigError(
            f"a step of cell {cell_id(cell)} needs {choice.bytes / 1e9:.3g} GB of each device with remat "
            f"{choice.remat!r} in {choice.accumulate} parts; {budget / 1e9:.3g} GB may be used. Take more "
            "devices (mesh) or a smaller train.batch"
        )
    log.info("%s: remat %s, %d parts", cell_id(cell), choice.remat, choice.accumulate)
    return plan


def usable_bytes() -> int:
    """Bytes of a device's memory that a step may use.

    Raises:
      ConfigError: the device does not tell (a CPU).
    """
    limit = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")
    if limit is None:
        raise ConfigError("remat is 'auto' on a device that does not tell its memory; give memory_bytes too")
    return int(USABLE * limit)


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
    needed = least_vocab(cell["model"], dataset.vocab)
    if needed > cell["model"]["vocab"]:
        raise ConfigError(
            f"model.vocab is {cell['model']['vocab']} but the data has token ids up to {dataset.vocab - 1}; "
            f"it must be at least {needed}"
        )
    return dataset


class Pack:
    """Cells of one shape under way together."""

    def __init__(self, jobs: Sequence[Job], execution: Execution, on_metrics, on_step=None):
        if len({program_key(job.cell) for job in jobs}) > 1:
            names = ", ".join(cell_id(job.cell) for job in jobs)
            raise ConfigError(f"cells {names} differ in what is compiled; a pack needs one shape and batch")
        if execution.wandb != "off" and len(jobs) > 1:
            raise ConfigError(
                f"wandb is {execution.wandb!r} with {len(jobs)} cells; it mirrors one at a time"
            )
        self.execution, self.static = execution, Static.of(jobs[0].cell)
        batch = jobs[0].cell["train"]["batch"]
        self.plan = plan_of(execution, jobs[0].cell)
        self.program = program_for(self.static, self.plan, batch, len(jobs), execution.together)
        self.prefetch = execution.prefetch
        if self.prefetch is None:
            self.prefetch = 0 if jax.default_backend() == "cpu" else 2
        opened: dict[str, object] = {}  # cells of one study share their data
        keys = [canonical_json(job.cell["data"]) for job in jobs]
        for key, job in zip(keys, jobs, strict=True):
            opened[key] = opened.get(key) or open_planned_data(job.cell)
        first = jobs[0]
        self.tracker = Tracker(
            execution.wandb if hosts.is_main() else "off",
            first.folder.path.parent.parent,
            cell_id(first.cell),
            tracked_config(first.cell, cell_id(first.cell)),
        )
        listen = on_metrics or self.tracker.log
        self.lanes = [Lane(job, opened[key], listen) for key, job in zip(keys, jobs, strict=True)]
        self.devices = 1 if self.plan.mesh is None else self.plan.mesh.size
        self.clock = time.perf_counter()
        self.result, self.on_step = None, on_step

    def to_the_end(self) -> None:
        """Steps, evaluations and checkpoints from wherever each cell stands to its last step."""
        try:
            with Watchdog(self.execution.watchdog_seconds) as watchdog:
                state = self.start()
                self.tell()
                hp = self.program.gather([lane.hp for lane in self.lanes])
                batches = [self.batches_of(lane) for lane in self.lanes]
                pending, since, steps = None, None, 0
                while any(lane.active for lane in self.lanes):
                    pairs = zip(self.lanes, batches, strict=True)
                    rows = [next(own) if lane.active else None for lane, own in pairs]
                    state, metrics = self.program.step(state, rows, hp)
                    for lane in self.lanes:
                        lane.done += lane.active
                    steps += 1
                    stop = self.tell()
                    done = [lane.done if lane.active else None for lane in self.lanes]
                    if pending is not None:  # one step late, so that the device never waits for Python
                        self.read(*pending)
                    pending = (done, metrics)
                    compiled = since is None  # in the first step: times begin after it
                    if stop or compiled or any(ln.active and self.needs_a_stop(ln) for ln in self.lanes):
                        self.read(*pending)
                        pending = None
                        if not compiled:
                            self.time_steps(time.perf_counter() - since, steps)
                        for j, lane in enumerate(self.lanes):
                            if lane.active and self.needs_a_stop(lane):
                                self.stop_at(lane, self.program.lane(state, j))
                        since, steps = time.perf_counter(), 0
                    if stop and any(lane.active for lane in self.lanes):
                        self.stop_early(state)
                    watchdog.step_ended()
        finally:
            for lane in self.lanes:
                lane.close()
            self.tracker.finish(self.result)

    def tell(self) -> bool:
        """Says where the cells stand; whether they should stop."""
        asked = False
        if self.on_step is not None:
            asked = bool(self.on_step({lane.name: lane.done for lane in self.lanes if lane.active}))
        if not hosts.several():
            return asked
        if asked:
            hosts.stop_all()
        return hosts.asked_to_stop()

    def stop_early(self, state) -> None:
        """Saves every cell that is under way, so that the next attempt goes on from here."""
        self.share_time()
        for j, lane in enumerate(self.lanes):
            if lane.active and lane.done > lane.first_step and not lane.saved_now():
                lane.save(self.program.lane(state, j))
        raise Preempted

    def start(self):
        """Every cell's state, gathered; cells that were killed after their last step are ended here."""
        states = []
        for lane in self.lanes:
            seed = lane.cell["train"]["seed"]
            first = placed_first_state(self.static, seed, lane.hp, self.plan.mesh)
            try:
                states.append(lane.start(first, self.plan.mesh))
            except Diverged as end:
                self.end(lane, "diverged", end.steps, str(end))
                states.append(first)
                continue
            if lane.done == lane.steps:  # killed between the last save and the result
                self.stop_at(lane, states[-1])
        return self.program.gather(states)

    def batches_of(self, lane: Lane):
        stop = max(lane.done, lane.steps)
        return lane.stream.iterate(lane.done, stop, prefetch=self.prefetch, rows=self.program.mine)

    def needs_a_stop(self, lane: Lane) -> bool:
        return lane.done in lane.eval_steps or lane.save_due(self.execution)

    def read(self, done: Sequence[int | None], metrics) -> None:
        """Looks at the numbers of one step of every cell that took it."""
        for j, (steps, lane) in enumerate(zip(done, self.lanes, strict=True)):
            if steps is None or not lane.active:
                continue
            try:
                lane.check_and_log(steps, self.program.metrics_of(metrics, j))
            except Diverged as end:
                self.end(lane, "diverged", end.steps, str(end))

    def stop_at(self, lane: Lane, state) -> None:
        """Evaluates and saves one cell where these are due; ends it at its last step."""
        self.share_time()
        try:
            if lane.done in lane.eval_steps:
                lane.evaluate(self.program.evaluate, eval_params(self.static, state))
        except Diverged as end:
            self.end(lane, "diverged", end.steps, str(end))
            return
        self.share_time()
        if lane.done > lane.first_step and lane.save_due(self.execution):
            lane.save(state)
        if lane.done == lane.steps:
            self.end(lane, "finished", lane.steps, None)

    def end(self, lane: Lane, status: str, steps: int, reason: str | None) -> None:
        self.share_time()
        self.result = lane.end(status, steps, reason, self.devices)

    def time_steps(self, seconds: float, steps: int) -> None:
        """Adds steps taken between two stops and their device time, in equal parts to every active cell."""
        active = [lane for lane in self.lanes if lane.active]
        for lane in active:
            lane.stepping_seconds += self.devices * seconds / len(active)
            lane.timed_steps += steps

    def share_time(self) -> None:
        """Adds the time since the last call: wall time to every active cell, the device's in equal parts."""
        now = time.perf_counter()
        active = [lane for lane in self.lanes if lane.active]
        for lane in active:
            lane.wall_seconds += now - self.clock
            lane.device_seconds += self.devices * (now - self.clock) / len(active)
        self.clock = now
