"""What each process of a Slurm job runs: a worker, and what is to be done when it ends.

Slurm sends SIGTERM to every process of a job: ``stop_seconds`` before its time limit, and when the job is
preempted or requeued. The worker then saves the cell at hand and ends with ``PREEMPTED``. Where Slurm does
not run the job again by itself, the first process asks it to. That goes on without the launcher.
"""

from __future__ import annotations

import collections
import dataclasses
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from launch.engine import PREEMPTED, Ended, Group, outcome_of, settle
from launch.local import oom_kills
from scaling.attempts import LAST_LINES, is_cancelled
from scaling.claims import JOB, FolderStore, amend, latest, of_job, of_process
from scaling.files import CellFolder
from scaling.records import read_manifest

MOST_LINES = 2000
"""Of a worker's stderr, kept to see why it died; the whole of it is in the job's log."""
ASK_SECONDS = 60
"""What squeue and scontrol may take: a controller that restarts is away for a while."""
BLAME_SECONDS = 45
"""For the first process to see that another is gone (``scaling.hosts.HEARTBEAT_SECONDS``) and to note it."""


def job_name(launch: str, job: str) -> str:
    """A job's name in attempts' files: the same in each of its runs, and of no other job.

    Args:
      launch: the folder of submitit's files, as a cluster may count its jobs from 1 again. job: as submitit
        names it, 12 or 12_3.
    """
    return f"slurm {Path(launch).name} {job}"


def own_job() -> str:
    """The job that this process is of, as Slurm's commands take it.

    Not SLURM_JOB_ID: that of an array's last element is the id of the whole array.
    """
    array = os.environ.get("SLURM_ARRAY_JOB_ID")
    return f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}" if array else os.environ["SLURM_JOB_ID"]


def own_name() -> str:
    """The same in attempts' files."""
    return job_name(os.environ["SUBMITIT_FOLDER"], own_job())


@dataclasses.dataclass(frozen=True)
class Task:
    """One process of a job on a group of cells; the first of them looks after the claims."""

    group: Group

    def __call__(self) -> int:
        """Runs the worker to its end.

        Returns:
          0 where nothing is left to do.

        Raises:
          SystemExit: any other end, with the worker's exit code (128 and a signal's number); no result is
            left for submitit then, so that the job counts as under way if it runs again.
        """
        first = os.environ.get("SLURM_PROCID", "0") == "0"
        environment, ooms = {**os.environ, JOB: own_name()}, oom_kills()
        worker = subprocess.Popen(
            [sys.executable, "-m", "launch.worker", *self.group.arguments(), "--parent", str(os.getpid())],
            stdin=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            env=environment,
        )
        lines: collections.deque[bytes] = collections.deque(maxlen=MOST_LINES)
        for line in worker.stderr:
            lines.append(line)
            sys.stderr.buffer.write(line)
            sys.stderr.buffer.flush()
        code = worker.wait()
        if code == 0:
            return 0
        ended = Ended(code, b"".join(lines).decode(errors="replace"))
        if first:
            settle(self.group, of_process(worker.pid), ended, oom_kills() > ooms)
            if code in (PREEMPTED, -signal.SIGTERM) and not is_cancelled(self.group.study):
                run_again()
        else:
            blame(self.group, own_name(), ended, oom_kills() > ooms)
        sys.exit(code if code > 0 else 128 - code)


def blame(group: Group, job: str, ended: Ended, out_of_memory: bool, wait: float = BLAME_SECONDS) -> None:
    """Counts an attempt as failed where it was this process, not the job's first, whose own fault ended it.

    The first process can only see that a peer is gone, which it notes as a preemption.
    """
    outcome, reason = outcome_of(ended, out_of_memory)
    if outcome != "failed":
        return
    log, end = ended.words.splitlines()[-LAST_LINES:], time.monotonic() + wait
    folders = [CellFolder(group.study, e["id"]) for e in read_manifest(group.study)["cells"]]
    stores = [FolderStore(folder.attempts) for folder in folders]
    stores = [store for store in stores if of_job(job)(latest(store)[1] or {})]
    while any(latest(store)[1]["outcome"] is None for store in stores) and time.monotonic() < end:
        time.sleep(0.5)
    for store in stores:
        amend(store, of_job(job), "preempted", "failed", reason=reason, log=log)


def run_again() -> None:
    """Puts this job back into the queue, unless Slurm does that already or the job was cancelled.

    A job that Slurm itself ends is no longer in state RUNNING when its processes get the signal.
    """
    job = own_job()
    try:
        ask = ["squeue", "--noheader", "--jobs", job, "--format", "%T"]
        state = subprocess.run(ask, capture_output=True, text=True, timeout=ASK_SECONDS).stdout.split()
        if state == ["RUNNING"]:
            subprocess.run(["scontrol", "requeue", job], check=True, timeout=ASK_SECONDS)
    except (OSError, subprocess.SubprocessError) as error:  # the launcher submits the job again
        print(f"job {job} was not requeued: {error}", file=sys.stderr, flush=True)
