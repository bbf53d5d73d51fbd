"""Whether this environment can compile for a GPU that is not here, and the figures of a compile."""

import importlib.util

import jax
import pytest

from pallas_kernels.gpu.resources import kernel_resources

# The plugin and ptxas are packages of their own: `make aot-gpu` installs them into an environment.
PLUGIN = any(importlib.util.find_spec(name) for name in ("jax_cuda12_plugin", "jax_cuda13_plugin"))
needs_plugin = pytest.mark.skipif(not PLUGIN, reason="JAX's CUDA plugin is not installed")


def figures(function, *shapes, target_config="h100"):
    """Kernel name -> (registers, spill stores, spill loads)."""
    found = kernel_resources(jax.jit(function), *shapes, target_config=target_config)
    return {r.name: (r.registers, r.spill_stores, r.spill_loads) for r in found}
