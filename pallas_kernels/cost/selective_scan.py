"""What the selective scan holds in memory, without JAX."""

CHUNK = 64
"""Tokens at a time: states [chunk, channels, state] are held for so many, and made again going back."""
