"""Number formats of simulated low-precision matmuls, as data; imports nothing heavy."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping


@dataclasses.dataclass(frozen=True)
class Format:
    """One element format.

    The floats are finite-only where the name of ``dtype`` ends in "fn"; all saturate. The integers are
    symmetric: -(2^(bits-1) - 1) to 2^(bits-1) - 1.
    """

    bits: float
    largest: float
    exponent: int
    """floor(log2(largest)): a block's shared scale is 2^(floor(log2(amax)) - exponent)."""
    dtype: str | None = None
    """The ml_dtypes type that rounds to it; None: an integer."""
    by_mean: bool = False
    """Whether the scale is the mean absolute value, not the largest over ``largest``."""


FORMATS: dict[str, Format] = {
    # Micikevicius et al. 2022, FP8 formats for deep learning, table 1
    "fp8_e4m3": Format(8, 448.0, 8, "float8_e4m3fn"),
    "fp8_e5m2": Format(8, 57344.0, 15, "float8_e5m2"),
    # OCP Microscaling Formats (MX) 1.0, table 5; Rouhani et al. 2023
    "fp4_e2m1": Format(4, 6.0, 2, "float4_e2m1fn"),
    **{f"int{b}": Format(b, 2.0 ** (b - 1) - 1, b - 2) for b in range(8, 2, -1)},
    # -1, 0 and 1 times the mean absolute value: Ma et al. 2024, BitNet b1.58, equations 1 to 3
    "ternary": Format(math.log2(3), 1.0, 0, by_mean=True),
}
WEIGHTS_ALONE = ("ternary",)
"""Formats that are for weights, a scale a tensor or a channel."""

OPERANDS = ("weights", "activations", "gradients")
SCALINGS = ("tensor", "channel", "block")


def bits(cell: Mapping) -> dict[str, float]:
    """Bits an element in the layers' matmuls: the P of a precision law (Kumar et al. 2024).

    Args:
      cell: a cell config; one from before there was a precision section simulates nothing.

    Returns:
      ``weights``, ``activations``, ``gradients``: of the simulated format, or of the compute dtype where
      none is simulated. Shared scales are not counted (a block of 32 adds 8/32 bit).
    """
    plain = {"float32": 32, "bfloat16": 16}[cell["model"]["dtype"]]
    names = {operand: cell.get("precision", {}).get(operand) for operand in OPERANDS}
    return {operand: plain if name is None else FORMATS[name].bits for operand, name in names.items()}
