"""Of many cases alike a few stand for all: in the fast tests, and in ``make test``."""

import pytest


def slow_but(quick, cases):
    """The cases, marked slow but for those of ``quick``, which must be among them."""
    return _marked(pytest.mark.slow, quick, cases)


def long_but(kept, cases):
    """The cases of a slow test, marked long but for those of ``kept``, which must be among them."""
    return _marked(pytest.mark.long, kept, cases)


def _marked(mark, kept, cases):
    assert {*kept} <= {*cases}, kept
    return [name if name in kept else pytest.param(name, marks=mark) for name in cases]
