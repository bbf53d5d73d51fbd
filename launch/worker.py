"""One worker process of ``scaling run``: ``python -m launch.worker STUDY``. Exit codes: 0 nothing is left to
do, or the study is cancelled; 1 try again; 2 a clear error, said in the last line; 75 asked to stop
(SIGTERM), all is saved."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import tempfile
import threading
from pathlib import Path

from scaling.attempts import MAX_FAILURES, MAX_PREEMPTIONS, Budgets, is_cancelled
from scaling.claims import HEARTBEAT, JOB


def configure_jax() -> None:
    """Settings that every training process shares: a compilation cache on disk."""
    import jax

    cache = os.environ.get("SCALING_COMPILATION_CACHE", os.path.expanduser("~/.cache/scaling/xla"))
    if cache:
        jax.config.update("jax_compilation_cache_dir", cache)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("study", type=Path)
    parser.add_argument("--checkpoint-seconds", type=float, default=60.0)
    parser.add_argument("--checkpoint-steps", type=int)
    parser.add_argument("--remat", default="none", help="none, dots, full or auto")
    parser.add_argument("--accumulate", type=int, default=1, help="parts that a batch is taken in")
    parser.add_argument("--memory-gb", type=float, help="what --remat auto may use of each device")
    parser.add_argument("--mesh", help="replica,fsdp,tensor[,expert]: devices that each cell is split over")
    parser.add_argument("--distributed", help="auto, or HOST:PORT,COUNT,INDEX: one process of several")
    parser.add_argument("--cell", action="append", help="only this cell (may be given again)")
    parser.add_argument("--wandb", default="off")
    parser.add_argument("--pack", default="auto", help="auto, off, turns or vmap")
    parser.add_argument("--watchdog-seconds", type=float, default=1800.0)
    parser.add_argument("--deterministic", action="store_true", help="no atomic sums in GPU programs")
    parser.add_argument("--max-failures", type=int, default=MAX_FAILURES)
    parser.add_argument("--max-preemptions", type=int, default=MAX_PREEMPTIONS)
    parser.add_argument("--heartbeat-seconds", type=float, default=HEARTBEAT)
    parser.add_argument("--cores", type=int, help="bind to so many CPU cores")
    parser.add_argument("--parent", type=int, help="end when this process is gone")
    args = parser.parse_args()
    if args.parent is not None:
        die_with(args.parent)
    if args.deterministic:
        os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_gpu_deterministic_ops=true"
    held = bind_to_cores(args.cores) if args.cores and hasattr(os, "sched_setaffinity") else []

    from launch.engine import BAD_INPUT, PREEMPTED
    from launch.packs import may_pack
    from launch.work import work
    from scaling.config import ConfigError
    from scaling.files import StudyError
    from scaling.hosts import initialize_distributed
    from scaling.mesh import MeshShape
    from scaling.train import Execution, Preempted

    configure_jax()
    try:
        initialize_distributed(args.distributed)
        mesh = None if args.mesh is None else MeshShape.parse(args.mesh)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return BAD_INPUT
    except RuntimeError as error:  # the other processes of the job did not come: they may another time
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 1
    execution = Execution(
        args.remat,
        args.accumulate,
        mesh=mesh,
        memory_bytes=None if args.memory_gb is None else int(args.memory_gb * 1e9),
        checkpoint_seconds=args.checkpoint_seconds,
        checkpoint_steps=args.checkpoint_steps,
        wandb=args.wandb,
        together=args.pack if args.pack in ("turns", "vmap") else None,
        watchdog_seconds=args.watchdog_seconds,
    )
    try:
        pack = args.pack if may_pack(vars(args)) else "off"
        budgets = Budgets(args.max_failures, args.max_preemptions)
        work(args.study, execution, args.cell, pack, budgets, args.heartbeat_seconds, stop_on_sigterm())
    except (ConfigError, StudyError) as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return BAD_INPUT
    except Preempted:
        return 0 if is_cancelled(args.study) else PREEMPTED  # who was cancelled is not to be started again
    finally:
        del held
    return 0


def stop_on_sigterm() -> threading.Event:
    """An event that SIGTERM sets, so that the cell at hand is saved; a second SIGTERM ends the process.

    Not in a scheduler's job, where several come and SIGKILL follows by itself. In a job of several processes
    the signal is JAX's, see ``scaling.hosts.asked_to_stop``, and the event is set by a cancel alone.
    """
    from scaling import hosts

    stop = threading.Event()

    def asked(*_) -> None:
        stop.set()
        if JOB not in os.environ:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)

    if not hosts.several():
        signal.signal(signal.SIGTERM, asked)
    return stop


def bind_to_cores(count: int) -> list:
    """Binds this process to cores that no other worker on this machine holds (to any, if all are held).

    Returns:
      The open lock files; the cores are held as long as they live.
    """
    import fcntl

    folder = Path(tempfile.gettempdir()) / f"scaling-cores-{os.getuid()}"
    folder.mkdir(exist_ok=True)
    cores, mine, held = sorted(os.sched_getaffinity(0)), [], []
    for core in cores:
        file = open(folder / str(core), "a")  # noqa: SIM115 (held for the life of the process)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            continue
        mine.append(core)
        held.append(file)
        if len(mine) == count:
            break
    spare = [c for c in cores if c not in mine]
    start = os.getpid() % max(1, len(spare))
    mine += (spare[start:] + spare[:start])[: count - len(mine)]
    os.sched_setaffinity(0, mine)
    return held


def die_with(parent: int) -> None:
    """Asks Linux to end this process when `scaling run` is killed, so that no orphan keeps a cell."""
    if sys.platform == "linux":
        import ctypes

        PR_SET_PDEATHSIG = 1
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:  # it was gone before the call above
        sys.exit(1)


if __name__ == "__main__":
    sys.exit(main())
