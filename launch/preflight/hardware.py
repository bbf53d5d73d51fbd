"""Slices of TPUs and nodes of GPUs: names, shapes, memory, and the network between the chips.

Names are those of Google's documentation: of v5e and v6e the number counts chips, of v4, v5p and tpu7x it
counts TensorCores, two a chip. A bare generation means one chip.
"""

from __future__ import annotations

import dataclasses
import math
import re

from scaling.chips import BANDWIDTH, PEAK_FLOPS
from scaling.config import ConfigError


@dataclasses.dataclass(frozen=True)
class Generation:
    """One kind of chip. Figures are per chip, as its vendor prints them.

    Attributes:
      name: in targets. chip: in ``scaling.chips``.
      memory: bytes that a program may use.
      link: bytes/s of one link in one direction. axes: of the torus.
      wrap: sides of a slice that close to a ring are multiples of this.
      host_chips: chips of one host of a slice of several hosts. dcn: bytes/s of network beyond the slice.
      devices: JAX devices of one chip. cores: TensorCores that the name of a slice counts a chip.
      slices: the documented slice shapes, smallest first.
    """

    name: str
    chip: str
    memory: int
    link: float
    axes: int
    wrap: int
    host_chips: int
    dcn: float
    devices: int = 1
    cores: int = 1
    slices: tuple[tuple[int, ...], ...] = ()


_PLANE = ((1, 1), (2, 2), (2, 4), (4, 4), (4, 8), (8, 8), (8, 16), (16, 16))
_CUBE = (
    (2, 2, 1),
    (2, 2, 2),
    (2, 2, 4),
    (2, 4, 4),
    (4, 4, 4),
    (4, 4, 8),
    (4, 8, 8),
    (8, 8, 8),
)  # to 512 chips

# Memory, bidirectional bandwidth of all links of a chip, and network of the data centre: the pages v4, v5e,
# v5p, v6e and tpu7x of docs.cloud.google.com/tpu/docs (2025, 2026): v4 2,400 Gbps one way over 6 links; v5e
# 400 GB/s both ways over 4; v5p 1,200 over 6; v6e 800 over 4; tpu7x 1,200 over 6. Sides that close to a ring:
# 16 in the planes of v5e and v6e, multiples of 4 in the tori of the others ("full 3D torus" from 4x4x4 on).
# Of the 16 GiB of a v5e its compiler lets a program use 15.75.
# The data centre's network, a chip: a v5e pod of 256 has 6.4 Tbps, v5p 50 Gbps, v6e and tpu7x 100; v4 as v5e.
GENERATIONS = {
    "v4": Generation("v4", "v4", 32 << 30, 50e9, 3, 4, 4, 3.125e9, 1, 2, _CUBE),
    "v5e": Generation("v5e", "v5e", 63 << 28, 50e9, 2, 16, 4, 3.125e9, 1, 1, _PLANE),
    "v5p": Generation("v5p", "v5p", 95 << 30, 100e9, 3, 4, 4, 6.25e9, 1, 2, _CUBE),
    "v6e": Generation("v6e", "v6e", 32 << 30, 100e9, 2, 16, 4, 12.5e9, 1, 1, _PLANE),
    "tpu7x": Generation("tpu7x", "v7x", 192 << 30, 100e9, 3, 4, 4, 12.5e9, 2, 2, _CUBE),
}

# GPUs: memory (of the data sheets, GB of 10^9), NVLink bytes/s of one GPU in one direction (half of what the
# data sheets print), network of one GPU in a reference node: A100 200 Gb/s, Hopper and Blackwell 400 Gb/s.
GPUS = {
    "a100": (80e9, 300e9, 25e9),
    "h100": (80e9, 450e9, 50e9),
    "h200": (141e9, 450e9, 50e9),
    "b200": (180e9, 900e9, 50e9),
}
NODE = 8


