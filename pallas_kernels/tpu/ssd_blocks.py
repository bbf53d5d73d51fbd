"""Tokens a chunk of ``ssd`` on TPU, by generation, and how they ranked.

Ranked by the compiler's static schedule (``benchmarks/rank_tpu_blocks.py``: cycles of the whole call on 4,096
tokens, bfloat16, ahead of time, jax 0.12.0.1 with libtpu 0.0.50.1). No device was timed. Cases: "mamba", one
query-key head of 128 for 32 value heads of 64; "head", 16 heads of 128 x 128 with one decay each; "channel",
the same with one decay a channel. On v5p a call is split over two cores where there are several query-key
heads, and the cycles are those of one.
"""

UNIT = "token and head"

# generation -> (case, tokens of a chunk) -> cycles per token and head of (forward, backward)
BUNDLES = {
    "v4": {("mamba", 64): (5.045, 10.529), ("mamba", 128): (4.285, 8.953), ("mamba", 256): (3.907, 9.668),
           ("head", 64): (9.516, 13.553), ("head", 128): (6.274, 11.075), ("head", 256): (4.965, 9.54),
           ("channel", 64): (13.079, 23.593), ("channel", 128): (11.118, 23.395),
           ("channel", 256): (11.419, 29.339)},
    "v5e": {("mamba", 64): (4.259, 8.415), ("mamba", 128): (3.247, 6.36), ("mamba", 256): (3.22, 6.54),
            ("head", 64): (7.641, 12.446), ("head", 128): (5.11, 8.749), ("head", 256): (4.262, 8.436),
            ("channel", 64): (9.422, 17.79), ("channel", 128): (7.336, 15.057),
           ("channel", 256): (7.535, 19.811)},
    "v5p": {("mamba", 64): (4.394, 8.393), ("mamba", 128): (3.3, 6.252), ("mamba", 256): (3.215, 6.556),
            ("head", 64): (4.579, 6.054), ("head", 128): (2.876, 4.238), ("head", 256): (2.18, 4.136),
            ("channel", 64): (5.422, 8.9), ("channel", 128): (3.891, 7.428),
           ("channel", 256): (3.842, 10.04)},
    "v6e": {("mamba", 64): (3.75, 7.54), ("mamba", 128): (3.007, 6.489), ("mamba", 256): (2.838, 5.55),
            ("head", 64): (7.61, 12.151), ("head", 128): (5.0, 8.946), ("head", 256): (4.059, 6.936),
            ("channel", 64): (8.719, 16.128), ("channel", 128): (6.774, 13.338),
           ("channel", 256): (6.282, 14.663)},
    "tpu7x": {("mamba", 64): (3.697, 7.378), ("mamba", 128): (2.996, 6.439), ("mamba", 256): (2.884, 5.482),
              ("head", 64): (7.813, 12.169), ("head", 128): (5.047, 8.368), ("head", 256): (3.868, 6.356),
              ("channel", 64): (9.047, 14.602), ("channel", 128): (6.836, 12.286),
           ("channel", 256): (5.985, 13.921)},
}  # fmt: skip

# Within 3 % of the fewest cycles of forward and backward together, for (a decay a head, a decay a channel);
# halved where VMEM does not hold it.
CHUNKS = dict.fromkeys(("default", "v4", "v5e", "v5p", "v6e", "tpu7x"), (256, 128))
