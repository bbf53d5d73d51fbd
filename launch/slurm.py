"""The engine of a Slurm cluster, through submitit: an array of jobs, one element a cell or a pack of cells.

A job that is preempted or comes to its time limit saves its cells and is requeued (``launch.slurm_task``);
one that dies, as when a process was killed or a node is lost, is submitted again by ``launch.engine.drive``.
"""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import time
import uuid
from collections.abc import Sequence
from pathlib import Path

from submitit.core.utils import FailedJobError, FailedSubmissionError
from submitit.slurm.slurm import SlurmExecutor, SlurmInfoWatcher, SlurmJob

from launch import packs
from launch.engine import BAD_INPUT, Ended, Group, ids, settle
from launch.options import as_argument
from launch.settings import engine_table
from launch.slurm_task import Task, job_name
from scaling.branches import spent_flops
from scaling.claims import of_job
from scaling.config import validate_cell
from scaling.files import CellFolder, StudyError
from scaling.records import read_manifest

LARGEST_ARRAY = 1000
"""Elements of one array; Slurm's own limit, MaxArraySize, is 1,001 unless the site has set another."""
LAST_SIGNAL = 64
MOST_WORDS = 1 << 16
"""Bytes of a dead job's log that are looked at: its end."""


@dataclasses.dataclass(frozen=True)
class Settings:
    """What a user says of the cluster: the keys of the file that ``--settings`` names (docs/launch_slurm.md).

    Attributes:
      partition, account, qos, constraint: as sbatch's. time: minutes that a job may run.
      nodes: of each job; its processes train every cell together. tasks_per_node: processes a node; one has
        all GPUs of its node. gpus_per_node, cpus_per_task, mem_gb: of each node, process, node.
      stop_seconds: how long before the time limit cells are saved.
      setup: lines of shell before the worker starts, such as ``module load``.
      container: an image, for clusters with Pyxis; mounts: HOST:INSIDE of it. python: the interpreter, where
        it is another than here.
      sbatch: further parameters of sbatch. srun: further words of srun's command line.
      poll_seconds: between two looks at the queue.
    """

    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    time: int = 60
    nodes: int = 1
    tasks_per_node: int = 1
    gpus_per_node: int = 0
    cpus_per_task: int | None = None
    mem_gb: float | None = None
    stop_seconds: int = 120
    setup: list[str] = dataclasses.field(default_factory=list)
    container: str | None = None
    mounts: list[str] = dataclasses.field(default_factory=list)
    python: str | None = None
    sbatch: dict = dataclasses.field(default_factory=dict)
    srun: list[str] = dataclasses.field(default_factory=list)
    poll_seconds: float = 15.0

    @property
    def processes(self) -> int:
        """Of each job."""
        return self.nodes * self.tasks_per_node


POSITIVE = ("time", "nodes", "tasks_per_node", "cpus_per_task", "mem_gb", "stop_seconds", "poll_seconds")
KINDS = {
    "str": (str, "a string"),
    "int": (int, "an integer"),
    "float": ((int, float), "a number"),
    "list[str]": (list, "a list of strings"),
    "dict": (dict, "a table"),
}


def read_settings(path: Path | None) -> Settings:
    """The table ``slurm`` of the user's file.

    Raises:
      ConfigError: the file cannot be read. StudyError: a key or value is not as it must be.
    """
    found = engine_table(path, "slurm")
    kinds = {f.name: f.type.removesuffix(" | None") for f in dataclasses.fields(Settings)}
    for key, value in found.items():
        if key not in kinds:
            raise StudyError(
                f"{path} has {key!r}; it may have {', '.join(kinds)} (others in sbatch = {{...}})"
            )
        kind, words = KINDS[kinds[key]]
        right = isinstance(value, kind) and not isinstance(value, bool)
        if isinstance(value, list):
            right = right and all(isinstance(x, str) for x in value)
        if not right or (key in POSITIVE and value <= 0) or (key == "gpus_per_node" and value < 0):
            least = " above 0" if key in POSITIVE else " of at least 0" if key == "gpus_per_node" else ""
            raise StudyError(f"{path}: {key} is {value!r}; it must be {words}{least}")
    settings = Settings(**found)
    if settings.stop_seconds >= 60 * settings.time:
        raise StudyError(
            f"{path}: stop_seconds is {settings.stop_seconds}, not less than time ({settings.time} minutes)"
        )
    return settings


