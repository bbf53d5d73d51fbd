"""One mesh for every model: replica x fsdp x tensor (x expert), and where each array lies on it.

Rows of a batch are split over replica and fsdp (and expert). A parameter is split over fsdp along
``d_model`` and over tensor along heads, feed-forward channels or vocabulary (``AXES``; the axes are declared
where the parameter is made, in ``scaling.models``); optimizer state lies as its parameter does. XLA's
partitioner does the rest: it gathers a layer's weights where they are used and scatters their gradients
(Rajbhandari et al. 2020, stage 3; Shoeybi et al. 2019 for tensor). replica keeps whole copies, for slices
that are joined by a slower network.

expert splits experts: each of its devices has some, and the tokens go to them and come back (Lepikhin et al.
2021, "GShard", section 3.3), where fsdp alone would gather every expert's weights. All else takes expert as
more of fsdp. A mesh of one expert part has no such axis.

No number depends on the mesh but by the order of sums.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from scaling.config import ConfigError
from scaling.layers import has
from scaling.models.lm import param_axes

ROWS = ("replica", "fsdp", "expert")
AXES = {
    "d_model": "fsdp",
    **dict.fromkeys(("heads", "kv_heads", "ffn_dim", "vocab"), "tensor"),
    "experts": "expert",
}
"""Axis of a parameter, named as the config names its size, to the mesh axis that splits it."""


@dataclasses.dataclass(frozen=True)
class MeshShape:
    """Devices along each mesh axis.

    Attributes:
      replica: whole copies of the model. fsdp: parts that each copy is split into along ``d_model``.
      tensor: parts along heads and channels. expert: parts along experts.

    Raises:
      ConfigError: a part below 1.
    """

    replica: int = 1
    fsdp: int = 1
    tensor: int = 1
    expert: int = 1

    def __post_init__(self):
        for name, value in dataclasses.asdict(self).items():
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ConfigError(f"mesh.{name} is {value!r}; it must be a positive integer")

    @property
    def devices(self) -> int:
        """Devices in all."""
        return self.replica * self.fsdp * self.tensor * self.expert

    @classmethod
    def parse(cls, text: str) -> MeshShape:
        """From ``"replica,fsdp,tensor"`` or ``"replica,fsdp,tensor,expert"``, as the command line takes it.

        Raises:
          ConfigError: not three or four positive integers.
        """
        parts = text.split(",")
        if len(parts) not in (3, 4) or not all(p.strip().isdigit() for p in parts):
            raise ConfigError(
                f"mesh is {text!r}; it must be replica,fsdp,tensor such as 1,8,1, or with a fourth number "
                "replica,fsdp,tensor,expert"
            )
        return cls(*map(int, parts))

    def __str__(self) -> str:
        return f"{self.replica},{self.fsdp},{self.tensor}" + f",{self.expert}" * (self.expert > 1)

    def check(self, model: Mapping) -> None:
        """Raises ``ConfigError`` where a ``model`` section's experts are not split evenly."""
        if self.expert > 1 and not has(model, "moe"):
            raise ConfigError(f"mesh.expert is {self.expert} for a model without experts; it must be 1")
        if self.expert > 1 and model["experts"] % self.expert:
            raise ConfigError(
                f"mesh.expert is {self.expert}; it must divide model.experts = {model['experts']}"
            )


