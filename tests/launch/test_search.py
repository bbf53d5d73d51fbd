"""Budgeted searches: their decisions on known losses, their budgets, and a real one that is killed."""

import json
import math
import sys

import numpy as np
import pytest
from click.testing import CliRunner
from kills import Killed, kill_after
from tiny_study import FACTS, tiny_study

from launch.cli import cli
from launch.search import tuning
from launch.search.command import algorithm_of, at_most
from launch.search.points import draw, perturbed
from launch.search.session import Session, loss_on_disk, replay, run_search
from launch.search.settings import load_search, validate_search
from launch.work import job_of
from scaling.branches import spent_flops
from scaling.config import ConfigError
from scaling.files import CellFolder, StudyError, read_json, read_jsonl, write_json
from scaling.lane import Job
from scaling.train import train_pack

LEAST = 2048  # 21 updates of 3 x 32 tokens
SPACE = {"optim.lr": {"low": 1e-4, "high": 1.0}}
BEST_LR = 3e-3


def searched(corpus, folder, **search):
    """A tiny study's settings with a search."""
    config = tiny_study(corpus, schedule={"decay_fraction": 0.25}, search={"budget": 1e30, **search})
    del config["grid"]
    path = folder / "search.json"
    path.write_text(json.dumps(config))
    return path


def settings_of(corpus, folder, **search):
    return load_search(searched(corpus, folder, **search))


def lr_loss(session, noise=0.0):
    """A loss that falls with D and is least at one learning rate; the cell's id gives the noise."""

    def loss_of(cell):
        config = session().entries[cell]["config"]
        jitter = noise * (int(cell[:4], 16) / 65535 - 0.5)
        return math.log(config["optim"]["lr"] / BEST_LR) ** 2 + 100 / config["train"]["steps"] + jitter

    return loss_of


def run(settings, loss_of=None, noise=0.0):
    """A session replayed to its end over known losses, and how it ended."""
    made = []
    session = Session(settings, FACTS, loss_of or lr_loss(lambda: made[0], noise))
    made.append(session)
    return session, replay(algorithm_of(settings["search"]["kind"]), session)


def tuned(corpus, folder, kind, **more):
    return settings_of(
        corpus, folder,
        **{"kind": kind, "params": 3e3, "tokens": 8 * LEAST, "least_tokens": LEAST, "space": SPACE, **more},
    )  # fmt: skip


def test_hyperband_measures_what_its_brackets_say_and_finds_the_best(corpus, tmp_path):
    session, status = run(tuned(corpus, tmp_path, "hyperband"))
    assert status == "done"
    asked = [(r["bracket"], r["tokens"] / LEAST, len(r["cells"])) for r in session.rounds]
    assert asked == [
        *(("bracket 0", d, n) for d, n in ((1, 8), (2, 4), (4, 2), (8, 1))),
        *(("bracket 1", d, n) for d, n in ((2, 6), (4, 3), (8, 1))),
        *(("bracket 2", d, n) for d, n in ((4, 4), (8, 2))), ("bracket 3", 8, 4),
    ]  # fmt: skip
    drawn = [p for r in session.rounds if len(r["cells"]) in (8, 6, 4) for p in r["points"]]
    distance = [abs(math.log(p["optim.lr"] / BEST_LR)) for p in drawn]
    assert session.answer["point"] == drawn[int(np.argmin(distance))]
    for r in session.rounds:
        if "promoted" in r:  # the lowest losses, in order
            order = np.argsort(r["losses"], kind="stable")[: len(r["promoted"])]
            assert r["promoted"] == [r["configs"][k] for k in order]
    assert session.spent == pytest.approx(sum(map(spent_flops, session.entries.values())))
    # every configuration goes on from its trunk: its stable part is paid for once
    paid = {}
    for e in session.entries.values():
        if e["role"] == "trunk":
            key = json.dumps(e["config"]["optim"]), e["config"]["train"]["seed"]
            paid.setdefault(key, []).append((e.get("fork", 0), e["config"]["train"]["steps"]))
    for parts in paid.values():
        assert all(a[1] == b[0] for a, b in zip(sorted(parts), sorted(parts)[1:], strict=False))


