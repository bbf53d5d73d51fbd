"""Compiling with few optimisations, here and in processes that are started meanwhile."""

import contextlib

import pytest


@contextlib.contextmanager
def few_optimisations():
    import jax

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
        jax.config.update("jax_disable_most_optimizations", True)
        try:
            yield
        finally:
            jax.config.update("jax_disable_most_optimizations", False)
