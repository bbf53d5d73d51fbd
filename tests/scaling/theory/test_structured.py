"""SGD on structured features: the exact mean, SGD, and the best batch's law."""

import dataclasses

import numpy as np
import pytest

from scaling.config import validate_cell
from scaling.theory.cells import run_structured, structured_truths
from scaling.theory.sgd import structured_losses
from scaling.theory.structured import Structured, best_batch, excess


def test_the_mean_is_the_recursion_step_by_step():
    problem = Structured(1.7, 2.2, 12, rate=0.3, noise=0.4, batch=3)
    k = np.arange(1.0, 13)
    lam, s = k**-1.7, k ** (1.7 - 2.2)
    for t in range(60):
        E = lam @ s
        np.testing.assert_allclose(excess(problem, t), E, rtol=1e-9)  # float64, with 0.4 taken off
        keep = 1 - 2 * 0.3 * lam + 0.3**2 * lam**2 * (1 + 1 / 3)
        s = keep * s + 0.3**2 / 3 * lam * (0.4 + E)


def test_sgd_has_this_mean():
    problem, steps, draws = Structured(1.7, 2.2, 12, rate=0.2, noise=0.4, batch=3), [10, 60], 120
    losses = structured_losses(problem, steps, draws)
    error = losses.std(0, ddof=1) / draws**0.5
    exact = excess(problem, np.array(steps))
    # two comparisons at four standard errors, which must be tight
    assert (abs(losses.mean(0) - exact) < 4 * error).all() and (error < 0.1 * exact).all()


def test_the_best_batch_and_its_excess_follow_their_law():
    problem = Structured(2.0, 3.0, 64, noise=0.5)
    (low, high), (first, last) = np.array([best_batch(problem, c) for c in (1e3, 1e5)]).T
    # the limit is 1/2; with 256 modes 0.497 and 0.500, and 64 leave a little out at the last steps
    assert np.log(high / low) / np.log(100) == pytest.approx(problem.exponent, abs=0.015)
    assert -np.log(last / first) / np.log(100) == pytest.approx(problem.exponent, abs=0.015)


def test_the_best_batch_is_a_minimum_of_the_excess():
    problem = Structured(2.0, 3.0, 32, noise=0.5)
    best, least = best_batch(problem, 1e4)
    for m in (best / 1.5, best * 1.5):
        assert excess(dataclasses.replace(problem, batch=m), 1e4 / m) > least


class Never:
    """Keeps nothing."""

    def restore(self, like):
        return None

    def save(self, state):
        pass


def test_without_noise_there_is_no_law_of_the_batch():
    cell = {"trainer": {"name": "structured", "decay": 2.0, "target": 3.0, "modes": 8, "noise": 0.0}}
    cells = [validate_cell({**cell, "train": {"batch": 2, "steps": s}}) for s in (10, 1000)]
    assert structured_truths(cells) is None
    # asked to stop; after the last step there is nothing to stop
    assert run_structured(cells[1], lambda step: True, Never()) is None
    assert run_structured(cells[0], lambda step: True, Never())[0]["step"] == 10
    with pytest.raises(ValueError, match="end of what was tried"):
        best_batch(Structured(2.0, 1.5, 32, rate=0.1, noise=0.0), 1e3)


def test_bad_problems_are_refused():
    with pytest.raises(ValueError, match="decay"):
        Structured(0.9, 2.0, 8)
    with pytest.raises(ValueError, match="rate"):
        Structured(2.0, 2.0, 8, rate=1.5)
