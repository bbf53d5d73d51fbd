"""The code of docs/fitting.md runs as it stands."""

import re
from pathlib import Path

import pandas as pd
from fits_tables import planted_table

DOC = Path(__file__).parents[2] / "docs" / "fitting.md"


def test_the_page_runs(tmp_path, monkeypatch):
    pd.DataFrame(planted_table(noise=2e-3)).to_csv(tmp_path / "runs.csv", index=False)
    monkeypatch.chdir(tmp_path)
    names = {}
    for code in re.findall(r"```python\n(.*?)```", DOC.read_text(), re.S):
        exec(code, names)
    assert names["fit"].status == "converged"
    assert names["profile"].low < names["profile"].estimate < names["profile"].high
    assert names["answer"].N <= 3e9 and len(names["teach"].runs) == 3
    assert names["plan"].runs == 9
    for result in ("fit", "profile", "run", "answer", "teach", "forecast", "plan"):
        assert len(str(names[result])) > 40, result
    for result in ("profile", "run", "answer", "teach", "forecast", "plan"):
        assert "<" in names[result]._repr_html_(), result
