"""Other ways to fit the Chinchilla law, for fit_speed.py: what papers and packages do."""

from __future__ import annotations

import functools
import itertools
import math
import pathlib
import resource
import tempfile
import time
import warnings

import numpy as np

DELTA = 1e-3
NAMES = ("E", "A", "B", "alpha", "beta")


class Clock:
    """CPU seconds (with children) and wall seconds of a block."""

    def __enter__(self):
        self.start = self._cpu(), time.perf_counter()
        return self

    def __exit__(self, *_):
        cpu, wall = self.start
        self.cpu, self.wall = self._cpu() - cpu, time.perf_counter() - wall

    @staticmethod
    def _cpu():
        use = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
        return sum(u.ru_utime + u.ru_stime for u in use)


def log_objective(theta, log_n, log_d, log_l, weights=1.0):
    """Value and gradient at (log E, log A, log B, alpha, beta), written for SciPy."""
    e, a, b, alpha, beta = theta
    terms = np.stack([np.full_like(log_n, e), a - alpha * log_n, b - beta * log_d])
    top = terms.max(0)
    scaled = np.exp(terms - top)
    total = scaled.sum(0)
    r = top + np.log(total) - log_l
    size = np.abs(r)
    slope = weights * np.clip(r, -DELTA, DELTA) * (scaled / total)
    value = (weights * np.where(size <= DELTA, 0.5 * r * r, DELTA * (size - 0.5 * DELTA))).sum()
    sums = slope.sum(1)
    return value, np.array([*sums, -(slope[1] @ log_n), -(slope[2] @ log_d)])


def logs(table):
    return np.log(table["N"]), np.log(table["D"]), np.log(table["L"])


def published_starts() -> np.ndarray:
    """The 4,500 starts of Hoffmann et al. 2022, appendix D.3: log E, log A, log B, alpha, beta."""
    exponents, e, ab = np.arange(0, 2.01, 0.5), np.arange(-1, 1.01, 0.5), np.arange(0, 25.01, 5.0)
    return np.array(list(itertools.product(e, ab, ab, exponents, exponents)))


def lbfgsb(table, starts) -> list:
    from scipy import optimize

    arguments = logs(table)
    return [optimize.minimize(log_objective, s, arguments, method="L-BFGS-B", jac=True) for s in starts]


def chinchilla_package(table, per_axis: int):
    """``Chinchilla.fit`` over its documented grid (README, "Fitting the scaling law on existing dataset").

    Its log-Huber loss with our delta, its own optimiser and precision; only its figure is left out.
    Returns E, A, B, alpha, beta and the seconds of ``fit``.
    """
    import pandas as pd
    from chinchilla import Chinchilla
    from chinchilla._metrics import log_huber

    wide, steep = np.linspace(1, 10, per_axis), np.linspace(0.1, 0.7, per_axis)
    grid = {"E": np.linspace(1, 2, per_axis), "a": wide, "b": wide, "alpha": steep, "beta": steep}
    with tempfile.TemporaryDirectory() as folder:
        columns = {"C": 6 * table["N"] * table["D"], "N": table["N"], "D": table["D"], "loss": table["L"]}
        pd.DataFrame(columns).to_csv(pathlib.Path(folder) / "df.csv", index=False)
        peer = Chinchilla(
            folder, param_grid=grid, loss_fn=functools.partial(log_huber, delta=DELTA), log_level=50
        )
        peer.visualizer.optim = lambda *a, **k: None
        with Clock() as clock, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            peer.fit(parallel=False)
    return [float(getattr(peer, n)) for n in NAMES], clock


def exponent_grid_nelder_mead(table, per_axis: int = 32):
    """Non-negative least squares of the coefficients at every grid point, then Nelder-Mead from the best."""
    from scipy import optimize

    def coefficients(pair):
        with np.errstate(all="ignore"):
            X = np.stack([np.ones_like(table["L"]), table["N"] ** -pair[0], table["D"] ** -pair[1]], 1)
        scale = np.linalg.norm(X, axis=0)
        if not np.isfinite(scale).all() or not (scale > 0).all():
            return np.zeros(3), math.inf
        best, norm = optimize.nnls(X / scale, table["L"])
        return best / scale, norm

    axis = np.linspace(0.05, 1.5, per_axis)
    start = min(itertools.product(axis, axis), key=lambda pair: coefficients(pair)[1])
    tight = {"xatol": 1e-10, "fatol": 1e-14, "maxfev": 2000}
    end = optimize.minimize(lambda p: coefficients(p)[1] ** 2, start, method="Nelder-Mead", options=tight)
    return (*coefficients(end.x)[0], *end.x)


def bfgs_refits(table, start, weights) -> list:
    """One BFGS run per resample from the point fit, with gradient: the published bootstrap."""
    from scipy import optimize

    arguments = logs(table)
    return [
        optimize.minimize(log_objective, start, (*arguments, w), method="BFGS", jac=True) for w in weights
    ]