def make_mesh(shape: MeshShape, devices: Sequence | None = None) -> Mesh:
    """The devices in the order in which the network joins them; slices of a multi-slice job along replica.

    Args:
      devices: to lie on; by default all of this job.

    Raises:
      ConfigError: another number of devices than the shape has, or slices that replica does not divide into.
    """
    devices = jax.devices() if devices is None else list(devices)
    if len(devices) != shape.devices:
        raise ConfigError(
            f"mesh is {shape}, {shape.devices} devices; this job has {len(devices)}: replica x fsdp x tensor "
            "(x expert) must be their number"
        )
    slices = len({getattr(d, "slice_index", 0) for d in devices})
    if shape.replica % slices:
        raise ConfigError(f"mesh.replica is {shape.replica}; it must be a multiple of the {slices} slices")
    # experts inside fsdp: neighbours, as the tokens go to and fro in every layer
    own = {
        "fsdp": shape.fsdp,
        **({"expert": shape.expert} if shape.expert > 1 else {}),
        "tensor": shape.tensor,
    }
    sizes = (shape.replica, *own.values())
    if devices[0].platform == "cpu":  # no network to follow: the same order in every process
        grid = np.array(devices).reshape(sizes)
    elif slices > 1:
        inside = (shape.replica // slices, *own.values())
        grid = mesh_utils.create_hybrid_device_mesh(inside, (slices, *(1 for _ in own)), devices)
    else:
        grid = mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
    return Mesh(grid, ("replica", *own), axis_types=(AxisType.Auto,) * len(sizes))


def row_axes(mesh: Mesh) -> tuple[str, ...]:
    """The mesh axes that split the rows of a batch."""
    return tuple(name for name in ROWS if name in mesh.shape)


def param_spec(axes: Sequence[str | None], size: Sequence[int], mesh: Mesh, model: Mapping) -> P:
    """How one parameter is split.

    Heads are split whole. An axis that the mesh does not divide is left whole on every device. What has no
    axis of experts is split over fsdp and expert together.

    Args:
      axes: names from ``scaling.models.lm.param_axes``. size: its shape. model: the cell's model section.
    """

    def part(axis, length):
        name = AXES.get(axis)
        if name not in mesh.shape:
            return None
        if name == "fsdp" and "expert" in mesh.shape and "experts" not in axes:
            both = ("fsdp", "expert")
            if length % math.prod(mesh.shape[n] for n in both) == 0:
                return both
        units = model[axis] if axis in ("heads", "kv_heads") else length
        return name if units % mesh.shape[name] == 0 else None

    return P(*map(part, axes, size))


def state_shardings(mesh: Mesh, static, shapes):
    """Where every array of a train state lies, a tree of ``NamedSharding``.

    Whatever in the optimizer's state has the name (path) and shape of a parameter lies as it does;
    everything else is small and lies whole on every device.

    Args:
      static: a ``scaling.program.Static``. shapes: the state's arrays or their shapes.
    """
    model = dict(static.model)
    is_axes = lambda x: isinstance(x, tuple)  # noqa: E731
    axes = jax.tree_util.tree_leaves_with_path(param_axes(model), is_leaf=is_axes)
    sizes = [x.shape for x in jax.tree.leaves(shapes.params)]
    known = {
        _names(path): (size, param_spec(names, size, mesh, model))
        for (path, names), size in zip(axes, sizes, strict=True)
    }

    def place(path, leaf):
        names = _names(path)
        for start in range(len(names)):
            size, spec = known.get(names[start:], (None, None))
            if size == leaf.shape:
                return NamedSharding(mesh, spec)
        return NamedSharding(mesh, P())

    return jax.tree_util.tree_map_with_path(place, shapes)


def _names(path) -> tuple[str, ...]:
    return tuple(str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k)))) for k in path)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Of arrays [batch, seq] (and of any whose first axis is rows)."""
    return NamedSharding(mesh, P(row_axes(mesh)))


@dataclasses.dataclass(frozen=True)
class OnMesh:
    """``scaling.models.places.Places`` on a mesh: said where XLA would guess wrong."""

    mesh: Mesh

    def rows(self, x):
        """[B, ...] split by rows."""
        return jax.lax.with_sharding_constraint(x, batch_sharding(self.mesh))

    def to_experts(self, x):
        """[B, E, C, D] with every expert's where its weights are; nothing without an axis of experts."""
        return x if "expert" not in self.mesh.shape else self._by_experts(self.rows(x))

    def from_experts(self, x):
        """The way back, from where ``to_experts`` has put it to where the rows are."""
        return x if "expert" not in self.mesh.shape else self.rows(self._by_experts(x))

    def _by_experts(self, x):
        rows = tuple(name for name in row_axes(self.mesh) if name != "expert")
        return jax.lax.with_sharding_constraint(x, NamedSharding(self.mesh, P(rows, "expert")))

    def table(self, x):
        """[V, D] with whole rows to look up; the vocabulary over tensor where it divides."""
        part = "tensor" if x.shape[0] % self.mesh.shape["tensor"] == 0 else None
        return jax.lax.with_sharding_constraint(x, NamedSharding(self.mesh, P(part, None)))


def row_parts(mesh: Mesh | None) -> int:
    """Parts that the rows of a batch are split into; 1 without a mesh."""
    return 1 if mesh is None else math.prod(mesh.shape[name] for name in row_axes(mesh))


def rows_with_padding(rows: int, parts: int) -> int:
    """The least multiple of ``parts`` that holds the rows."""
    return parts * math.ceil(rows / parts)


def pad_rows(batch: Mapping[str, np.ndarray], rows: int) -> Mapping[str, np.ndarray]:
    """The batch with rows of zeros at its end: their loss mask is zero, so they count for nothing."""
    short = rows - len(batch["loss_mask"])
    return {k: np.pad(v, ((0, short), (0, 0))) for k, v in batch.items()} if short else batch


class RowFeed:
    """How this process puts batches on the mesh: it reads the rows of its own devices alone.

    Attributes:
      rows: rows of a batch on the mesh, padding included.
      mine: slice of the batch (without padding) that this process reads.
    """

    def __init__(self, mesh: Mesh, batch: int, parts: int):
        self.sharding = batch_sharding(mesh)
        self.rows = rows_with_padding(batch, parts)
        spans = [s[0] for s in self.sharding.addressable_devices_indices_map((self.rows,)).values()]
        self.first = min(s.start or 0 for s in spans)
        last = max(self.rows if s.stop is None else s.stop for s in spans)
        self.span = last - self.first
        self.mine = slice(min(self.first, batch), min(last, batch))

    def place(self, batch: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
        """This process's rows as global arrays [rows, seq]."""
        local = pad_rows(batch, self.span)

        def put(x):
            def part(index):
                start = (index[0].start or 0) - self.first
                stop = (self.rows if index[0].stop is None else index[0].stop) - self.first
                return x[start:stop]

            return jax.make_array_from_callback((self.rows, *x.shape[1:]), self.sharding, part)

        return {k: put(v) for k, v in local.items()}
