"""Cost of the diagonal recurrence: vector arithmetic and bytes of device memory."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Cost:
    """Attributes:
    flops: real additions and multiplications; none of them can be done by a matrix unit.
    bytes: what the Pallas kernel reads and writes.
    floor_bytes: every operand and result once.
    """

    flops: int
    bytes: int
    floor_bytes: int


def forward(B: int, T: int, F: int, itemsize: int, *, is_complex: bool = False, segments: bool = False):
    """h_t = a_t h_{t-1} + b_t: one product and one sum an element, 8 operations where complex.

    Args:
      B, T, F: rows, tokens, features.
      itemsize: bytes of one element of a, b and h, both parts where complex.
      segments: whether segment resets are read, one int32 a token.
    """
    state = B * F * (8 if is_complex else 4)
    moved = 3 * B * T * F * itemsize + 2 * state + (4 * B * T if segments else 0)
    return Cost((8 if is_complex else 2) * B * T * F, moved, moved)


def backward(
    B: int, T: int, F: int, itemsize: int, *, block_tokens: int, is_complex: bool = False,
    segments: bool = False,
):  # fmt: skip
    """dh_t = g_t + a_{t+1} dh_{t+1}, da_t = dh_t h_{t-1}, db = dh: two products and a sum an element.

    14 operations an element where complex. At every block of ``block_tokens`` the kernel reads eight more
    tokens of h, for the one before the block.
    """
    state = B * F * (8 if is_complex else 4)
    floor = 5 * B * T * F * itemsize + 3 * state + (4 * B * T if segments else 0)
    edges = 8 * -(-T // block_tokens) * B * F * itemsize
    return Cost((14 if is_complex else 3) * B * T * F, floor + edges, floor)
