"""A study compiled for TPUs that are not here: does each cell fit, where, how, how fast, for how much?

Every distinct training step is compiled by the real TPU compiler for the smallest slice that holds it, the
largest also for the whole target. What a step needs and does is read off the compiled program; times, MFU
and money are estimates from it (``roofline``), and marked as such wherever they are shown.
"""

from __future__ import annotations

import concurrent.futures
import math
from collections.abc import Callable, Iterator, Mapping, Sequence

from launch.preflight.cache import Cache
from launch.preflight.cells import Program, programs
from launch.preflight.hardware import Target
from launch.preflight.plans import Choice
from launch.preflight.prices import Prices
from launch.preflight.roofline import step_time
from launch.preflight.search import best_on, smallest_slice
from pallas_kernels import aot
from scaling.config import ConfigError


def preflight(
    cells: Sequence[Mapping],
    target: Target,
    prices: Prices,
    cache: Cache,
    *,
    remat: str | None = None,
    jobs: int = 1,
    say: Callable[[str], None] = lambda text: None,
) -> Iterator[dict]:
    """One row a distinct program, smallest first, and one of the largest on the whole target.

    Args:
      cells: entries of a manifest. remat: one policy (see ``models.lm.build``); None: the fastest that fits.
      jobs: shapes to compile at once. say: is told what is being compiled, by any thread.

    Yields:
      Plain JSON, see ``describe``.

    Raises:
      ConfigError: the target's compiler is not installed.
    """
    if target.platform == "tpu":
        try:
            aot.tpu_topology(target.topology)
        except (RuntimeError, ValueError) as error:
            raise ConfigError(str(error)) from error
    shapes: dict[tuple, list[Program]] = {}
    for program in programs(cells):
        shapes.setdefault((program.static, program.seq), []).append(program)
    largest = list(shapes.values())[-1][-1]

    def rows_of(group: Sequence[Program]) -> list[dict]:
        rows = []
        for program in group:
            prefix = f"{program.params:.3g} parameters, {program.batch} rows: "
            tell = lambda text, prefix=prefix: say(prefix + text)  # noqa: E731
            where = smallest_slice(program, target, cache, remat=remat, say=tell)
            rows.append(describe(program, *where, prices))
            if program is largest and where[0] != target and target.platform == "tpu":
                choice, result, why = best_on(program, target, cache, remat=remat, say=tell)
                tried = [] if why is None else [{"slice": str(target), "why": why}]
                rows.append(
                    {**describe(program, target, choice, result, tried, prices), "whole_target": True}
                )
        return rows

    with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
        groups = list(shapes.values())
        under_way = [pool.submit(rows_of, group) for group in reversed(groups)]  # the largest take longest
        for rows in reversed(under_way):
            yield from rows.result()


def describe(
    program: Program, target: Target, choice: Choice | None, found: dict | None, tried: list, prices: Prices
) -> dict:
    """One row of the report, plain JSON.

    Of the cell: ``cells`` (ids), ``params, layers, d_model, batch, seq, steps`` (of all its cells),
    ``flops_per_step`` (exact ledger). Of where it runs: ``target, chips, devices, device_bytes, mesh, remat,
    rows`` (of a device in one part), ``accumulate``. By the compiler: ``fits, needed_bytes, bytes, kernels,
    program_flops, memory_traffic, collectives, error, tried, compiled_parts, cached, compile_seconds``. By
    estimate, all under ``estimate``: ``step_seconds, bound, compute, memory, network, in_turn_seconds, mfu,
    days, chip_hours, money``; None where nothing fits.
    """
    row = {
        "cells": [cell["id"] for cell in program.cells],
        "params": program.params,
        "layers": program.model["layers"],
        "d_model": program.model["d_model"],
        "batch": program.batch,
        "seq": program.seq,
        "steps": program.steps,
        "flops_per_step": program.flops,
        "target": target.name,
        "slice": str(target),
        "chips": target.chips,
        "devices": target.devices,
        "device_bytes": target.memory,
        "whole_target": False,
        "tried": tried,
        "fits": bool(found and found["error"] is None and found["needed_bytes"] <= target.memory),
        "estimate": None,
    }
    if choice is not None:
        row |= {
            "mesh": str(choice.mesh),
            "remat": choice.remat,
            "rows": choice.rows,
            "accumulate": choice.accumulate,
        }
    if found is not None:
        row |= {
            "needed_bytes": found["needed_bytes"],
            "bytes": found["bytes"],
            "error": found["error"],
            "kernels": found["kernels"],
            "program_flops": found["flops"],
            "memory_traffic": found["memory_bytes"],
            "collectives": by_kind(found["collectives"]),
            "unknown_loops": found["unknown_loops"],
            "compiled_parts": found["compiled_parts"],
            "cached": found["cached"],
            "compile_seconds": found["compile_seconds"],
        }
    if row["fits"]:
        times = step_time(found["flops"], found["memory_bytes"], found["collectives"], target)
        chip_hours = times.seconds * program.steps * target.chips / 3600
        price = prices.chip_hour.get(target.generation)
        row["estimate"] = {
            "step_seconds": times.seconds,
            "bound": times.bound,
            "compute": times.compute,
            "memory": times.memory,
            "network": times.network,
            "in_turn_seconds": times.in_turn,
            "mfu": program.flops / (times.seconds * target.peak_flops * target.devices),
            "days": times.seconds * program.steps / 86400,
            "chip_hours": chip_hours,
            "money": None if price is None else chip_hours * price,
        }
    return row


def by_kind(collectives: Sequence[Mapping]) -> dict[str, int]:
    """Bytes a step of each kind of collective, on one device."""
    total: dict[str, int] = {}
    for c in collectives:
        total[c["kind"]] = total.get(c["kind"], 0) + c["bytes"] * c["times"]
    return total


def study_totals(rows: Sequence[Mapping], target: Target) -> dict:
    """Of all cells that fit, on the slices found: ``chip_hours, money, days`` (of the target, kept full) and
    ``longest_days`` (of the program whose cells take longest, one after another)."""
    done = [r["estimate"] for r in rows if r["estimate"] and not r["whole_target"]]
    hours = math.fsum(e["chip_hours"] for e in done)
    money = None if any(e["money"] is None for e in done) else math.fsum(e["money"] for e in done)
    return {"chip_hours": hours, "money": money, "days": hours / target.chips / 24,
            "longest_days": max((e["days"] for e in done), default=0.0)}  # fmt: skip
