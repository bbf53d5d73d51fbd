"""One worker process of ``scaling run``: ``python -m launch.worker STUDY``. Exit code 2: a clear error."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from pathlib import Path


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
    parser.add_argument("--remat", default="none")
    parser.add_argument("--cell", action="append", help="only this cell (may be given again)")
    parser.add_argument("--wandb", default="off")
    parser.add_argument("--cores", help="bind to these CPU cores, such as 0,1")
    parser.add_argument("--parent", type=int, help="end when this process is gone")
    args = parser.parse_args()
    if args.parent is not None:
        die_with(args.parent)
    if args.cores and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {int(c) for c in args.cores.split(",")})
    configure_jax()

    from launch.local import work
    from scaling.config import ConfigError
    from scaling.files import StudyError
    from scaling.train import Execution

    execution = Execution(args.remat, args.checkpoint_seconds, args.checkpoint_steps, wandb=args.wandb)
    try:
        return 1 if work(args.study, execution, args.cell) else 0
    except (ConfigError, StudyError) as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 2


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
