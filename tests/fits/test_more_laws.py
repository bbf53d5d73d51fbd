"""Laws beyond Chinchilla: published values, gradients, planted recovery, pinned parameters."""

import itertools
import re
from pathlib import Path

import numpy as np
import pytest

import fits
from fits.laws import LAWS, register_law
from fits.laws.repetition import effective
from fits.objective import RowLoss, make_problem
from fits.solve import solve
from fits.table import clean

PLANTED = {
    "overtraining": {"E": 1.7, "a": 50.0, "b": 90.0, "eta": 0.14},
    "data_constrained": {
        "E": 1.8, "A": 480.0, "B": 2100.0, "alpha": 0.34, "beta": 0.37, "R_N": 6.0, "R_D": 14.0,
    },
    "data_constrained_tied": {"E": 1.87, "A": 520.0, "B": 1488.0, "alpha": 0.3527, "R_N": 5.31, "R_D": 15.4},
    "broken_D": {"E": 1.5, "K": 300.0, "c0": 0.25, "c1": 0.3, "d": 3e9, "f": 0.4},
    "broken_C": {"E": 1.2, "K": 400.0, "c0": 0.12, "c1": 0.15, "d": 1e20, "f": 0.5},
    "steps_batch": {"E": 1.6, "A": 300.0, "K": 60.0, "alpha": 0.33, "gamma": 0.4, "B_crit": 8e5},
}  # fmt: skip


def planted_table(name):
    """A grid wide enough to show every parameter, without noise."""
    law = LAWS[name]
    if name.startswith("data_constrained"):
        points = np.array(list(itertools.product(
            np.geomspace(5e7, 3e10, 6), np.geomspace(1e9, 1e12, 7), (1e9, 1e10, 1e11))))  # fmt: skip
        x = dict(zip("NDU", points.T, strict=True))
    elif name == "steps_batch":
        points = np.array(list(itertools.product(
            np.geomspace(1e7, 1e10, 5), np.geomspace(1e3, 1e6, 6), np.geomspace(3e4, 3e7, 5))))  # fmt: skip
        x = dict(zip("NSB", points.T, strict=True))
    elif name == "overtraining":
        points = np.array(list(itertools.product(np.geomspace(1e7, 1e10, 6), np.geomspace(5, 640, 7))))
        x = {"N": points[:, 0], "D": points.prod(1)}
    else:
        x = {
            law.variables[0]: np.geomspace(1e6, 1e13, 60)
            if name == "broken_D"
            else np.geomspace(1e16, 1e24, 60)
        }
    loss = law.predict(PLANTED[name], x)
    return law, x, loss


def log_of(x):
    return {k: np.log(v) for k, v in x.items()}


def test_data_constrained_gives_the_published_losses():
    law = LAWS["data_constrained_tied"]
    for N, D, loss in ((6.34e9, 242e9, 2.2256440889984477), (8.67e9, 178e9, 2.2269634075087867)):
        # published values, to a few units in the last place
        assert law.predict(law.PUBLISHED, {"N": N, "D": D, "U": 25e9}) == pytest.approx(loss, rel=1e-14)
        untied = {**law.PUBLISHED, "beta": law.PUBLISHED["alpha"]}
        got = LAWS["data_constrained"].predict(untied, {"N": N, "D": D, "U": 25e9})
        assert got == pytest.approx(loss, rel=1e-14)


def test_data_constrained_optimum_is_the_published_one():
    law, budget = LAWS["data_constrained_tied"], 6 * 8.67e9 * 178e9
    N = np.geomspace(1e9, 1e11, 400_001)
    loss = law.predict(law.PUBLISHED, {"N": N, "D": budget / 6 / N, "U": 25e9})
    best = N[np.argmin(loss)]
    # printed with three figures
    assert best == pytest.approx(6.80e9, rel=2e-3)
    assert budget / 6 / best == pytest.approx(227e9, rel=5e-3)
    assert budget / 6 / best / 25e9 == pytest.approx(9.08, rel=2e-3)


