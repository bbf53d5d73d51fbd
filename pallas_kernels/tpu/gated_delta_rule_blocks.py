"""Heads that a step of the gated delta rule takes on TPU, by generation, and how they ranked.

Ranked by the compiler's static schedule (``benchmarks/rank_tpu_blocks.py``: cycles of the whole call on 4,096
tokens of 8 heads of 128 x 128, bfloat16, ahead of time, jax 0.12.0.1 with libtpu 0.0.50.1). No device was
timed. On v5p a call is split over two cores, but for one step of 8 heads; the cycles are those of one core.
"""

UNIT = "token and head"

# generation -> (tokens of a chunk, heads of a step) -> cycles per token and head of (forward, backward)
BUNDLES = {
    "v4": {(32, 4): (35.8, 58.1), (64, 1): (41.7, 60.6), (64, 2): (38.4, 55.7), (64, 4): (36.5, 52.6),
           (64, 8): (35.2, 51.3), (128, 2): (37.6, 50.8), (128, 4): (36.5, 50.2)},
    "v5e": {(32, 4): (29.4, 48.6), (64, 1): (31.4, 46.8), (64, 2): (31.0, 44.4), (64, 4): (30.1, 42.3),
            (64, 8): (29.3, 41.8), (128, 2): (32.6, 42.4), (128, 4): (31.8, 41.7)},
    "v5p": {(32, 4): (15.0, 24.5), (64, 1): (16.1, 24.1), (64, 2): (15.8, 22.5), (64, 4): (15.1, 21.3),
            (64, 8): (29.4, 42.1), (128, 2): (16.4, 21.3), (128, 4): (15.9, 20.9)},
    "v6e": {(32, 4): (27.6, 49.5), (64, 1): (30.1, 44.6), (64, 2): (28.3, 42.5), (64, 4): (27.4, 41.8),
            (64, 8): (26.9, 40.8), (128, 2): (30.2, 40.3), (128, 4): (29.5, 39.5)},
    "tpu7x": {(32, 4): (22.6, 41.9), (64, 1): (24.5, 39.5), (64, 2): (22.6, 36.1), (64, 4): (21.9, 34.2),
              (64, 8): (21.4, 33.2), (128, 2): (23.0, 33.2), (128, 4): (22.2, 32.3)},
}  # fmt: skip

# With the chunk of 64 of every implementation, the fewer heads within 5 % of the fewest cycles; a divisor
# of both where the number of heads is no multiple.
BLOCK_SIZES = {
    generation: {"forward": (64, 4), "backward": (64, 4)}
    for generation in ("default", "v4", "v5e", "v5p", "v6e", "tpu7x")
}
