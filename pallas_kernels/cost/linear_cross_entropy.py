"""Cost of the cross-entropy of a linear head.

M tokens, D features, V vocabulary. ``flops`` are 2 per multiply-add of the matrix products and nothing
else; ``transcendentals`` the exponentials and hyperbolic tangents of logits; ``bytes`` what is read from and
written to HBM, block by block.
"""

WORD = 4  # bytes of float32 and int32
CHUNK_BYTES = 1 << 26  # of float32 logits that "xla_chunked" holds at a time, unless told how many tokens
FEWEST_TOKENS = 64  # a chunk; below it the matmuls are slower for want of rows


def chunk_tokens(tokens: int, V: int) -> int:
    """Rows of a chunk of "xla_chunked": as many as ``CHUNK_BYTES`` hold, in chunks of nearly equal size."""
    most = max(CHUNK_BYTES // (WORD * V), FEWEST_TOKENS)
    chunks = -(-tokens // most)
    return -(-tokens // chunks)


def forward(M: int, D: int, V: int, *, tokens: int, itemsize: int, soft_cap: bool = False) -> dict:
    """The kernel of log-sum-exp and picked logit: all of w for every block of ``tokens`` rows."""
    return {
        "flops": 2 * M * D * V,
        "transcendentals": M * V * (1 + soft_cap),
        "bytes": itemsize * (M * D + -(-M // tokens) * D * V) + 3 * WORD * M,
    }


def backward_x(M: int, D: int, V: int, *, tokens: int, itemsize: int, soft_cap: bool = False) -> dict:
    """The kernel of dx: logits again and their gradient times w."""
    return {
        "flops": 4 * M * D * V,
        "transcendentals": M * V * (1 + soft_cap),
        "bytes": itemsize * (2 * M * D + -(-M // tokens) * D * V) + 4 * WORD * M,
    }


def backward_w(
    M: int, D: int, V: int, *, vocab: int, itemsize: int, w_itemsize: int, soft_cap: bool = False
) -> dict:
    """The kernel of dw: logits again and x times their gradient; all of x for every block of ``vocab``."""
    moved = itemsize * (D * V + -(-V // vocab) * M * D) + w_itemsize * D * V
    return {
        "flops": 4 * M * D * V,
        "transcendentals": M * V * (1 + soft_cap),
        "bytes": moved + -(-V // vocab) * 4 * WORD * M,
    }


def floor_bytes(M: int, D: int, V: int, *, itemsize: int, w_itemsize: int, gradients: bool) -> int:
    """Every operand and every result once: x, w, labels, loss; with gradients dx and dw too."""
    once = itemsize * M * D + w_itemsize * D * V
    return (2 if gradients else 1) * once + 2 * WORD * M
