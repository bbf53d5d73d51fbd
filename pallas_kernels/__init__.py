"""Attention and scan kernels in JAX; knows arrays only."""

from pallas_kernels.attention import dot_product_attention
from pallas_kernels.linear_cross_entropy import linear_cross_entropy

__all__ = ["dot_product_attention", "linear_cross_entropy"]
