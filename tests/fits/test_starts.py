"""Random starts never beat the reported optimum, and both derivations of one law end at one place."""

import numpy as np
import pytest
from benchmark_script import load_script
from fits_tables import PLANTED, planted_table

from fits.laws import Law, get_law
from fits.solve import solve


@pytest.fixture(scope="module")
def benchmark():
    return load_script("fit_speed")


def columns(table, loss="loss"):
    x = {v: np.log(np.asarray(table[c], float)) for v, c in (("N", "params"), ("D", "tokens"))}
    return x, np.asarray(table[loss], float)


def tables(request, name):
    if name == "epoch":
        table = request.getfixturevalue("epoch")
        return columns(table[table.kept == 1])
    if name == "kyo":
        return columns(request.getfixturevalue("kyo"))
    if name == "overtraining":
        table = request.getfixturevalue("overtraining")
        return columns(table[table.dataset == "c4_original"], "loss_eval1")
    return columns(planted_table(noise=0.003, size_effect=0.003 * (name == "planted, by size"), seed=5))


@pytest.mark.parametrize("name", ["epoch", "kyo", "overtraining", "planted", "planted, by size"])
def test_no_random_start_beats_the_reported_optimum(benchmark, request, name):
    x, y = tables(request, name)
    problem, point = solve(get_law("chinchilla"), x, y)
    study = benchmark.random_start_study(problem, point.objective, count=48, seed=3)
    # sums of a few hundred terms agree to about 1e-14
    assert study["lowest_over_reported"] > -1e-12
    assert study["elsewhere"] == 0.0
    # a study whose starts went nowhere would prove nothing
    assert study["at_optimum"] > 0.75


def test_a_start_that_is_beaten_is_noticed(benchmark):
    """The study of a value a tenth above the optimum must say that random starts go below it."""
    x, y = columns(planted_table(noise=0.003, seed=5))
    problem, point = solve(get_law("chinchilla"), x, y)
    study = benchmark.random_start_study(problem, 1.1 * point.objective, count=16)
    assert study["lowest_over_reported"] == pytest.approx(1 / 1.1 - 1, rel=1e-6)
    assert study["at_optimum"] == 0.0


def test_published_starts_are_4500_and_scipy_goes_no_lower(benchmark):
    starts = benchmark.peers.published_starts()
    assert starts.shape == (4500, 5)
    x, y = columns(planted_table(noise=0.003, seed=5))
    table = {"N": np.exp(x["N"]), "D": np.exp(x["D"]), "L": y}
    _, point = solve(get_law("chinchilla"), x, y)
    ours = benchmark.objective([point.params[n] for n in benchmark.NAMES], table)
    assert ours == pytest.approx(point.objective, rel=1e-10)
    picked = starts[np.random.default_rng(0).choice(4500, 60, replace=False)]
    lowest = min(end.fun for end in benchmark.peers.lbfgsb(table, picked))
    assert ours <= lowest * (1 + 1e-12)


def test_benchmark_gradient_is_that_of_its_objective(benchmark):
    t = planted_table(noise=0.003, seed=1)
    arrays = np.log(t["params"]), np.log(t["tokens"]), np.log(t["loss"])
    theta = np.array([0.5, 6.0, 7.5, 0.34, 0.36])
    _, gradient = benchmark.peers.log_objective(theta, *arrays)
    for k in range(5):
        step = 1e-6 * np.eye(5)[k]
        up, down = (benchmark.peers.log_objective(theta + s, *arrays)[0] for s in (step, -step))
        assert gradient[k] == pytest.approx((up - down) / 2e-6, rel=1e-4)  # central difference


def test_exponent_grid_peer_recovers_a_planted_law(benchmark):
    t = planted_table()
    found = benchmark.peers.exponent_grid_nelder_mead({"N": t["params"], "D": t["tokens"], "L": t["loss"]})
    assert found == pytest.approx([PLANTED[n] for n in benchmark.NAMES], rel=1e-3)


class ChinchillaByAutodiff(Law):
    """The Chinchilla law without its structure, so that it is fitted through JAX."""

    name, formula = "chinchilla by autodiff", "L = E + A / N^alpha + B / D^beta"
    parameters = ("E", "A", "B", "alpha", "beta")

    def __init__(self):
        self.twin = get_law("chinchilla")
        self.bounds = self.twin.bounds

    def predict(self, params, x, xp=np):
        return self.twin.predict(params, x, xp)

    def to_solver(self, params, centre, xp=np):
        # the value of each term at the mean run, so that the search is as well scaled as the other
        A = xp.log(params["A"]) - params["alpha"] * centre["N"]
        B = xp.log(params["B"]) - params["beta"] * centre["D"]
        return [xp.log(params["E"]), A, B, xp.log(params["alpha"]), xp.log(params["beta"])]

    def from_solver(self, p, centre, xp=np):
        alpha, beta = xp.exp(p[3]), xp.exp(p[4])
        A, B = xp.exp(p[1] + alpha * centre["N"]), xp.exp(p[2] + beta * centre["D"])
        return {"E": xp.exp(p[0]), "A": A, "B": B, "alpha": alpha, "beta": beta}

    def starts(self, x, y):
        first = {"E": 1.7, "A": 400.0, "B": 1500.0, "alpha": 0.33, "beta": 0.35}
        return [first, {**first, "E": 1.5, "alpha": 0.3}, {**first, "E": 1.9, "beta": 0.38}]


@pytest.mark.parametrize("loss", ["huber", "least_squares"])
def test_numpy_and_jax_paths_agree(epoch, loss):
    x, y = columns(epoch[epoch.kept == 1])
    _, ours = solve(get_law("chinchilla"), x, y, loss=loss)
    _, jax = solve(ChinchillaByAutodiff(), x, y, loss=loss)
    assert ours.status == jax.status == "converged"
    assert jax.objective == pytest.approx(ours.objective, rel=1e-12)
    for name, value in ours.params.items():
        assert jax.params[name] == pytest.approx(value, rel=1e-10), name
