"""What ``ssd`` computes and moves.

Letters: B batch, T tokens, K query-key heads, N value heads, D key size, E value size, C tokens a chunk.
flops: 2 for each multiply-add of a matrix product, of pairs s <= t within a chunk alone (a kernel computes
whole squares of C x C and masks half); products of vectors and weights are not counted.
transcendentals: exponentials of the sums of log_decay. bytes: what the TPU kernels read from and write to
HBM; the last chunk is padded to C. floor: each operand and result of the public function once.
"""

from typing import NamedTuple


class Cost(NamedTuple):
    flops: int
    transcendentals: int
    bytes: int
    floor_bytes: int


def pairs(T: int, chunk: int) -> int:
    """Pairs s <= t of tokens in the same chunk."""
    whole, rest = divmod(T, chunk)
    return whole * (chunk * (chunk + 1) // 2) + rest * (rest + 1) // 2


def forward(*, B, T, K, N, D, E, chunk, channel, itemsize) -> Cost:
    """o and the final state. Products: q k^T (once for the heads that share it, where decay is one a
    head), times v; q times the state before the chunk; v^T k into the state."""
    z = _Sizes(B, T, K, N, D, E, chunk, channel, itemsize)
    flops = 2 * B * (z.pairs * (D * z.products + E * N) + 2 * T * N * D * E)
    return Cost(flops, z.exponentials, 2 * z.keys + 2 * z.values + z.decay + 2 * z.state, z.floor_forward)


def starts(*, B, T, K, N, D, E, chunk, channel, itemsize) -> Cost:
    """The state before each chunk: the first kernel of the backward pass."""
    z = _Sizes(B, T, K, N, D, E, chunk, channel, itemsize)
    exponentials = B * N * T * (D if channel else 1)
    moved = z.keys + z.values + z.decay + z.state + z.starts
    return Cost(2 * B * T * N * D * E, exponentials, moved, z.keys + z.values + z.decay_once + z.state)


def walk_back(*, B, T, K, N, D, E, chunk, channel, itemsize) -> Cost:
    """The gradients, from the states before each chunk: the second kernel of the backward pass. Products:
    of pairs q k^T, do v^T, A^T do, and the gradients of q and k; with the state four, into its gradient
    one."""
    z = _Sizes(B, T, K, N, D, E, chunk, channel, itemsize)
    flops = 2 * B * (z.pairs * (3 * D * z.products + 2 * E * N) + 4 * T * N * D * E)
    moved = 4 * z.keys + 3 * z.values + z.decay + z.decay_gradient + z.starts + 2 * z.state
    return Cost(flops, z.exponentials, moved, z.floor_backward)


def backward(**sizes) -> Cost:
    """Both kernels of the backward pass; ``floor_bytes`` as if they were one."""
    a, b = starts(**sizes), walk_back(**sizes)
    return Cost(a.flops + b.flops, a.transcendentals + b.transcendentals, a.bytes + b.bytes, b.floor_bytes)


class _Sizes:
    """Counts, and bytes of the arrays once each."""

    def __init__(self, B, T, K, N, D, E, chunk, channel, itemsize):
        chunks = -(-T // chunk)
        padded = chunks * chunk
        self.pairs = pairs(T, chunk)
        self.products = N if channel else K
        levels = chunk.bit_length() - 1
        self.exponentials = B * N * (T * D * (levels + 2) if channel else self.pairs + 2 * T)
        self.keys = B * padded * K * D * itemsize
        self.values = B * padded * N * E * itemsize
        # one a head: an exact sum and a rest, once as a row and once as a column
        self.decay = 4 * B * padded * N * (D if channel else 4)
        self.decay_gradient = 4 * B * padded * N * (D if channel else 2)
        self.decay_once = 4 * B * T * N * (D if channel else 1)
        self.state = 4 * B * N * D * E
        self.starts = chunks * B * N * D * E * itemsize
        q, v = B * T * K * D * itemsize, B * T * N * E * itemsize
        self.floor_forward = 2 * q + 2 * v + self.decay_once + 2 * self.state
        self.floor_backward = 4 * q + 3 * v + 2 * self.decay_once + 3 * self.state
