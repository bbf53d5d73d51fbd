"""Block sizes of the diagonal recurrence, (tokens, features), per TPU generation; kept as data."""

# Chosen to fit: a forward block is 2 MiB an array in float32 and a backward block 1 MiB, twice each for the
# pipeline, within the 16 MiB that a kernel may have by default. All five generations compile; not timed.
BLOCKS = {
    "forward": dict.fromkeys(("any", "v4", "v5e", "v5p", "v6e", "tpu7x"), (256, 2048)),
    "backward": dict.fromkeys(("any", "v4", "v5e", "v5p", "v6e", "tpu7x"), (128, 2048)),
}
