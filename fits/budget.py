"""A training budget in the unit that it comes in: FLOPs, device-hours or money."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from fits.errors import FitError
from scaling.chips import BANDWIDTH, PEAK_FLOPS


def seconds_per_token(params, chip: str, devices: float = 1.0, bytes_per_param: float = 2.0):
    """The least time to decode one token of one sequence with a dense model of N parameters, in seconds.

    Every weight is read once and used in two FLOPs, N bytes_per_param / bandwidth + 2 N / peak, with the
    weights split evenly over ``devices``. The model leaves out what makes real decoding slower: the
    cache of keys and values, communication between devices, and bandwidth below its peak.

    Raises:
      FitError: an unknown chip.
    """
    if chip not in BANDWIDTH:
        raise FitError(f"chip is {chip!r}; it must be one of {', '.join(BANDWIDTH)}")
    return params * (bytes_per_param / BANDWIDTH[chip] + 2.0 / PEAK_FLOPS[chip]) / devices


@dataclasses.dataclass(frozen=True)
class Budget:
    """Compute to spend, given in one of three ways.

    Attributes:
      flops: training FLOPs.
      device_hours: hours of one device, with ``chip`` and ``mfu``.
      money: in any currency, with ``price_per_device_hour`` in the same, ``chip`` and ``mfu``.
      chip: a name in ``PEAK_FLOPS``. mfu: achieved share of its peak, above 0 and at most 1.

    Raises:
      FitError: no way or several ways given, a part that is missing or unused, or a value that is no
        positive number.
    """

    flops: float | None = None
    device_hours: float | None = None
    money: float | None = None
    price_per_device_hour: float | None = None
    chip: str | None = None
    mfu: float | None = None

    def __post_init__(self):
        given = [k for k in ("flops", "device_hours", "money") if getattr(self, k) is not None]
        if len(given) != 1:
            said = " and ".join(given) or "nothing"
            raise FitError(f"budget gives {said}; give one of flops, device_hours, money")
        for name in ("flops", "device_hours", "money", "price_per_device_hour", "mfu"):
            if getattr(self, name) is not None:
                positive(name, getattr(self, name))
        if given == ["flops"]:
            needs: tuple[str, ...] = ()
        else:
            needs = ("chip", "mfu") + (("price_per_device_hour",) if given == ["money"] else ())
        for name in ("chip", "mfu", "price_per_device_hour"):
            if (getattr(self, name) is None) == (name in needs):
                verb = "lacks" if name in needs else "has no use for"
                raise FitError(f"a budget in {given[0]} {verb} {name}")
        if self.chip is not None and self.chip not in PEAK_FLOPS:
            raise FitError(f"chip is {self.chip!r}; it must be one of {', '.join(PEAK_FLOPS)}")
        if self.mfu is not None and self.mfu > 1:
            raise FitError(f"mfu is {self.mfu!r}; it must be a share, above 0 and at most 1")

    @property
    def total(self) -> float:
        """The budget in FLOPs."""
        if self.flops is not None:
            return float(self.flops)
        hours = self.device_hours if self.money is None else self.money / self.price_per_device_hour
        return float(hours * 3600.0 * PEAK_FLOPS[self.chip] * self.mfu)

    def __str__(self) -> str:
        if self.flops is not None:
            return f"{self.flops:.4g} FLOPs"
        how = f"{self.chip} at {100 * self.mfu:g} % of {PEAK_FLOPS[self.chip]:.4g} FLOP/s"
        if self.money is None:
            return f"{self.device_hours:g} device-hours of {how}"
        return f"{self.money:g} at {self.price_per_device_hour:g} a device-hour of {how}"


def positive(name: str, value: Any) -> float:
    """``value`` as a float; raises ``FitError`` where it is no positive finite number."""
    try:
        good = not isinstance(value, bool | str) and math.isfinite(value) and value > 0
    except (TypeError, ValueError):
        good = False
    if not good:
        raise FitError(f"{name} is {value!r}; it must be a positive number")
    return float(value)