def test_effective_epochs():
    """Values that follow from R* = 15.387756: four passes are nearly as good as new tokens."""
    got = effective(1.0, np.array([1.0, 4.0, 16.0, 40.0]), 15.387756)
    assert got == pytest.approx([1.0, 3.726, 10.582, 15.167], abs=5e-4)
    assert effective(10.0, 4.0, 15.0) == 4.0


def test_overtraining_is_tied_in_other_words():
    law, x, loss = planted_table("overtraining")
    p = PLANTED["overtraining"]
    tied = {"E": p["E"], "A": p["a"] / 6 ** p["eta"], "B": p["b"] / 6 ** p["eta"], "alpha": 2 * p["eta"]}
    assert LAWS["tied"].predict(tied, x) == pytest.approx(loss, rel=1e-13)
    mine, theirs = law.optimum(p, 1e21), LAWS["tied"].optimum(tied, 1e21)
    assert [mine[k] for k in "ND"] == pytest.approx([theirs[k] for k in "ND"], rel=1e-12)
    assert mine["D"] / mine["N"] == pytest.approx((p["b"] / p["a"]) ** (0.5 / p["eta"]), rel=1e-12)


def test_broken_power_has_two_slopes():
    p = PLANTED["broken_D"]
    for x, slope in ((1e-3, p["c0"]), (1e22, p["c0"] + p["c1"])):
        low, high = (LAWS["broken_D"].predict({**p, "E": 0.0}, {"D": x * k}) for k in (1.0, 1.001))
        # 1e-9: three decimals of a slope read over a step of 1e-3, with 16 digits
        assert -np.log(high / low) / np.log(1.001) == pytest.approx(slope, abs=1e-9)


def test_steps_batch_limits():
    """Far above the critical batch only steps count; far below it only their product with the batch."""
    law, p = LAWS["steps_batch"], PLANTED["steps_batch"]
    wide = law.predict(p, {"N": 1e9, "S": 1e5, "B": np.array([1e13, 1e14])})
    assert wide[0] == pytest.approx(wide[1], rel=1e-7)
    narrow = law.predict(p, {"N": 1e9, "S": np.array([1e12, 1e11]), "B": np.array([1.0, 10.0])})
    assert narrow[0] == pytest.approx(narrow[1], rel=1e-5)


@pytest.mark.parametrize("name", PLANTED)
def test_planted_law_is_recovered(name):
    law, x, loss = planted_table(name)
    _, point = solve(law, log_of(x), loss, loss="least_squares")
    assert point.status == "converged", point.reasons
    # noise-free rows have 16 digits; these surfaces' condition numbers (up to 1e7 in J'J) leave half
    for key, value in PLANTED[name].items():
        assert point.params[key] == pytest.approx(value, rel=1e-6), key


@pytest.mark.parametrize("name", PLANTED)
def test_gradient_against_differences(name):
    law, x, loss = planted_table(name)
    problem = make_problem(law, log_of(x), loss * 1.01)
    p = problem.from_params({k: v * 1.05 for k, v in PLANTED[name].items()})
    weights, rule = np.ones((1, len(loss))), RowLoss("least_squares", 1.0)
    got = problem.evaluate(p, weights, rule).gradient_BxK[0]
    assert np.isfinite(got).all()
    for k in range(p.shape[1]):
        step = np.zeros_like(p)
        step[0, k] = 1e-5 * max(1.0, abs(p[0, k]))
        up, down = (problem.evaluate(p + s * step, weights, rule).value_B[0] for s in (1, -1))
        # central differences over 1e-5 keep about nine of the objective's 16 digits
        assert (up - down) / (2 * step[0, k]) == pytest.approx(got[k], rel=1e-4, abs=1e-6 * abs(got).max())


@pytest.mark.parametrize("name", PLANTED)
def test_coordinates_are_undone(name):
    law, x, loss = planted_table(name)
    problem = make_problem(law, log_of(x), loss)
    back = problem.to_params(problem.from_params(PLANTED[name]))
    for key, value in PLANTED[name].items():
        assert float(back[key][0]) == pytest.approx(value, rel=1e-10)


