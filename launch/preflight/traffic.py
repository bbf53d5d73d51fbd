"""What one step of a compiled program does on each device: products, memory traffic, collectives.

Products and collectives are read off the program, and those in a loop are multiplied by its trips. Bytes
of main memory are those of every operation's operands and results that lie there: what is kept in on-chip
memory costs nothing, and caches are not modelled. A Pallas kernel counts as it describes itself.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping, Sequence

from launch.preflight.hlo import Array, Computation, Instruction, Module

KINDS = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute")
FREE = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call", "iota",
    "after-all", "partition-id", "replica-id", "opt-barrier", "async-update",
}  # fmt: skip
# Custom calls that move nothing: the names of buffers and of hints.
FREE_CALLS = ("AllocateBuffer", "ConcatBitcast", "AssumeGatherIndicesInBound", "Sharding", "annotate_device")


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective operation.

    Attributes:
      kind: one of ``KINDS``.
      bytes: of the array before it is split or after it is gathered, on one device: the result of an
        all-gather, the operand of a reduce-scatter, either of the others.
      group: ids of the devices of one group (for a permutation, of everyone it connects).
      times: how often a step does it.
    """

    kind: str
    bytes: int
    group: tuple[int, ...]
    times: int


@dataclasses.dataclass(frozen=True)
class Traffic:
    """A step's work on one device.

    Attributes:
      flops: of matrix products and kernels, recomputation included. memory_bytes: to and from main memory.
      collectives: see ``Collective``. unknown_loops: loops taken to run once, for want of a count.
    """

    flops: float
    memory_bytes: float
    collectives: tuple[Collective, ...]
    unknown_loops: tuple[str, ...] = ()

    def by_kind(self) -> dict[str, int]:
        """Bytes a step by kind of collective, on one device."""
        total = dict.fromkeys(KINDS, 0)
        for c in self.collectives:
            total[c.kind] += c.bytes * c.times
        return total


def traffic(module: Module, devices: int, trips: Mapping[str, int] | None = None) -> Traffic:
    """The work of one step of a program compiled for ``devices`` devices; ``trips``: of loops, by name."""
    flops = memory = 0.0
    found: dict[tuple, Collective] = {}
    runs, unknown = module.runs(trips)
    for name, times in runs.items():
        computation = module.computations[name]
        for instruction in computation.instructions.values():
            flops += times * _flops(module, computation, instruction)
            memory += times * _memory(module, computation, instruction)
            for owner, inner in _with_fused(module, computation, instruction):
                kind = _kind(inner)
                if kind is None:
                    continue
                size = _collective_bytes(kind, owner, inner)
                key: tuple = (name, inner.name)
                if owner is not computation:
                    # an asynchronous collective on TPU stands in the fusions that start it, hide it and end
                    # it, under one channel; those that hide it may be in a loop of their own
                    key = (inner.attribute("channel_id"), kind, size)
                    if key in found and found[key].times <= times:
                        continue
                found[key] = Collective(kind, size, _group(inner, devices), times)
    return Traffic(flops, memory, tuple(found.values()), unknown)


