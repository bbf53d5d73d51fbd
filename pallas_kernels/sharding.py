"""Kernels on sharded arrays: each device computes its own part, whichever way the sharding is known.

XLA cannot split a kernel: left alone it gathers the whole array on every device. A kernel that works on
each batch row and head alone says so by a rule in einsum notation, and ``per_shard`` does the rest:

- under a mesh with explicit axes the types carry the sharding, and the kernel goes into ``shard_map``;
- within ``placed(mesh, ...)`` the caller has said it, and the kernel goes into ``shard_map`` too;
- otherwise the partitioner knows it later and asks then (``custom_partitioning`` with a Shardy rule), which
  the compilers for CPU and GPU do and that for TPU does not: on a TPU mesh, say it by ``placed``;
- inside the caller's own ``shard_map`` arrays are local already, and the kernel is called as it is (where
  that ``shard_map`` leaves automatic axes over, the kernel's arrays are gathered over those).
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import re
from collections.abc import Callable, Mapping, Sequence

import jax
from jax import custom_batching
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import AxisType, ManualAxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from pallas_kernels import dispatch

Factors = tuple[str, ...]  # of one axis, major first: ("k",) or ("k", "g")


@dataclasses.dataclass(frozen=True)
class _Placement:
    mesh: Mesh
    factors: tuple[tuple[str, tuple[str, ...]], ...]

    def of(self, sizes: Mapping[str, int], whole: Sequence[str]) -> dict[str, tuple[str, ...]]:
        """Mesh axes of the factors in ``sizes``, where they divide them."""
        parts = {name: math.prod(self.mesh.shape[a] for a in axes) for name, axes in self.factors}
        fit = {n for n, k in parts.items() if n in sizes and n not in whole and sizes[n] % k == 0}
        return {name: axes for name, axes in self.factors if name in fit}


# part of the keys of jit's caches, like the target of ``dispatch``
_placement = jax.make_user_context(None)


@contextlib.contextmanager
def placed(mesh: Mesh, **factors: str | tuple[str, ...]):
    """Within it kernels are split over ``mesh`` as said here, whatever their arguments' sharding.

    For a mesh with automatic axes whose compiler does not ask back how a kernel is split (TPU).

    Args:
      mesh: concrete, of automatic axes.
      **factors: mesh axes that split a factor of the kernels' rules: ``b`` are batch rows, ``k`` key and
        value heads. A factor that they do not divide is whole on every device, as is any not named.
    """
    axes = {name: (over,) if isinstance(over, str) else tuple(over) for name, over in factors.items()}
    with _placement(_Placement(mesh, tuple(axes.items()))):
        yield


def out_shape(shape: Sequence[int], dtype, *inputs) -> jax.ShapeDtypeStruct:
    """What ``pl.pallas_call(out_shape=...)`` takes, varying over the mesh axes that any input varies over.

    Without it a kernel inside the caller's ``shard_map`` is refused unless its checks are turned off.
    """
    varying = frozenset().union(*(jax.typeof(x).manual_axis_type.varying for x in inputs))
    return jax.ShapeDtypeStruct(tuple(shape), dtype, manual_axis_type=ManualAxisType(varying=varying))


def placed_like(gradient, primal):
    """Under explicit axes a gradient's sharding is part of its type, and must be that of its argument."""
    if AxisType.Explicit not in jax.sharding.get_abstract_mesh().axis_types:
        return gradient
    return jax.sharding.reshard(gradient, jax.typeof(primal).sharding.spec)


