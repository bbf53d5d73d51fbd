"""A compiled program's text, read: computations, instructions, shapes, and how often each runs."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import re
from collections.abc import Iterator, Mapping

# Bits of one element, by HLO's name of the type.
BITS = {
    "pred": 8, "s4": 4, "u4": 4, "s8": 8, "u8": 8, "s16": 16, "u16": 16, "s32": 32, "u32": 32, "s64": 64,
    "u64": 64, "f4e2m1fn": 4, "f8e4m3": 8, "f8e4m3fn": 8, "f8e4m3b11fnuz": 8, "f8e5m2": 8, "f8e8m0fnu": 8,
    "bf16": 16, "f16": 16, "f32": 32, "f64": 64, "c64": 64, "c128": 128, "token": 0,
}  # fmt: skip
_ARRAY = re.compile(r"([a-z]\w*)\[([\d,<=]*)\](?:\{([^}]*)\})?")
_NAME = re.compile(r"%?([\w.\-]+)\s*$")
_HEAD = re.compile(r"^\s*(ROOT )?%?([\w.\-]+) = ")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")


@dataclasses.dataclass(frozen=True)
class Array:
    """One array of a shape: its type, dimensions, and memory space (0 is the device's main memory)."""

    dtype: str
    dims: tuple[int, ...]
    space: int = 0

    @property
    def bytes(self) -> int:
        """Without padding to tiles."""
        return math.ceil(math.prod(self.dims) * BITS[self.dtype] / 8)


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation. ``rest``: its attributes as text, after the operands."""

    name: str
    shape: str
    opcode: str
    operands: tuple[str, ...]
    rest: str
    root: bool = False

    @functools.cached_property
    def arrays(self) -> tuple[Array, ...]:
        """The arrays of its result, a tuple's in order."""
        return tuple(_arrays(self.shape))

    @property
    def called(self) -> tuple[str, ...]:
        """Computations that it runs, but for a loop's condition and a reduction's function."""
        found = re.findall(r"(?:body|calls|true_computation|false_computation)=%?([\w.\-]+)", self.rest)
        for group in re.findall(r"branch_computations=\{([^}]*)\}", self.rest):
            found += [name.strip().lstrip("%") for name in group.split(",")]
        if self.opcode == "call":
            found += re.findall(r"to_apply=%?([\w.\-]+)", self.rest)
        return tuple(found)

    def attribute(self, name: str) -> str | None:
        """The text of ``name=...`` up to the next comma or blank outside braces."""
        found = re.search(rf"\b{name}=(\{{[^}}]*\}}|[^,\s]+)", self.rest)
        return found[1] if found else None

    @property
    def config(self) -> dict:
        """``backend_config`` where it is JSON, else empty."""
        start = self.rest.find("backend_config={")
        if start < 0:
            return {}
        try:
            return json.JSONDecoder().raw_decode(self.rest, start + len("backend_config="))[0]
        except ValueError:
            return {}


@dataclasses.dataclass(frozen=True)
class Computation:
    """Instructions by name, in order."""

    name: str
    instructions: dict[str, Instruction]

    @property
    def root(self) -> Instruction:
        return next((i for i in self.instructions.values() if i.root), list(self.instructions.values())[-1])


@dataclasses.dataclass(frozen=True)
class Module:
    """A whole program. ``entry``: the name of the computation that runs first."""

    computations: dict[str, Computation]
    entry: str

    def runs(self, trips: Mapping[str, int] | None = None) -> tuple[dict[str, int], tuple[str, ...]]:
        """How often every computation runs that is not fused: of ``entry`` once, of a loop's body its trips.

        Branches of a conditional count as if each were taken.

        Args:
          trips: of some loops, by name, in place of what the program says.

        Returns:
          (runs by computation, names of the loops whose trips are not written in the program: taken as one).
        """
        runs: dict[str, int] = {}
        unknown: list[str] = []

        def walk(name, times):
            runs[name] = runs.get(name, 0) + times
            for instruction in self.computations[name].instructions.values():
                if instruction.opcode == "fusion":
                    continue
                repeated = 1
                if instruction.opcode == "while":
                    repeated = (trips or {}).get(instruction.name) or self.trips(name, instruction)
                    if repeated is None:
                        unknown.append(instruction.name)
                        repeated = 1
                for called in instruction.called:
                    walk(called, times * repeated)

        walk(self.entry, 1)
        return runs, tuple(unknown)

    def trips(self, name: str, loop: Instruction) -> int | None:
        """How often a while loop of computation ``name`` runs its body; None where that is not constant."""
        known = loop.config.get("known_trip_count", {}).get("n")
        if known is not None:
            return int(known)
        condition = self.computations[re.search(r"condition=%?([\w.\-]+)", loop.rest)[1]]
        test = condition.root
        if test.opcode != "compare" or test.attribute("direction") != "LT":
            return None
        counter, limit = (condition.instructions[o] for o in test.operands)
        if counter.opcode != "get-tuple-element" or limit.opcode != "constant":
            return None
        index = int(counter.attribute("index"))
        here = self.computations[name]
        first = self._constant(here, _element(here.instructions.get(loop.operands[0]), index))
        step = self._step(self.computations[loop.called[0]], index)
        if step is None or first is None:
            return None
        return max(0, math.ceil((int(limit.operands[0]) - first) / step))

    def _step(self, body: Computation, index: int) -> int | None:
        """What one run of a loop's body adds to its counter, element ``index`` of its state."""
        new = body.instructions.get(_element(body.root, index))
        while new is not None and new.opcode in ("copy", "bitcast"):
            new = body.instructions.get(new.operands[0])
        if new is None:
            return None
        if new.opcode == "fusion" and len(new.operands) == 1:  # on CPU the addition is a fusion of its own
            body = self.computations[new.called[0]]
            new = body.root
        if new.opcode != "add":
            return None
        steps = [self._constant(body, o) for o in new.operands]
        return next((s for s in steps if s is not None), None)

    def _constant(self, computation: Computation, name: str | None) -> int | None:
        while name is not None:
            made = computation.instructions.get(name)
            if made is None or made.opcode not in ("constant", "copy", "bitcast", "convert"):
                return None
            if made.opcode == "constant":
                return int(made.operands[0]) if made.operands[0].lstrip("-").isdigit() else None
            name = made.operands[0]
        return None


def parse(text: str) -> Module:
    """Reads ``jax.stages.Compiled.as_text()``.

    Raises:
      ValueError: no entry computation in the text.
    """
    computations: dict[str, Computation] = {}
    entry, current = None, None
    for line in text.splitlines():
        if current is None:
            head = _COMPUTATION.match(line)
            if head:
                current = Computation(head[2], {})
                entry = head[2] if head[1] else entry
        elif line.startswith("}"):
            computations[current.name] = current
            current = None
        else:
            instruction = _instruction(line)
            if instruction is not None:
                current.instructions[instruction.name] = instruction
    if entry is None:
        raise ValueError("the text has no ENTRY computation; it must be a compiled program's as_text()")
    return Module(computations, entry)


def _instruction(line: str) -> Instruction | None:
    head = _HEAD.match(line)
    if head is None:
        return None
    shape, rest = _shape(line[head.end() :])
    opcode, _, rest = rest.partition("(")
    inside, rest = _until_closed(rest)
    if opcode == "constant":
        operands = (inside.strip(),)
    else:
        names = (_NAME.search(part) for part in _split(re.sub(r"/\*.*?\*/", "", inside)))
        operands = tuple(m[1] for m in names if m)
    return Instruction(head[2], shape, opcode.strip(), operands, rest, bool(head[1]))


def _shape(text: str) -> tuple[str, str]:
    """A shape and what follows it: a tuple is in brackets and holds blanks, an array does not."""
    if not text.startswith("("):
        shape, _, rest = text.partition(" ")
        return shape, rest
    inside, rest = _until_closed(text[1:])
    return f"({inside})", rest.lstrip()


def _until_closed(text: str) -> tuple[str, str]:
    depth = 1
    for match in re.finditer(r"[()]", text):
        depth += 1 if match[0] == "(" else -1
        if depth == 0:
            return text[: match.start()], text[match.end() :]
    return text, ""


def _element(made: Instruction | None, index: int) -> str | None:
    return made.operands[index] if made is not None and made.opcode == "tuple" else None


def _split(text: str) -> Iterator[str]:
    """Parts between the commas that stand in no bracket."""
    depth, start = 0, 0
    for match in re.finditer(r"[(){}\[\],]", text):
        if match[0] in "({[":
            depth += 1
        elif match[0] in ")}]":
            depth -= 1
        elif depth == 0:
            yield text[start : match.start()]
            start = match.end()
    yield text[start:]


def _arrays(shape: str) -> Iterator[Array]:
    for dtype, dims, layout in _ARRAY.findall(shape):
        if dtype not in BITS:
            continue
        space = re.search(r"S\((\d+)\)", layout)
        sizes = tuple(int(d.lstrip("<=")) for d in dims.split(",") if d)
        yield Array(dtype, sizes, int(space[1]) if space else 0)
