"""The kept results of benchmarks/graph_complexity.py: floors hold, and the pages say what was measured."""

import json
from pathlib import Path

import pytest
from benchmark_script import load_script

from scaling.config import validate_section
from scaling.data.synthetic import make_source
from scaling.study import load_study

ROOT = Path(__file__).parents[2]
CONFIG = ROOT / "experiments" / "theory" / "graphs.py"
RESULTS = ROOT / "benchmarks" / "results" / "graph_complexity"


@pytest.fixture(scope="module")
def measured():
    return json.loads(RESULTS.with_suffix(".json").read_text())


def test_every_fitted_floor_holds_the_entropy_rate_of_its_graph(measured):
    assert len(measured) >= 3
    for got in measured:
        study = load_study(CONFIG, [f"data.degree={got['degree']}"])
        chain = make_source(validate_section("data", study["data"]))
        assert got["entropy_rate"] == pytest.approx(chain.conditional_entropies()[-1], rel=1e-12)
        assert got["edges"] == chain.facts["edges"]
        low, high = got["E"][1]
        assert low <= got["entropy_rate"] <= high and low <= got["E"][0] <= high


def test_the_pages_have_the_measured_figures(measured):
    script = load_script("graph_complexity")
    table, page = RESULTS.with_suffix(".md").read_text(), (ROOT / "docs" / "theory.md").read_text()
    for got in measured:
        row = script.row(got)
        assert row in table
        cells = [c.strip() for c in row.strip("|").split("|")]
        assert f"| {cells[0]} | {cells[2]} | " + " | ".join(cells[4:8]) + " |" in page