def per_shard(
    function: Callable, rule: str, *, whole: Sequence[str] = (), sums: Sequence[str] = (), **sizes: int
) -> Callable:
    """``function(*arrays) -> tuple of arrays``, computed by every device on its own part of the arrays.

    Works under jit, vmap and ``shard_map``; not differentiable (wrap it in a ``custom_vjp``).

    Args:
      function: pure, of positional arrays alone; called with local shapes. Returns a tuple.
      rule: one name per axis, such as ``"b t (k g) h, b s k h -> b t (k g) h"``; an axis in brackets has
        the named factors, major first, and may be split over the first.
      whole: names of axes that a device needs in full.
      sums: names of axes over which an output that lacks them is a sum: parts are added up.
      **sizes: size of each factor that stands in brackets.

    Returns:
      The function of the same arrays.
    """
    ins, outs = _parse(rule)

    @custom_batching.custom_vmap
    def call(*arrays):
        return _call(function, rule, ins, outs, tuple(whole), tuple(sums), sizes, arrays)

    @call.def_vmap
    def batched(axis_size, in_batched, *arrays):
        lead = _fresh_name(ins)
        mapped = jax.vmap(function, [0 if b else None for b in in_batched], axis_size=axis_size)
        new_ins = [f"{lead} {a}" if b else a for a, b in zip(_sides(rule)[0], in_batched, strict=True)]
        new_outs = [f"{lead} {a}" for a in _sides(rule)[1]]
        new_rule = f"{', '.join(new_ins)} -> {', '.join(new_outs)}"
        out = per_shard(mapped, new_rule, whole=whole, sums=sums, **sizes)(*arrays)
        return out, (True,) * len(out)

    return call


def per_shard_but_none(function: Callable, rule: str, arrays: Sequence, **options) -> Callable:
    """``per_shard`` of a function some of whose arguments may be None, by a rule that names all of them.

    Args:
      function: of as many positional arguments as the rule's left side has.
      arrays: those of the call, for which of them are None.
      **options: ``per_shard``'s.

    Returns:
      The function of the arrays that are not None, in order.
    """
    left, right = _sides(rule)
    present = [x is not None for x in arrays]

    def full(*given):
        given = iter(given)
        return function(*(next(given) if here else None for here in present))

    left = [axes for axes, here in zip(left, present, strict=True) if here]
    return per_shard(full, f"{', '.join(left)} -> {', '.join(right)}", **options)


def _call(function, rule, ins, outs, whole, sums, sizes, arrays):
    function = dispatch.as_now(function)  # the partitioner may trace it in a thread of its own
    mesh = jax.sharding.get_abstract_mesh()
    free = [a for a, kind in zip(mesh.axis_names, mesh.axis_types, strict=True) if kind != AxisType.Manual]
    if mesh.axis_names and not free:
        return function(*arrays)
    sizes = {**_sizes(ins, [x.shape for x in arrays]), **sizes}
    if _placement.value is not None:
        mesh, placed = _placement.value.mesh, _placement.value.of(sizes, whole)
        spec_in, spec_out = (tuple(_spec(axes, placed) for axes in side) for side in (ins, outs))
        local = _with_sums(function, outs, sums, placed)
        return jax.shard_map(local, mesh=mesh, in_specs=spec_in, out_specs=spec_out, check_vma=False)(*arrays)
    if len(free) < len(mesh.axis_names) or AxisType.Explicit in mesh.axis_types:
        # in a shard_map over some axes alone, what the partitioner does with the others is not to be had
        specs = [jax.typeof(x).sharding.spec for x in arrays]
        placed = _place(ins, specs, dict(mesh.shape), sizes, whole)
        local = _with_sums(function, outs, sums, placed)
        spec_in, spec_out = (tuple(_spec(axes, placed) for axes in side) for side in (ins, outs))
        if AxisType.Explicit in mesh.axis_types:
            arrays = [jax.sharding.reshard(x, s) for x, s in zip(arrays, spec_in, strict=True)]
        split = jax.shard_map(
            local, in_specs=spec_in, out_specs=spec_out, axis_names=set(free), check_vma=False
        )
        return split(*arrays)

    def partition(mesh, arg_shapes, result_shape):
        specs = [_spec_of(a.sharding) for a in arg_shapes]
        placed = _place(ins, specs, dict(mesh.shape), sizes, whole)
        shard_in, shard_out = (
            tuple(NamedSharding(mesh, _spec(axes, placed)) for axes in side) for side in (ins, outs)
        )
        return mesh, _with_sums(function, outs, sums, placed), shard_out, shard_in

    split = custom_partitioning(lambda *xs: function(*xs))
    rule = _without_ones(rule, sizes)
    axes = [axis for side in _parse(rule) for operand in side for axis in operand]
    names = dict.fromkeys(name for axis in axes for name in axis)
    alone = {axis[0] for axis in axes if len(axis) == 1}
    split.def_partition(
        partition=partition,
        sharding_rule=rule,
        need_replication_factors=tuple(n for n in names if n in whole),
        **{n: sizes[n] for n in names if n not in alone},
    )
    return jax.jit(split)(*arrays)  # outside jit the arrays' shardings would be lost


