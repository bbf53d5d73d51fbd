"""Who may import whom: the floors of the house, and light imports where they are promised."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
HEAVY = {"flax", "optax", "orbax"}
LIGHT = {"scaling.records", "scaling.flops", "scaling.chips"}


def imports_of(path):
    """Every module imported anywhere in a file, as written."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (a.name for a in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            # "from scaling import data" imports scaling.data
            yield node.module
            yield from (f"{node.module}.{a.name}" for a in node.names)


def files_of(folder):
    found = sorted((ROOT / folder).rglob("*.py"))
    assert found, f"{folder} has no Python files"
    return found


OURS = ("scaling", "fits", "launch", "experiments", "pallas_kernels")
ALLOWED = {
    "pallas_kernels": {"pallas_kernels"},
    "scaling": {"scaling", "pallas_kernels"},
    "fits": {"fits", "scaling"},
    "experiments": {"scaling", "fits", "experiments"},
    "launch": set(OURS),
}


@pytest.mark.parametrize("folder", OURS)
def test_floors(folder):
    for path in files_of(folder):
        for name in imports_of(path):
            top = name.split(".")[0]
            if top in OURS:
                assert top in ALLOWED[folder], f"{path.relative_to(ROOT)} imports {name}"


def test_kernels_import_jax_alone():
    standard = set(sys.stdlib_module_names)
    for path in files_of("pallas_kernels"):
        for name in imports_of(path):
            top = name.split(".")[0]
            assert top in standard | {"jax", "pallas_kernels"}, f"{path.relative_to(ROOT)} imports {name}"


def test_fits_imports_of_scaling():
    for path in files_of("fits"):
        for name in imports_of(path):
            assert name.split(".")[0] not in HEAVY | {"pallas_kernels"}, f"{path} imports {name}"
            if name.split(".")[0] == "scaling" and name != "scaling":
                module = ".".join(name.split(".")[:2])
                assert module in LIGHT, f"{path.relative_to(ROOT)} imports {name}"


@pytest.mark.parametrize(
    ("statement", "absent"),
    [
        ("import fits", {"flax", "optax", "orbax", "jax", "matplotlib"}),
        ("import scaling", {"jax", "numpy"}),
        ("import scaling.flops", {"jax", "flax"}),
        ("import scaling.records", {"jax", "flax", "pandas"}),
        ("import scaling.train", {"pandas"}),
        ("import launch.cli, launch.show_status", {"jax", "pandas"}),
    ],
)
def test_light_imports(statement, absent):
    code = f"{statement}; import sys; print(sorted({absent!r} & set(sys.modules)))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert out.stdout.strip() == "[]"
