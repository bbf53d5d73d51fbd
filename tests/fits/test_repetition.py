"""What repeated tokens are worth: the published figures through the question."""

import math

import pytest

import fits


@pytest.mark.parametrize("passes, worth", [(4, 3.726), (16, 10.582), (40, 15.167)])
def test_published_effective_epochs(passes, worth):
    got = fits.ask("data_constrained_tied", "worth", params=1e9, tokens=passes * 1e10, unique_tokens=1e10)
    assert got["effective_epochs"] == pytest.approx(worth, abs=5e-4)  # printed with three decimals
    assert got["share"] == pytest.approx(worth / passes, abs=5e-4)


def test_the_last_pass_is_worth_what_was_asked():
    """dD'/dD by a difference, against the share."""
    got = fits.ask("data_constrained_tied", "passes", worth=0.2)
    step = 1e-4
    up, down = (
        fits.ask(
            "data_constrained_tied", "worth", params=1e9, tokens=1e9 * (got["passes"] + s), unique_tokens=1e9
        )["effective_epochs"]
        for s in (step, -step)
    )
    # a central difference over 1e-4 passes errs by its square
    assert (up - down) / (2 * step) == pytest.approx(0.2, rel=1e-6)
    assert got["passes"] == pytest.approx(1 - 15.387756 * math.log(0.2), rel=1e-12)
