"""The published tables, read from beside the checkout; a test that needs an absent one skips."""

import pathlib

import pytest

SHARED = pathlib.Path(__file__).resolve().parents[3] / "shared" / "data"


def shared(name):
    """A published table, or a skip that says why."""
    if not (SHARED / name).is_file():
        pytest.skip(f"the published table {name} is not in {SHARED}")
    import pandas as pd

    return pd.read_csv(SHARED / name)


@pytest.fixture(scope="session")
def epoch():
    """245 rows digitised from Hoffmann et al. 2022 by Besiroglu et al. 2024."""
    return shared("chinchilla_epoch.csv")


@pytest.fixture(scope="session")
def kyo():
    """The same figure in another digitisation, 234 rows."""
    return shared("chinchilla_kyo.csv")


@pytest.fixture(scope="session")
def overtraining():
    """104 runs of Gadre et al. 2024."""
    return shared("overtraining_mlfoundations.csv")
