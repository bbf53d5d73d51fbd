"""One mesh for every model: replica x fsdp x tensor, and where each array lies on it.

Rows of a batch are split over replica and fsdp. A parameter is split over fsdp along ``d_model`` and
over tensor along heads, feed-forward channels or vocabulary (``AXES``; the axes are declared where the
parameter is made, in ``scaling.models``); optimizer state lies as its parameter does. XLA's partitioner
does the rest: it gathers a layer's weights where they are used and scatters their gradients (Rajbhandari
et al. 2020, stage 3; Shoeybi et al. 2019 for tensor). replica keeps whole copies, for slices that are joined
by a slower network.

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
from scaling.models.lm import param_axes

ROWS = ("replica", "fsdp")
AXES = {"d_model": "fsdp", "heads": "tensor", "kv_heads": "tensor", "ffn_dim": "tensor", "vocab": "tensor"}
"""Axis of a parameter, named as the config names its size, to the mesh axis that splits it."""


@dataclasses.dataclass(frozen=True)
class MeshShape:
    """Devices along each mesh axis.

    Attributes:
      replica: whole copies of the model. fsdp: parts that each copy is split into along ``d_model``.
      tensor: parts along heads and channels.

    Raises:
      ConfigError: a part below 1.
    """

    replica: int = 1
    fsdp: int = 1
    tensor: int = 1

    def __post_init__(self):
        for name, value in dataclasses.asdict(self).items():
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ConfigError(f"mesh.{name} is {value!r}; it must be a positive integer")

    @property
    def devices(self) -> int:
        """Devices in all."""
        return self.replica * self.fsdp * self.tensor

    @classmethod
    def parse(cls, text: str) -> MeshShape:
        """From ``"replica,fsdp,tensor"``, as the command line takes it.

        Raises:
          ConfigError: not three positive integers.
        """
        parts = text.split(",")
        if len(parts) != 3 or not all(p.strip().isdigit() for p in parts):
            raise ConfigError(f"mesh is {text!r}; it must be replica,fsdp,tensor such as 1,8,1")
        return cls(*map(int, parts))

    def __str__(self) -> str:
        return f"{self.replica},{self.fsdp},{self.tensor}"


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
            "must be their number"
        )
    slices = len({getattr(d, "slice_index", 0) for d in devices})
    if shape.replica % slices:
        raise ConfigError(f"mesh.replica is {shape.replica}; it must be a multiple of the {slices} slices")
    sizes = (shape.replica, shape.fsdp, shape.tensor)
    if devices[0].platform == "cpu":  # no network to follow: the same order in every process
        grid = np.array(devices).reshape(sizes)
    elif slices > 1:
        inside = (shape.replica // slices, shape.fsdp, shape.tensor)
        grid = mesh_utils.create_hybrid_device_mesh(inside, (slices, 1, 1), devices)
    else:
        grid = mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
    return Mesh(grid, (*ROWS, "tensor"), axis_types=(AxisType.Auto,) * 3)


def param_spec(axes: Sequence[str | None], size: Sequence[int], mesh: Mesh, model: Mapping) -> P:
    """How one parameter is split.

    Heads are split whole. An axis that the mesh does not divide is left whole on every device.

    Args:
      axes: names from ``scaling.models.lm.param_axes``. size: its shape. model: the cell's model section.
    """

    def part(axis, length):
        name = AXES.get(axis)
        if name is None:
            return None
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
    return NamedSharding(mesh, P(ROWS))


@dataclasses.dataclass(frozen=True)
class OnMesh:
    """``scaling.models.lm.Places`` on a mesh: said where XLA would guess wrong."""

    mesh: Mesh

    def rows(self, x):
        """[B, ...] split by rows."""
        return jax.lax.with_sharding_constraint(x, batch_sharding(self.mesh))

    def table(self, x):
        """[V, D] with whole rows to look up; the vocabulary over tensor where it divides."""
        part = "tensor" if x.shape[0] % self.mesh.shape["tensor"] == 0 else None
        return jax.lax.with_sharding_constraint(x, NamedSharding(self.mesh, P(part, None)))


def row_parts(mesh: Mesh | None) -> int:
    """Parts that the rows of a batch are split into; 1 without a mesh."""
    return 1 if mesh is None else math.prod(mesh.shape[name] for name in ROWS)


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
