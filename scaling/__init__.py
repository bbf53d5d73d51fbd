"""A grid of cells, and how one cell is planned, trained and recorded. Imports nothing heavy."""
