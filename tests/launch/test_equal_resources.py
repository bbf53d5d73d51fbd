"""Families at equal total N, C and unique tokens: the plan, the trained cells and what is said of them."""

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from scipy import stats
from test_cli import refused
from tiny_study import FACTS, tiny_study

from launch.cli import cli
from launch.equal_resources import difference, grids
from launch.families import load, run, save, study_of, tuning_study
from launch.show_families import told_difference
from launch.work import work
from scaling.flops import ledger
from scaling.grid import plan
from scaling.records import collect, read_manifest
from scaling.train import Execution

MOE = {"family": "moe", "experts": 4, "active_experts": 1, "expert_fraction": 0.5}


def comparison(corpus, **changes) -> dict:
    study = tiny_study(corpus, budgets=(2e8,), params=(8e3, 12e3), batch_tokens=64, seeds=[0, 1])
    study["grid"] |= {"tolerance": 0.05}
    study["recipe"] |= {"ffn_multiple": 2}
    return {
        "name": "matched",
        "study": study,
        "families": {"dense": {}, "experts": {"model": MOE}},
        "reference": "dense",
        "tune": {"params": 8e3, "tokens": 6e3, "lr": [1.0, 2.0]},
        "equal": "total",
        **changes,
    }


def loaded(tmp_path, config) -> dict:
    (tmp_path / "c.json").write_text(json.dumps(config))
    return load(tmp_path / "c.json")


def planned(config, facts=FACTS):
    """Manifests of every family's matched grid and tuning cell, and what was dropped."""
    found, dropped = grids(config, {f: study_of(config, f) for f in config["families"]}, facts)
    out = {}
    for family, own in found.items():
        out[family] = plan(study_of(config, family, 2.0, own["grid"]), facts)
        out[family + "-tune"] = plan(tuning_study(config, family, own["tune"]), facts)
    return out, dropped


def test_every_triple_has_one_total_n_one_c_and_one_set_of_tokens(corpus, tmp_path):
    config = loaded(tmp_path, comparison(corpus, params_tolerance=0.01))
    manifests, dropped = planned(config)
    assert not dropped and [len(m["cells"]) for m in manifests.values()] == [4, 3, 4, 3]
    for suffix in ("", "-tune"):
        for dense, moe in zip(*(manifests[f + suffix]["cells"] for f in ("dense", "experts")), strict=True):
            one, other = dense["achieved"], moe["achieved"]
            assert abs(other["params_total"] / one["params_total"] - 1) <= 0.01
            assert abs(other["flops"] / one["flops"] - 1) <= 0.05
            # by the ledger of the built model, not of the plan
            assert ledger(moe["config"]["model"], 32).params_total == other["params_total"]
            assert other["params_active"] < one["params_active"] == one["params_total"]
            # the dense model passes over its tokens once; the experts, cheaper by the token, more often
            cuts = {e["config"]["data"]["unique_tokens"] for e in (dense, moe)}
            assert cuts == {one["tokens"] + 1} and other["tokens"] > 1.2 * one["tokens"]


def test_a_reference_that_is_fitted_to_its_own_n_stays_so(corpus, tmp_path):
    config = comparison(corpus)
    config["study"]["grid"]["params_tolerance"] = 0.03
    manifests, dropped = planned(loaded(tmp_path, config))
    assert not dropped
    for suffix in ("", "-tune"):
        for dense, moe in zip(*(manifests[f + suffix]["cells"] for f in ("dense", "experts")), strict=True):
            assert abs(dense["achieved"]["params_total"] / dense["target"]["params"] - 1) <= 0.03
            assert abs(moe["achieved"]["params_total"] / dense["achieved"]["params_total"] - 1) <= 0.02


def test_the_experiment_is_matched_whole():
    config = load(Path(__file__).parents[2] / "experiments" / "experts.py")
    manifests, dropped = planned(config)
    assert not dropped and len(manifests["dense"]["cells"]) == 4 * 3


def test_data_that_do_not_suffice_bound_the_unique_tokens_of_all(corpus, tmp_path):
    config = loaded(tmp_path, comparison(corpus))
    manifests, _ = planned(config, {**FACTS, "unique_tokens": 960})
    cuts = {e["config"]["data"]["unique_tokens"] for m in manifests.values() for e in m["cells"]}
    assert cuts == {961}


