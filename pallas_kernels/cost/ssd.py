"""What ``ssd`` computes and moves.

Letters: B batch, T tokens, K query-key heads, N value heads, D key size, E value size (both as the kernels
hold them, in whole lanes where they must), C tokens a chunk; kept: states that a differentiated call keeps.
flops: 2 for each multiply-add of a matrix product, of pairs s <= t within a chunk alone (a kernel computes
whole squares of C x C and masks half); products of vectors and weights are not counted.
transcendentals: exponentials of the sums of log_decay. bytes: what the TPU kernels read from and write to
HBM; the last chunk is padded to C. floor: each operand and result of the public function once; so the
states that forward keeps for backward are bytes over the floor of both, save that the first is state0.
"""

from typing import NamedTuple

# Of 32, 64, 128 and 256 tokens the quickest gradient on a loaded two-core CPU, T 4096, 8 heads of 64.
XLA_CHUNK = 64


class Cost(NamedTuple):
    flops: int
    transcendentals: int
    bytes: int
    floor_bytes: int


def chunk_for(T: int, chunk: int) -> int:
    """Tokens a chunk: ``chunk``, or a smaller power of two of at least 16 where T is short."""
    return min(chunk, max(16, 1 << (T - 1).bit_length()))


def xla_chunked(*, T: int, K: int, N: int, D: int, E: int) -> tuple[int, int]:
    """FLOPs of matrix products of one row of T tokens as ``xla_chunked`` computes them, (forward, backward).

    One decay a head. Whole squares of C x C, whole chunks. Backward computes the state before every chunk,
    q k^T and q times the state again.
    """
    C = chunk_for(T, XLA_CHUNK)
    tokens = -(-T // C) * C
    forward = C * D * K + C * E * N + 2 * N * D * E
    backward = 3 * C * D * K + 2 * C * E * N + 6 * N * D * E
    return 2 * tokens * forward, 2 * tokens * backward


def pairs(T: int, chunk: int) -> int:
    """Pairs s <= t of tokens in the same chunk."""
    whole, rest = divmod(T, chunk)
    return whole * (chunk * (chunk + 1) // 2) + rest * (rest + 1) // 2


def forward(*, B, T, K, N, D, E, chunk, kept, channel, itemsize, keep) -> Cost:
    """o and the final state, and with ``keep`` the states for backward. Products: q k^T (once for the heads
    that share it, where decay is one a head), times v; q times the state before the chunk; v^T k into the
    state."""
    z = _Sizes(B, T, K, N, D, E, chunk, channel, itemsize)
    flops = 2 * B * (z.pairs * (D * z.products + E * N) + 2 * T * N * D * E)
    moved = 2 * z.keys + 2 * z.values + z.decay + (2 + kept * keep) * z.state
    return Cost(flops, z.exponentials, moved, z.floor_forward)


def backward(*, B, T, K, N, D, E, chunk, kept, channel, itemsize) -> Cost:
    """The gradients, from the states that forward kept. Products: of pairs q k^T, do v^T, A^T do, and the
    gradients of q and k; with the state or its gradient three, into the gradient one; and into the state
    again for every chunk but the last before a state that is kept, or before the end."""
    z = _Sizes(B, T, K, N, D, E, chunk, channel, itemsize)
    again = T - _tokens_of_last_chunks(T, chunk, kept)
    flops = 2 * B * (z.pairs * (3 * D * z.products + 2 * E * N) + (4 * T + again) * N * D * E)
    exponentials = z.exponentials + B * N * again * (D if channel else 1)
    moved = 4 * z.keys + 3 * z.values + z.decay + z.decay_gradient + (2 + kept) * z.state
    return Cost(flops, exponentials, moved, z.floor_backward)


def _tokens_of_last_chunks(T, chunk, kept):
    chunks = -(-T // chunk)
    of_end = T - (chunks - 1) * chunk
    return (kept - 1) * chunk + of_end


class _Sizes:
    """Counts, and bytes of the arrays once each."""

    def __init__(self, B, T, K, N, D, E, chunk, channel, itemsize):
        padded = -(-T // chunk) * chunk
        self.pairs = pairs(T, chunk)
        self.products = N if channel else K
        levels = chunk.bit_length() - 1
        self.exponentials = B * N * (T * D * (levels + 2) if channel else self.pairs + 2 * T)
        self.keys = B * padded * K * D * itemsize
        self.values = B * padded * N * E * itemsize
        # one a head: an exact sum and a rest
        self.decay = 4 * B * padded * N * (D if channel else 2)
        self.decay_gradient = 4 * B * padded * N * (D if channel else 1)
        self.state = 4 * B * N * D * E
        q, v, decay = (
            B * T * K * D * itemsize,
            B * T * N * E * itemsize,
            4 * B * T * N * (D if channel else 1),
        )
        self.floor_forward = 2 * q + 2 * v + decay + 2 * self.state
        self.floor_backward = 4 * q + 3 * v + 2 * decay + 3 * self.state