@pytest.mark.parametrize("strategy", ["discarding", "preserving", "efficient"])
def test_deepening_keeps_what_ran(corpus, tmp_path, strategy):
    deep = {"kind": "deepening", "strategy": strategy}
    eight, _ = run(tuned(corpus, tmp_path, **deep, tokens=[8 * LEAST]), noise=8.0)
    both, status = run(tuned(corpus, tmp_path, **deep, tokens=[8 * LEAST, 16 * LEAST]), noise=8.0)
    assert status == "done" and set(eight.entries) < set(both.entries)
    assert both.rounds[: len(eight.rounds)] == eight.rounds
    # by hand (tests/scaling/test_halving.py): so many begin at R = 16 in each bracket
    second = both.rounds[len(eight.rounds) :]
    first = {r["bracket"]: r for r in reversed(second)}
    assert [len(first[f"bracket {k}"]["cells"]) for k in range(5)] == [16, 10, 7, 5, 5]
    if strategy == "discarding":  # Hyperband at R = 16 from scratch on the same points decides the same
        whole = tuned(corpus, tmp_path, "hyperband", tokens=16 * LEAST)
        whole["grid"] = both.settings["grid"]  # the recipe's reference stays that of R = 8
        scratch = Session(whole, FACTS, lr_loss(lambda: scratch, 8.0))
        real, tuning._span = tuning._span, lambda s: (LEAST, 8 * LEAST)
        try:
            assert replay(tuning.band, scratch) == "done"
        finally:
            tuning._span = real
        assert [(r["cells"], r.get("promoted")) for r in scratch.rounds] == [
            (r["cells"], r.get("promoted")) for r in second
        ]
    if strategy == "efficient":  # whatever was trained further stays in
        for old in eight.rounds:
            new = next(r for r in second if r["bracket"] == old["bracket"] and r["tokens"] == old["tokens"])
            assert set(old.get("promoted", ())) <= set(new.get("promoted", ()))


@pytest.mark.parametrize(
    ("kind", "more"),
    [
        ("hyperband", {"params": None, "space": {**SPACE, "params": [3e3, 6e3, 12e3]}}),
        ("deepening", {"strategy": "efficient"}),
        ("deepening", {"strategy": "discarding"}),
        ("deepening", {"strategy": "preserving"}),
    ],
)
def test_a_dry_run_says_what_it_costs_at_most(corpus, tmp_path, kind, more):
    more = {"tokens": [4 * LEAST, 8 * LEAST], **more} if kind == "deepening" else more
    settings, spent = tuned(corpus, tmp_path, kind, **more), []
    most = at_most(algorithm_of(kind), settings, FACTS)["spent"]
    for turn in range(8):
        session, status = run(settings, lambda cell, turn=turn: float(int(cell[turn : turn + 6], 16)))
        assert status == "done"
        spent.append(session.spent)
    assert max(spent) <= most * (1 + 1e-9)  # sums of floats in another order


def test_a_budget_is_kept_and_a_larger_one_goes_on(corpus, tmp_path):
    whole, _ = run(tuned(corpus, tmp_path, "hyperband"))
    ids = list(whole.entries)
    for share in (0.3, 0.7):
        budget = share * whole.spent
        part, status = run(tuned(corpus, tmp_path, "hyperband", budget=budget))
        assert status == "out of budget" and part.spent <= budget
        assert list(part.entries) == ids[: len(part.entries)]
        refused = part.rounds[-1]
        assert refused["refused"] and part.spent + refused["flops"] > budget
        record = part.record(status)
        assert record["left"] == pytest.approx(budget - record["spent"]) and record["saved"] > 0
    with pytest.raises(ConfigError, match="the first round alone costs"):
        run(tuned(corpus, tmp_path, "hyperband", budget=1.0))
    planned = at_most(tuning.band, tuned(corpus, tmp_path, "hyperband", budget=1.0), FACTS)
    assert planned["status"] == "planned: more than its budget"
    assert planned["spent"] == pytest.approx(whole.spent)


def test_what_diverges_is_not_promoted(corpus, tmp_path):
    settings, made = tuned(corpus, tmp_path, "halving", configs=8), []
    plain = lr_loss(lambda: made[0])

    def loss_of(cell):
        high = made[0].entries[cell]["config"]["optim"]["lr"] > 1e-3
        return math.inf if high else plain(cell)

    made.append(Session(settings, FACTS, loss_of))
    assert replay(tuning.halve, made[0]) == "done"
    for r in made[0].rounds:
        assert all(x is None or math.isfinite(x) for x in r["losses"])  # JSON has no infinity
        assert all(r["losses"][r["configs"].index(c)] is not None for c in r.get("promoted", ()))
    assert made[0].answer["point"]["optim.lr"] <= 1e-3
    made[0] = Session(settings, FACTS, lambda cell: math.inf)
    assert replay(tuning.halve, made[0]) == "done" and made[0].answer is None


