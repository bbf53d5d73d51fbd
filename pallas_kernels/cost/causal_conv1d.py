"""Cost of the depthwise causal convolution."""

from pallas_kernels.cost.linear_scan import Cost


def forward(B: int, T: int, C: int, W: int, itemsize: int) -> Cost:
    """W products and W sums an element, the bias among them; the activation is not counted.

    ``bytes`` are those of one fused pass, which is the floor; what XLA really moves is its own matter.
    """
    floor = itemsize * (2 * B * T * C + B * (W - 1) * C + (W + 1) * C)
    return Cost(2 * W * B * T * C, floor, floor)
