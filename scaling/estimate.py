"""Time and memory of a cell before it is trained: estimates, marked as such wherever they are shown.

Time: the cell's own largest matrix products are timed on this device, and the exact ledger says
how many FLOPs a step has. A training step also moves memory and starts operations, so the
products' rate is divided by ``STEP_OVER_MATMUL``.
"""

from __future__ import annotations

import contextlib
import functools
import os
import time
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from scaling.branches import spent_flops
from scaling.flops import memory_bytes

STEP_OVER_MATMUL = 4.0
"""Time of a step over that of its bare matrix products on one CPU core, for models of 7k to 1M parameters."""
START_SECONDS = 10.0
"""To start a process and open the data, once a worker."""
COMPILE_SECONDS = 5.0
"""To compile a small step, once a cell."""
MOST_ROWS = 4096
"""Rows of the timed product: more do not change its rate."""


def estimate_cells(cells: Sequence[dict], workers: int = 1) -> dict:
    """Estimates every cell of a manifest on this device.

    Args:
      cells: manifest entries.
      workers: processes that will share the machine's CPU cores, one core each.

    Returns:
      ``cells`` (list of ``seconds`` and ``bytes``), ``total_seconds``, ``device``, ``workers``, ``how``.
    """
    out = []
    with one_core():
        for cell in cells:
            config = cell["config"]
            model, batch, seq = config["model"], config["train"]["batch"], config["data"]["seq"]
            rate = matmul_rate(
                model["d_model"], model["ffn_dim"], min(batch * seq, MOST_ROWS), model["dtype"]
            )
            seconds = spent_flops(cell) / rate * STEP_OVER_MATMUL + COMPILE_SECONDS
            out.append({"seconds": seconds, "bytes": int(memory_bytes(model, batch, seq).total)})
    longest = max(c["seconds"] for c in out)
    return {
        "cells": out,
        "total_seconds": max(longest, sum(c["seconds"] for c in out) / workers) + START_SECONDS,
        "device": jax.devices()[0].device_kind,
        "workers": workers,
        "how": f"measured matrix products, times {STEP_OVER_MATMUL:g}",
    }


@contextlib.contextmanager
def one_core():
    """Binds the process to one core for the block, as a worker is, where the system can."""
    if not hasattr(os, "sched_setaffinity") or jax.default_backend() != "cpu":
        yield
        return
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(cores)})
    try:
        yield
    finally:
        os.sched_setaffinity(0, cores)


@functools.lru_cache
def matmul_rate(d_model: int, ffn_dim: int, tokens: int, dtype: str) -> float:
    """FLOP/s of the feed-forward's product on this device, best of a few short runs."""
    x = jnp.ones((tokens, d_model), dtype)
    w = jnp.ones((d_model, ffn_dim), dtype)
    product = jax.jit(lambda x, w: x @ w)
    product(x, w).block_until_ready()
    best = float("inf")
    repeats = max(1, int(2e7 / (2 * tokens * d_model * ffn_dim)))
    for _ in range(5):
        start = time.perf_counter()
        for _ in range(repeats):
            y = product(x, w)
        y.block_until_ready()
        best = min(best, (time.perf_counter() - start) / repeats)
    return 2 * tokens * d_model * ffn_dim / best
