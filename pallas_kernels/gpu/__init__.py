"""Implementations for NVIDIA GPUs: Mosaic GPU kernels (Hopper) and cuDNN."""
