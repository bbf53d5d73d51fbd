"""Block sizes of the causal convolution, (tokens, channels), per TPU generation; kept as data."""

# Chosen to fit: four forward buffers of 2 MiB in float32, six of 1 MiB backward, within the 16 MiB that a
# kernel may have by default. By the compiler's static schedule for v5e, 16 tokens of 512 channels in bfloat16
# with SiLU take 91 bundles forward and 180 backward (with segments 104 and 223) in blocks of 512 channels,
# 110 and 190 in blocks of 256, 176 and 264 in blocks of 128. No device was timed.
BLOCKS = {
    "forward": dict.fromkeys(("any", "v4", "v5e", "v5p", "v6e", "tpu7x"), (1024, 512)),
    "backward": dict.fromkeys(("any", "v4", "v5e", "v5p", "v6e", "tpu7x"), (512, 512)),
}
