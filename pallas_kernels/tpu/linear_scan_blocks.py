"""Block sizes of the diagonal recurrence for TPU: (tokens, features) by generation, and how they ranked.

Ranked by the compiler's static schedule (``benchmarks/rank_tpu_blocks.py``: cycles of a whole call on 8 rows
of 4,096 tokens of 2,048 features, ahead of time, jax 0.12.0.1 with libtpu 0.0.50.1). No device was timed. On
v5p a call is split over two cores, and the cycles are those of one.

Is it bound by vector arithmetic? At this clock, in GHz, the cycles take as long as moving the bytes at the
published bandwidth, forward and backward; where a chip's clock is lower, arithmetic is the bound:

    v4 1.29 1.28    v5e 0.25 0.25    v5p 0.43 0.47    v6e 0.48 0.48    tpu7x 1.08 1.10    float32
    v4 2.98 2.97    v5e 0.79 0.76    v5p 1.34 1.38    v6e 1.29 1.28    tpu7x 2.92 2.89    bfloat16

By their published peaks v4 runs at 1.05, v5e at 1.5 and v5p at 1.75 GHz; v6e and tpu7x have no such figure.
So v5e and v5p wait for memory in both dtypes, v6e too if its clock is above 1.3 and tpu7x in float32 if above
1.1. Bound by vector work are v4, and tpu7x in bfloat16, where a quarter of it is copies to float32.
"""

UNIT = "1,024 elements"

# generation -> block sizes -> cycles per 1,024 float32 elements of (forward, backward); None does not fit
BUNDLES = {
    "v4": {(64, 2048): (13.65, 22.58), (128, 1024): (13.73, 22.92), (128, 2048): (12.95, 21.41),
           (256, 512): (14.25, 23.78), (256, 1024): (13.12, 21.9), (256, 2048): (12.6, None),
           (512, 1024): (12.81, None)},
    "v5e": {(64, 2048): (4.09, 6.82), (128, 1024): (5.46, 7.79), (128, 2048): (3.76, 6.26),
            (256, 512): (7.37, 9.45), (256, 1024): (5.05, 7.08), (256, 2048): (3.6, None),
            (512, 1024): (4.84, None)},
    "v5p": {(64, 2048): (2.5, 4.16), (128, 1024): (3.06, 4.31), (128, 2048): (2.11, 3.5),
            (256, 512): (4.0, 5.15), (256, 1024): (2.69, 3.75), (256, 2048): (1.92, None),
            (512, 1024): (2.5, None)},
    "v6e": {(64, 2048): (4.21, 7.2), (128, 1024): (4.98, 7.59), (128, 2048): (3.79, 6.41),
            (256, 512): (7.36, 9.47), (256, 1024): (4.55, 6.86), (256, 2048): (3.59, 6.02),
            (512, 1024): (4.34, 6.49)},
    "tpu7x": {(64, 2048): (4.33, 7.46), (128, 1024): (5.08, 7.61), (128, 2048): (3.85, 6.58),
              (256, 512): (7.56, 9.75), (256, 1024): (4.67, 6.87), (256, 2048): (3.61, 6.13),
              (512, 1024): (4.46, 6.5)},
}  # fmt: skip

# As above, bfloat16
BUNDLES_BFLOAT16 = {
    "v4": {(128, 2048): (14.89, 24.77), (256, 1024): (15.76, 24.33), (256, 2048): (14.54, 24.14),
           (512, 2048): (14.37, None)},
    "v5e": {(128, 2048): (5.89, 9.46), (256, 1024): (8.31, 11.87), (256, 2048): (5.73, 9.14),
            (512, 2048): (5.64, None)},
    "v5p": {(128, 2048): (3.18, 5.11), (256, 1024): (4.31, 6.16), (256, 2048): (2.98, 4.76),
            (512, 2048): (2.88, None)},
    "v6e": {(128, 2048): (5.04, 8.38), (256, 1024): (6.55, 8.63), (256, 2048): (4.83, 7.97),
            (512, 2048): (4.73, 7.77)},
    "tpu7x": {(128, 2048): (5.1, 8.48), (256, 1024): (6.53, 8.65), (256, 2048): (4.86, 8.02),
              (512, 2048): (4.74, 7.79)},
}  # fmt: skip

# Within 5 % of the fewest cycles in float32 the smaller block; of complex numbers it has half the tokens.
BLOCK_SIZES = {
    "default": {"forward": (256, 2048), "backward": (128, 2048)},
    "v4": {"forward": (128, 2048), "backward": (128, 2048)},
    "v5e": {"forward": (128, 2048), "backward": (128, 2048)},
    "v5p": {"forward": (256, 2048), "backward": (128, 2048)},
    "v6e": {"forward": (256, 2048), "backward": (256, 2048)},
    "tpu7x": {"forward": (256, 2048), "backward": (256, 2048)},
}
