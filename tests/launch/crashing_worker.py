"""A worker whose cells of some seeds crash, each in its own way: for the tests of the launcher.

    python crashing_worker.py KIND=SEED,SEED... -- STUDY OPTIONS

An odd way of training would be a hook in the product; here the worker's own functions are replaced.
"""

import sys
import time

import numpy as np


def crash(kind: str) -> None:
    """Fails as cells do: on opening the data, or at its second batch."""
    if kind == "import":
        import a_module_that_is_not_there  # noqa: F401
    if kind == "data":
        raise ValueError("row 7 of the shard is damaged")
    if kind == "memory":
        raise MemoryError("RESOURCE_EXHAUSTED: Out of memory allocating 1 TB")
    if kind == "hang":
        time.sleep(3600)
    if kind == "killed":
        import os
        import signal

        os.kill(os.getpid(), signal.SIGKILL)


def main() -> int:
    kinds = {}
    for word in sys.argv[1 : sys.argv.index("--")]:
        kind, _, seeds = word.partition("=")
        kinds |= {int(seed): kind for seed in seeds.split(",")}
    sys.argv = ["worker", *sys.argv[sys.argv.index("--") + 1 :]]
    from scaling import train
    from scaling.lane import Lane

    check, batches = Lane.check_and_log, train.Pack.batches_of

    def batches_of(pack, lane):
        kind = kinds.get(lane.cell["train"]["seed"])
        for i, rows in enumerate(batches(pack, lane)):
            if kind is not None and i == 1:
                crash(kind)
            yield rows

    def check_and_log(lane, done, metrics):
        if kinds.get(lane.cell["train"]["seed"]) == "nan":
            metrics = {**metrics, "loss": np.float32("nan")}
        check(lane, done, metrics)

    train.Pack.batches_of, Lane.check_and_log = batches_of, check_and_log
    from launch.worker import main

    return main()


if __name__ == "__main__":
    sys.exit(main())
