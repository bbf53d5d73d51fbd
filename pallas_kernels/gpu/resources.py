"""Registers, spills and shared memory of Mosaic GPU kernels, from compiling them without a GPU.

Mosaic GPU writes what ptxas says to the folder that ``MOSAIC_GPU_DUMP_TO`` names. It compiles through
nvJitLink where that library is installed, as it is with JAX's wheels; a kernel that uses ``setmaxnreg`` gets
other figures from ptxas alone.
"""

import contextlib
import dataclasses
import os
import pathlib
import re
import tempfile
from collections.abc import Callable, Iterator

from pallas_kernels import aot


@dataclasses.dataclass(frozen=True)
class Resources:
    """Of one kernel.

    Attributes:
      name: of the kernel, as given to ``plgpu.kernel``.
      registers: of a thread.
      spill_stores, spill_loads: bytes of a thread that registers could not hold.
      shared_memory: bytes of a block that the kernel's scratch takes; barriers add a few.
      notes: what ptxas warns of, less the spills.
    """

    name: str
    registers: int
    spill_stores: int
    spill_loads: int
    shared_memory: int
    notes: tuple[str, ...] = ()


def kernel_resources(function: Callable, *shapes, target_config: str = "h100") -> list[Resources]:
    """Compiles ``function`` as ``aot.compile_gpu`` does; one entry per Mosaic kernel, as they come in it.

    Raises:
      RuntimeError: two kernels of one name, as ptxas reports by name; or no report.
    """
    with tempfile.TemporaryDirectory() as folder:
        with _environment({"MOSAIC_GPU_DUMP_TO": folder}):
            aot.compile_gpu(function, *shapes, target_config=target_config)
        asked = sorted(pathlib.Path(folder).glob("*.resources.txt"), key=_order)
        return [_parse(_name(path), path.read_text(), _report(folder, _name(path))) for path in asked]


@contextlib.contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _name(path: pathlib.Path) -> str:
    return path.name.split(".")[0].rsplit("_", 1)[0]


def _order(path: pathlib.Path) -> int:
    return int(path.name.split(".")[0].rsplit("_", 1)[1])


def _report(folder: str, name: str) -> str:
    """What ptxas wrote of the kernel; numbered by the order in which threads compiled, so by name alone."""
    reports = [path for path in pathlib.Path(folder).glob("*.ptxas") if _name(path) == name]
    if len(reports) != 1:
        raise RuntimeError(f"{len(reports)} kernels are called {name}; compile them one at a time")
    return reports[0].read_text(errors="replace")


def _parse(name: str, asked: str, report: str) -> Resources:
    spills = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", report)
    registers = re.search(r"Used (\d+) registers", report)
    shared = re.search(r"smem_scratch_bytes=(\d+)", asked)
    if not (spills and registers and shared):
        raise RuntimeError(f"no registers, spills or shared memory of {name} in {report[:500]!r}")
    notes = re.findall(r"ptxas (?:info|warning)\s*: (\(C\d+\).*)", report)
    return Resources(name, *(int(x) for x in (registers[1], spills[1], spills[2], shared[1])), tuple(notes))
