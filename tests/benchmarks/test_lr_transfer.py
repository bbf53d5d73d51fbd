"""The optimum of the learning-rate benchmark, on losses whose optimum is known."""

import numpy as np
import pytest
from benchmark_script import load_script


@pytest.fixture(scope="module")
def bench():
    return load_script("lr_transfer")


def test_optimum_of_a_parabola_and_its_error_from_seeds(bench):
    x = np.arange(-10.0, -3)
    exact = [2 + 0.05 * (x + 6.3) ** 2] * 2
    got = bench.optimum(x, exact)
    assert got["log2_lr"] == pytest.approx(-6.3) and got["stderr"] < 1e-6 and got["inside"]
    # seeds 0.4 octaves apart: a standard error of half of that, the scatter about the parabola still none
    apart = bench.optimum(x, [2 + 0.05 * (x + 6.1) ** 2, 2 + 0.05 * (x + 6.5) ** 2])
    assert apart["log2_lr"] == pytest.approx(-6.3) and apart["stderr"] == pytest.approx(0.2)
    assert not bench.optimum(x, [2 + 0.05 * (x + 1.0) ** 2] * 2)["inside"]


def test_standard_error_holds_the_scatter_about_the_parabola(bench):
    """Against the spread of vertices over many draws of noise."""
    rng, x = np.random.default_rng(0), np.arange(-8.0, -3)
    drawn = []
    for noise in rng.normal(0, 2e-3, (400, 5)):
        loss = 2 + 0.05 * (x + 6.0) ** 2 + noise
        drawn.append(bench.optimum(x, [loss]))
    errors = np.array([d["stderr"] for d in drawn])
    spread = np.std([d["log2_lr"] for d in drawn])
    # five points, two degrees of freedom: the root mean square is what estimates the spread
    np.testing.assert_allclose(np.sqrt(np.mean(errors**2)), spread, rtol=0.15)


def test_shift_from_the_narrowest_to_the_widest(bench):
    x = np.array(bench.LOG2_LRS, float)
    losses = {f"{n} {w}": [2 + 0.1 * (x + 6) ** 2] * 2 for n in ("standard", "mup") for w in bench.WIDTHS}
    losses[f"standard {bench.WIDTHS[-1]}"] = [2 + 0.1 * (x + 7.5) ** 2] * 2
    moves = bench.shifts({"losses": losses})
    assert moves["standard"]["octaves"] == pytest.approx(-1.5) and moves["mup"]["octaves"] == pytest.approx(0)
