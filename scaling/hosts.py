"""What the processes of one job agree on: who writes, what was read, when all are there.

A job of one process needs none of it, and every function here is then free.
"""

from __future__ import annotations

import itertools
import json
import os
import signal
from typing import Any

import jax
import numpy as np

from scaling.config import ConfigError

LONGEST = 1 << 16
"""Bytes that one message may have: it is sent padded, in a shape that all processes know."""

HEARTBEAT_SECONDS = 30
"""When a process has not been heard of for so long, its peers end: none of them could take another step."""


def initialize_distributed(how: str | None) -> None:
    """Joins this process to the others of its job (``jax.distributed``); must come before any use of JAX.

    Args:
      how: None: a job of one process. ``auto``: what the cluster says (Slurm, TPU pod, Kubernetes, Open MPI).
        ``HOST:PORT,COUNT,INDEX``: the coordinator's address (that of process 0), how many, which this is.

    Raises:
      ConfigError: none of these.
    """
    if how is None:
        return
    if how == "auto":
        jax.distributed.initialize(
            local_device_ids=gpus_of_this_process(), heartbeat_timeout_seconds=HEARTBEAT_SECONDS
        )
        return
    address, *numbers = how.split(",")
    if len(numbers) != 2 or ":" not in address or not all(n.isdigit() for n in numbers):
        raise ConfigError(f"distributed is {how!r}; it must be 'auto' or HOST:PORT,COUNT,INDEX")
    count, index = map(int, numbers)
    if index >= count:
        raise ConfigError(f"distributed is {how!r}; INDEX must be below COUNT, from 0")
    jax.distributed.initialize(
        address, num_processes=count, process_id=index, heartbeat_timeout_seconds=HEARTBEAT_SECONDS
    )


def gpus_of_this_process() -> list[int] | None:
    """Under Slurm with one process a node all of its GPUs, of which JAX by itself takes one; else None."""
    env = os.environ
    gpus, nodes = env.get("SLURM_GPUS_ON_NODE", ""), env.get("SLURM_STEP_NUM_NODES")
    if not gpus.isdigit() or nodes is None or nodes != env.get("SLURM_STEP_NUM_TASKS"):
        return None
    return list(range(int(gpus)))


def is_main() -> bool:
    """Whether this is the process that writes the cell's files."""
    return jax.process_index() == 0


def several() -> bool:
    """Whether the job has more than one process."""
    return jax.process_count() > 1


CALLS = itertools.count(1)


def asked_to_stop() -> bool:
    """Whether any process of a job of several was sent SIGTERM: at one call the answer is True in them all.

    Every process calls this equally often, once a step. It costs a look at a flag: JAX's coordination
    service, whose handler of SIGTERM stays in place, settles on the call that no process has come to yet.
    """
    if not several():
        return False
    from jax.experimental import multihost_utils

    return multihost_utils.reached_preemption_sync_point(next(CALLS))


def stop_all() -> None:
    """Has every process of the job told to stop by ``asked_to_stop``, as after a SIGTERM from outside."""
    os.kill(os.getpid(), signal.SIGTERM)


LOST = ("Gloo", "by peer", "UNAVAILABLE", "ncclRemoteError", "ncclSystemError", "oordination service")
"""Of the words of errors that a collective raises where another process is gone."""


def is_lost_peer(error: Exception) -> bool:
    """Whether an error is that of a job of several processes whose others are gone, not the cell's own."""
    return several() and isinstance(error, RuntimeError) and any(words in str(error) for words in LOST)


def agree(value: Any) -> Any:
    """Process 0's value, in every process.

    Args:
      value: what JSON holds; the others' are not looked at.

    Raises:
      ValueError: it is longer than ``LONGEST`` bytes.
    """
    if not several():
        return value
    from jax.experimental import multihost_utils

    data = json.dumps(value).encode() if is_main() else b"null"
    if len(data) > LONGEST:
        raise ValueError(f"a message of {len(data)} bytes; it must be at most {LONGEST}")
    message = np.zeros(LONGEST, np.uint8)
    message[: len(data)] = np.frombuffer(data, np.uint8)
    sent = np.asarray(multihost_utils.broadcast_one_to_all(message), np.uint8)
    return json.loads(sent.tobytes().rstrip(b"\0"))


def everywhere(value: bool) -> bool:
    """Whether a condition holds in every process."""
    return bool(np.all(of_all(np.array([value]))))


def of_all(values: np.ndarray) -> np.ndarray:
    """Every process's array, stacked: [processes, ...]."""
    if not several():
        return values[None]
    from jax.experimental import multihost_utils

    return np.asarray(multihost_utils.process_allgather(values))


def wait_for_all(what: str) -> None:
    """Goes on when every process of the job has come here."""
    if several():
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(what)
