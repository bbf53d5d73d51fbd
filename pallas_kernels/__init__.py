"""Attention and scan kernels in JAX; knows arrays only."""

from pallas_kernels.attention import dot_product_attention

__all__ = ["dot_product_attention"]