@pytest.mark.parametrize("name, pinned", [("overtraining", "E"), ("data_constrained_tied", "R_N"),
                                          ("steps_batch", "B_crit"), ("broken_D", "f")])  # fmt: skip
def test_any_constant_can_be_pinned(name, pinned):
    law, x, loss = planted_table(name)
    _, point = solve(law, log_of(x), loss, loss="least_squares", fixed={pinned: PLANTED[name][pinned]})
    assert point.status == "converged", point.reasons
    for key, value in PLANTED[name].items():
        assert point.params[key] == pytest.approx(value, rel=1e-6), key


def test_unique_tokens_are_read_under_another_name():
    _law, x, loss = planted_table("data_constrained_tied")
    table = {"N": x["N"] / 1e6, "D": x["D"] / 1e9, "pool": x["U"] / 1e9, "loss": loss}
    table["pool"] = [None, *table["pool"][1:]]
    fit = fits.fit_table(
        table, "data_constrained_tied", columns={"params": "N", "tokens": "D", "unique_tokens": "pool"},
        param_unit=1e6, token_unit=1e9, bootstraps=0, sensitivity=False, loss="least_squares",
    )  # fmt: skip
    assert fit.params["R_D"] == pytest.approx(15.4, rel=1e-5)
    assert fit.rows[0]["outcome"] == "excluded" and "unique_tokens" in fit.rows[0]["reason"]
    assert fit.predict(params=1e9, tokens=1e11, unique_tokens=1e10) > 0
    with pytest.raises(fits.FitError, match="unique_tokens"):
        fit.predict(params=1e9, tokens=1e11)
    with pytest.raises(fits.FitError, match="no column 'unique_tokens'"):
        fits.fit_table({"params": x["N"], "tokens": x["D"], "loss": loss}, "data_constrained")


def test_a_unit_of_parameters_holds_for_those_of_the_repeated_block():
    table = {"params": [100.0, 200.0], "recurrent_params": [50.0, 60.0], "iterations": [2, 4],
             "tokens": [1e9, 2e9], "loss": [3.0, 2.9]}  # fmt: skip
    needs = ("params", "recurrent_params", "iterations", "tokens", "loss")
    rows = clean(table, needs=needs, param_unit=1e6)
    assert rows.params.tolist() == [1e8, 2e8] and rows.more["recurrent_params"].tolist() == [5e7, 6e7]


DOC = Path(__file__).parents[2] / "docs" / "laws.md"


def test_a_users_law_from_a_file(tmp_path):
    """The one in the docs."""
    [code] = re.findall(r"```python\n(.*?)```", DOC.read_text(), re.S)
    (tmp_path / "mine.py").write_text(code)
    D = np.geomspace(1e7, 1e11, 30)
    table = {"params": 1e8 + 0 * D, "tokens": D, "loss": 1.5 + 100 * (D + 5e7) ** -0.3}
    try:
        fit = fits.fit_table(table, f"{tmp_path}/mine.py:Shifted", bootstraps=0, sensitivity=False)
        assert fit.params["D0"] == pytest.approx(5e7, rel=1e-4)
        fits.fit_table(table, f"{tmp_path}/mine.py:Shifted", bootstraps=0, sensitivity=False)  # read again
    finally:
        LAWS.pop("shifted", None)
    with pytest.raises(fits.FitError, match="defines no fits.Law class 'Other'"):
        fits.get_law(f"{tmp_path}/mine.py:Other")
    with pytest.raises(fits.FitError, match="is not a file"):
        fits.get_law("nowhere.py:X")


def test_registered_names_are_not_taken_twice():
    class Fake(fits.Law):
        name, formula, parameters = "chinchilla", "L = E", ("E",)

    with pytest.raises(fits.FitError, match="taken by another law"):
        register_law(Fake())
    with pytest.raises(fits.FitError, match="must be an object"):
        register_law("chinchilla")


def test_docs_list_every_law():
    text = DOC.read_text()
    assert [n for n in LAWS if f"`{n}`" not in text] == []