def parameters(settings: Settings, name: str, cores: int, parallel: int | None) -> dict:
    """submitit's words for the settings.

    Args:
      name: of the jobs. cores: CPU cores that a worker is bound to. parallel: elements at once at most.
    """
    srun = ["--kill-on-bad-exit=1", *settings.srun]  # one dead process ends its peers
    if settings.container:
        srun.append(f"--container-image={settings.container}")
    if settings.mounts:
        srun.append(f"--container-mounts={','.join(settings.mounts)}")
    given = {
        "job_name": name,
        "partition": settings.partition,
        "account": settings.account,
        "qos": settings.qos,
        "constraint": settings.constraint,
        "time": settings.time,
        "nodes": settings.nodes,
        "ntasks_per_node": settings.tasks_per_node,
        "gpus_per_node": settings.gpus_per_node or None,
        "cpus_per_task": settings.cpus_per_task or (None if settings.gpus_per_node else cores),
        "mem": None if settings.mem_gb is None else f"{int(settings.mem_gb * 1024)}M",
        "array_parallelism": parallel or LARGEST_ARRAY,
        "setup": settings.setup or None,
        "srun_args": srun,
        "wckey": "",
        # to all steps, not to the shell; requeued on preemption and where a node is lost
        "additional_parameters": {"signal": f"TERM@{settings.stop_seconds}", "requeue": True}
        | settings.sbatch,
    }
    return {key: value for key, value in given.items() if value is not None}


class Executor(SlurmExecutor):
    """submitit's; it can be made where no Slurm is, to show its script."""

    @classmethod
    def affinity(cls) -> int:
        return 1

    def script(self, count: int) -> str:
        """What sbatch would be given for so many elements."""
        if count > 1:
            self.parameters["map_count"] = count
        try:
            return self._make_submission_file_text(self._submitit_command_str, "")
        finally:
            self.parameters.pop("map_count", None)


class Watcher(SlurmInfoWatcher):
    """submitit's; it also knows a preempted job that is not to run again, which ends as PREEMPTED."""

    def read_info(self, string: bytes | str) -> dict:
        found = super().read_info(string)
        if any(info["State"] == "PREEMPTED" for info in found.values()):
            ask = ["squeue", "--noheader", "--array", "--me", "--format", "%i"]
            queue = subprocess.run(ask, capture_output=True, text=True)
            if queue.returncode == 0:
                there = queue.stdout.split()
                for job, info in found.items():
                    if info["State"] == "PREEMPTED" and job not in there:
                        found[job] = {**info, "State": "PREEMPTED, NOT REQUEUED"}
        return found


class Slurm:
    """Jobs of a Slurm cluster.

    Args:
      study: its folder; submitit's files go to a new folder below it at each launch, as results are kept by
        job id, and a cluster may count from 1 again. It must be seen by all nodes.
      settings: of the cluster. name: of the jobs. cores: CPU cores of a worker. parallel: jobs at once.
    """

    def __init__(
        self, study: Path, settings: Settings, name: str, cores: int = 1, parallel: int | None = None
    ):
        launch = time.strftime("%Y%m%d-%H%M%S-", time.gmtime()) + uuid.uuid4().hex[:6]
        self.executor = Executor(Path(study).resolve() / "slurm" / launch, python=settings.python)
        try:
            self.executor.update_parameters(**parameters(settings, name, cores, parallel))
        except (TypeError, ValueError) as error:
            raise StudyError(f"submitit does not take the settings: {error}") from error
        self.settings, self.every = settings, settings.poll_seconds
        self.jobs: dict[str, tuple[SlurmJob, Group]] = {}
        SlurmJob.watcher = Watcher(delay_s=settings.poll_seconds)

    def submit(self, groups: Sequence[Group]) -> list[str]:
        names = []
        for start in range(0, len(groups), LARGEST_ARRAY):
            part = groups[start : start + LARGEST_ARRAY]
            try:
                with self.executor.batch():
                    jobs = [self.executor.submit(Task(group)) for group in part]
            except (FailedSubmissionError, FailedJobError, OSError, subprocess.SubprocessError) as error:
                self.cancel(names)
                said = str(error).strip().splitlines() or [type(error).__name__]
                raise StudyError(f"sbatch refused the jobs: {said[-1]}") from error
            self.jobs |= {job.job_id: (job, group) for job, group in zip(jobs, part, strict=True)}
            names += [job.job_id for job in jobs]
        return names

    def poll(self, job: str) -> Ended | None:
        found, group = self.jobs[job]
        first = found.task(0)
        if not first.done():
            return None
        del self.jobs[job]
        state = first.watcher.get_state(job, mode="cache")
        if first.paths.result_pickle.exists() or state == "COMPLETED":
            return Ended(0)
        ended = Ended(exit_code(job, state), end_of(first.paths.stderr))
        by_hand = state.startswith("CANCELLED by")
        settled = settle(group, of_job(job_name(self.executor.folder, job)), ended, state == "OUT_OF_MEMORY")
        return dataclasses.replace(ended, settled=settled, unwanted=by_hand)

    def cancel(self, jobs: Sequence[str]) -> None:
        jobs = [job for job in jobs if self.jobs.pop(job, None) is not None]
        if jobs:
            subprocess.run(["scancel", *jobs], check=False)


