"""A fitted E beside a floor that is known."""

from types import SimpleNamespace

import pytest

from fits.known import floor_words, known_floor

MANIFEST = {"data": {"ideal_loss": 1.6, "entropy_rate": 1.59}}


def fit(**intervals):
    return SimpleNamespace(intervals=intervals)


@pytest.mark.parametrize(
    ("interval", "holds", "said"),
    [([1.5, 1.7], True, "holds it"), ([1.61, 1.7], False, "misses it"), (None, None, "+0.05000")],
)
def test_the_interval_is_held_against_the_ideal_loss(interval, holds, said):
    truth = known_floor(MANIFEST, fit(E={"estimate": 1.65, "95": interval}))
    assert truth["holds"] is holds and floor_words(truth).endswith(said)
    assert "1.60000" in floor_words(truth) and "1.59000" in floor_words(truth)


def test_nothing_is_said_where_nothing_is_known():
    e = {"estimate": 1.65, "95": [1.5, 1.7]}
    assert known_floor({"data": {}}, fit(E=e)) is None
    assert known_floor(MANIFEST, fit(B=e)) is None
