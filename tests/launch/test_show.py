"""What a person sees: numbers with suffixes, tables that fit the terminal, nothing cut in half."""

import io

import pytest
from rich.console import Console
from tiny_study import FACTS

from launch import show
from scaling.grid import plan
from scaling.study import validate_study


@pytest.mark.parametrize(
    ("x", "text"),
    [(None, "-"), (7, "7"), (999.4, "999"), (1000, "1k"), (12345, "12.3k"), (999_999, "1M"), (6.7e9, "6.7B")],
)
def test_si(x, text):
    assert show.si(x) == text


@pytest.mark.parametrize("width", [80, 100, 140])
def test_plan_fits_the_terminal(study_config, tmp_path, width):
    manifest = plan(validate_study(study_config), FACTS)
    out = io.StringIO()
    show.plan(Console(file=out, width=width), manifest, None, tmp_path, "new")
    table = out.getvalue().split("data:")[0]
    assert "…" not in table and max(map(len, table.splitlines())) <= width
    assert ("left out at this width" in table) == (width < 140)
    for cell in manifest["cells"]:
        assert f"{cell['achieved']['ratio']:.3g}" in table
        assert cell["id"][:8] in table or width == 80


def test_messages_with_brackets_are_printed_whole(study_config, tmp_path):
    manifest = plan(validate_study(study_config), FACTS)
    manifest["dropped"] = [{"target": {"params": 1.0, "flops": 1.0}, "reason": "must be [low, high]"}]
    out = io.StringIO()
    show.plan(Console(file=out, width=200), manifest, None, tmp_path, "new")
    assert "must be [low, high]" in out.getvalue()