def population_settings(corpus, folder, **more):
    return settings_of(
        corpus, folder,
        **{"kind": "population", "params": 3e3, "tokens": 8 * LEAST, "members": 4, "generations": 4,
           "space": {**SPACE, "optim.weight_decay": {"low": 0.01, "high": 1.0}}, **more},
    )  # fmt: skip


def test_a_population_copies_the_better_and_is_deterministic(corpus, tmp_path):
    settings = population_settings(corpus, tmp_path)
    session, status = run(settings)
    again, _ = run(settings)
    assert status == "done" and session.rounds == again.rounds
    assert population_settings(corpus, tmp_path, seed=1)["search"]["seed"] == 1
    assert run(population_settings(corpus, tmp_path, seed=1))[0].rounds != session.rounds
    *generations, last = session.rounds
    for k, r in enumerate(generations):
        order = np.argsort(r["losses"])
        for m, how in r.get("copied", {}).items():
            assert int(m) in order[-1:] and how["from"] in order[:1]
            assert how["cell"] == r["cells"][how["from"]]
            child = session.entries[generations[k + 1]["cells"][int(m)]]
            assert child["config"]["train"]["parent"] == child["trunk"] == how["cell"]
            for name, x in r["points"][how["from"]].items():
                section, _, key = name.partition(".")
                ratio = child["config"][section][key] / x
                edge = settings["search"]["space"][name]
                assert min(abs(ratio - f) for f in (0.8, 1.25)) < 1e-3 or how["point"][name] in edge.values()
    assert all(len(r["copied"]) == 1 for r in generations[:-1])
    final = session.entries[last["cells"][0]]
    assert final["role"] == "branch" and final["trunk"] in generations[-1]["cells"]
    assert session.alone() is None
    assert session.answer["tokens"] == pytest.approx(8 * LEAST, rel=0.01)  # whole steps of 96 tokens
    short = population_settings(corpus, tmp_path, budget=0.6 * session.spent)
    part, status = run(short)
    assert status == "out of budget" and part.answer["cell"] in part.rounds[-2]["cells"]
    assert part.answer["loss"] == min(part.rounds[-2]["losses"])


def test_a_cooldown_that_diverges_leaves_the_answer_before_it(corpus, tmp_path):
    more = {"params": 3e3, "tokens": 8 * LEAST, "space": SPACE, "members": 2, "generations": 2}
    settings, made = settings_of(corpus, tmp_path, kind="population", **more), []

    def loss_of(cell):
        return math.inf if made[0].entries[cell]["role"] == "branch" else float(int(cell[:4], 16))

    made.append(Session(settings, FACTS, loss_of))
    record = made[0].record(replay(algorithm_of("population"), made[0]))
    write_json(tmp_path / "record.json", record)  # no infinity
    assert record["status"] == "done" and math.isfinite(record["answer"]["loss"])


def test_points_are_functions_of_seed_stream_and_index():
    search = {"seed": 3, "space": {**SPACE, "optim.beta2": [0.9, 0.99]}, "sampler": "random"}
    points = [draw(search, "a", k) for k in range(200)]
    assert points == [draw(search, "a", k) for k in range(200)] and points[0] != draw(search, "b", 0)
    logs = np.log([p["optim.lr"] for p in points])
    assert {p["optim.beta2"] for p in points} == {0.9, 0.99}
    # uniform in the log over [1e-4, 1]: the mean's standard error over 200 is 0.19
    assert abs(logs.mean() - math.log(1e-2)) < 4 * 0.19 and logs.min() >= math.log(1e-4)
    grid = {"seed": 0, "sampler": "grid", "space": {"optim.lr": {"low": 1e-3, "high": 1e-1, "points": 3},
            "optim.beta2": [0.9, 0.99]}}  # fmt: skip
    values = {tuple(draw(grid, "a", k).values()) for k in range(6)}
    assert values == {(a, b) for a in (1e-3, 1e-2, 1e-1) for b in (0.9, 0.99)}
    with pytest.raises(ConfigError, match="6 grid points"):
        draw(grid, "a", 6)
    explore = {**search, "factors": [0.8, 1.25]}
    moved = perturbed(explore, {"optim.lr": 0.9, "optim.beta2": 0.9}, np.random.default_rng(0))
    assert moved["optim.lr"] in (0.72, 1.0) and moved["optim.beta2"] in (0.9, 0.99)


