"""The pages of docs/laws: each names its laws, shows a picture that the script draws; its command runs."""

import re
import runpy
import shlex
from pathlib import Path

import pytest
from click.testing import CliRunner

from fits.laws import LAWS
from launch.cli import cli

FOLDER = Path(__file__).parents[2] / "docs" / "laws"
PAGES = sorted(p.stem for p in FOLDER.glob("*.md"))
PICTURES = runpy.run_path(str(FOLDER / "pictures.py"))["PICTURES"]


def test_every_page_has_its_picture_and_stands_in_the_list():
    assert set(PAGES) == set(PICTURES) == {p.stem for p in FOLDER.glob("*.png")}
    linked = re.findall(r"\(laws/(\w+)\.md\)", (FOLDER.parent / "laws.md").read_text())
    assert sorted(set(linked)) == PAGES


@pytest.mark.parametrize("page", PAGES)
def test_a_page_holds(page):
    text = (FOLDER / f"{page}.md").read_text()
    assert (
        re.search(rf"!\[[^]]+\]\({page}\.png\)", text) and "**Source.**" in text and "**Question.**" in text
    )
    assert any(f"`{name}`" in text for name in LAWS)
    # a formula stands alone, indented, before the picture
    assert re.search(r"^    .*[A-Za-z0-9)}] [/+^*x-] ", text.partition("![")[0], re.M)
    commands = re.findall(r"^(scaling .*)$", text, re.M)
    [tried] = re.findall(r"\*\*Try it\.\*\*\n\n```\n(.*?)\n```", text, re.S)
    assert tried in commands
    done = CliRunner().invoke(cli, shlex.split(tried)[1:], standalone_mode=False, catch_exceptions=False)
    assert done.return_value in (0, None) and len(done.output) > 100, done.output
    axes = PICTURES[page]().axes
    drawn = [len(ax.lines) + len(ax.collections) + len(ax.images) + len(ax.patches) for ax in axes]
    assert axes and min(drawn) > 0 and all(ax.get_xlabel() for ax in axes)
