"""The report against the fit file, the run table and a planted study; nothing is trained."""

import html.parser
import json
import math
import re

import numpy as np
import pandas as pd
import pytest
from matplotlib.image import imread

import fits
from fits.report import write_report
from scaling.files import CellFolder, write_json, write_whole
from scaling.grid import plan, write_manifest
from scaling.records import collect
from scaling.study import validate_study

PLANTED = {"E": 0.8, "A": 30.0, "B": 90.0, "alpha": 0.34, "beta": 0.36}
UNITS = {"": 1.0, "k": 1e3, "M": 1e6, "B": 1e9, "T": 1e12}


def planted_loss(N, D):
    p = PLANTED
    return p["E"] + p["A"] / N ** p["alpha"] + p["B"] / D ** p["beta"]


def foreign_table(seed=0) -> pd.DataFrame:
    """Twenty-four runs on a grid of sizes and tokens, with a kept column and one broken loss."""
    rng = np.random.default_rng(seed)
    N, D = (a.ravel() for a in np.meshgrid(np.geomspace(1e4, 1e6, 6), np.geomspace(2e5, 5e7, 4)))
    loss = planted_loss(N, D) * np.exp(rng.normal(0, 2e-3, N.size))
    loss[5] = np.nan
    return pd.DataFrame(
        {"params": N, "tokens": D, "flops": 6 * N * D, "loss": loss, "kept": [0, 1, *[1] * (N.size - 2)]}
    )


STUDY = {
    "name": "planted",
    "grid": {
        "kind": "isoflop",
        "budgets": [3e10, 1.2e11, 4.8e11],
        "params": [7e3, 14e3, 20e3, 40e3, 67e3, 115e3, 2e6],
        "min_steps": 50,
    },
    "model": {"head_dim": 16},
    "data": {"source": "stdlib", "seq": 128},
    "recipe": {
        "params": 33e3, "tokens": 2.0e6, "lr": 1e-2, "batch_tokens": 2048, "width_per_layer": 32.0,
        "width_multiple": 16, "ffn_multiple": 8,
    },
}  # fmt: skip
DATA = {"fingerprint": "abc123", "vocab": 256, "unique_tokens": 2.5e8, "heldout_tokens": 10**6,
        "bytes_per_token": 1.0}  # fmt: skip


