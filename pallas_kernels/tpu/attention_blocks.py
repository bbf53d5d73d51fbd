"""Block sizes of the attention kernels for TPU: (of queries, of keys) by generation, and how they ranked.

Ranked by the compiler's static schedule (bundles of the whole kernel at head size 128, bfloat16, no masks,
2,048 tokens, ahead of time, jax 0.12.0.1 with libtpu 0.0.50.1; the dump of ``LIBTPU_INIT_ARGS=
--xla_jf_dump_to=``), per 1,024 pairs of a query and a key. No device was timed. Causal masks waste more
of a larger block: of 1,024 at 4,096 tokens 20 % of the pairs computed against 11 % for 512. Counted again by
``benchmarks/rank_tpu_blocks.py``, which adds what a step of the grid costs, forward on v5e and v6e takes 5 to
11 % more, in the same order: (512, 512) 11.8 and 10.1, (512, 1024) 7.2 and 6.8, (1024, 1024) 6.8 and 5.2.
"""

UNIT = "1,024 pairs"

# generation -> block sizes -> bundles per 1,024 pairs of (forward, backward_q, backward_kv)
BUNDLES = {
    "v4": {(128, 128): (55.6, 46.2, 47.8), (512, 512): (12.5, 10.3, 11.5), (512, 1024): (9.3, 8.0, 10.5),
           (1024, 512): (12.4, 9.3, 9.8), (1024, 1024): (9.1, 7.4, 9.5), (256, 1024): (9.9, 9.4, 11.9)},
    "v5e": {(128, 128): (41.9, 27.8, 25.9), (512, 512): (10.7, 7.6, 8.8), (512, 1024): (6.5, 6.2, 8.5),
            (1024, 512): (9.7, 7.3, 8.0), (1024, 1024): (6.3, 6.0, 7.7), (256, 1024): (7.2, 6.6, 10.8)},
    "v5p": {(128, 128): (51.2, 47.3, 47.1), (512, 512): (11.3, 8.8, 10.2), (512, 1024): (6.7, 6.8, 9.1),
            (1024, 512): (9.9, 7.8, 8.7), (1024, 1024): (6.4, 6.5, 8.1), (256, 1024): (8.0, 8.1, 12.2)},
    "v6e": {(128, 128): (38.0, 25.1, 26.2), (512, 512): (9.5, 5.3, 5.8), (512, 1024): (6.4, 4.3, 5.2),
            (1024, 512): (9.9, 4.6, 5.0), (1024, 1024): (4.9, 3.9, 4.6), (256, 1024): (6.1, 4.8, 6.9)},
    "tpu7x": {(128, 128): (42.6, 42.3, 44.0), (512, 512): (9.8, 6.3, 6.9), (512, 1024): (6.4, 4.8, 5.9),
              (1024, 512): (9.3, 5.2, 5.6), (1024, 1024): (5.0, 4.2, 5.1), (256, 1024): (6.5, 5.9, 7.8)},
}  # fmt: skip

# Within 5 % of the fewest bundles the smaller block; v4 has an eighth of the others' VMEM.
BLOCK_SIZES = {
    "default": {"forward": (512, 1024), "backward_q": (512, 1024), "backward_kv": (512, 512)},
    "v4": {"forward": (512, 512), "backward_q": (512, 512), "backward_kv": (512, 512)},
    "v5e": {"forward": (512, 1024), "backward_q": (512, 1024), "backward_kv": (1024, 512)},
    "v5p": {"forward": (512, 1024), "backward_q": (512, 1024), "backward_kv": (1024, 1024)},
    "v6e": {"forward": (1024, 1024), "backward_q": (1024, 1024), "backward_kv": (1024, 1024)},
    "tpu7x": {"forward": (1024, 1024), "backward_q": (1024, 1024), "backward_kv": (1024, 1024)},
}
