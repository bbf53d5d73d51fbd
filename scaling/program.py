"""What is compiled for a cell: its static part, and the jitted step and evaluation that cells share."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping

import jax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from pallas_kernels import sharding
from scaling.config import as_static
from scaling.mesh import OnMesh, batch_sharding, row_axes, state_shardings
from scaling.models.block_choice import BlockChoice
from scaling.models.lm import Apply, init_params, make_apply, once_options
from scaling.models.loss import eval_sums
from scaling.models.places import HERE
from scaling.models.upcycled import upcycled_params
from scaling.optim import hyper_parameter_shapes
from scaling.precision import matmul_of
from scaling.schedules import as_compiled
from scaling.step import init_state, train_step

UNROLLED_LAYERS = 4
"""Up to this depth layers are unrolled: 13 to 23 % less time a step on CPU than a scan of so few, and
compiling stays quick. By the config alone, never by the device."""


@dataclasses.dataclass(frozen=True)
class Static:
    """The part of a cell's config that is compiled in; the rest is traced (``optim.hyper_parameters``).

    Cells with equal ``Static``, batch and sequence length share one program.
    """

    model: tuple
    optim: str
    schedule: str
    decay: str = "linear"
    precision: tuple = ()
    skip_window: int | None = None

    @classmethod
    def of(cls, cell: Mapping) -> Static:
        """The static part of a validated cell config."""
        return cls(
            model=as_static(cell["model"]),
            optim=cell["optim"]["name"],
            schedule=as_compiled(cell["schedule"])[0],
            decay=cell["schedule"]["decay"],
            precision=as_static(cell["precision"]),
            skip_window=cell["train"]["skip_window"] if cell["train"]["skip_spikes"] else None,
        )

    @property
    def params_dtype(self) -> str:
        """What parameters and optimizer state are stored in."""
        return dict(self.precision).get("params", "float32")

    @property
    def stochastic_rounding(self) -> bool:
        """How a bfloat16 parameter is rounded after an update."""
        return dict(self.precision).get("rounding") == "stochastic"

    def apply(
        self, remat: str = "none", mesh: Mesh | None = None, blocks: BlockChoice | None = None
    ) -> Apply:
        """The model as a pure function (``scaling.models.lm.make_apply``)."""
        model = dict(self.model)
        return make_apply(
            model,
            unroll=model["layers"] <= UNROLLED_LAYERS,
            remat=remat,
            matmul=matmul_of(dict(self.precision)),
            places=HERE if mesh is None else OnMesh(mesh),
            blocks=blocks,
        )


def program_key(cell: Mapping) -> tuple:
    """What cells must share to share a compiled program: those of one pack, those compiled once ahead."""
    return Static.of(cell), cell["train"]["batch"], cell["data"]["seq"]


@dataclasses.dataclass(frozen=True)
class Plan:
    """How a step runs, not what it computes: no field changes a number but by the order of sums.

    Attributes:
      remat: what the backward pass recomputes, see ``scaling.models.lm.build``.
      accumulate: parts that a batch is taken in, one after another.
      mesh: where arrays lie; None: all on one device.
    """

    remat: str = "none"
    accumulate: int = 1
    mesh: Mesh | None = None


def first_state(static: Static, seed, hp):
    """The state before the first step of a cell with that seed, on one device."""
    return init_state(init_params(dict(static.model), seed), static, hp)


def placed_first_state(static: Static, seed: int, hp, mesh: Mesh | None):
    """``first_state`` on a mesh, each part made where it lies; on one device without."""
    if mesh is None:  # committed to its device, as what a checkpoint gives is: else a resume compiles again
        return jax.device_put(first_state(static, seed, hp), jax.local_devices()[0])
    return _maker(static, mesh)(seed, hp)


@functools.lru_cache(maxsize=8)
def _maker(static: Static, mesh: Mesh):
    make = functools.partial(first_state, static)
    where = state_shardings(mesh, static, state_shapes(static))
    return jax.jit(make, out_shardings=where, compiler_options=once_options())


def upcycled_state(dense: Static, static: Static, params, seed: int, hp, mesh: Mesh | None):
    """The state before the first step of a cell that starts from a dense one's parameters.

    Args:
      dense, static: of the dense cell and of this one. params: the dense cell's (``optim.eval_params``).
      seed, hp, mesh: as ``placed_first_state``.

    Returns:
      A state whose optimizer has seen nothing.
    """

    def make(params, seed, hp):
        before, model = dict(dense.model), dict(static.model)
        return init_state(upcycled_params(before, model, params, init_params(model, seed)), static, hp)

    where = None if mesh is None else state_shardings(mesh, static, state_shapes(static))
    made = jax.jit(make, out_shardings=where, compiler_options=once_options())(params, seed, hp)
    return jax.device_put(made, jax.local_devices()[0]) if mesh is None else made


def placed_shapes(static: Static, mesh: Mesh | None):
    """``state_shapes`` with where every array lies, for reading a checkpoint."""
    shapes = state_shapes(static)
    if mesh is None:
        here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        where = jax.tree.map(lambda _: here, shapes)
    else:
        where = state_shardings(mesh, static, shapes)
    put = lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)  # noqa: E731
    return jax.tree.map(put, shapes, where)


def state_shapes(static: Static):
    """Shapes and dtypes of a train state, nothing computed."""
    return jax.eval_shape(functools.partial(first_state, static), 0, hyper_parameter_shapes())


def step_function(static: Static, plan: Plan = Plan()):
    """(state, batch, hp) to (state, metrics): one update, pure and not yet jitted."""
    apply = static.apply(plan.remat, plan.mesh)
    return on_mesh(functools.partial(train_step, apply, static, accumulate=plan.accumulate), plan.mesh)


def eval_function(static: Static, mesh: Mesh | None = None, blocks: BlockChoice | None = None):
    """(params, batch) to (nats_B, tokens_B), pure and not yet jitted; of ``blocks`` of attention alone."""
    return on_mesh(functools.partial(eval_sums, static.apply(mesh=mesh, blocks=blocks)), mesh)


def on_mesh(function, mesh: Mesh | None):
    """The function with its kernels split as its arrays are: TPU's partitioner does not do it."""
    if mesh is None:
        return function

    @functools.wraps(function.func)
    def placed(*args):
        with sharding.placed(mesh, b=row_axes(mesh), k="tensor"):
            return function(*args)

    return placed


@functools.lru_cache(maxsize=8)
def compiled(static: Static, plan: Plan = Plan()):
    """The jitted step (it donates the state) and evaluation; cells of one ``Static`` share them."""
    step = step_function(static, plan)
    if plan.mesh is None:
        return jax.jit(step, donate_argnums=0), compiled_evaluation(static, None, None)
    state, rows, whole = step_shardings(static, plan.mesh)
    return (
        jax.jit(step, donate_argnums=0, in_shardings=(state, rows, whole), out_shardings=(state, whole)),
        compiled_evaluation(static, plan.mesh, None),
    )


@functools.lru_cache(maxsize=8)
def compiled_evaluation(static: Static, mesh: Mesh | None, blocks: BlockChoice | None):
    """``eval_function``, jitted."""
    evaluate = eval_function(static, mesh, blocks)
    if mesh is None:
        return jax.jit(evaluate)
    state, rows, whole = step_shardings(static, mesh)
    return jax.jit(evaluate, in_shardings=(state.params, rows), out_shardings=whole)


def step_shardings(static: Static, mesh: Mesh):
    """Where a step's state, batch and everything else lie on a mesh."""
    state = state_shardings(mesh, static, state_shapes(static))
    return state, batch_sharding(mesh), NamedSharding(mesh, P())
