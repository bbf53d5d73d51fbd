"""Schedules against closed forms and optax, and full decay at the cell's own last step."""

import numpy as np
import optax
import pytest

from scaling.schedules import SCHEDULES, learning_rate

HP = {"lr": 0.3, "steps": 100.0, "warmup": 10.0, "decay_fraction": 0.2, "final_fraction": 0.0}


def values(name, **changes):
    return np.asarray(learning_rate(name, np.arange(100), HP | changes), np.float64)


@pytest.mark.parametrize("name", SCHEDULES)
def test_warmup_is_linear(name):
    # float32 arithmetic
    np.testing.assert_allclose(values(name)[:10], 0.3 * np.arange(1, 11) / 10, rtol=1e-6)


def test_wsd():
    lr = values("wsd")
    np.testing.assert_allclose(lr[10:80], 0.3, rtol=1e-6)
    np.testing.assert_allclose(lr[80:], 0.3 * (1 - np.arange(20) / 20), rtol=1e-5)
    np.testing.assert_allclose(values("wsd", final_fraction=0.1)[99], 0.3 * (1 - 0.9 * 19 / 20), rtol=1e-5)


def test_cosine_is_optax():
    theirs = optax.cosine_decay_schedule(0.3, 90, alpha=0.1)
    ours = values("cosine", final_fraction=0.1)
    np.testing.assert_allclose(ours[10:], [float(theirs(i)) for i in range(90)], rtol=1e-5)


def test_full_decay_at_the_end():
    for name in ("wsd", "cosine"):
        assert float(learning_rate(name, 100, HP)) == pytest.approx(0.0, abs=1e-7)
    assert float(learning_rate("constant", 100, HP)) == pytest.approx(0.3)
