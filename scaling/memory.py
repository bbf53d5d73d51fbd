"""Which activations to keep and in how many parts to take a batch: the cheapest way that fits a budget.

What fits is the compiler's word (``step_bytes`` of the real, compiled step), what is cheapest the ledger's:
recomputing costs FLOPs, every further part of a batch reads the weights and the summed gradients again.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp

from scaling import layers
from scaling.config import ConfigError
from scaling.flops import ledger
from scaling.mesh import row_parts, rows_with_padding
from scaling.optim import hyper_parameter_shapes
from scaling.program import Plan, Static, compiled, state_shapes, step_shardings

REMATS = ("none", "dots", "full")
"""From the most memory to the least."""
FLOPS_PER_BYTE = 240.0
"""Peak FLOP/s over memory bandwidth, where the device's own are not known: that of a TPU v5e."""


@dataclasses.dataclass(frozen=True)
class Choice:
    """What ``choose`` found.

    Attributes:
      remat, accumulate: as ``scaling.program.Plan`` takes them.
      bytes: what the compiled step needs on one device.
      fits: whether that is within the budget; where nothing is, this needs least of what was tried.
      tried: (remat, accumulate, bytes) of everything that was compiled, in order.
    """

    remat: str
    accumulate: int
    bytes: int
    fits: bool
    tried: tuple[tuple[str, int, int], ...]


def candidates(rows: int) -> list[tuple[str, int]]:
    """Every (remat, accumulate): parts in powers of two down to one row a device.

    Args:
      rows: of the batch on one device.
    """
    parts = [1]
    while parts[-1] * 2 <= rows:
        parts.append(parts[-1] * 2)
    return list(itertools.product(REMATS, parts))


def cost(
    model: Mapping,
    batch: int,
    seq: int,
    remat: str,
    accumulate: int,
    devices: int = 1,
    flops_per_byte: float = FLOPS_PER_BYTE,
) -> float:
    """An estimate of a step's work on one device in FLOPs, to rank ways of running it.

    The ledger's FLOPs; for "full" one more forward pass of the layers, for "dots" that of attention's
    products alone; for every part of the batch a reading of the weights and a sum into the gradients
    (10 bytes a parameter), each byte as ``flops_per_byte`` FLOPs.

    Raises:
      ConfigError: an unknown remat policy.
    """
    account = ledger(model, seq)
    head = 2.0 * model["d_model"] * model["vocab"]
    forward = account.forward_flops_per_token() - head
    weights = 2.0 * (account.params_active - account.params_embedding)
    again = {"none": 0.0, "dots": max(0.0, forward - weights), "full": forward}
    if remat not in again:
        raise ConfigError(f"remat is {remat!r}; it must be one of {', '.join(map(repr, again))}")
    flops = batch * seq * (account.train_flops_per_token() + again[remat])
    return (flops + accumulate * 10.0 * account.params_total * flops_per_byte) / devices


def choose(
    budget: float,
    ways: Sequence[tuple[str, int]],
    measure: Callable[[str, int], int],
    price: Callable[[str, int], float],
) -> Choice:
    """The cheapest way that fits.

    Ways are measured from the cheapest up, and the first that fits is taken. One that must need at least as
    much as another that did not fit (it keeps as much and takes as many rows at once) is not compiled.

    Args:
      budget: bytes of one device. ways: (remat, accumulate), at least one.
      measure: (remat, accumulate) to the compiled step's bytes. price: to its cost, see ``cost``.
    """
    tried: list[tuple[str, int, int]] = []
    for remat, parts in sorted(ways, key=lambda way: price(*way)):
        kept = REMATS.index(remat)
        if any(kept <= REMATS.index(other) and parts <= many for other, many, _ in tried):
            continue
        tried.append((remat, parts, measure(remat, parts)))
        if tried[-1][2] <= budget:
            return Choice(*tried[-1], True, tuple(tried))
    least = min(tried, key=lambda way: way[2])
    return Choice(*least, False, tuple(tried))


def abstract_step(static: Static, plan: Plan, batch: int, seq: int) -> tuple:
    """(state, rows, hp) as ``jax.ShapeDtypeStruct``, placed as the plan says: what a step is lowered with."""
    rows = rows_with_padding(batch, row_parts(plan.mesh) * plan.accumulate)
    ids = jax.ShapeDtypeStruct((rows, seq), jnp.int32)
    arrays = dict.fromkeys(("inputs", "targets", "segment_ids", "positions"), ids)
    arrays["loss_mask"] = jax.ShapeDtypeStruct((rows, seq), jnp.float32)
    if not layers.causal(dict(static.model)):
        arrays["weights"] = arrays["loss_mask"]
    state, hp = state_shapes(static), hyper_parameter_shapes()
    if plan.mesh is None:
        return state, arrays, hp

    def at(sharding, x):
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    where, by_rows, whole = step_shardings(static, plan.mesh)
    placed = (jax.tree.map(lambda x, s=s: at(s, x), tree) for s, tree in ((by_rows, arrays), (whole, hp)))
    return jax.tree.map(at, where, state), *placed


def step_parts(program) -> dict[str, int]:
    """Bytes of a compiled step on one device: arguments (and results beside them), temporary, program."""
    m = program.memory_analysis()
    return {
        "arguments": m.argument_size_in_bytes + m.output_size_in_bytes - m.alias_size_in_bytes,
        "temporary": m.temp_size_in_bytes,
        "program": m.generated_code_size_in_bytes,
    }


def step_bytes(program) -> int:
    """Bytes on one device that a compiled step needs in all."""
    return sum(step_parts(program).values())


def choose_plan(cell: Mapping, budget: float, mesh=None) -> tuple[Plan, Choice]:
    """``choose`` for a cell on the devices that are here, by compiling its step.

    Args:
      cell: a validated cell config. budget: bytes of one device. mesh: a ``jax.sharding.Mesh`` or None.
    """
    static, batch, seq = Static.of(cell), cell["train"]["batch"], cell["data"]["seq"]
    parts = row_parts(mesh)
    devices = 1 if mesh is None else mesh.size

    def measure(remat: str, accumulate: int) -> int:
        plan = Plan(remat, accumulate, mesh)
        step = compiled(static, plan)[0]
        return step_bytes(step.lower(*abstract_step(static, plan, batch, seq)).compile())

    def price(remat: str, accumulate: int) -> float:
        return cost(cell["model"], batch, seq, remat, accumulate, devices)

    choice = choose(budget, candidates(-(-batch // parts)), measure, price)
    return Plan(choice.remat, choice.accumulate, mesh), choice
