"""Planted tables and published ones."""

import pathlib

import numpy as np
import pytest

SHARED = pathlib.Path(__file__).resolve().parents[3] / "shared" / "data"
PLANTED = {"E": 1.8, "A": 480.0, "B": 2100.0, "alpha": 0.35, "beta": 0.37}


def planted_loss(N, D, p=None):
    """Chinchilla's surface, written without the library."""
    p = p or PLANTED
    return p["E"] + p["A"] * N ** -p["alpha"] + p["B"] * D ** -p["beta"]


def planted_table(noise=0.0, seed=0, size_effect=0.0, p=None):
    """Six budgets by seven sizes about the optimum; log-normal noise by row and by size."""
    rng = np.random.default_rng(seed)
    ladder = 1e8 * 1.6 ** np.arange(12)
    N = np.concatenate([ladder[i : i + 7] for i in range(6)])
    C = np.repeat(np.geomspace(1e19, 3e21, 6), 7)
    D = C / 6 / N
    size = np.round(np.log(N / 1e8) / np.log(1.6)).astype(int)
    error = noise * rng.standard_normal(N.size) + size_effect * rng.standard_normal(12)[size]
    return {"params": N, "tokens": D, "flops": C, "loss": planted_loss(N, D, p) * np.exp(error)}


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