def exit_code(job: str, state: str) -> int:
    """A dead job's exit code, minus a signal's number where one ended it."""
    if state.startswith(("CANCELLED", "TIMEOUT", "PREEMPTED")):
        return -signal.SIGTERM
    if state != "FAILED":  # OUT_OF_MEMORY, NODE_FAIL, BOOT_FAIL and the like
        return -signal.SIGKILL
    ask = ["sacct", "--noheader", "--parsable2", "--allocations", "--format", "ExitCode", "--jobs", job]
    said = subprocess.run(ask, capture_output=True, text=True).stdout.strip()
    code, _, how = said.partition(":")
    if not (code.isdigit() and how.isdigit()):
        return 1
    code, how = int(code), int(how)
    if how or code > 128:
        return -(how or code - 128)
    if code in (0, 1, BAD_INPUT) or code > LAST_SIGNAL:
        return code or 1
    return -code  # srun's where it ended its tasks by a signal; no worker's


def end_of(log: Path) -> str:
    """The last lines of a job's log, without those of Slurm and submitit."""
    try:
        with open(log, "rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - MOST_WORDS))
            lines = file.read().decode(errors="replace").splitlines(keepends=True)
    except OSError:
        return ""
    return "".join(x for x in lines if not x.startswith(("srun: ", "slurmstepd: ", "submitit ")))


def groups_of(study: Path, only: Sequence[str], options: Sequence[str], size_of) -> list[Group]:
    """What has no result, a job each: a cell, a pack of cells of one shape, or a trunk with its branches.

    Args:
      only: the cells to train; all where empty. options: of the workers. size_of: config to the most cells
        of a pack.

    Returns:
      The most expensive first.
    """
    study = Path(study).resolve()
    entries = [{**e, "config": validate_cell(e["config"])} for e in read_manifest(study)["cells"]]
    todo = {name for name in ids(Group(study, tuple(only))) if not CellFolder(study, name).result.exists()}
    families: dict[str, list[dict]] = {}
    for entry in entries:
        if entry["id"] in todo:
            families.setdefault(entry.get("trunk") or entry["id"], []).append(entry)
    together = [cells for cells in families.values() if len(cells) > 1]
    alone = [cells[0] for cells in families.values() if len(cells) == 1]
    alone.sort(key=spent_flops, reverse=True)
    together += packs.in_packs(alone, size_of)
    together.sort(key=lambda cells: sum(map(spent_flops, cells)), reverse=True)
    return [Group(study, tuple(e["id"] for e in cells), tuple(options)) for cells in together]


def plan(
    study: Path,
    only: Sequence[str],
    options: dict,
    settings: Settings,
    cores: int = 1,
    parallel: int | None = None,
) -> tuple[Slurm, list[Group]]:
    """The engine and the jobs for what a study lacks; nothing is submitted.

    Args:
      only: the cells to train; all where empty. options: of the workers, as ``scaling launch`` has them.
      settings: of the cluster. cores: CPU cores of a worker. parallel: jobs at once.

    Raises:
      StudyError: options and settings do not go together.
    """
    if options["distributed"]:
        raise StudyError(
            "--distributed with --on slurm: it follows from nodes and tasks_per_node of --settings"
        )
    if settings.gpus_per_node > 1 and settings.processes == 1 and not options["mesh"]:
        raise StudyError(
            f"gpus_per_node is {settings.gpus_per_node} for one process without --mesh, which would use one "
            f"of them; give --mesh 1,{settings.gpus_per_node},1, or gpus_per_node = 1"
        )
    words = [x for name, value in options.items() for x in as_argument(name, value)]
    if settings.processes > 1:
        words += ["--distributed", "auto"]
    if not settings.gpus_per_node:
        words += ["--cores", str(cores)]
    how = options["pack"] if settings.processes == 1 and packs.may_pack(options) else "off"
    on_cpu = settings.gpus_per_node == 0
    engine = Slurm(study, settings, f"scaling-{Path(study).resolve().name}", cores, parallel)
    return engine, groups_of(
        study, only, words, lambda config: packs.cells_that_fit(config, how, on_cpu, None, None)
    )


def dry_run(engine: Slurm, groups: Sequence[Group]) -> dict:
    """What would be submitted: ``script``, of sbatch, and ``jobs``, the cells of each element."""
    count = min(len(groups), LARGEST_ARRAY)
    return {
        "script": engine.executor.script(count),
        "worker": " ".join(["python -m launch.worker", *groups[0].arguments()]) if groups else None,
        "jobs": [list(group.cells) for group in groups],
    }