def make_study(folder, losses=True) -> pd.DataFrame:
    """A study folder whose losses follow the planted law; one cell diverged, one never ran."""
    manifest = plan(validate_study(STUDY), DATA)
    write_manifest(folder, manifest)
    rng = np.random.default_rng(1)
    for i, entry in enumerate(manifest["cells"] if losses else []):
        cell = CellFolder(folder, entry["id"])
        steps, got = entry["config"]["train"]["steps"], entry["achieved"]
        if i == 3:
            continue
        diverged = i == 7
        loss = float(planted_loss(got["params_total"], got["tokens"]) * math.exp(rng.normal(0, 1e-3)))
        score = {"step": steps, "tokens": got["tokens"], "loss": loss, "loss_stderr": 0.01,
                 "bits_per_byte": loss / math.log(2)}  # fmt: skip
        write_json(
            cell.result,
            {"cell": entry["id"], "status": "diverged" if diverged else "finished",
             "reason": "the training loss was nan at step 9" if diverged else None,
             "loss": None if diverged else loss, "steps": steps, "tokens": got["tokens"],
             "unique_tokens": 1000, "epochs": 0.5, "flops": got["flops"],
             "evals": [] if diverged else [score], "data": "abc123",
             "device_kind": "cpu", "devices": 1, "versions": {}},
        )  # fmt: skip
        write_json(cell.timing, {"wall_seconds": 3.5, "device_seconds": 3.5, "mfu": None, "peak_bytes": None})
        lines = [
            {"step": s, "tokens": s * got["tokens"] // steps, "loss": loss * (1 + 1 / s),
             "grad_norm": 1.0, "lr": 0.01}
            for s in range(1, steps + 1, max(1, steps // 20))
        ]  # fmt: skip
        write_whole(cell.metrics, "".join(json.dumps(line) + "\n" for line in lines))
    return collect(folder)


class Page(html.parser.HTMLParser):
    """The page taken apart: text and ``<data>`` by section, ids, links, and whether tags balance."""

    VOID = ("meta", "br", "link", "img", "input", "hr")

    def __init__(self, path):
        super().__init__()
        self.source = path.read_text(encoding="utf-8")
        self.open, self.sections, self.numbers, self.ids, self.links = [], {}, [], [], []
        self.tags, self.section, self.value = set(), None, None
        self.feed(self.source)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.tags.add(tag)
        if tag not in self.VOID:
            self.open.append(tag)
        if tag == "section":
            self.section = attrs["id"]
            self.sections[self.section] = ""
        if tag == "data":
            self.value = float(attrs["value"])
        self.ids += [attrs["id"]] if "id" in attrs else []
        self.links += [
            v for k, v in attrs.items() if k in ("href", "src", "xlink:href", "srcset", "data", "poster")
        ]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag
        if tag == "section":
            self.section = None

    def handle_data(self, text):
        if self.value is not None:
            self.numbers.append((self.section, self.value, text))
            self.value = None
        if self.section and not {"style", "script"} & set(self.open):
            self.sections[self.section] += " " + " ".join(text.split())

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.open.pop()


def parse_printed(text: str) -> tuple[float, float]:
    """A printed number and half a unit of its last digit."""
    match = re.fullmatch(r"(-?[\d,]+)(?:\.(\d+))?(?:e([+-]?\d+))?([kMBT]?)( %)?", text)
    assert match, text
    whole, decimals, power, unit, percent = match.groups()
    scale = 10.0 ** int(power or 0) * UNITS[unit] * (0.01 if percent else 1.0)
    value = float(whole.replace(",", "") + "." + (decimals or "0"))
    return value * scale, 0.5 * 10.0 ** -len(decimals or "") * scale


def assert_self_contained(page: Page):
    inside = [link for link in page.links if link.startswith("#")]
    # colour bars are small pictures written into the page itself
    assert all(link.startswith("data:image/png;base64,") for link in page.links if link not in inside)
    assert {link[1:] for link in inside} <= set(page.ids)
    assert len(page.ids) == len(set(page.ids))
    # scripts are in the page (a src would be among the links) and have no way to fetch
    assert not page.tags & {"link", "iframe", "object", "embed", "img"}
    assert not re.search(r"fetch\(|XMLHttpRequest|WebSocket|sendBeacon|import\(|eval\(", page.source)
    assert not re.search(r"@import|url\((?!#)", page.source)
    # the only addresses are the names of the SVG vocabularies, which nothing loads
    addresses = set(re.findall(r"https?://[^\s\"'<>)]+", page.source))
    assert addresses <= {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}


def assert_printed_numbers(page: Page):
    """Every printed number is its own full value, to its last printed digit."""
    assert len(page.numbers) > 20
    for _, value, text in page.numbers:
        printed, half = parse_printed(text)
        assert abs(printed - value) <= half * (1 + 1e-9) + 1e-12 * abs(value), (value, text)


def assert_pictures(folder, names):
    assert sorted(p.stem for p in folder.glob("*.png")) == sorted(names)
    for path in folder.glob("*.png"):
        pixels = imread(path)[..., :3]
        assert min(pixels.shape[:2]) > 200
        assert np.mean(np.any(pixels < 0.95, axis=-1)) > 0.005  # there is something to see
        frame = np.concatenate(
            [pixels[:2].ravel(), pixels[-2:].ravel(), pixels[:, :2].ravel(), pixels[:, -2:].ravel()]
        )
        assert np.all(frame == 1.0), f"{path.name} is cut off at its edge"


@pytest.fixture(scope="module")
def foreign(tmp_path_factory):
    """A table from elsewhere, its fit file and its report."""
    folder = tmp_path_factory.mktemp("foreign")
    table = foreign_table()
    fit = fits.fit_table(table, bootstraps=100, source="runs <b>of</b> others.csv")
    fits.write_fit(fit, folder / "fit.json")
    answer = fits.allocate(fit, 1e16, shape=lambda N: {"params": round(N, -3), "layers": 4})
    compared = fits.approaches(table, fit=fit, bootstraps=20)
    out = write_report(
        None, folder / "fit.json", allocation=answer, approaches=compared,
        out=folder / "report.html", commands=["scaling fit runs.csv"],
    )  # fmt: skip
    return folder, Page(out), json.loads((folder / "fit.json").read_text()), answer


def test_page_is_self_contained_and_consistent(foreign):
    folder, page, _, _ = foreign
    assert_self_contained(page)
    assert_printed_numbers(page)
    assert_pictures(folder / "report.plots", re.findall(r'id="figure-(\w+)"', page.source))


def test_answer_and_warnings_come_first(foreign):
    _, page, stored, answer = foreign
    assert next(iter(page.sections)) == "answer"
    first = page.sections["answer"]
    assert first.index("train") < first.index("Status: converged")
    assert stored["flags"] and all(flag["text"][1:] in first for flag in stored["flags"])
    assert "2 of 24 rows are not in the fit" in first
    assert answer.extrapolation["text"] in first
    printed = [value for section, value, _ in page.numbers if section == "answer"]
    ends = [end for name in ("N", "D", "loss") for end in answer.intervals[name]["95"]]
    assert printed == [answer.budget, answer.N, answer.D, answer.tokens_per_param, answer.loss, *ends]


def test_law_prints_the_fit_file(foreign):
    _, page, stored, _ = foreign
    printed = [value for section, value, _ in page.numbers if section == "law"]
    wanted = []
    for got in stored["intervals"].values():
        sd = [got["sd"]] if got["sd"] <= abs(got["estimate"]) else []  # a tail's is said in words
        wanted += [got["estimate"], *sd, *got["80"], *got["95"]]
    assert printed == wanted
    assert "Student&#39;s t for few clusters" in page.sections["law"] or "Student's t" in page.sections["law"]
    assert stored["law"]["formula"] in page.sections["law"]


def test_allocation_prints_the_allocation(foreign):
    _, page, _, answer = foreign
    printed = [value for section, value, _ in page.numbers if section == "allocation"]
    wanted = [answer.budget]
    for name in ("N", "D", "tokens_per_param", "loss"):
        wanted += [getattr(answer, name), *answer.intervals[name]["80"], *answer.intervals[name]["95"]]
    low, high = zip(answer.band["N"], answer.band["D"], strict=True)
    wanted += [
        *low,
        *high,
        answer.band["within"],
        *(answer.buildable[k] for k in ("N", "D", "loss", "extra_compute")),
        *(answer.policy[k] for k in ("tokens_per_param", "N", "D", "loss", "extra_compute")),
    ]
    assert printed == wanted
    assert "layers 4" in page.sections["allocation"]


def test_every_excluded_and_flagged_row_is_listed(foreign):
    _, page, stored, _ = foreign
    text = page.sections["rows"]
    excluded = [r for r in stored["rows"] if r["outcome"] == "excluded"]
    assert [r["row"] for r in excluded] == [0, 5]
    assert "Not in the fit (2)" in text and "kept = 0" in text and "loss is nan" in text
    flagged = [r for r in stored["rows"] if r["outcome"] == "used" and r["flags"]]
    assert f"flagged ({len(flagged)})" in text
    assert all(flag in text for r in flagged for flag in r["flags"])


def test_text_from_outside_is_escaped(foreign):
    _, page, _, _ = foreign
    assert "runs &lt;b&gt;of&lt;/b&gt; others.csv" in page.source
    assert "<b>of</b>" not in page.source


def test_checklist_says_how(foreign):
    _, page, stored, _ = foreign
    text = page.sections["checklist"]
    for said in (stored["data"]["hash"], stored["method"]["optimiser"], stored["method"]["initialisation"],
                 stored["method"]["compute"], "scaling fit runs.csv", "numpy " + stored["versions"]["numpy"],
                 "huber, delta 0.001 on log loss", "seed 0"):  # fmt: skip
        assert said in text
    assert stored["objective"] in [value for section, value, _ in page.numbers if section == "checklist"]


@pytest.mark.slow
def test_same_inputs_same_bytes(foreign, tmp_path):
    folder, page, _, answer = foreign
    table = foreign_table()
    fit = fits.read_fit(folder / "fit.json")
    compared = fits.approaches(table, fit=fit, bootstraps=20).to_dict()
    out = write_report(
        None, fit, allocation=[answer.to_dict()], approaches=compared,
        out=tmp_path / "again.html", commands=["scaling fit runs.csv"],
    )  # fmt: skip
    assert out.read_bytes() == page.source.encode()
    pictures = list((folder / "report.plots").glob("*.png"))
    assert pictures
    for path in pictures:
        assert (tmp_path / "again.plots" / path.name).read_bytes() == path.read_bytes()


def test_not_identified_fit_gives_no_answer(tmp_path):
    table = foreign_table()
    table = table[table["params"] == table["params"].iloc[1]].assign(kept=1)
    more = pd.concat(
        [table.assign(tokens=table["tokens"] * k, loss=table["loss"] * (1 - 0.01 * k)) for k in (1, 2, 3)]
    )
    fit = fits.fit_table(more, bootstraps=50)
    assert fit.status == "not identified"
    (tmp_path / "p").mkdir()
    for name in ("surface.png", "mine.png"):
        (tmp_path / "p" / name).write_bytes(b"of an earlier fit")
    page = Page(write_report(None, fit, out=tmp_path / "r.html", plots_dir=tmp_path / "p"))
    assert_self_contained(page)
    first = page.sections["answer"]
    assert "There is no answer" in first and "No value below is an estimate" in first
    assert all(reason[1:] in first for reason in fit.reasons)
    assert "They are not estimates" in page.sections["law"] and "estimate " not in page.sections["law"]
    assert "allocation" not in page.sections
    assert [p.name for p in (tmp_path / "p").iterdir()] == ["mine.png"]


@pytest.mark.slow
def test_interval_without_width_is_doubted(foreign, tmp_path):
    folder, _, _, answer = foreign
    stuck = answer.to_dict()
    stuck["intervals"] = {**stuck["intervals"], "N": {**stuck["intervals"]["N"], "95": [answer.N, answer.N]}}
    page = Page(write_report(None, folder / "fit.json", allocation=stuck, out=tmp_path / "r.html"))
    assert "has next to no width" in page.sections["answer"]
    healthy = Page(folder / "report.html")
    assert "has next to no width" not in healthy.source


def test_scattered_budgets_show_only_curves(tmp_path):
    rng = np.random.default_rng(3)
    N, C = np.geomspace(1e4, 3e5, 8), np.repeat([3e10, 1.2e11, 4.8e11], 8)
    N = np.tile(N, 3)
    lone = np.geomspace(1e9, 1e10, 9)
    N, C = np.concatenate([N, np.full(9, 5e4)]), np.concatenate([C, lone])
    D = C / (6 * N)
    table = pd.DataFrame(
        {"params": N, "tokens": D, "loss": planted_loss(N, D) * np.exp(rng.normal(0, 1e-3, N.size))}
    )
    fit = fits.fit_table(table, bootstraps=30)
    compared = fits.approaches(table, fit=fit, bootstraps=20)
    page = Page(write_report(None, fit, approaches=compared, out=tmp_path / "r.html"))
    text = page.sections["isoflop"]
    assert text.count("interior minimum") == 3
    assert "9 more groups of nearly equal compute" in text


def test_law_in_one_variable(tmp_path):
    D = np.geomspace(1e6, 1e9, 12)
    table = {"params": np.full(12, 1e5), "tokens": D, "loss": 1.0 + 40 * D**-0.3}
    fit = fits.fit_table(table, "power_D", bootstraps=30)
    page = Page(write_report(None, fit, out=tmp_path / "r.html"))
    assert "does not trade N against D" in page.sections["answer"]
    assert "gives no optimal N and D" in page.sections["frontier"]
    assert_pictures(tmp_path / "r.plots", ["residuals", "forecasts"])


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """A study folder, its fit and its report."""
    folder = tmp_path_factory.mktemp("study")
    table = make_study(folder)
    fit = fits.fit_table(table, bootstraps=100, source="planted")
    fits.write_fit(fit, folder / "fits" / "chinchilla.json")
    compared = fits.approaches(table, fit=fit, bootstraps=20)
    out = write_report(
        folder, folder / "fits" / "chinchilla.json", allocation=fits.allocate(fit, 1e13), approaches=compared,
        out=folder / "report.html",
    )  # fmt: skip
    return folder, Page(out), table, fit, compared


def test_study_report(study):
    folder, page, table, fit, _ = study
    assert_self_contained(page)
    assert_printed_numbers(page)
    names = re.findall(r'id="figure-(\w+)"', page.source)
    assert {"isoflop", "surface", "frontier", "loss_curves", "residuals"} <= set(names)
    assert_pictures(folder / "plots", names)
    first = page.sections["answer"]
    assert f"Of {len(table)} cells of the study, 1 diverged" in first
    assert f"Of {len(table)} cells of the study, 1 did not run yet" in first
    assert "fit it again" not in page.source
    assert fit.data["hash"] in page.sections["checklist"]


def test_study_rows_and_dropped_cells_have_reasons(study):
    folder, page, table, _, _ = study
    text = page.sections["rows"]
    for cell in table["cell"][table["status"] != "finished"]:
        assert cell in text
    assert "status is diverged, not finished" in text and "status is planned, not finished" in text
    dropped = json.loads((folder / "manifest.json").read_text())["dropped"]
    assert dropped and all(d["reason"] in text for d in dropped)
    assert f"never planned ({len(dropped)})" in text


def test_study_run_table(study):
    folder, page, table, _, _ = study
    text = page.sections["runs"]
    assert all(cell in text for cell in table["cell"])
    assert "the training loss was nan at step 9" in text
    printed = [value for section, value, _ in page.numbers if section == "runs"]
    for column in ("loss", "flops", "tokens", "params", "bits_per_byte"):
        assert set(table[column].dropna()) <= set(printed)
    assert "fingerprint = abc123" in text and "path = none" in text
    rates = [e["config"]["optim"]["lr"] for e in json.loads((folder / "manifest.json").read_text())["cells"]]
    assert min(rates) in printed and max(rates) in printed


def test_study_conventions(study):
    _, page, table, _, compared = study
    printed = [value for section, value, _ in page.numbers if section == "conventions"]
    done = table[table["status"] == "finished"]
    for column in ("flops", "flops_full", "flops_6N_total", "flops_6N_nonembedding", "flops_kaplan"):
        for _, group in done.groupby("params_total"):
            per_token = float(group[column].iloc[0] / group["tokens"].iloc[0])
            assert any(math.isclose(per_token, v, rel_tol=1e-12) for v in printed)
    assert set(done["params_nonembedding"]) <= set(printed)
    for row in compared.to_dict()["conventions"]:
        assert row["a"] in printed and row["approach_2_a"] in printed
        assert row["convention"] in page.sections["conventions"]


def test_isoflop_section_names_every_budget(study):
    _, page, _, _, compared = study
    points = compared.to_dict()["approaches"]["2"]["points"]
    assert len(points) == 3
    printed = [value for section, value, _ in page.numbers if section == "isoflop"]
    for p in points:
        assert p["budget"] in printed
        assert (p["N"] in printed) if p["accepted"] else (p["reason"] in page.sections["isoflop"])


def test_stale_fit_is_said_first(study, tmp_path):
    folder, _, table, fit, _ = study
    cell = CellFolder(folder, table["cell"][0])
    before = cell.result.read_text()
    changed = json.loads(before)
    changed["evals"][-1]["loss"] += 0.25
    try:
        cell.result.write_text(json.dumps(changed))
        page = Page(write_report(folder, fit, out=tmp_path / "r.html", plots_dir=tmp_path / "p"))
    finally:
        cell.result.write_text(before)
    assert "run table has changed since the fit: fit it again" in page.sections["answer"]


@pytest.mark.slow
def test_unwritable_place_is_one_sentence(foreign, tmp_path):
    folder, _, _, _ = foreign
    (tmp_path / "file").write_text("")
    with pytest.raises(fits.FitError, match="cannot be written") as caught:
        write_report(
            None, folder / "fit.json", out=tmp_path / "file" / "report.html", plots_dir=tmp_path / "p"
        )
    assert str(tmp_path / "file") in str(caught.value) and "\n" not in str(caught.value)
