"""Sentinel brackets: the planner's cells, and what they say of the rule."""

import numpy as np
import pytest
from tiny_study import FACTS, tiny_study

from scaling.config import ConfigError
from scaling.grid import plan
from scaling.sentinels import brackets, judge, words
from scaling.study import validate_study


def manifest(corpus, **grid):
    config = tiny_study(
        corpus, grid={"kind": "product", "params": [3e3, 6e3], "tokens": [2e4, 8e4], "min_steps": 10, **grid}
    )
    return plan(validate_study(config), FACTS)


def test_brackets_are_planned_around_the_cheapest_cell_of_each_size(corpus):
    cells = manifest(corpus, sentinels={"lr": [0.5, 2.0], "batch": [2]})["cells"]
    own = {e["id"]: e for e in cells if e["role"] == "cell"}
    made = [e for e in cells if e["role"] == "sentinel"]
    assert len(own) == 4 and len(made) == 6
    for e in made:
        base, about = own[e["sentinel"]["of"]], e["sentinel"]
        assert base["achieved"]["tokens"] < 3e4  # the cheaper of the size's two
        if about["field"] == "lr":
            ratio = e["config"]["optim"]["lr"] / base["config"]["optim"]["lr"]
            assert ratio == pytest.approx(about["multiple"], rel=1e-3)  # four digits
            assert {**e["config"], "optim": 0} == {**base["config"], "optim": 0}
        else:
            assert e["config"]["train"]["batch"] == 2 * base["config"]["train"]["batch"]
            assert e["achieved"]["tokens"] == pytest.approx(base["achieved"]["tokens"], rel=0.05)
            # the rule's own rate for that batch: the square root
            ratio = e["config"]["optim"]["lr"] / base["config"]["optim"]["lr"]
            assert ratio == pytest.approx(2**0.5, rel=0.02)  # D is rounded to whole steps


def test_brackets_and_trunks_live_together(corpus):
    config = manifest(corpus, sentinels={"lr": [2.0], "cells": "cheapest"}, trunks=True)
    roles = [e["role"] for e in config["cells"]]
    assert roles.count("trunk") == 2 and roles.count("branch") == 4 and roles.count("sentinel") == 1


def test_the_vertex_of_a_planted_parabola_is_found():
    x = np.array([0.5, 1.0, 2.0])
    losses = 3.0 + 0.1 * (np.log(x) - np.log(1.3)) ** 2
    got = judge(x, losses, np.full(3, 0.003))
    assert got["best"] == pytest.approx(1.3) and not got["edge"]
    assert got["excess"] == pytest.approx(0.1 * np.log(1.3) ** 2 / 3.0)
    assert got["stderr"] == pytest.approx(np.sqrt(2) * 0.003 / 3.0)


def test_an_optimum_at_the_end_is_said():
    got = judge(np.array([0.5, 1.0, 2.0]), np.array([3.3, 3.1, 3.0]), np.full(3, 0.003))
    assert got["edge"] and got["best"] == 2.0 and got["excess"] == pytest.approx(3.1 / 3.0 - 1)
    right = judge(np.array([0.5, 1.0, 2.0]), np.array([3.3, 3.0, 3.1]), np.full(3, 0.003))
    assert not right["edge"] and right["excess"] >= 0


def test_only_finished_brackets_are_judged(corpus):
    plan_ = manifest(corpus, sentinels={"lr": [0.5, 2.0]})
    assert brackets(plan_, lambda cell: None) == []
    made = [e for e in plan_["cells"] if e["role"] == "sentinel"]
    base = made[0]["sentinel"]["of"]
    losses = {base: (3.0, 0.01), made[0]["id"]: (3.2, 0.01), made[1]["id"]: (3.1, 0.01)}
    (row,) = brackets(plan_, losses.get)
    assert row["cell"] == base and row["field"] == "lr" and row["multiples"] == [0.5, 1.0, 2.0]


def test_sentences_and_warnings():
    row = {"field": "lr", "params": 3e3, "tokens": 2e4, "multiples": [0.5, 1.0, 2.0], "best": 1.3}
    said, warning = words({**row, "excess": 0.002, "stderr": 0.001, "edge": False})
    assert not warning and "the rule's learning rate is within 0.20% (± 0.10%)" in said
    said, warning = words({**row, "excess": 0.03, "stderr": 0.001, "edge": True, "best": 2.0})
    assert warning and "the bracket's end" in said and "at least 3.00%" in said
    _, warning = words({**row, "excess": 0.03, "stderr": 0.02, "edge": False})
    assert not warning  # the noise alone could be that


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["lr"], "must be a mapping with keys lr, batch, cells"),
        ({"lr": [1]}, "none of them 1"),
        ({"lr": 2}, "grid.sentinels.lr is 2"),
        ({"lr": [2, 2]}, "different positive multiples"),
        ({}, "neither lr nor batch"),
        ({"lr": [2], "cells": "some"}, "grid.sentinels.cells is 'some'"),
    ],
)
def test_bad_settings_are_named(corpus, given, words):
    with pytest.raises(ConfigError, match=words):
        manifest(corpus, sentinels=given)