def test_tpe_is_optunas_and_replays(monkeypatch):
    search = {"seed": 0, "space": SPACE, "sampler": "tpe"}
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(StudyError, match=r"pip install 'scaling\[search\]'"):
        draw(search, "a", 0)
    monkeypatch.undo()
    pytest.importorskip("optuna")
    seen = [({"optim.lr": lr}, math.log(lr / BEST_LR) ** 2) for lr in np.geomspace(1.1e-4, 0.9, 12)]
    seen.append(({"optim.lr": 1.0}, math.inf))
    points = [draw(search, "a", k, seen)["optim.lr"] for k in range(8)]
    assert points == [draw(search, "a", k, seen)["optim.lr"] for k in range(8)] and len(set(points)) > 1
    # it has learned where the loss is low: random points would be within a factor of 10 half of the time
    assert np.mean([abs(math.log(x / BEST_LR)) < math.log(10) for x in points]) >= 7 / 8


BAD = [
    ({"kind": "annealing"}, "search.kind is 'annealing'"),
    ({"kind": "law", "eta": 2}, "does not read it"),
    ({"kind": "hyperband"}, "is missing"),
    ({"kind": "law", "quantity": "N*"}, "search.at is missing"),
    ({"kind": "law", "law": "chinchila"}, "search.law is 'chinchila'.*one of chinchilla"),
    ({"kind": "law", "law": "product"}, "search.law is 'product'.*no exponent a"),
    ({"kind": "law", "law": "precision", "quantity": "N*", "at": 1e9}, "must be a law in N and D"),
    ({"kind": "halving", "tokens": 10.0, "least_tokens": 20.0}, "do not fit"),
    ({"kind": "halving", "configs": 0}, "at least 1"),
    ({"kind": "deepening", "tokens": [100, 300]}, "each is search.eta"),
    ({"kind": "halving", "space": {"model.d_model": [8]}}, "must be params, or a field"),
    ({"kind": "halving", "space": {"optim.lr": {"low": 1, "high": 0.1}}}, "low must be below high"),
    ({"kind": "halving", "sampler": "grid"}, "has no points"),
    ({"kind": "population", "space": {"schedule.decay_fraction": [0.1]}}, "only numbers of optim"),
    ({"kind": "population", "space": {"optim.name": ["adamw", "lion"]}}, "only numbers of optim"),
]


@pytest.mark.parametrize("change, words", BAD)
def test_bad_settings_are_named(change, words):
    whole = {"kind": change["kind"], "budget": 1e9}
    if len(change) > 1 and change["kind"] != "law":
        whole |= {"params": 3e3, "tokens": 800, "space": SPACE}
        extra = {
            "halving": {"least_tokens": 100, "configs": 4},
            "deepening": {"least_tokens": 100},
            "population": {"members": 4, "generations": 2},
        }
        whole |= extra[change["kind"]]
    with pytest.raises(ConfigError, match=words):
        validate_search({**whole, **change})


