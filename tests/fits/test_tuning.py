"""Learning rate and batch: the published constants, the square root, and the trade of steps for tokens."""

import numpy as np
import pytest

import fits
from fits.laws import get_law
from fits.planted import STUDIES


def test_the_published_rate_and_batch():
    """Step Law at 1B parameters and 100B tokens, by plain arithmetic."""
    got = fits.ask("tuned_ND", "lr", params=1e9, tokens=1e11)
    assert got["lr"] == pytest.approx(1.79 * 1e9**-0.713 * 1e11**0.307, rel=1e-12)
    assert got["lr"] == pytest.approx(1.64e-3, rel=5e-3)
    batch = fits.ask("tuned_D", "batch", tokens=1e11)
    assert batch["batch"] == pytest.approx(0.58 * 1e11**0.571, rel=1e-12)
    assert 1.0e6 < batch["batch"] < 1.2e6 and batch["steps"] * batch["batch"] == pytest.approx(1e11)


def test_another_batch_by_the_square_root():
    got = fits.ask("tuned_ND", "lr", params=1e9, tokens=1e11, batch=4e6, tuned_batch=1e6)
    assert got["lr_at_batch"] == pytest.approx(2 * got["lr"], rel=1e-12)
    same = fits.ask("tuned_ND", "lr", params=1e9, tokens=1e11)
    assert same["lr_at_batch"] == same["lr"] == got["lr"]


def test_steps_are_traded_for_tokens():
    """At the critical batch twice the least of each; every point of the hyperbola has one loss."""
    law, p = get_law("steps_batch"), STUDIES["steps_batch"][0]
    asked = {"params": 1e9, "steps": 3e4, "batch_tokens": 2e5}
    got = law.questions["trade"].answer(law, {k: np.array([v]) for k, v in p.items()}, asked)
    assert got["steps_at_critical"] == pytest.approx(2 * got["least_steps"])
    assert got["steps_at_critical"] * p["B_crit"] == pytest.approx(2 * got["least_tokens"])
    batch = np.geomspace(1e4, 1e8, 9)
    steps = got["least_steps"] * (1 + p["B_crit"] / batch)
    loss = law.predict(p, {"N": 1e9, "S": steps, "B": batch})
    assert loss == pytest.approx(np.full(9, got["loss"]), rel=1e-12)
    assert steps[-1] == pytest.approx(got["least_steps"], rel=0.01)
    assert steps[0] * batch[0] == pytest.approx(got["least_tokens"], rel=0.02)
