"""From a step's work to its time: the slowest of products, memory and network, at the published figures.

A floor under ideal overlap; nothing here knows of launch latency, stragglers, or of products below the peak.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping

from launch.preflight.hardware import Target


@dataclasses.dataclass(frozen=True)
class StepTime:
    """Estimated seconds of one step: each part alone.

    Attributes:
      compute: products at the peak. memory: main memory's traffic. network: collectives.
    """

    compute: float
    memory: float
    network: float

    @property
    def seconds(self) -> float:
        """With all three at once: the roofline."""
        return max(self.compute, self.memory, self.network)

    @property
    def in_turn(self) -> float:
        """With none of them at once."""
        return self.compute + self.memory + self.network

    @property
    def bound(self) -> str:
        """Which of the three it is."""
        parts = {"compute": self.compute, "memory": self.memory, "network": self.network}
        return max(parts, key=parts.get)


def step_time(flops: float, memory_bytes: float, collectives: Iterable[Mapping], target: Target) -> StepTime:
    """The estimate for one device's work.

    Args:
      flops: of products, recomputation included. memory_bytes: to and from main memory.
      collectives: of ``kind, bytes, devices, spans, times``, as ``launch.preflight.compile`` reads them off.
    """
    network = sum(
        c["times"] * sent_bytes(c["kind"], c["bytes"], c["devices"]) / target.network(tuple(c["spans"]))
        for c in collectives
    )
    return StepTime(flops / target.peak_flops, memory_bytes / target.bandwidth, network)


def sent_bytes(kind: str, size: float, devices: int) -> float:
    """Bytes that one device sends for one collective, by rings.

    Of an array of B bytes in g devices: B (g - 1) / g to gather or scatter it, twice that to reduce it, and
    as much as to scatter it to exchange it; a permutation sends all of its own.
    """
    if kind == "collective-permute":
        return float(size)
    share = size * (devices - 1) / devices
    return 2 * share if kind == "all-reduce" else share
