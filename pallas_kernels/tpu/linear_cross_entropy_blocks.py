"""Block sizes of the linear cross-entropy for TPU: (tokens, vocabulary) by generation, and how they ranked.

Ranked by the compiler's static schedule (``benchmarks/rank_tpu_blocks.py``: cycles of a whole call on 8,192
tokens of 1,024 features and 32,768 columns, bfloat16, ahead of time, jax 0.12.0.1 with libtpu 0.0.50.1). No
device was timed. On v5p a call is split over two cores, and the cycles are those of one. ``blocks`` halves
what does not fit with more features. The cycles take longer than the bytes at any clock below 2 GHz.
"""

UNIT = "1,024 logits"

# generation -> block sizes -> cycles per 1,024 logits of (forward, backward_x, backward_w); None does not fit
BUNDLES = {
    "v4": {(256, 512): (20.49, 34.13, 36.71), (512, 512): (18.81, 31.64, 33.4),
           (512, 1024): (17.92, None, None), (1024, 512): (None, None, None)},
    "v5e": {(512, 512): (14.97, 26.86, 28.18), (512, 1024): (15.94, 30.58, 27.11),
            (1024, 512): (14.56, 27.7, 27.79), (1024, 1024): (15.66, 30.36, 27.53)},
    "v5p": {(512, 512): (7.67, 13.76, 15.79), (512, 1024): (8.06, 15.38, 14.49),
            (1024, 512): (7.37, 13.93, 14.29), (1024, 1024): (7.87, 15.22, 13.87)},
    "v6e": {(512, 512): (6.38, 9.64, 9.77), (512, 1024): (5.89, 8.86, 9.06),
            (1024, 512): (5.76, 8.99, 9.12), (1024, 1024): (5.46, 8.48, 8.72)},
    "tpu7x": {(512, 512): (4.74, 8.6, 9.33), (512, 1024): (4.42, 7.32, 7.76),
              (1024, 512): (4.15, 7.61, 7.38), (1024, 1024): (4.39, 6.57, 6.89)},
}  # fmt: skip

# Within 5 % of the fewest cycles the smaller block, of two as large the faster.
BLOCK_SIZES = {
    "default": {"forward": (512, 512), "backward_x": (512, 512), "backward_w": (512, 512)},
    "v4": {"forward": (512, 512), "backward_x": (512, 512), "backward_w": (512, 512)},
    "v5e": {"forward": (512, 512), "backward_x": (512, 512), "backward_w": (512, 512)},
    "v5p": {"forward": (512, 512), "backward_x": (512, 512), "backward_w": (1024, 512)},
    "v6e": {"forward": (1024, 1024), "backward_x": (512, 1024), "backward_w": (512, 1024)},
    "tpu7x": {"forward": (1024, 512), "backward_x": (1024, 1024), "backward_w": (1024, 1024)},
}
