"""Compiling for a TPU or GPU that is not here: real compilers, no device.

TPU needs ``libtpu`` (the extra ``tpu``), GPU the CUDA plugin of JAX and ptxas (the extra ``aot-gpu``); both
run on a CPU machine. Set ``JAX_PLATFORMS=cpu`` so that JAX does not look for the device itself.
"""

from __future__ import annotations

import functools
import os
import pathlib
from collections.abc import Callable

import jax
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from pallas_kernels import dispatch

# The smallest slice of each generation that can be described.
TPU_SLICES = {
    "v4": "v4:2x2x1",
    "v5e": "v5e:2x2",
    "v5p": "v5p:2x2x1",
    "v6e": "v6e:2x2",
    "tpu7x": "tpu7x:2x2x1",
}


@functools.cache
def tpu_topology(name: str):
    """Topology of a TPU slice such as ``v5e:2x2``, or of the smallest one of a generation.

    Raises:
      RuntimeError: libtpu is not installed.
      ValueError: no such slice.
    """
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # no metadata server to ask off Google Cloud
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # no device is opened: processes may share it
    name = TPU_SLICES.get(name, name)
    # as on the machine, where both TensorCores of a v4 chip are one device
    options = {"chip_config_name": "megacore"} if name.startswith("v4:") else {}
    try:
        return topologies.get_topology_desc(platform="tpu", topology_name=name, **options)
    except RuntimeError as e:
        if "not installed" in str(e):
            raise RuntimeError("libtpu is not installed; pip install 'scaling[tpu]' brings it") from e
        raise ValueError(f"TPU slice {name!r} is not known; generations: {', '.join(TPU_SLICES)}") from e


def compile_tpu(function: Callable, *shapes, generation: str = "v5e", **jit_options):
    """``jax.jit(function)`` compiled for one chip of a TPU generation.

    Args:
      function: of positional arrays; kernels in it with ``implementation=None`` are the TPU's.
      *shapes: arrays or ``jax.ShapeDtypeStruct``, pytrees allowed.
      generation: v4, v5e, v5p, v6e or tpu7x.
      **jit_options: of ``jax.jit``, such as ``donate_argnums``.

    Returns:
      ``jax.stages.Compiled``: ``memory_analysis()`` and ``as_text()`` are to be relied upon;
      ``cost_analysis()`` is not, inside custom calls and loops.
    """
    with dispatch.target("tpu", generation):
        return _compile(function, shapes, tpu_topology(generation).devices[0], "tpu", jit_options)


# Descriptions of GPUs that come with the package, by file name.
GPU_TARGETS = pathlib.Path(__file__).parent / "gpu" / "targets"


@functools.cache
def gpu_topology(target_config: str = "h100"):
    """Topology of one GPU: a name such as ``h100``, or the text of XLA's ``GpuTargetConfigProto``.

    Raises:
      RuntimeError: JAX's CUDA plugin is not installed.
      ValueError: no such name.
    """
    if target_config.isidentifier():
        known = {path.stem: path for path in sorted(GPU_TARGETS.glob("*.txtpb"))}
        if target_config not in known:
            raise ValueError(f"GPU {target_config!r} is not known; GPUs: {', '.join(known)}")
        target_config = known[target_config].read_text()
    try:
        return topologies.get_topology_desc(
            platform="cuda", topology_name="", target_config=target_config, topology="1x1x1"
        )
    except NotImplementedError as e:  # where no plugin has registered the platform
        raise RuntimeError(
            "JAX's CUDA plugin is not installed, or JAX_PLATFORMS is not set to cpu on a machine without a "
            "GPU; pip install 'scaling[aot-gpu]' brings the plugin"
        ) from e


def compile_gpu(function: Callable, *shapes, target_config: str = "h100"):
    """``jax.jit(function)`` compiled for the GPU that ``target_config`` names or describes.

    Arguments and result as of ``compile_tpu``; by a Hopper GPU's name, None means its kernels.
    """
    with dispatch.target("cuda", target_config if target_config in dispatch.HOPPER else None):
        return _compile(function, shapes, gpu_topology(target_config).devices[0], "cuda")


def _compile(function, shapes, device, platform, jit_options=None):
    def place(x):
        mesh = Mesh([device], ("device",))
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, P()))

    placed = jax.tree.map(place, shapes)
    traced = jax.jit(function, **(jit_options or {})).trace(*placed)
    return traced.lower(lowering_platforms=(platform,)).compile()