def test_what_cannot_be_matched_is_left_out_with_a_reason(corpus, tmp_path):
    config = comparison(corpus)
    config["study"]["grid"]["max_epochs"] = 1.01
    with pytest.raises(ValueError, match=r"no cell of the grid could be matched \(experts: .* epochs, more"):
        planned(loaded(tmp_path, config))
    config = comparison(corpus, params_tolerance=1e-6)
    with pytest.raises(ValueError, match="experts: .* no shape of this recipe lies within 1e-06 of it"):
        planned(loaded(tmp_path, config))


def test_bad_settings_are_named(corpus, tmp_path):
    def said(**changes):
        (tmp_path / "c.json").write_text(json.dumps(comparison(corpus, **changes)))
        return refused("families", "c.json", cwd=tmp_path)

    assert "equal is 'active'; it must be 'total' or left out" in said(equal="active")
    assert "params_tolerance is 2; it must be a number between" in said(params_tolerance=2)
    assert "params_tolerance is 0.1 without equal" in said(equal=None, params_tolerance=0.1)
    families = {"dense": {}, "experts": {"model": MOE, "data": {"seed": 1}}}
    assert "families.experts has a data of its own" in said(families=families)
    families = {"dense": {}, "experts": {"model": MOE, "flops_convention": "full"}}
    assert "families.experts has a flops_convention of its own" in said(families=families)
    study = comparison(corpus)["study"]
    study["grid"]["trunks"] = True
    assert "study.grid.trunks is True with equal = 'total'" in said(study=study)


def test_an_interval_is_students_and_says_where_nothing_is_told():
    pairs = [-0.03, -0.05, -0.02, -0.04]
    got = difference(pairs)
    want = stats.ttest_1samp(pairs, 0).confidence_interval(0.95)
    np.testing.assert_allclose(got["interval"], [want.low, want.high], rtol=1e-12)
    assert got["apart"] and told_difference(got) == "-0.0350 (-0.0555 to -0.0145)"
    assert told_difference(difference([0.01, -0.02])).endswith("cannot be told apart")
    assert told_difference(difference([0.5])) == "+0.5000, no interval, cannot be told apart"
    assert told_difference(difference([])) == "no pair of finished runs"


@pytest.mark.slow
def test_from_a_config_to_the_table_and_nothing_twice(corpus, tmp_path):
    config = comparison(corpus)
    config["study"]["grid"] |= {"budgets": [1e8, 2e8], "params": [8e3]}
    (tmp_path / "matched.json").write_text(json.dumps(config))
    folder, trained = tmp_path / "out", []

    def call(name, *args):  # in this process: workers of their own would import everything again
        if name == "run":
            trained.append(args)
            return work(Path(args[0]), Execution())
        CliRunner().invoke(cli, [name, *args], standalone_mode=False, catch_exceptions=False)

    config, result, _ = run(tmp_path / "matched.json", folder, call)
    save(folder, result, config)
    assert len(result["triples"]) == 2 and not (folder / "dense" / "fits").exists()
    tables = {f: collect(folder / f).set_index("cell") for f in ("dense", "experts")}
    for triple in result["triples"]:
        one, other = triple["dense"], triple["experts"]
        assert one["epochs"] == pytest.approx(1) and other["epochs"] > 1.2
        assert one["unique_tokens"] == other["unique_tokens"] == one["tokens"] < other["tokens"]
        assert set(one["losses"]) == set(other["losses"]) == {"0", "1"}
        pairs = [other["losses"][s] - one["losses"][s] for s in ("0", "1")]
        assert other["difference"]["mean"] == pytest.approx(np.mean(pairs))
    for family, table in tables.items():
        mine = {x for t in result["triples"] for x in t[family]["losses"].values()}
        assert mine == set(table["loss"])
        assert len(read_manifest(folder / family)["cells"]) == 4
    assert result["overall"]["experts"]["pairs"] == 2
    text = (folder / "comparison.md").read_text()
    assert "## At equal total N, C and unique tokens" in text and "| experts |" in text
    assert "over all 2 cells" in (folder / "comparison.html").read_text()
    # the same plan again: the folders hold it already, or planning would have refused
    before = {p: p.stat().st_mtime_ns for p in folder.rglob("result.json")}
    assert run(tmp_path / "matched.json", folder, call)[1] == result and len(trained) == 8
    assert {p: p.stat().st_mtime_ns for p in folder.rglob("result.json")} == before
