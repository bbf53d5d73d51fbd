"""Which cells train together: those of one shape that are ready, where a device would be under-used by one.

On CPU a core is busy with one cell, and cells in turns give the bits of each alone, so nothing is packed
unless asked for. On an accelerator a step of a small cell is shorter than what it costs to launch it:
cells are packed until their steps together take ``WORTHWHILE_SECONDS`` at the device's peak, or memory
is half full.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from scaling.flops import ledger, memory_bytes

MOST_CELLS = 16
WORTHWHILE_SECONDS = 2e-3
"""A step shorter than this is mostly launches: a small model's step starts several hundred kernels of a few
microseconds each."""
MEMORY_SHARE = 0.5
"""Of the device's memory, by the estimate, which is up to a quarter off."""
TYPICAL_PEAK, TYPICAL_BYTES = 200e12, 16 << 30
"""Taken for an accelerator whose own are not known: the smallest of today's data-centre chips."""


def may_pack(options: Mapping) -> bool:
    """Whether a worker with these options (by the names of ``scaling launch``) packs any cells."""
    alone = options["accumulate"] > 1 or options["remat"] == "auto"
    return options["wandb"] == "off" and options.get("mesh") is None and not alone


def cells_that_fit(config: Mapping, how: str, on_cpu: bool, peak: float | None, memory: int | None) -> int:
    """How many cells of a config's shape to train together.

    Args:
      config: a cell. how: ``auto``, ``off``, ``turns`` or ``vmap``; the last two pack even on CPU.
      on_cpu: whether the device is a CPU. peak: its FLOP/s; memory: its bytes; None where not known.
    """
    if how == "off" or (how == "auto" and on_cpu) or "trainer" in config:
        return 1
    model, batch, seq = config["model"], config["train"]["batch"], config["data"]["seq"]
    bytes_each = memory_bytes(model, batch, seq).total
    most = max(1, int(MEMORY_SHARE * (memory or TYPICAL_BYTES) / bytes_each))
    if how == "auto":
        seconds = ledger(model, seq).train_flops(batch * seq) / (peak or TYPICAL_PEAK)
        most = min(most, max(1, int(WORTHWHILE_SECONDS / seconds)))
    return min(most, MOST_CELLS)


def form_pack(ready: Sequence[dict], size_of: Callable[[Mapping], int]) -> list[dict]:
    """The next cells to train together: the first that is ready, and others of its shape up to its size.

    Args:
      ready: manifest entries in the order wanted. size_of: config to the most cells in its pack.
    """
    first = ready[0]
    most = size_of(first["config"])
    if most == 1:
        return [first]
    from scaling.program import program_key  # here, so that who packs nothing need not wait for flax

    key = program_key(first["config"])
    return [e for e in ready if program_key(e["config"]) == key][:most]


def in_packs(entries: Sequence[dict], size_of: Callable[[Mapping], int]) -> list[list[dict]]:
    """All entries in packs, each formed by ``form_pack`` of those that are left."""
    waiting, packs = list(entries), []
    while waiting:
        packs.append(form_pack(waiting, size_of))
        waiting = [e for e in waiting if e not in packs[-1]]
    return packs


def describe(entries: Sequence[dict], size_of: Callable[[Mapping], int]) -> str:
    """One sentence on what is packed on this device."""
    together = [p for p in in_packs(entries, size_of) if len(p) > 1]
    if not together:
        return "packing: none on this device, one cell of this study keeps it busy"
    cells = sum(map(len, together))
    return (
        f"packing: one cell would leave this device idle, so {cells} of {len(entries)} cells train in "
        f"{len(together)} packs of up to {max(map(len, together))} (one program each)"
    )
