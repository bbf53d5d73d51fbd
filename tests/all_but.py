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
    values = lambda case: case if isinstance(case, tuple) else (case,)  # noqa: E731
    return [case if case in kept else pytest.param(*values(case), marks=mark) for case in cases]
