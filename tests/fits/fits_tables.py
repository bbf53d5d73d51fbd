"""Planted tables for the tests of fits."""

import numpy as np

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
