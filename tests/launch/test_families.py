"""`scaling families`: tuned alike, trained, fitted and compared; a second call does nothing."""

import json
from pathlib import Path

import numpy as np
import pytest
from test_cli import called, refused
from tiny_study import tiny_study

from launch.families import judged, load, study_of
from launch.family_costs import ByTheToken
from launch.show_families import told
from scaling.flops import ledger
from scaling.layers import FAMILIES
from scaling.recipe import recipe_from_config, round4, shape
from scaling.records import read_manifest


def comparison(corpus, **changes) -> dict:
    study = tiny_study(corpus, budgets=(1e8, 2.5e8), params=(3e3, 5e3, 8e3), batch_tokens=64)
    study["grid"] |= {"tolerance": 0.2}
    families = {"transformer": {}, "recurrent": {"model": {"family": "min_gru"}}}
    tune = {"params": 5e3, "tokens": 6e3, "lr": [0.5, 1.0, 2.0]}
    shared = {"name": "both", "study": study, "families": families, "reference": "transformer", "tune": tune}
    return {**shared, **changes}


@pytest.mark.slow
def test_from_nothing_to_a_page_and_nothing_twice(corpus, tmp_path):
    (tmp_path / "both.json").write_text(json.dumps(comparison(corpus)))
    called("families", "both.json", cwd=tmp_path)
    folder = tmp_path / "studies" / "both"
    result = json.loads((folder / "comparison.json").read_text())
    assert result["reference"] == "transformer" and list(result["families"]) == ["transformer", "recurrent"]
    for name, own in result["families"].items():
        # the same bracket for each; the grid is trained at the best of it
        assert own["tuned"]["multiples"] == [0.5, 1.0, 2.0] and len(own["tuned"]["losses"]) == 3
        config = read_manifest(folder / name)["config"]
        assert config["recipe"]["lr"] == round4(1e-2 * own["tuned"]["best"])
        assert own["runs"] == 6 and own["params"] > 0
    recurrent, dense = result["families"]["recurrent"], result["families"]["transformer"]
    assert dense["state_bytes"] == 0 < recurrent["state_bytes"] == recurrent["decode_bytes"]
    assert dense["decode_bytes"] > recurrent["decode_bytes"]
    assert {(m["axis"], m["family"]) for m in result["multipliers"]} == {
        (axis, "recurrent") for axis in ("flops", "seconds", "roofline")
    }
    # six runs tell little: a multiplier with its interval, or a sentence on why there is none
    assert all(len(m.get("budgets", [])) == 3 or m["why_not"] for m in result["multipliers"])
    page = (folder / "comparison.html").read_text()
    assert page.count("<svg") == 3 and "http" not in page.replace("http://www.w3.org", "")
    assert "| transformer |" in (folder / "comparison.md").read_text()
    trained = {p: p.stat().st_mtime_ns for p in folder.rglob("result.json")}
    assert len(trained) == 2 * (6 + 3)
    said = called("families", "both.json", cwd=tmp_path)
    assert said.count("nothing to do") == 4
    assert {p: p.stat().st_mtime_ns for p in folder.rglob("result.json")} == trained


def test_bad_comparisons_end_in_one_sentence(corpus, tmp_path):
    def said(**changes):
        (tmp_path / "c.json").write_text(json.dumps(comparison(corpus, **changes)))
        return refused("families", "c.json", cwd=tmp_path)

    assert "unknown key 'famlies'; did you mean 'families'" in said(famlies={})
    assert "families is {'transformer': {}}; it must map two names" in said(families={"transformer": {}})
    assert "reference is 'rnn'; it must be one of the families: 'transformer'" in said(reference="rnn")
    assert "tune is None; it must have params" in said(tune=None)
    assert "model.family is 'mamba3'" in said(
        families={"a": {}, "b": {"model": {"family": "mamba3"}}}, reference="a"
    )
    assert not (tmp_path / "studies").exists()


def test_sections_of_a_family_lie_on_top(corpus, tmp_path):
    (tmp_path / "c.json").write_text(json.dumps(comparison(corpus)))
    config = load(tmp_path / "c.json")
    own = study_of(config, "recurrent", 2.0)
    assert own["model"] == {"head_dim": 8, "family": "min_gru"} and own["recipe"]["lr"] == 0.02
    assert own["name"] == "both-recurrent" and study_of(config, "transformer")["model"] == {"head_dim": 8}


@pytest.mark.parametrize(
    ("estimate", "ends", "apart", "words"),
    [
        (2.0, [1.2, 3.4567], True, "2 (1.2 to 3.46)"),
        (2.0, [0.9, 3.0], False, "2 (0.9 to 3), cannot be told apart"),
        (2.8157, [1.80712, "infinite"], True, "2.82 (1.81 to infinite)"),
        ("infinite", [0.5, "infinite"], False, "infinite (0.5 to infinite), cannot be told apart"),
        (0.5, None, False, "0.5, no interval, cannot be told apart"),
        (None, None, False, "no answer, no interval, cannot be told apart"),
    ],
)
def test_a_multiplier_tells_apart_where_its_interval_leaves_one_out(estimate, ends, apart, words):
    speedup = {"estimate": estimate, "95": ends}
    row = judged({"speedup": speedup, "loss_a": 1.0, "loss_b": 1.0})
    assert row["apart"] is apart and told(row) == words


def test_cost_by_the_token_is_linear_in_logs_and_goes_on_with_the_end_slopes():
    cost = ByTheToken([1e3, 1e5, 1e4], [1e-6, 1e-3, 1e-5], "x")
    np.testing.assert_allclose(cost([1e3, 1e4, 1e5], 2.0), [2e-6, 2e-5, 2e-3], rtol=1e-12)
    # slopes of 1 below and 2 above
    np.testing.assert_allclose(cost([1e2, 10**4.5, 1e6], 1.0), [1e-7, 1e-4, 1e-1], rtol=1e-12)
    assert ByTheToken([1e3], [2.0], "x")(7e8, 3.0) == 6.0


def test_every_family_has_shapes_on_the_grid_of_all():
    config = load(Path(__file__).resolve().parents[2] / "experiments" / "all_families.py")
    named = {study_of(config, name)["model"].get("family", "transformer") for name in config["families"]}
    assert set(FAMILIES) <= named
    for name in config["families"]:
        study = study_of(config, name)
        recipe = recipe_from_config(study["recipe"])
        for params in {n for row in study["grid"]["params"] for n in row}:
            model = shape(recipe, {"vocab": 256, **study["model"]}, params, study["data"]["seq"])
            # as near as shapes of two or three layers come; at 10k the Monarch mixer has one shape
            assert 0.8 < ledger(model, study["data"]["seq"]).params_total / params < 1.4, (name, params)
