"""A grid of cells, and how one cell is planned, trained and recorded. Imports nothing heavy."""

__version__ = "0.1.0"
