"""What one chip can do, as its vendor prints it. Light: no imports but the standard library's."""

from __future__ import annotations

# Peak dense bf16 FLOP/s and memory bandwidth (bytes/s) of one chip, as the vendors print them; read in
# November 2026. NVIDIA's data sheets print figures with sparsity for all but the A100, which are halved here:
# A100 80 GB SXM (312 TFLOP/s, 2,039 GB/s), H100 and H200 SXM (1,979 sparse, 989.4 dense in the Hopper white
# paper; 3.35 and 4.8 TB/s), B200 in an HGX of 1,000 W a chip (4.5 PFLOP/s sparse, up to 8 TB/s; boards with a
# 7,680-bit bus reach 7.7). TPUs: the pages v4, v5e, v5p, v6e and tpu7x of docs.cloud.google.com/tpu/docs, per
# chip. The page of the v5e has printed 819 GB/s and 800 GiB/s (859 GB/s); the lower is kept.
PEAK_FLOPS = {
    "a100": 312e12,
    "h100": 989.4e12,
    "h200": 989.4e12,
    "b200": 2.25e15,
    "v4": 275e12,
    "v5e": 197e12,
    "v5p": 459e12,
    "v6e": 918e12,
    "v7x": 2307e12,
}
BANDWIDTH = {
    "a100": 2.039e12,
    "h100": 3.35e12,
    "h200": 4.8e12,
    "b200": 8.0e12,
    "v4": 1.2e12,
    "v5e": 0.819e12,
    "v5p": 2.765e12,
    "v6e": 1.638e12,
    "v7x": 7.38e12,
}

# What JAX calls a device, lower case, and the chip (with its JAX devices) that it is; the first that fits.
KINDS = (
    ("tpu7x", "v7x", 2),
    ("tpu v6", "v6e", 1),
    ("tpu v5 lite", "v5e", 1),
    ("tpu v5e", "v5e", 1),
    ("tpu v5", "v5p", 1),
    ("tpu v4", "v4", 1),
    ("b200", "b200", 1),
    ("h200", "h200", 1),
    ("h100", "h100", 1),
    ("a100", "a100", 1),
)


def peak_flops(device_kind: str) -> float | None:
    """Peak dense bfloat16 FLOP/s of one JAX device, by the name that JAX gives it; None where not known.

    A CPU has none: its peak depends on clock and vector units that it does not tell.
    """
    kind = str(device_kind).lower()
    for words, chip, devices in KINDS:
        if words in kind:
            return PEAK_FLOPS[chip] / devices
    return None