def _with_sums(function, outs, sums, placed):
    """The local function, with the parts of summed outputs added up over the devices that hold them."""
    if not any(placed.get(name) for name in sums):
        return function

    @functools.wraps(function)
    def summed(*arrays):
        results = []
        for x, axes in zip(function(*arrays), outs, strict=True):
            present = {f for axis in axes for f in axis}
            over = [a for name in sums if name not in present for a in placed.get(name, ())]
            results.append(jax.lax.psum(x, tuple(over)) if over else x)
        return tuple(results)

    return summed


def _place(ins, specs, mesh_shape: Mapping[str, int], sizes, whole) -> dict[str, tuple[str, ...]]:
    """Mesh axes of every factor: those of the first input that splits it, where they divide it."""
    placed: dict[str, tuple[str, ...]] = {}
    used: set[str] = set()
    for axes, spec in zip(ins, specs, strict=True):
        for axis, part in zip(axes, spec or (), strict=False):
            if part is None or part is P.UNCONSTRAINED or not axis:
                continue
            name, parts = axis[0], (part,) if isinstance(part, str) else tuple(part)
            fits = sizes[name] % math.prod(mesh_shape[p] for p in parts) == 0
            if name not in whole and name not in placed and fits and not used & set(parts):
                placed[name] = parts
                used |= set(parts)
    return placed


def _spec(axes: Sequence[Factors], placed) -> P:
    return P(*(placed.get(axis[0]) if axis else None for axis in axes))


def _spec_of(sharding):
    spec = getattr(sharding, "spec", None)
    if spec is None and not getattr(sharding, "is_fully_replicated", True):
        raise NotImplementedError(
            f"an input of a kernel has sharding {sharding}; kernels take NamedSharding (a mesh and a spec)"
        )
    return spec


def _sizes(ins, shapes) -> dict[str, int]:
    """Sizes of the factors that are an axis of their own."""
    return {
        axis[0]: n
        for axes, shape in zip(ins, shapes, strict=True)
        for axis, n in zip(axes, shape, strict=True)
        if len(axis) == 1
    }


def _without_ones(rule: str, sizes: Mapping[str, int]) -> str:
    """The rule with factors of size 1 left out of brackets, where Shardy refuses them."""

    def shorter(axis):
        names = axis[1].split()
        kept = [n for n in names if sizes[n] != 1] or names[:1]
        return kept[0] if len(kept) == 1 else f"({' '.join(kept)})"

    return re.sub(r"\(([^)]*)\)", shorter, rule)


def _sides(rule: str) -> tuple[list[str], list[str]]:
    left, right = rule.split("->")
    return [a.strip() for a in left.split(",")], [a.strip() for a in right.split(",")]


def _parse(rule: str) -> tuple[list[list[Factors]], list[list[Factors]]]:
    """Per operand and result its axes, each a tuple of factor names."""
    axis = re.compile(r"\(([^)]*)\)|(\S+)")
    sides = (
        [[tuple((m[1] or m[2]).split()) for m in axis.finditer(a)] for a in side] for side in _sides(rule)
    )
    ins, outs = sides
    return ins, outs


def _fresh_name(ins) -> str:
    taken = {f for axes in ins for axis in axes for f in axis}
    return next(f"v{i}" for i in range(len(taken) + 1) if f"v{i}" not in taken)
