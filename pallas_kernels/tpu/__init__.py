"""Kernels for TPU, by ``pl.pallas_call``."""