@dataclasses.dataclass(frozen=True)
class Target:
    """What is compiled for: a slice of TPU chips, or GPUs.

    Attributes:
      name: as the user wrote it, or the documented name of the slice. chip: in ``scaling.chips``.
      platform: tpu or cuda. generation: of the TPU, or the GPU's name.
      shape: chips along each axis of the torus; of GPUs (GPUs,).
      devices_per_chip: JAX devices of one chip.
      memory: bytes of one device. hosts: machines.
    """

    name: str
    platform: str
    generation: str
    chip: str
    shape: tuple[int, ...]
    devices_per_chip: int
    memory: int
    hosts: int

    @property
    def chips(self) -> int:
        return math.prod(self.shape)

    @property
    def devices(self) -> int:
        """JAX devices."""
        return self.chips * self.devices_per_chip

    @property
    def peak_flops(self) -> float:
        """Dense bf16 FLOP/s of one device."""
        return PEAK_FLOPS[self.chip] / self.devices_per_chip

    @property
    def bandwidth(self) -> float:
        """Bytes/s of main memory of one device."""
        return BANDWIDTH[self.chip] / self.devices_per_chip

    @property
    def topology(self) -> str:
        """The name that the TPU compiler knows the slice by."""
        return f"{self.generation}:{'x'.join(map(str, self.shape))}"

    def __str__(self) -> str:
        if self.platform == "cuda":
            return f"{self.name}: {self.chips} GPU{'s' * (self.chips > 1)}"
        shape, one = "x".join(map(str, self.shape)), self.chips == 1
        hosts = f"{self.hosts} host{'s' * (self.hosts > 1)}"
        return f"{self.name}: {self.chips} chip{'s' * (not one)}, {shape}, {hosts}"

    def network(self, spans: tuple[int, ...]) -> float:
        """Bytes/s that one device sends in a ring over devices which span so many chips along each axis.

        Two links serve an axis that closes to a ring, one an axis that does not; a group over several axes
        uses all of them (rings over each, at once). Two devices of one chip share its links.
        """
        if self.platform == "cuda":
            _, nvlink, network = GPUS[self.generation]
            return nvlink if math.prod(spans) <= NODE else network
        kind = GENERATIONS[self.generation]
        links = sum(self._links(span, side, kind) for span, side in zip(spans, self.shape, strict=True))
        return max(links, 1) * kind.link / self.devices_per_chip

    @staticmethod
    def _links(span: int, side: int, kind: Generation) -> int:
        if span == 1:
            return 0
        return 2 if span == side and side % kind.wrap == 0 else 1


def parse_target(name: str) -> Target:
    """A target by its name: ``v5e-256``, ``v5p-128``, ``v5e`` (one chip), ``v5e:4x4`` (a shape), ``h100-8``.

    Raises:
      ConfigError: an unknown chip, or a size that it has no slice of.
    """
    found = re.fullmatch(r"([a-z]+\d+[a-z]*?)(?:-(\d+)|:(\d+(?:x\d+)+))?", name.strip().lower())
    if found is None or found[1] not in (*GENERATIONS, *GPUS):
        known = ", ".join((*GENERATIONS, *GPUS))
        raise ConfigError(
            f"target is {name!r}; it must be one of {known}, alone (one chip) or with a size such as v5e-256"
        )
    kind, number, shape = found[1], found[2] and int(found[2]), found[3]
    if kind in GPUS:
        if shape or number == 0 or (number and number > NODE and number % NODE):
            raise ConfigError(
                f"target is {name!r}; GPUs come as {kind}-1 to {kind}-{NODE}, or whole nodes of {NODE}"
            )
        count = number or 1
        return Target(name, "cuda", kind, kind, (count,), 1, int(GPUS[kind][0]), math.ceil(count / NODE))
    if shape:
        return slice_of(kind, tuple(map(int, shape.split("x"))))
    generation = GENERATIONS[kind]
    if number is None:
        return slice_of(kind, (1,) * generation.axes)
    fitting = [s for s in generation.slices if math.prod(s) * generation.cores == number]
    if not fitting:
        sizes = ", ".join(f"{kind}-{math.prod(s) * generation.cores}" for s in generation.slices)
        counts = "chips" if generation.cores == 1 else "TensorCores, two a chip"
        raise ConfigError(f"target is {name!r}; {kind} has slices {sizes} (the number counts {counts})")
    return slice_of(kind, fitting[0])


def slice_of(kind: str, shape: tuple[int, ...]) -> Target:
    """A slice of a TPU generation by its shape.

    Raises:
      ConfigError: a shape with another number of axes than the generation's torus, or larger than known.
    """
    generation = GENERATIONS[kind]
    one = (1,) * generation.axes
    if shape != one and shape not in generation.slices:
        known = ", ".join("x".join(map(str, s)) for s in generation.slices)
        raise ConfigError(f"target is {kind}:{'x'.join(map(str, shape))}; {kind} has slices {known}")
    chips = math.prod(shape)
    hosts = 1 if chips <= _one_host(generation) else chips // generation.host_chips
    name = kind if shape == one else f"{kind}-{chips * generation.cores}"
    return Target(
        name, "tpu", kind, generation.chip, shape, generation.devices,
        generation.memory // generation.devices, hosts,
    )  # fmt: skip


def _one_host(generation: Generation) -> int:
    """Chips of the largest host: those of v5e and v6e also come with eight."""
    return 8 if generation.axes == 2 else generation.host_chips


def smaller_slices(target: Target) -> list[Target]:
    """Slices of the target's kind from one chip to the whole target, smallest first."""
    if target.platform == "cuda":
        counts = [n for n in (1, 2, 4, 8) if n < target.chips]
        counts += range(2 * NODE, target.chips, NODE)
        return [*(parse_target(f"{target.generation}-{n}") for n in counts), target]
    generation = GENERATIONS[target.generation]
    shapes = [s for s in {(1,) * generation.axes, *generation.slices} if math.prod(s) < target.chips]
    found = [slice_of(target.generation, s) for s in sorted(shapes, key=math.prod)]
    return [*found, target]
