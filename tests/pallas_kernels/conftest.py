"""Kernels' numbers are compared with tolerances; what is read off a compiler's program is left alone."""

import pytest


@pytest.fixture(autouse=True)
def compiles(request):
    """Few optimisations, but for the real compilers of TPUs and GPUs."""
    if not any(request.node.get_closest_marker(mark) for mark in ("aot", "aot_gpu")):
        request.getfixturevalue("quick_compiles")
