"""GPUs: the step is lowered for CUDA, not compiled, and everything else is estimated from shapes."""

from __future__ import annotations

import time

from launch.preflight.cells import Program
from launch.preflight.hardware import Target
from launch.preflight.plans import Choice, choices, does_not_divide, estimated_bytes, flops_with_remat
from pallas_kernels import dispatch
from scaling.flops import memory_bytes
from scaling.memory import abstract_step
from scaling.program import Plan, compiled


def estimate_step(
    program: Program, target: Target, *, remat: str | None = None
) -> tuple[Choice | None, dict | None, str | None]:
    """As ``search.best_on``, by estimate: the first choice whose estimated memory fits, lowered for CUDA."""
    found = list(choices(program, target, remat))
    if not found:
        return None, None, does_not_divide(program, target)
    fitting = [c for c in found if estimated_bytes(program, c) <= target.memory]
    choice = fitting[0] if fitting else min(found, key=lambda c: estimated_bytes(program, c))
    numbers = guessed(program, target, choice)
    if not fitting:
        return choice, numbers, f"needs about {numbers['needed_bytes'] / 2**30:.0f} GiB a device, by estimate"
    began = time.perf_counter()
    try:
        lower_for_cuda(program, target, choice)
    except Exception as error:  # a kernel or an operation that CUDA does not have
        numbers["error"] = str(error).splitlines()[0][:300]
    numbers["compile_seconds"] = time.perf_counter() - began
    return choice, numbers, numbers["error"]


def lower_for_cuda(program: Program, target: Target, choice: Choice):
    """The step of one GPU's part of a batch, lowered."""
    parts = min(choice.accumulate, 2)
    plan = Plan(choice.remat, parts)
    name = target.generation if target.generation in dispatch.HOPPER else None
    with dispatch.target("cuda", name):
        arguments = abstract_step(program.static, plan, parts * choice.rows, program.seq)
        return compiled(program.static, plan)[0].trace(*arguments).lower(lowering_platforms=("cuda",))


def guessed(program: Program, target: Target, choice: Choice) -> dict:
    """What ``compile.compile_step`` reads off a program, guessed from shapes.

    Products: the ledger's, and what remat repeats. Memory: weights three times a part, parameters, gradient
    and moments once there and back, and a layer's activations there and back. Network: bfloat16 weights
    gathered twice a part, float32 gradients scattered once.
    """
    devices, parts = choice.mesh.devices, choice.accumulate
    weights = 2 * program.params // choice.mesh.tensor
    kept = memory_bytes(program.model, choice.rows, program.seq).activations // choice.mesh.tensor
    shared = {"devices": choice.mesh.fsdp, "spans": [choice.mesh.fsdp], "times": parts}
    collectives = [
        {"kind": "all-gather", "bytes": 2 * weights, **shared},
        {"kind": "reduce-scatter", "bytes": 2 * weights, **shared},
    ]
    return {
        "bytes": None,
        "needed_bytes": estimated_bytes(program, choice),
        "error": None,
        "kernels": [],
        "flops": flops_with_remat(program, choice),
        "memory_bytes": parts * (3 * weights + 2 * kept) + 28 * program.params / devices,
        "collectives": collectives if choice.mesh.fsdp > 1 else [],
        "unknown_loops": [],
        "compiled_parts": parts,
        "cached": False,
        "compile_seconds": 0.0,
    }
