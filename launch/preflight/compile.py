"""A training step compiled ahead of time for a slice, and the numbers read off what comes out."""

from __future__ import annotations

import re
import time

import jax

from launch.preflight.cache import Cache, key
from launch.preflight.cells import Program
from launch.preflight.hardware import Target
from launch.preflight.hlo import Module, parse
from launch.preflight.plans import Choice
from launch.preflight.traffic import Traffic, spans, traffic
from pallas_kernels import aot, dispatch
from scaling.memory import abstract_step, step_parts
from scaling.mesh import make_mesh, row_parts
from scaling.program import Plan, compiled

SHARED_PARTS = 3
"""Batches of more parts than this are compiled with so many: only the trips of one loop differ."""
BATCH_BYTES = 20
"""Bytes of a batch a token: inputs, targets, segments, positions and the mask, four each."""


def compile_step(program: Program, target: Target, choice: Choice, cache: Cache) -> dict:
    """Compiles one step, or finds it in the cache.

    Args:
      program: what is trained. target: the slice. choice: how it runs there.

    Returns:
      Plain JSON: ``bytes`` (arguments, temporary, program; None where it did not compile), ``needed_bytes``
      (in all; of a program too large what the compiler says it needs, or None), ``error``, ``kernels``,
      ``flops``, ``memory_bytes``, ``collectives`` (kind, bytes, group size, spans, times),
      ``unknown_loops``, ``compiled_parts`` (of the batch, in the program that was compiled),
      ``compile_seconds``, ``cached``.
    """
    parts = choice.accumulate
    shared = min(parts, SHARED_PARTS)
    found = _found(program, target, choice, shared, cache)
    if parts > shared and not found["shares_parts"]:
        found, shared = _found(program, target, choice, parts, cache), parts
    return _with_parts(found, program, choice, shared)


def _found(program: Program, target: Target, choice: Choice, parts: int, cache: Cache) -> dict:
    mesh, lowered = lower_step(program, target, choice, parts)
    name = key(lowered.as_text(), target.topology)
    found = cache.get(name)
    if found is not None:
        return {**found, "cached": True}
    began = time.perf_counter()
    try:
        executable = lowered.compile()
    except Exception as error:  # in the compiler's own words: most often that memory is exceeded
        found = refused(str(error))
    else:
        found = read_off(executable, target, mesh, parts)
    found["compile_seconds"] = time.perf_counter() - began
    cache.put(name, found)
    return {**found, "cached": False}


def lower_step(program: Program, target: Target, choice: Choice, parts: int):
    """The mesh (None on one device) and the lowered step, for a batch of so many parts."""
    devices = aot.tpu_topology(target.topology).devices
    mesh = make_mesh(choice.mesh, devices) if choice.mesh.devices > 1 else None
    plan = Plan(choice.remat, parts, mesh)
    rows = parts * choice.rows * row_parts(mesh)
    arguments = abstract_step(program.static, plan, rows, program.seq)
    if mesh is None:
        here = jax.sharding.SingleDeviceSharding(devices[0])
        arguments = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), arguments)
    step, _ = compiled(program.static, plan)
    with dispatch.target("tpu", target.generation):
        return mesh, step.trace(*arguments).lower(lowering_platforms=("tpu",))


MEMORY_WORDS = (
    re.compile(r"Used ([\d.]+)([KMGT]) of [\d.]+[KMGT] hbm"),
    re.compile(r"\(([\d.]+)([KMGT])\) exceeds available HBM"),  # temporaries alone: it stops before the rest
)


def refused(message: str) -> dict:
    """What is known of a program that the compiler refused; ``needed_bytes`` is then a lower bound."""
    used = next((found for found in (w.search(message) for w in MEMORY_WORDS) if found), None)
    needed = float(used[1]) * 1024 ** (" KMGT".index(used[2])) if used else None
    line = next((line for line in message.splitlines() if line.strip()), "no message")
    return {
        "bytes": None, "needed_bytes": needed, "error": line[:300], "kernels": [], "flops": None,
        "memory_bytes": None, "collectives": [], "unknown_loops": [], "shares_parts": True, "loop": None,
    }  # fmt: skip


def read_off(executable, target: Target, mesh, parts: int) -> dict:
    """The numbers of a compiled program, those of its loop over parts apart so that others may share it."""
    sizes, text = step_parts(executable), executable.as_text()
    module = parse(text)
    places = coordinates(mesh, target)
    loop = loop_over_parts(module, parts) if parts >= SHARED_PARTS else None
    whole = _plain(traffic(module, target.devices), places)
    one_more = None
    if loop is not None:
        one_more = _plain(traffic(module, target.devices, {loop: parts + 1}), places)
    return {
        "bytes": sizes, "needed_bytes": sum(sizes.values()), "error": None, "kernels": kernels_in(text),
        **whole, "shares_parts": loop is not None, "loop": one_more,
    }  # fmt: skip


def loop_over_parts(module: Module, parts: int) -> str | None:
    """The one loop of the entry that runs once a part, by name; None where that is not one loop."""
    entry = module.computations[module.entry]
    loops = [i for i in entry.instructions.values() if i.opcode == "while"]
    fitting = [i.name for i in loops if module.trips(module.entry, i) == parts]
    return fitting[0] if len(fitting) == 1 else None


def coordinates(mesh, target: Target) -> list[tuple[int, ...]]:
    """Of the chip of each device, in the order of the program's ids."""
    if mesh is None:
        return [(0,) * len(target.shape)]
    return [tuple(d.coords[: len(target.shape)]) for d in mesh.devices.flat]


def _plain(work: Traffic, places) -> dict:
    groups: dict[tuple, int] = {}
    for c in work.collectives:
        same = c.kind, c.bytes, len(c.group), spans(c.group, places)
        groups[same] = groups.get(same, 0) + c.times
    collectives = [
        {"kind": kind, "bytes": size, "devices": devices, "spans": list(span), "times": times}
        for (kind, size, devices, span), times in groups.items()
    ]
    return {
        "flops": work.flops, "memory_bytes": work.memory_bytes, "collectives": collectives,
        "unknown_loops": list(work.unknown_loops),
    }  # fmt: skip


def _with_parts(found: dict, program: Program, choice: Choice, compiled: int) -> dict:
    """The numbers for as many parts as the cell has: each part more does what one trip of the loop does."""
    found = {**found, "compiled_parts": compiled}
    more, loop = choice.accumulate - compiled, found.pop("loop")
    found.pop("shares_parts")
    if more == 0 or found["bytes"] is None:
        return found
    longer = BATCH_BYTES * more * choice.rows * program.seq
    found["bytes"] = {**found["bytes"], "arguments": found["bytes"]["arguments"] + longer}
    found["needed_bytes"] += longer
    for field in ("flops", "memory_bytes"):
        found[field] += more * (loop[field] - found[field])
    pairs = zip(found["collectives"], loop["collectives"], strict=True)
    found["collectives"] = [{**c, "times": c["times"] + more * (d["times"] - c["times"])} for c, d in pairs]
    return found


def kernels_in(hlo: str) -> list[str]:
    """Names of the Pallas TPU kernels in a compiled program, each once."""
    lines = [line for line in hlo.splitlines() if 'custom_call_target="tpu_custom_call"' in line]
    # an instruction is called by its kernel's name, with a number where there are several
    found = [re.match(r"\s*(?:ROOT )?%?([A-Za-z_]\w*)", line) for line in lines]
    return sorted({m[1] for m in found if m})
