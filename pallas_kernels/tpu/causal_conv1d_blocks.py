"""Block sizes of the causal convolution for TPU: (tokens, channels) by generation, and how they ranked.

Ranked by the compiler's static schedule (``benchmarks/rank_tpu_blocks.py``: cycles of the whole call on 4
rows of 4,096 tokens of 2,048 channels, 4 taps, SiLU, no segments, bfloat16, ahead of time, jax 0.12.0.1 with
libtpu 0.0.50.1). No device was timed. On v5p a call is split over two cores; the cycles are those of one.
"""

UNIT = "1,024 elements"

# generation -> block sizes -> cycles per 1,024 elements of (forward, backward)
BUNDLES = {
    "v4": {(256, 512): (34.301, 71.207), (512, 256): (35.013, 68.519), (512, 512): (33.527, 68.98),
           (1024, 256): (34.259, 66.636), (1024, 512): (33.14, 67.867), (512, 1024): (35.841, 79.339)},
    "v5e": {(256, 512): (12.334, 24.576), (512, 256): (14.93, 25.773), (512, 512): (11.982, 23.541),
            (1024, 256): (14.594, 24.891), (1024, 512): (11.806, 23.023), (512, 1024): (10.889, 24.449)},
    "v5p": {(256, 512): (6.675, 13.367), (512, 256): (8.435, 13.767), (512, 512): (6.277, 12.404),
            (1024, 256): (8.032, 12.886), (1024, 512): (6.078, 11.923), (512, 1024): (5.603, 12.424)},
    "v6e": {(256, 512): (8.903, 20.395), (512, 256): (10.515, 22.015), (512, 512): (8.516, 19.262),
            (1024, 256): (10.136, 21.011), (1024, 512): (8.323, 18.696), (512, 1024): (7.267, 18.861)},
    "tpu7x": {(256, 512): (8.495, 20.448), (512, 256): (10.621, 22.044), (512, 512): (8.061, 19.288),
              (1024, 256): (10.187, 21.024), (1024, 512): (7.844, 18.708), (512, 1024): (7.102, 18.871)},
}  # fmt: skip

# The smaller block within 5 % of the fewest cycles; in float32 at most 2 MiB a forward buffer, 1 MiB
# backward, within the 16 MiB that a kernel may have by default.
BLOCK_SIZES = {
    "default": {"forward": (1024, 512), "backward": (512, 512)},
    "v4": {"forward": (256, 512), "backward": (512, 256)},
    "v5e": {"forward": (512, 1024), "backward": (512, 512)},
    "v5p": {"forward": (512, 1024), "backward": (512, 512)},
    "v6e": {"forward": (512, 1024), "backward": (512, 512)},
    "tpu7x": {"forward": (512, 1024), "backward": (512, 512)},
}
