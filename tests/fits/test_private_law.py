"""DP-SGD at equal batch over noise: total noise by simulation, equal trainings, best steps by a search."""

import numpy as np
import pytest
from scipy.optimize import minimize_scalar

from fits.laws import get_law
from fits.laws.private import privacy
from fits.planted import STUDIES

LAW, P = get_law("dp_sgd"), STUDIES["dp_sgd"][0]


def answered(question, **given):
    arrays = {k: np.array([v]) for k, v in P.items()}
    got = LAW.questions[question].answer(LAW, arrays, given)
    return {k: float(np.squeeze(v)) for k, v in got.items()}


def test_total_noise_is_that_of_the_mean_over_steps():
    """The mean of S noisy gradients, each of noise sigma / B, has the noise of 1 / (eta examples 2^0.5)."""
    batch, sigma, steps, examples = 512, 3.0, 40, 60_000
    rng = np.random.default_rng(0)
    means = (sigma / batch * rng.standard_normal((20_000, steps))).mean(1)
    total = 1 / privacy(batch, sigma, steps, examples)
    # a standard deviation of 20,000 draws is known to 0.5 %: three of that
    assert means.std() == pytest.approx(total / np.sqrt(2) / examples, rel=0.015)
    assert total == pytest.approx(np.sqrt(2 / steps) * sigma * examples / batch, rel=1e-14)


def test_a_hundredth_of_the_batch_trains_alike():
    """On a quadratic without sampling noise the losses agree at equal B / sigma, and not at equal sigma."""
    given = dict(batch=32768.0, sigma=2.5, steps=200.0, examples=1.28e6)
    small = answered("scale", times=128.0, **given)
    assert (small["batch"], small["sigma"], small["steps"]) == (256.0, pytest.approx(0.01953125), 200.0)
    assert small["noise"] == pytest.approx(small["noise_scaled"], rel=1e-14)
    assert small["examples_seen"] == pytest.approx(32768 * 200 / 128)

    def trained(batch, sigma, seed):
        rng, w = np.random.default_rng(seed), np.ones(4000)
        for _ in range(200):
            w -= 0.1 * (w + 1e3 * sigma / batch * rng.standard_normal(4000))
        return w**2 / 2

    large, other = trained(32768, 2.5, 0), trained(small["batch"], small["sigma"], 1)
    error = np.hypot(large.std(), other.std()) / np.sqrt(4000)
    assert abs(large.mean() - other.mean()) < 4 * error  # four standard errors
    wrong = trained(small["batch"], 2.5, 2)
    assert wrong.mean() > 1000 * large.mean()


def test_best_steps_at_a_total_noise():
    noise, examples, batch = 2.0, 1.28e6, 16384.0
    got = answered("steps", noise=noise, examples=examples, batch=batch)

    def sigma_of(steps):
        return batch / examples * noise * np.sqrt(steps / 2)

    def loss(log_steps):
        S = np.exp(log_steps)
        return float(LAW.predict(P, {"S": S, "Q": batch / sigma_of(S)}))

    best = minimize_scalar(loss, bounds=(0.0, 25.0), method="bounded", options={"xatol": 1e-9})
    # the loss is flat at its minimum: a search on its values keeps about half of the 16 digits
    assert np.log(got["steps"]) == pytest.approx(best.x, abs=1e-5)
    assert got["loss"] == pytest.approx(best.fun, rel=1e-12)
    assert got["sigma"] == pytest.approx(sigma_of(got["steps"]), rel=1e-12)
    assert 1 / privacy(batch, got["sigma"], got["steps"], examples) == pytest.approx(noise, rel=1e-12)
    least = answered("steps", noise=noise, examples=examples, batch=got["least_batch"])
    assert least["sigma"] == pytest.approx(2.0, rel=1e-12) and least["loss"] == pytest.approx(got["loss"])


def test_more_noise_wants_fewer_steps():
    got = [answered("steps", noise=n, examples=1e6, batch=4096.0) for n in (0.5, 2.0, 8.0)]
    assert [g["steps"] for g in got] == sorted((g["steps"] for g in got), reverse=True)
    assert [g["loss"] for g in got] == sorted(g["loss"] for g in got)
