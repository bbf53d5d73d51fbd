"""Power of a planned grid: against the linear theory, and what bad plans are told."""

import numpy as np
import pytest

import fits
from fits.objective import RowLoss, make_problem
from fits.power import power

TRUTH = {"E": 1.8, "A": 480.0, "B": 2100.0, "alpha": 0.35, "beta": 0.37}


def isoflop():
    return [(k * 1e8 * (c / 1e19) ** 0.5, c / 6 / (k * 1e8 * (c / 1e19) ** 0.5))
            for c in (1e18, 1e19, 1e20, 1e21) for k in (0.25, 0.5, 1, 2, 4)]  # fmt: skip


def linear_deviation(grid, noise):
    """Standard deviation of a by the delta method on the least-squares covariance."""
    N, D = np.array(grid).T
    law = fits.get_law("chinchilla")
    problem = make_problem(law, {"N": np.log(N), "D": np.log(D)}, law.predict(TRUTH, {"N": N, "D": D}))
    p = problem.from_params(TRUTH)
    H = problem.evaluate(p, np.ones((1, len(N))), RowLoss("least_squares", 1.0)).majoriser_BxKxK[0]
    total = TRUTH["alpha"] + TRUTH["beta"]
    slope = np.array([0, 0, 0, -TRUTH["beta"] / total**2, TRUTH["alpha"] / total**2])
    return noise * np.sqrt(slope @ np.linalg.solve(H, slope))


def test_width_of_the_exponent_is_the_linear_one():
    grid, noise = isoflop(), 1e-4  # little enough noise for the law to be linear in it
    got = power("chinchilla", TRUTH, noise, grid, budget_target=1e22, quantity="a", simulations=400,
                loss="least_squares")  # fmt: skip
    assert got.failed == 0 and got.truth == pytest.approx(0.37 / 0.72)
    # a quantile range of 400 draws has a standard error of about 6 %
    assert got.half_width == pytest.approx(1.96 * linear_deviation(grid, noise), rel=0.2)


def test_more_noise_and_shared_effects_widen():
    def width(noise, **options):
        return power(
            "chinchilla", TRUTH, noise, isoflop(), budget_target=1e22, simulations=100, **options
        ).half_width

    quiet = width(1e-3)
    assert width(4e-3) > 2 * quiet
    assert width(1e-3, size_effect=4e-3) > 1.5 * quiet


def test_no_noise_no_width():
    got = power("chinchilla", TRUTH, 0.0, isoflop(), budget_target=1e22, simulations=20)
    # every study is the planted surface itself
    assert got.half_width < 1e-6 and got.estimate == pytest.approx(got.truth, rel=1e-6)
    assert "20 runs" in str(got)


@pytest.mark.parametrize("change, words", [
    ({"quantity": "N"}, "quantity is 'N'"),
    ({"noise": -1.0}, "noise is -1.0"),
    ({"grid": [(1e8, 1e9)]}, "grid has 1 runs"),
    ({"grid": [(1e8, -1e9)] * 9}, "positive"),
    ({"simulations": 3}, "simulations is 3"),
    ({"params": {"E": 1.0}}, "params lacks A, B, alpha, beta"),
    ({"law": "power_C"}, "power needs one in N and D"),
])  # fmt: skip
def test_bad_plans_are_refused(change, words):
    plan = {"law": "chinchilla", "params": TRUTH, "noise": 1e-3, "grid": isoflop(), "budget_target": 1e22}
    with pytest.raises(fits.FitError, match=words):
        power(**{**plan, **change})
