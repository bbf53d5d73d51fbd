"""The package's names: functions, found lazily, and costs without JAX."""

import re
import subprocess
import sys
import types
from pathlib import Path

import pallas_kernels


def test_every_name_is_a_function_whatever_was_imported_before():
    import pallas_kernels.ssd  # the file of the same name

    for name in pallas_kernels.__all__:
        found = getattr(pallas_kernels, name)
        assert callable(found) and not isinstance(found, types.ModuleType), name
        assert found.__doc__ and "Args:" in found.__doc__ and "Raises:" in found.__doc__, name
    assert set(pallas_kernels.__all__) <= set(dir(pallas_kernels))


def test_an_unknown_name_is_an_attribute_error():
    try:
        pallas_kernels.flash  # noqa: B018
    except AttributeError as error:
        assert "flash" in str(error)
    else:
        raise AssertionError("flash was found")


def test_costs_need_no_jax():
    folder = Path(pallas_kernels.__file__).parent / "cost"
    names = sorted(p.stem for p in folder.glob("*.py") if p.stem != "__init__")
    assert names
    imports = "; ".join(f"import pallas_kernels.cost.{n}" for n in names)
    code = f"{imports}; import sys; assert 'jax' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=folder.parents[1])


def test_the_page_on_kernels_runs_and_lists_every_function():
    page = (Path(__file__).parents[2] / "docs" / "kernels.md").read_text()
    names = {}
    for code in re.findall(r"```python\n(.*?)```", page, re.S):
        exec(code, names)
    assert names["out"].shape == names["q"].shape and names["lse"].shape == (2, 64, 4)
    listed = set(re.findall(r"^\| `(\w+)` \|", page, re.M))
    assert listed == set(pallas_kernels.__all__)
