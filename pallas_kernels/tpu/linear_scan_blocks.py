"""Block sizes of the diagonal recurrence, (tokens, features), per TPU generation; kept as data."""

# TODO
BLOCKS = {
    "forward": dict.fromkeys(("any", "v4", "v5e", "v5p", "v6e", "tpu7x"), (256, 2048)),
    "backward": dict.fromkeys(("any", "v4", "v5e", "v5p", "v6e", "tpu7x"), (128, 2048)),
}
