"""Schedules against closed forms and optax, and full decay at the cell's own last step."""

import numpy as np
import optax
import pytest

from scaling.schedules import FALLS, SCHEDULES, learning_rate

HP = {"lr": 0.3, "steps": 100.0, "warmup": 10.0, "decay_fraction": 0.2, "final_fraction": 0.0}
HP = {k: np.float32(v) for k, v in HP.items()}


def values(name, decay="linear", steps=100, **changes):
    return np.asarray(learning_rate(name, np.arange(steps), HP | changes, decay), np.float64)


@pytest.mark.parametrize("name", SCHEDULES)
def test_warmup_is_linear(name):
    # float32 arithmetic
    np.testing.assert_allclose(values(name)[:10], 0.3 * np.arange(1, 11) / 10, rtol=1e-6)


def test_wsd():
    lr = values("wsd")
    np.testing.assert_allclose(lr[10:80], 0.3, rtol=1e-6)
    np.testing.assert_allclose(lr[80:], 0.3 * (1 - np.arange(20) / 20), rtol=1e-5)
    np.testing.assert_allclose(values("wsd", final_fraction=0.1)[99], 0.3 * (1 - 0.9 * 19 / 20), rtol=1e-5)


def test_one_minus_square_root_cooldown():
    lr = values("wsd", "1-sqrt")
    np.testing.assert_allclose(lr[10:80], 0.3, rtol=1e-6)
    # 1 - sqrt(p) cancels near p = 1: float32's 6e-8 against 0.025
    np.testing.assert_allclose(lr[80:], 0.3 * (1 - np.sqrt(np.arange(20) / 20)), rtol=1e-5)


@pytest.mark.parametrize("decay", FALLS)
@pytest.mark.parametrize("final_fraction", [0.0, 0.1])
@pytest.mark.parametrize(("steps", "fraction"), [(100, 0.2), (997, 0.13), (12_345, 0.3)])
def test_wsd_is_its_constant_trunk_until_the_cooldown(decay, final_fraction, steps, fraction):
    """Bit for bit: a branch may leave the trunk's checkpoint at the start of its cooldown."""
    hp = {
        "steps": np.float32(steps),
        "decay_fraction": np.float32(fraction),
        "final_fraction": np.float32(final_fraction),
    }
    begin = int((1 - fraction) * steps)
    branch, trunk = (
        np.asarray(learning_rate(name, np.arange(steps), HP | hp, decay)) for name in ("wsd", "constant")
    )
    assert branch.dtype == np.float32
    np.testing.assert_array_equal(branch[: begin + 1], trunk[: begin + 1])
    assert np.all(branch[begin + 2 :] < trunk[begin + 2 :])


def test_cosine_is_optax():
    theirs = optax.cosine_decay_schedule(0.3, 90, alpha=0.1)
    ours = values("cosine", final_fraction=0.1)
    np.testing.assert_allclose(ours[10:], [float(theirs(i)) for i in range(90)], rtol=1e-5)


def test_linear_is_optax():
    theirs = optax.linear_schedule(0.3, 0.03, 90)
    ours = values("linear", final_fraction=0.1)
    np.testing.assert_allclose(ours[10:], [float(theirs(i)) for i in range(90)], rtol=1e-5)


def test_inverse_square_root():
    lr = values("inverse_sqrt")
    # Vaswani et al. 2017, equation 3, in the peak and the step that it has at the end of warm-up
    n = np.arange(1, 101)
    want = 0.3 * np.sqrt(10) * np.minimum(n**-0.5, n * 10**-1.5)
    np.testing.assert_allclose(lr[:80], want[:80], rtol=1e-5)
    np.testing.assert_allclose(lr[80:], want[80:] * (1 - np.arange(20) / 20), rtol=1e-5)


def test_rex():
    progress, share = [0.0, 0.5, 0.9, 1.0], [1.0, 2 / 3, 0.1 / 0.55, 0.0]
    lr = learning_rate("rex", np.array(progress) * 100, HP | {"warmup": np.float32(0), "lr": np.float32(1)})
    np.testing.assert_allclose(lr, share, rtol=1e-6, atol=1e-7)
    p = np.arange(90) / 90
    want = 0.3 * (0.1 + 0.9 * (1 - p) / (0.5 + 0.5 * (1 - p)))
    np.testing.assert_allclose(values("rex", final_fraction=0.1)[10:], want, rtol=1e-5)


@pytest.mark.parametrize("decay", FALLS)
@pytest.mark.parametrize("name", sorted(set(SCHEDULES) - {"constant"}))
def test_full_decay_at_the_end(name, decay):
    assert float(learning_rate(name, 100, HP, decay)) == pytest.approx(0.0, abs=1e-7)
    # at the final fraction of the value without a decay
    peak = 0.3 * np.sqrt(10 / 101) if name == "inverse_sqrt" else 0.3
    last = learning_rate(name, 100, HP | {"final_fraction": np.float32(0.1)}, decay)
    assert float(last) == pytest.approx(0.1 * peak, rel=1e-6)


def test_constant_never_decays():
    assert float(learning_rate("constant", 100, HP)) == pytest.approx(0.3)
