"""What is compiled for a cell: its static part, and the jitted step and evaluation that cells share."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping

import jax

from scaling.models.lm import build
from scaling.models.loss import eval_sums
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
            model=tuple(sorted(cell["model"].items())),
            optim=cell["optim"]["name"],
            schedule=as_compiled(cell["schedule"])[0],
            decay=cell["schedule"]["decay"],
            precision=tuple(sorted(cell["precision"].items())),
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

    def build(self, seed: int, remat: str = "none"):
        """The model as ``scaling.models.lm.build`` gives it: (apply, params)."""
        model = dict(self.model)
        return build(
            model,
            seed=seed,
            unroll=model["layers"] <= UNROLLED_LAYERS,
            remat=remat,
            matmul=matmul_of(dict(self.precision)),
        )


def program_key(cell: Mapping) -> tuple:
    """What cells must share to share a compiled program: those of one pack, those compiled once ahead."""
    return Static.of(cell), cell["train"]["batch"], cell["data"]["seq"]


def first_state(static: Static, seed: int, hp):
    """The state before the first step of a cell with that seed."""
    _, params = build(dict(static.model), seed=seed)
    return init_state(params, static, hp)


def step_function(static: Static, remat: str = "none"):
    """(state, batch, hp) to (state, metrics): one update, pure and not yet jitted."""
    return functools.partial(train_step, static.build(0, remat)[0], static)


def eval_function(static: Static):
    """(params, batch) to (nats_B, tokens_B), pure and not yet jitted."""
    return functools.partial(eval_sums, static.build(0)[0])


@functools.lru_cache(maxsize=8)
def compiled(static: Static, remat: str = "none"):
    """The jitted step (it donates the state) and evaluation; cells of one ``Static`` share them."""
    return jax.jit(step_function(static, remat), donate_argnums=0), jax.jit(eval_function(static))
