"""Of many cases alike a few stand for all in the fast tests; ``make test`` runs every one."""

import pytest


def slow_but(quick, cases):
    """The cases, marked slow but for those of ``quick``, which must be among them."""
    assert {*quick} <= {*cases}, quick
    return [name if name in quick else pytest.param(name, marks=pytest.mark.slow) for name in cases]
