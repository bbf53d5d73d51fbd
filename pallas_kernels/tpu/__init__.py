"""Pallas kernels for TPU; on a CPU they run within ``dispatch.interpret()``."""