def spans(group: Sequence[int], coordinates: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
    """Along each axis of the torus, how many different places the devices of a group take."""
    return tuple(len(set(places)) for places in zip(*(coordinates[d] for d in group), strict=True))


def _with_fused(module: Module, computation: Computation, instruction: Instruction) -> Iterator[tuple]:
    """The instruction and those fused into it, each with its computation."""
    yield computation, instruction
    if instruction.opcode == "fusion":
        for name in instruction.called:
            fused = module.computations[name]
            for inner in fused.instructions.values():
                yield from _with_fused(module, fused, inner)


def _kind(instruction: Instruction) -> str | None:
    opcode = instruction.opcode.removesuffix("-start")
    return opcode if opcode in KINDS else None


def _collective_bytes(kind: str, computation: Computation, instruction: Instruction) -> int:
    operands = sum(a.bytes for o in instruction.operands for a in _arrays_of(computation, o))
    if kind != "all-gather":
        return operands
    if not instruction.opcode.endswith("-start"):
        return sum(a.bytes for a in instruction.arrays)
    # a start's result is (operands, results), with what the device needs besides
    return sum(a.bytes for a in instruction.arrays[len(instruction.operands) : 2 * len(instruction.operands)])


def _arrays_of(computation: Computation, name: str) -> tuple[Array, ...]:
    made = computation.instructions.get(name)
    return made.arrays if made is not None else ()


def _group(instruction: Instruction, devices: int) -> tuple[int, ...]:
    """The first group of devices: from a list, an iota, or named axes of a mesh."""
    if instruction.opcode.startswith("collective-permute"):
        pairs = re.search(r"source_target_pairs=\{(.*?)\}\}", instruction.rest)
        ids = [int(d) for d in re.findall(r"\d+", pairs[1])] if pairs else range(devices)
        return tuple(sorted(set(ids)))
    text = re.search(r"replica_groups=(.*?)(?:, \w+=|$)", instruction.rest)
    text = text[1] if text else ""
    listed = re.match(r"\{\{([\d,]*)\}", text)
    if listed:
        return tuple(int(d) for d in listed[1].split(",") if d)
    iota = re.match(r"\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text)
    if iota:
        sizes = [int(d) for d in iota[3].split(",")]
        order = [int(d) for d in iota[4].split(",")] if iota[4] else list(range(len(sizes)))
        return _lattice(sizes, order)[: int(iota[2])]
    named = re.match(r"mesh\[([^\]]*)\].*?\{([^}]*)\}", text)
    if named:
        sizes = {n: int(s) for n, s in re.findall(r"'([^']+)'=(\d+)", named[1])}
        over = re.findall(r"'([^']+)'", named[2])
        order = [i for i, n in enumerate(sizes) if n not in over] + [
            i for i, n in enumerate(sizes) if n in over
        ]
        return _lattice(list(sizes.values()), order)[: math.prod(sizes[n] for n in over)]
    return tuple(range(devices))  # no groups are written where all devices are one


def _lattice(sizes: list[int], order: list[int]) -> tuple[int, ...]:
    """Ids of a row-major lattice, read with its axes in another order."""
    strides = [math.prod(sizes[i + 1 :]) for i in range(len(sizes))]
    ids = [0]
    for axis in order:
        ids = [base + strides[axis] * k for base in ids for k in range(sizes[axis])]
    return tuple(ids)


def _flops(module: Module, computation: Computation, instruction: Instruction) -> float:
    if instruction.opcode == "custom-call":
        return float(_described(instruction).get("flops", 0))
    return sum(
        _product_flops(owner, inner)
        for owner, inner in _with_fused(module, computation, instruction)
        if inner.opcode in ("dot", "convolution")
    )


def _described(instruction: Instruction) -> dict:
    """What a Pallas kernel says of its own cost."""
    config = instruction.config.get("custom_call_config", {})
    return config.get("cost_estimate", {}) if isinstance(config, dict) else {}


def _product_flops(computation: Computation, instruction: Instruction) -> float:
    out = instruction.arrays[0].dims
    left, right = (_arrays_of(computation, o)[0].dims for o in instruction.operands[:2])
    if instruction.opcode == "dot":
        axes = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", instruction.rest)
        contracted = math.prod(left[int(d)] for d in axes[1].split(",") if d) if axes else 1
        return 2.0 * math.prod(out) * contracted
    ins, kernel, outs = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", instruction.rest).groups()
    flops = 2.0 * out[outs.index("b")] * out[outs.index("f")] * right[kernel.index("i")]
    window = instruction.attribute("window") or ""
    for axis in (c for c in ins if c.isdigit()):
        n = sum(c.isdigit() for c in ins)
        option = {k: v.split("x") for k, v in re.findall(r"(\w+)=([\d_x\-]+)", window)}
        at = int(axis)
        stride, wide, spread = (
            int(option.get(k, ["1"] * n)[at]) for k in ("stride", "rhs_dilate", "lhs_dilate")
        )
        before = int(option.get("pad", ["0_0"] * n)[at].split("_")[0])
        last = (left[ins.index(axis)] - 1) * spread
        places = (
            o * stride + k * wide - before
            for o in range(out[outs.index(axis)])
            for k in range(right[kernel.index(axis)])
        )
        flops *= sum(0 <= p <= last and p % spread == 0 for p in places)
    groups = instruction.attribute("batch_group_count")
    return flops / int(groups) if groups else flops


def _memory(module: Module, computation: Computation, instruction: Instruction) -> float:
    """Bytes that an instruction reads from and writes to main memory."""
    opcode, operands = instruction.opcode, [_arrays_of(computation, o) for o in instruction.operands]
    if opcode in FREE or (opcode.endswith("-done") and opcode not in (f"{k}-done" for k in KINDS)):
        return 0.0
    result = sum(map(_main, instruction.arrays))
    if opcode == "custom-call":
        if any(f'custom_call_target="{name}"' in instruction.rest for name in FREE_CALLS):
            return 0.0
        described = _described(instruction).get("bytes_accessed")
        if described is not None:
            return float(described)
    if opcode in ("dynamic-slice", "slice", "gather"):
        return result + sum(a.bytes for a in instruction.arrays if operands[0] and operands[0][0].space == 0)
    if opcode == "dynamic-update-slice":
        return 2.0 * sum(map(_main, operands[1]))
    if opcode in ("copy-start", "slice-start"):  # the result is (what is made, what it is made of, ...)
        made = instruction.arrays[0]
        return sum(made.bytes for a in (made, *operands[0][:1]) if a.space == 0)
    if opcode.endswith("-start"):
        return float(sum(_main(a) for arrays in operands for a in arrays))
    if opcode.endswith("-done"):
        return float(result)
    if opcode == "fusion":
        fused = module.computations[instruction.called[0]]
        starts = instruction.name.startswith("async-collective-start")
        ends = instruction.name.startswith("async-collective-done")
        read = 0.0 if ends else _read_by_fusion(module, fused, operands)
        return read + (0.0 if starts else _written_by_fusion(fused, instruction))
    return float(result + sum(_main(a) for arrays in operands for a in arrays))


def _main(array: Array) -> int:
    return array.bytes if array.space == 0 else 0


def _read_by_fusion(module: Module, fused: Computation, operands) -> float:
    """Of each operand all, or the slices where only slices are taken, or nothing where it is written into."""
    return sum(
        min(_taken(module, fused, number), sum(map(_main, arrays)))
        for number, arrays in enumerate(operands)
        if any(map(_main, arrays))
    )


def _taken(module: Module, fused: Computation, number: int) -> float:
    """Bytes that a fused computation takes of its parameter by slices; infinite where it takes all."""
    inside = fused.instructions.values()
    name = next((i.name for i in inside if i.opcode == "parameter" and i.operands[0] == str(number)), None)
    taken, seen = 0.0, [name]
    while seen:
        source = seen.pop()
        for user in inside:
            if source not in user.operands:
                continue
            if user.opcode in ("bitcast", "reshape"):
                seen.append(user.name)
            elif user.opcode in ("dynamic-slice", "slice", "gather") and user.operands[0] == source:
                taken += sum(a.bytes for a in user.arrays)
            elif user.opcode == "fusion":
                inner = module.computations[user.called[0]]
                taken += sum(_taken(module, inner, n) for n, o in enumerate(user.operands) if o == source)
            elif user.opcode != "dynamic-update-slice" or user.operands[0] != source:
                return math.inf
    return taken


def _written_by_fusion(fused: Computation, instruction: Instruction) -> float:
    roots = [fused.root]
    if fused.root.opcode == "tuple":
        roots = [fused.instructions[o] for o in fused.root.operands if o in fused.instructions]
    if len(roots) != len(instruction.arrays):
        return float(sum(map(_main, instruction.arrays)))
    written = 0.0
    for root, array in zip(roots, instruction.arrays, strict=True):
        while root.opcode in ("bitcast", "reshape") and root.operands[0] in fused.instructions:
            root = fused.instructions[root.operands[0]]
        if root.opcode == "dynamic-update-slice" and array.space == 0:
            written += sum(a.bytes for a in _arrays_of(fused, root.operands[1]))
        else:
            written += _main(array)
    return written
