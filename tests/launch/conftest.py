"""What the commands train here are programs of milliseconds."""

import pytest
from few_optimisations import few_optimisations


@pytest.fixture(autouse=True, scope="module")
def compiles(own_programs):
    """Few optimisations, in the processes that the commands start too."""
    with few_optimisations():
        yield
