"""Searches for a law: the cells that tell most, on planted losses."""

import json
import math

import numpy as np
import pytest
from click.testing import CliRunner
from tiny_study import FACTS, tiny_study

from launch.cli import cli
from launch.search import law
from launch.search.command import at_most, show
from launch.search.session import Session, replay
from launch.search.settings import load_search
from scaling.branches import spent_flops
from scaling.config import ConfigError
from scaling.files import write_json
from scaling.records import collect, read_manifest

PLANTED = {"E": 1.5, "A": 30.0, "B": 60.0, "alpha": 0.35, "beta": 0.3}


def law_settings(corpus, folder, **more):
    sizes, tokens = [3e3, 4.5e3, 6e3, 8e3, 12e3, 17e3, 24e3], [2e4 * 2**k for k in range(6)]
    grid = {"kind": "product", "params": sizes, "tokens": tokens, "trunks": True, "min_steps": 10}
    grid["tolerance"] = 0.1
    config = tiny_study(corpus, grid=grid, schedule={"decay_fraction": 0.2}, seeds=[0, 1])
    config["search"] = {"kind": "law", "budget": 1e30, **more}
    path = folder / "law.json"
    path.write_text(json.dumps(config))
    return load_search(path)


def planted_loss(session):
    def loss_of(cell):
        got = session().entries[cell]["achieved"]
        rng = np.random.default_rng(int(cell[:8], 16))
        loss = PLANTED["E"] + PLANTED["A"] / got["params_total"] ** PLANTED["alpha"]
        loss += PLANTED["B"] / got["tokens"] ** PLANTED["beta"]
        return loss * math.exp(0.002 * rng.standard_normal())

    return loss_of


def test_a_law_is_known_from_the_cells_that_tell_most(corpus, tmp_path):
    settings, made = law_settings(corpus, tmp_path, within=0.05), []
    session = Session(settings, FACTS, planted_loss(lambda: made[0]))
    made.append(session)
    assert replay(law.narrow, session) == "done"
    answer = session.answer
    truth = PLANTED["beta"] / (PLANTED["alpha"] + PLANTED["beta"])
    assert max(answer["half_width"], answer["linear_half_width"]) <= 0.05
    assert abs(answer["estimate"] - truth) <= 2 * answer["half_width"]  # two half-widths: four sigma
    assert [r["chosen"] for r in session.rounds] == [len(r["cells"]) for r in session.rounds]
    assert answer["share"] < 0.5 and answer["flags"][0]["code"] == "adaptive"
    # what it says to have spent is what its entries cost, trunks once; prices told before are those paid
    assert session.spent == pytest.approx(sum(map(spent_flops, session.entries.values())))
    first = session.rounds[0]["flops"]
    asked = [at_most(law.narrow, law_settings(corpus, tmp_path, budget=x * first), FACTS) for x in (0.9, 1.1)]
    assert [a["status"] for a in asked] == ["planned: more than its budget", "planned"]
    half = 0.5 * session.spent
    made[0] = Session(law_settings(corpus, tmp_path, budget=half), FACTS, planted_loss(lambda: made[0]))
    assert replay(law.narrow, made[0]) == "out of budget" and made[0].spent <= half
    assert set(made[0].entries) & set(session.entries)


def test_an_optimum_that_is_nowhere_is_none_in_the_record(corpus, tmp_path):
    settings, made = law_settings(corpus, tmp_path, quantity="N*", at=1e9, budget=2e10), []

    def of_size_alone(cell):
        jitter = np.random.default_rng(int(cell[:8], 16)).standard_normal()
        return (1.5 + 40 * made[0].entries[cell]["achieved"]["params_total"] ** -0.3) * math.exp(
            0.002 * jitter
        )

    made.append(Session(settings, FACTS, of_size_alone))
    record = made[0].record(replay(law.narrow, made[0]))
    assert record["answer"]["estimate"] is None
    write_json(tmp_path / "search.json", record)  # no NaN
    show({**record, "lacking": []}, tmp_path)


def test_prices_of_a_grid_are_what_its_entries_cost(corpus, tmp_path):
    from scaling.grid import plan

    settings = law_settings(corpus, tmp_path)
    manifest = plan({k: v for k, v in settings.items() if k != "search"}, FACTS)
    pool = law.Pool(manifest)
    assert pool.whole == pytest.approx(sum(map(spent_flops, manifest["cells"])))
    paid, rng, every = 0.0, np.random.default_rng(0), list(range(len(pool.cells)))
    rng.shuffle(every)
    for k in range(0, len(every), 7):
        picks = every[k : k + 7]
        told = sum(pool.prices([i], picks[:j])[0] for j, i in enumerate(picks))
        got = sum(map(spent_flops, pool.grow(picks)))
        # one long segment or several short ones: the same steps, in floats of another order
        assert got == pytest.approx(told, rel=1e-9)
        paid += got
    assert paid == pytest.approx(pool.whole)


def of_a_trainer(folder, **search):
    config = {
        "name": "features",
        "grid": {"kind": "product", "params": [8, 12, 16, 24, 32], "tokens": [64, 128, 256, 512, 1024]},
        "trainer": {"name": "plrf", "alpha": 0.7, "beta": 0.3, "rate": 0.25, "dynamics": "sgd"},
        "train": {"batch": 1},
        "seeds": [0, 1],
        "search": {"budget": 1e6, **search},
    }
    path = folder / "features.json"
    path.write_text(json.dumps(config))
    return path


def test_a_trainers_study_is_searched_within_its_budget(tmp_path):
    path, study = of_a_trainer(tmp_path, kind="law"), tmp_path / "study"
    args = ["search", str(path), "--study", str(study), "--workers", "1"]
    done = CliRunner().invoke(cli, [*args, "--json"], standalone_mode=False, catch_exceptions=False)
    record = json.loads(done.stdout)
    assert done.return_value == 0 and record["status"] == "out of budget"
    assert 0.5 * 1e6 < record["spent"] <= 1e6 and record["saved"] == 0
    entries = read_manifest(study)["cells"]
    assert record["spent"] == pytest.approx(sum(e["achieved"]["flops"] for e in entries))
    table = collect(study)
    assert (table["status"] == "finished").all() and len(table) == len(entries) < 50


def test_a_trainer_has_no_recipe_to_vary(tmp_path):
    path = of_a_trainer(tmp_path, kind="halving", tokens=1024, least_tokens=64, configs=4, params=16,
                        space={"optim": {"lr": [0.1, 0.2]}})  # fmt: skip
    with pytest.raises(ConfigError, match=r"search\.kind is 'halving' for a study of a trainer.*'law'"):
        load_search(path)
