"""Implementations in plain JAX, left to XLA to compile; they run on every platform."""
