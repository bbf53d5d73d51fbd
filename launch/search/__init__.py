"""Search within a compute budget, over the manifest of a study that grows (docs/search.md).

A search is written as its paper has it: it asks for cells and gets their losses. It is run from its beginning
each time (``session``): where all losses are there it goes on, and where some are missing it stops, its cells
are trained, and it is run again. So every decision is a function of the results on disk, and a search that
was killed makes the same ones and trains nothing twice.
"""
