"""Compiled programs run by turns in one process, so that a load on the machine meets them alike."""

from __future__ import annotations

import argparse
import os
import pathlib
import statistics
import time
from collections.abc import Callable, Mapping

import jax


def compiled(function: Callable, *arrays):
    """``function`` compiled for arrays like these, or shapes."""
    return jax.jit(function).lower(*arrays).compile()


def by_turns(
    programs: Mapping[str, Callable], *arrays, turns: int, launches: int = 1
) -> dict[str, list[float]]:
    """Seconds of each program on the same arrays, turn by turn; their order is reversed every other turn.

    A first turn, which touches the memory for the first time, does not count. ``launches``: calls behind
    one another that are timed as one, where a call is too short to be timed; the figure is that of one.
    """
    seconds = {name: [] for name in programs}
    for turn in range(turns + 1):
        for name in sorted(programs, reverse=turn % 2 == 1):
            begin = time.perf_counter()
            for _ in range(launches):
                out = programs[name](*arrays)
            jax.block_until_ready(out)
            if turn:
                seconds[name].append((time.perf_counter() - begin) / launches)
    return seconds


def median_ms(seconds: list[float]) -> float:
    return round(1e3 * statistics.median(seconds), 2)


def ratio(theirs: list[float], ours: list[float]) -> float:
    """The median over turns of theirs / ours within a turn: above 1 ours is faster."""
    return round(statistics.median(a / b for a, b in zip(theirs, ours, strict=True)), 2)


def temporary_mb(program) -> float:
    return round(program.memory_analysis().temp_size_in_bytes / 1e6, 1)


def device() -> str:
    """The name of the device at hand; of a CPU, its model."""
    kind = jax.devices()[0].device_kind
    info = pathlib.Path("/proc/cpuinfo")
    if jax.default_backend() != "cpu" or not info.exists():
        return kind
    names = [line.split(":")[1].strip() for line in info.read_text().splitlines() if "model name" in line]
    return names[0] if names else kind


def load() -> float:
    """Processes that ran or waited on this machine in the last minute."""
    return round(os.getloadavg()[0], 1)


def show(tables: Mapping[str, list[dict]]) -> None:
    """A section's tables as lines of text."""
    for title, rows in tables.items():
        print(title)
        for row in rows:
            print("  " + "  ".join(f"{name}={value}" for name, value in row.items() if value is not None))


def main(measure: Callable, doc: str) -> None:
    """A section as a script of its own, with ``--quick``."""
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    parser.add_argument("--quick", action="store_true")
    show(measure(parser.parse_args().quick))
