"""Which mesh, micro-batch and remat to try on a slice, in which order: an estimate that only orders.

What is reported of a choice comes from the compiler. A wrong estimate here costs a compilation more.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator

from launch.preflight.cells import Program
from launch.preflight.hardware import Target
from scaling.flops import ledger, memory_bytes
from scaling.flops.ledger import routed_tokens
from scaling.layers import capacity, has, layers
from scaling.memory import REMATS, cost
from scaling.mesh import MeshShape

MICRO_TOKENS = 16384
"""Most tokens of a device in one part of a batch: more makes products no faster."""


@dataclasses.dataclass(frozen=True)
class Choice:
    """How a step runs on a slice.

    Attributes:
      mesh: replica, fsdp, tensor, expert. remat: see ``scaling.models.lm.build``. rows: of a device in one
        part. accumulate: parts of a batch, one after another.
    """

    mesh: MeshShape
    remat: str
    rows: int
    accumulate: int


def mesh_for(program: Program, target: Target) -> MeshShape | None:
    """All devices along fsdp, as far as there are rows for them; heads are split over those left.

    None where neither rows nor heads divide.
    """
    fsdp = math.gcd(program.batch, target.devices)
    tensor = target.devices // fsdp
    model = program.model
    if model["kv_heads"] % tensor or model["ffn_dim"] % tensor:
        return None
    return MeshShape(1, fsdp, tensor)


def meshes_for(program: Program, target: Target) -> list[MeshShape]:
    """``mesh_for``, and on TPUs the same with a part of fsdp, a power of two, along experts.

    On GPUs nothing is compiled, and ``gpu.estimate_step`` knows of no exchange of tokens.
    """
    mesh = mesh_for(program, target)
    if mesh is None:
        return []
    parts = [1]
    if has(program.model, "moe") and target.platform == "tpu":
        most = math.gcd(program.model["experts"], mesh.fsdp)
        parts = [n for n in _powers(most) if most % n == 0]
    return [MeshShape(1, mesh.fsdp // n, mesh.tensor, n) for n in parts]


def does_not_divide(program: Program, target: Target) -> str:
    """Why there is no mesh."""
    return f"{program.batch} rows do not divide over {target.devices} devices, nor do the heads"


def choices(program: Program, target: Target, remat: str | None = None) -> Iterator[Choice]:
    """Every choice on a slice, the fastest by estimate first; nothing where no mesh divides the cell.

    Args:
      remat: this policy alone.
    """
    most, found = max(1, MICRO_TOKENS // program.seq), []
    for mesh in meshes_for(program, target):
        own = program.batch // (mesh.replica * mesh.fsdp * mesh.expert)
        sizes = [rows for rows in _powers(most) if own % rows == 0]
        found += [Choice(mesh, policy, rows, own // rows) for policy in REMATS for rows in sizes]
    found = [c for c in found if remat in (None, c.remat)]
    yield from sorted(found, key=lambda c: (estimated_seconds(program, target, c), c.accumulate))


def _powers(most: int) -> list[int]:
    return [2**k for k in range(most.bit_length())]


def estimated_seconds(program: Program, target: Target, choice: Choice) -> float:
    """A step's time, to order choices: products and weights (``scaling.memory.cost``), or the network."""
    ratio = target.peak_flops / target.bandwidth
    work = (program.model, program.batch, program.seq, choice.remat, choice.accumulate, target.devices)
    here = cost(*work, flops_per_byte=ratio) / target.peak_flops
    mesh = choice.mesh
    if mesh.fsdp * mesh.expert == 1:
        return here
    return max(here, moved_bytes(program, choice) / target.network(target.shape))


def moved_bytes(program: Program, choice: Choice) -> float:
    """Bytes that a device sends in a step, about: weights that are gathered, tokens that go to experts.

    In bfloat16: weights for the forward and the backward pass, and their gradients added up, of experts those
    of a device's own part alone; of the places of its rows what lies elsewhere, there and back, twice.
    """
    model, mesh = program.model, choice.mesh
    entries = ledger(model, program.seq).entries
    experts = sum(e.params for e in entries if e.name in ("experts", "routed experts"))
    gathered = program.params - experts + (experts / mesh.expert if mesh.fsdp > 1 else 0)
    weights = choice.accumulate * 3 * 2 * gathered / mesh.tensor
    if mesh.expert == 1:
        return weights
    elsewhere = 4 * 2 * (1 - 1 / mesh.expert) * model["d_model"] / mesh.tensor
    places = 0
    for layer in layers(model):
        if layer.ffn == "moe":
            seq = routed_tokens(model, program.seq) if layer.routed else program.seq
            places += model["experts"] * capacity(
                model["experts"], model["active_experts"], model["capacity_factor"], seq
            )
    return weights + choice.accumulate * choice.rows * places * elsewhere


def flops_with_remat(program: Program, choice: Choice) -> float:
    """Products of one device in a step: the ledger's and what remat repeats."""
    work = (program.model, program.batch, program.seq, choice.remat, choice.accumulate)
    return cost(*work, choice.mesh.devices, flops_per_byte=0.0)


def state_bytes(program: Program, devices: int) -> int:
    """Bytes of parameters and moments that each device holds at the least."""
    slots = {"adamw": 2, "lion": 1, "muon": 2, "schedule_free": 2}[program.static.optim]
    width = 2 if program.static.params_dtype == "bfloat16" else 4
    return width * (1 + slots) * program.params // devices


def estimated_bytes(program: Program, choice: Choice) -> float:
    """Memory of one device, to leave out choices that are far from fitting.

    Within 10 % of what libtpu reported for models of 50M, 90M and 155M on one chip, 4.9B on 8, 7B on 16. It
    gave a step 20 bytes a parameter besides the state: gradients, and new arrays while the old are there.
    """
    model, devices = program.model, choice.mesh.devices
    parts = memory_bytes(model, choice.rows, program.seq, remat=choice.remat)
    table = program.model["vocab"] * model["d_model"]
    gathered = 6 * table if devices > 1 else 4 * table  # the head in bfloat16, and its gradient in float32
    update = 20 * program.params / devices
    return state_bytes(program, devices) + update + gathered + parts.activations / choice.mesh.tensor
