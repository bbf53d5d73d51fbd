"""The smallest slice that holds a cell, found by compiling for it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from launch.preflight.cache import Cache
from launch.preflight.cells import Program
from launch.preflight.compile import compile_step
from launch.preflight.gpu import estimate_step
from launch.preflight.hardware import Target, smaller_slices
from launch.preflight.plans import Choice, choices, does_not_divide, estimated_bytes, state_bytes

FAR = 1.6
"""A choice whose estimated memory is so many times the device's is not compiled: said so in ``tried``."""


def smallest_slice(
    program: Program, target: Target, cache: Cache, *, remat: str | None = None, say: Callable = print
) -> tuple[Target, Choice | None, dict | None, list[dict]]:
    """The first slice, from one chip to the whole target, on which a cell's step compiles and fits.

    Args:
      remat: this policy alone. say: is told what is being compiled.

    Returns:
      (slice, choice, found, tried): of the slice that holds it; else of the whole target, with what came
      nearest there (None where nothing could be compiled). ``tried``: ``slice, why`` of what did not fit.
    """
    tried: list[dict] = []
    choice = found = None
    for piece in smaller_slices(target):
        choice, found, why = best_on(program, piece, cache, remat=remat, say=say)
        if why is None:
            return piece, choice, found, tried
        tried.append({"slice": str(piece), "why": why})
    return target, choice, found, tried


def best_on(
    program: Program, target: Target, cache: Cache, *, remat: str | None = None, say: Callable = print
) -> tuple[Choice | None, dict | None, str | None]:
    """The fastest choice, by estimate, that fits a slice.

    Returns:
      (choice, found, None); or what came nearest, and why it does not fit.
    """
    if target.platform == "cuda":
        return estimate_step(program, target, remat=remat)
    state = state_bytes(program, target.devices)
    if state > target.memory:
        return None, None, f"parameters and moments alone are {state / 2**30:.1f} GiB a device"
    left = list(choices(program, target, remat))
    if not left:
        return None, None, does_not_divide(program, target)
    nearest: tuple = (None, None)
    error = 1.0  # how far the estimate was off where the compiler has spoken
    while left:
        choice = next_choice(program, target, left, error)
        estimate = estimated_bytes(program, choice)
        if estimate * error > FAR * target.memory:
            why = f"about {estimate * error / 2**30:.0f} GiB a device with the least memory, by estimate"
            return *nearest, nearest_words(nearest) or why
        left.remove(choice)
        say(f"{target.name} mesh {choice.mesh} remat {choice.remat} {choice.rows} x {choice.accumulate} rows")
        found = compile_step(program, target, choice, cache)
        if found["bytes"] is not None and found["needed_bytes"] <= target.memory:
            return choice, found, None
        needed = found["needed_bytes"]
        if needed is None:  # refused for another reason than memory
            return choice, found, found["error"]
        if nearest[1] is None or needed < nearest[1]["needed_bytes"]:
            nearest = choice, found
        error = max(error, needed / estimate)
        left = [c for c in left if estimated_bytes(program, c) < estimate]
    return *nearest, nearest_words(nearest)


def next_choice(program: Program, target: Target, left: Sequence[Choice], error: float) -> Choice:
    """The fastest that fits by estimate, else the one of least memory: the compiler has the last word."""
    for choice in left:
        if estimated_bytes(program, choice) * error <= target.memory:
            return choice
    return min(left, key=lambda c: estimated_bytes(program, c))


def nearest_words(nearest) -> str | None:
    choice, found = nearest
    if found is None:
        return None
    return f"needs {found['needed_bytes'] / 2**30:.2f} GiB a device with remat {choice.remat}, compiled"
