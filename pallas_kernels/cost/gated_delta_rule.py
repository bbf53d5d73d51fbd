"""Cost of the gated delta rule by chunks of C tokens; D key and E value features a head.

``flops`` are 2 per multiply-add of the matrix products, the inversion in a chunk included, and nothing else;
``transcendentals`` the exponentials of decays; ``bytes`` what is read from and written to HBM.
"""

import math

WORD = 4  # bytes of float32
CHUNK = 64  # tokens, where the caller does not say


def chunk_for(T: int, D: int, E: int) -> int:
    """Tokens a chunk where the caller does not say: fewer where T or the heads are small.

    A chunk of more tokens than a head has channels spends most of its time on its inverse, C^3.
    """
    return min(CHUNK, *(math.ceil(size / 16) * 16 for size in (T, max(D, E))))


def xla_chunked(*, T: int, N: int, D: int, E: int) -> tuple[int, int]:
    """FLOPs of products of one row of T tokens as ``xla_chunked`` computes them, (forward, backward)."""
    sizes = {"chunk": chunk_for(T, D, E), "itemsize": WORD}
    return forward(1, T, N, D, E, keep=True, **sizes)["flops"], backward(1, T, N, D, E, **sizes)["flops"]


def _products(C: int, D: int, E: int) -> dict[str, int]:
    """Multiply-adds of each product of one chunk of one head."""
    levels = max(math.ceil(math.log2(C)), 1) if C > 1 else 1
    return {
        "k k": C * C * D,
        "q k": C * C * D,
        "k S": C * D * E,
        "q S": C * D * E,
        "inverse": 2 * (levels - 1) * C**3,
        "solve": C * C * E,
        "scores U": C * C * E,
        "k U": C * D * E,
    }


def forward(B: int, T: int, N: int, D: int, E: int, *, chunk: int, itemsize: int, keep: bool) -> dict:
    """All tokens, whole chunks counted; ``keep``: the state before every chunk is written."""
    chunks = B * N * -(-T // chunk)
    tokens = itemsize * chunk * (2 * D + 2 * E) + 3 * WORD * chunk
    return {
        "flops": 2 * chunks * sum(_products(chunk, D, E).values()),
        "transcendentals": chunks * (chunk * chunk + chunk),
        "bytes": chunks * (tokens + keep * WORD * D * E) + 2 * WORD * B * N * D * E,
    }


def backward(B: int, T: int, N: int, D: int, E: int, *, chunk: int, itemsize: int) -> dict:
    """What the gradient needs of the chunk again, and two products for each of the chunk's own."""
    chunks = B * N * -(-T // chunk)
    parts = _products(chunk, D, E)
    again = sum(n for name, n in parts.items() if name not in ("scores U", "k U"))
    gradients = 2 * sum(n for name, n in parts.items() if name != "inverse")
    tokens = itemsize * chunk * (4 * D + 3 * E) + 6 * WORD * chunk
    return {
        "flops": 2 * chunks * (again + gradients),
        "transcendentals": chunks * (chunk * chunk + chunk),
        "bytes": chunks * (tokens + WORD * D * E) + 2 * WORD * B * N * D * E,
    }


def floor_bytes(B: int, T: int, N: int, D: int, E: int, *, itemsize: int, gradients: bool) -> int:
    """q, k, v, beta, log decay, o and both states once; with gradients those of the inputs and of o too.

    The forward of a differentiated call and its backward count as two passes over the inputs.
    """
    inputs = B * T * N * (itemsize * (2 * D + E) + 2 * WORD)
    outputs = B * T * N * itemsize * E
    states = 2 * WORD * B * N * D * E
    forward = inputs + outputs + states
    return forward + (2 * inputs + outputs + states if gradients else 0)
