"""Cost of the depthwise causal convolution: vector arithmetic and bytes of device memory."""

from pallas_kernels.cost.linear_scan import Cost

EDGE = (
    16  # tokens that the Pallas kernel takes as one: the state and what comes before a block are whole such
)


def forward(
    B: int, T: int, C: int, W: int, itemsize: int, *, segments: bool = False, channel_blocks: int = 1
):
    """W products and W sums an element, the bias among them; the activation is not counted.

    Args:
      B, T, C, W: rows, tokens, channels, taps.
      itemsize: bytes of one element of x and y; w and bias are float32.
      segments: whether segment ids are read, one int32 a token; the kernel reads half a byte a token, once
        for each of its ``channel_blocks``, and its shape of them is made from the ids outside it.
    """
    floor = itemsize * (2 * B * T * C + B * (W - 1) * C) + 4 * (W + 1) * C + (4 * B * T if segments else 0)
    moved = itemsize * (2 * B * T * C + B * EDGE * C) + 4 * (W + 1) * C
    return Cost(2 * W * B * T * C, moved + _reach(B, T, segments, channel_blocks), floor)


def backward(
    B: int, T: int, C: int, W: int, itemsize: int, *, block_tokens: int, silu: bool = False,
    segments: bool = False, channel_blocks: int = 1,
):  # fmt: skip
    """dx and dw: W products and W sums an element each, dbias the one sum that dx is short of.

    With ``silu`` the sum before it is computed again, as in ``forward``; its own derivative is not counted.
    Reads x, dy and the state, writes dx and the state's gradient, which the kernel leaves in float32. At
    every block of ``block_tokens`` the kernel reads ``EDGE`` more tokens of x, those before the block.
    """
    weights = 4 * 2 * (W + 1) * C
    floor = itemsize * (3 * B * T * C + 2 * B * (W - 1) * C) + weights + (4 * B * T if segments else 0)
    edges = itemsize * -(-T // block_tokens) * B * EDGE * C
    moved = itemsize * (3 * B * T * C + B * EDGE * C) + 4 * B * EDGE * C + weights + edges
    moved += 2 * _reach(B, T, segments, channel_blocks)
    return Cost((6 if silu else 4) * W * B * T * C, moved, floor)


def _reach(B, T, segments, channel_blocks):
    return channel_blocks * B * 4 * -(-T // 8) if segments else 0
