"""Compiling a study's cells for a TPU that is not here: does each fit, with which kernels, at what cost?

Each distinct shape's training step is compiled once by the real TPU compiler for one chip. What the
compiler reports is exact for that chip: bytes of arguments, of temporaries and of the program. The
time is not: FLOPs by the exact ledger over the chip's peak, a floor that no run reaches.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp

from fits.budget import PEAK_FLOPS
from launch.show import data_facts
from pallas_kernels import aot
from scaling import data
from scaling.config import ConfigError, validate_cell, validate_section
from scaling.flops import ledger
from scaling.grid import plan
from scaling.optim import hyper_parameters
from scaling.program import Plan, Static, first_state, program_key, step_function
from scaling.records import read_manifest
from scaling.study import load_study

# Bytes of memory that one JAX device has: a chip's, but half a chip's on tpu7x, whose chips are two
# devices. From the vendor's page of each generation.
DEVICE_BYTES = {"v4": 32 << 30, "v5e": 16 << 30, "v5p": 95 << 30, "v6e": 32 << 30, "tpu7x": 96 << 30}
PEAKS = {g: PEAK_FLOPS[{"tpu7x": "v7x"}.get(g, g)] / (2 if g == "tpu7x" else 1) for g in DEVICE_BYTES}


def read_cells(study: Path) -> list[dict]:
    """Cells of a study folder's manifest, or those that a config file resolves into.

    Raises:
      ConfigError, StudyError: no such study or config.
    """
    if study.is_dir():
        return read_manifest(study)["cells"]
    settings = load_study(study)
    dataset = data.open_data(validate_section("data", settings["data"]))
    return plan(settings, data_facts(dataset, settings["data"].get("seq", 128)))["cells"]


def preflight(
    cells: Sequence[Mapping],
    generation: str,
    *,
    remat: str = "none",
) -> Iterator[dict]:
    """Compiles the training step of every distinct shape for one chip of a TPU generation.

    Args:
      cells: entries of a manifest. generation: v4, v5e, v5p, v6e or tpu7x. remat: see ``models.lm.build``.

    Yields:
      One dict a shape: cells (ids), params, batch, seq, layers, d_model, bytes (arguments, temporary,
      program), total_bytes, device_bytes, fits, kernels (names of the Pallas kernels in the program),
      compile_seconds, flops_per_step, floor_seconds (of all the shape's steps, at the chip's peak), error.

    Raises:
      ConfigError: an unknown generation, or libtpu is not installed.
    """
    if generation not in DEVICE_BYTES:
        raise ConfigError(f"target is {generation!r}; it must be one of {', '.join(DEVICE_BYTES)}")
    try:
        aot.tpu_topology(generation)
    except RuntimeError as error:
        raise ConfigError(str(error)) from error
    groups: dict[tuple, list[Mapping]] = {}
    for cell in cells:
        cell = {**cell, "config": validate_cell(cell["config"])}  # an earlier version's lacks later fields
        groups.setdefault(program_key(cell["config"]), []).append(cell)
    for group in groups.values():
        yield _describe(group, generation) | _compile(group[0]["config"], generation, remat)


def _describe(group: Sequence[Mapping], generation: str) -> dict:
    config = group[0]["config"]
    model, batch, seq = config["model"], config["train"]["batch"], config["data"]["seq"]
    account = ledger(model, seq)
    flops = account.train_flops(batch * seq)
    steps = sum(cell["config"]["train"]["steps"] for cell in group)
    return {
        "cells": [cell["id"] for cell in group],
        "params": account.params_total,
        "batch": batch,
        "seq": seq,
        "layers": model["layers"],
        "d_model": model["d_model"],
        "steps": steps,
        "flops_per_step": flops,
        "floor_seconds": flops * steps / PEAKS[generation],
        "device_bytes": DEVICE_BYTES[generation],
    }


def _compile(config: Mapping, generation: str, remat: str) -> dict:
    batch, seq = config["train"]["batch"], config["data"]["seq"]
    static, hp = Static.of(config), hyper_parameters(config)
    state = jax.eval_shape(lambda: first_state(static, 0, hp))
    ids = jax.ShapeDtypeStruct((batch, seq), jnp.int32)
    rows = dict.fromkeys(("inputs", "targets", "segment_ids", "positions"), ids)
    rows["loss_mask"] = jax.ShapeDtypeStruct((batch, seq), jnp.float32)
    hp_shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), hp)
    step = step_function(static, Plan(remat))
    began = time.perf_counter()
    try:
        compiled = aot.compile_tpu(step, state, rows, hp_shapes, generation=generation, donate_argnums=0)
    except Exception as error:  # the compiler's own words: most often that memory is exceeded
        return {"fits": False, "error": str(error).splitlines()[0][:300], "bytes": None, "kernels": [],
                "total_bytes": None, "compile_seconds": time.perf_counter() - began}  # fmt: skip
    memory = compiled.memory_analysis()
    parts = {
        "arguments": memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes,
        "temporary": memory.temp_size_in_bytes,
        "program": memory.generated_code_size_in_bytes,
    }
    total = sum(parts.values())
    return {
        "bytes": parts,
        "total_bytes": total,
        "fits": total <= DEVICE_BYTES[generation],
        "kernels": kernels_in(compiled.as_text()),
        "compile_seconds": time.perf_counter() - began,
        "error": None,
    }


def kernels_in(hlo: str) -> list[str]:
    """Names of the Pallas TPU kernels in a compiled program, each once."""
    lines = [line for line in hlo.splitlines() if 'custom_call_target="tpu_custom_call"' in line]
    # an instruction is called by its kernel's name, with a number where there are several
    found = [re.match(r"\s*(?:ROOT )?%?([A-Za-z_]\w*)", line) for line in lines]
    return sorted({m[1] for m in found if m})