def finish(study, kill=None):
    """Trains what a study lacks, one cell after another; ``kill``: (number of the cell, step) to die at."""

    def train():
        entries = read_json(study / "manifest.json")["cells"]
        for k, e in enumerate(entries):
            if CellFolder(study, e["id"]).result.exists():
                continue
            job = job_of(study, e)
            train_pack([job], None, kill_after(kill[1]) if kill is not None and k == kill[0] else None)

    return train


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["halving", "population"])
def test_a_killed_search_decides_the_same_and_trains_nothing_twice(corpus, tmp_path, kind):
    from launch.planning import data_facts
    from scaling.config import validate_section
    from scaling.data import open_data

    if kind == "halving":
        settings = tuned(corpus, tmp_path, "halving", configs=3, tokens=2 * LEAST)
    else:
        settings = population_settings(
            corpus, tmp_path, tokens=3 * LEAST, members=2, generations=2, share=0.5
        )
    facts = data_facts(open_data(validate_section("data", settings["data"])), 32)

    def go(study, train):
        def make():
            return Session(settings, facts, loss_on_disk(study))

        return run_search(study, algorithm_of(kind), make, train)

    stopped = go(tmp_path / "none", lambda: None)  # its cells failed, or were cancelled
    assert stopped["status"] == "stopped" and len(stopped["lacking"]) == stopped["cells"]
    whole = go(tmp_path / "whole", finish(tmp_path / "whole"))
    assert whole["status"] == "done" and whole["answer"]["loss"] < math.log(256)
    cut = tmp_path / "cut"
    for where in ((1, 14), (7 if kind == "halving" else 3, 30)):  # in the first round and in the second
        with pytest.raises(Killed):
            go(cut, finish(cut, kill=where))
    done = {p: p.stat().st_mtime_ns for p in cut.glob("cells/*/result.json")}
    assert 1 <= len(done) < whole["cells"]
    assert go(cut, finish(cut)) == whole
    assert (cut / "search.json").read_bytes() == (tmp_path / "whole/search.json").read_bytes()
    assert all(p.stat().st_mtime_ns == t for p, t in done.items())
    for e in read_json(cut / "manifest.json")["cells"]:
        a, b = (CellFolder(tmp_path / name, e["id"]) for name in ("cut", "whole"))
        assert a.result.read_bytes() == b.result.read_bytes()
        steps = [r["step"] for r in read_jsonl(a.metrics) if "loss" in r]
        assert min(steps) > e.get("fork", 0) and len(steps) == len(set(steps))
    assert go(cut, lambda: pytest.fail("nothing is left to train")) == whole
    if kind == "population":
        child = next(e for e in read_json(cut / "manifest.json")["cells"] if e["config"]["train"]["parent"])
        with pytest.raises(StudyError, match="can be trained in its study alone"):
            train_pack([Job(child["config"], CellFolder(tmp_path / "alone", child["id"]))])
        lost = Job(
            child["config"], CellFolder(tmp_path / "b", child["id"]), CellFolder(tmp_path / "b", "no"), 9
        )
        with pytest.raises(StudyError, match="has no checkpoint of step 9"):
            train_pack([lost])


def test_options_that_do_not_go_together_are_refused_before_anything_is_trained(corpus, tmp_path):
    given = {"params": 3e3, "tokens": 2 * LEAST, "least_tokens": LEAST, "space": SPACE}
    path = searched(corpus, tmp_path, kind="halving", configs=2, **given)
    done = CliRunner().invoke(
        cli, ["search", str(path), "--dry-run", "--wandb", "offline", "--pack", "turns"]
    )
    assert isinstance(done.exception, StudyError) and "--wandb" in str(done.exception)


def test_a_cancel_after_the_last_cell_stops_nothing(corpus, tmp_path):
    settings = tuned(corpus, tmp_path, "halving", configs=2, tokens=LEAST)  # a single round
    study = tmp_path / "study"

    def train():
        for e in read_json(study / "manifest.json")["cells"]:
            words = {"reason": None, "tokens": 1, "evals": [], "unique_tokens": 1, "epochs": 1.0}
            result = {"cell": e["id"], "status": "finished", "loss": 2.0, **words}
            write_json(CellFolder(study, e["id"]).result, result)
        (study / "cancelled").touch()

    record = run_search(
        study, algorithm_of("halving"), lambda: Session(settings, FACTS, loss_on_disk(study)), train
    )
    assert record["status"] == "done" and record["answer"]["loss"] == 2.0


@pytest.mark.slow
def test_the_command(corpus, tmp_path):
    path = searched(
        corpus,
        tmp_path,
        kind="halving",
        configs=2,
        params=3e3,
        tokens=2 * LEAST,
        least_tokens=LEAST,
        space=SPACE,
    )
    study = tmp_path / "study"
    args = ["search", str(path), "--study", str(study), "--workers", "1", "--json"]

    def call(*more):
        result = CliRunner().invoke(cli, [*args, *more], standalone_mode=False, catch_exceptions=False)
        return json.loads(result.output), result.return_value

    planned, _ = call("--dry-run")
    assert not study.exists()
    part, code = call("--set", f"budget={0.9 * planned['spent']}")
    assert code == 0 and part["status"] == "out of budget" and part["spent"] < 0.9 * planned["spent"]
    done, code = call()
    assert code == 0 and done["status"] == "done" and done["spent"] == pytest.approx(planned["spent"])
    assert done == read_json(study / "search.json") and done["rounds"][0] == part["rounds"][0]
    other = ["--set", f"tokens={4 * LEAST}"]  # its rungs are other cells
    with pytest.raises(StudyError, match="not in this config"):
        call(*other)
