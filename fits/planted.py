"""Planted studies: for each law parameters and a grid that shows them, for tests and benchmarks."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np

from fits.errors import FitError
from fits.few_clusters import FewClusters
from fits.laws import COLUMN_OF, get_law
from fits.solve import solve
from fits.uncertainty import acts_by_its_log

NOISE = 2e-3  # standard deviation of the log of the fitted column, row by row


def _grid(**axes) -> dict[str, np.ndarray]:
    points = np.array(list(itertools.product(*axes.values())), float)
    return dict(zip(axes, points.T, strict=True))


def _over(low: float, high: float, count: int) -> np.ndarray:
    return np.geomspace(low, high, count)


def _with_ratio(x):
    """N and D from N and M = D / N."""
    return {"N": x["N"], "D": x["N"] * x["M"]}


def _with_block(x):
    """N_r from N and its share."""
    return {v: values for v, values in x.items() if v != "share"} | {"Nr": x["N"] * x["share"]}


# law: (parameters, grid, noise); the constants are near the papers' own where these are known
STUDIES: dict[str, tuple] = {
    "chinchilla": (
        {"E": 1.69, "A": 406.4, "B": 410.7, "alpha": 0.34, "beta": 0.28},
        lambda: _grid(N=_over(5e7, 1e10, 7), D=_over(1e9, 1e12, 6)), NOISE,
    ),
    "tied": (
        {"E": 1.9, "A": 480.0, "B": 1500.0, "alpha": 0.34},
        lambda: _grid(N=_over(5e7, 1e10, 7), D=_over(1e9, 1e12, 6)), NOISE,
    ),
    "kaplan": (
        {"Nc": 6.4e13, "Dc": 1.8e13, "alphaN": 0.076, "alphaD": 0.103},
        lambda: _grid(N=_over(1e6, 1e9, 7), D=_over(2e7, 2e10, 6)), NOISE,
    ),
    "power_N": ({"E": 1.7, "A": 400.0, "alpha": 0.34}, lambda: {"N": _over(1e6, 1e11, 30)}, NOISE),
    "power_D": ({"E": 1.7, "B": 400.0, "beta": 0.28}, lambda: {"D": _over(1e7, 1e13, 30)}, NOISE),
    "power_C": ({"E": 1.7, "K": 1000.0, "gamma": 0.15}, lambda: {"C": _over(1e16, 1e26, 30)}, NOISE),
    "product": (
        {"E": 0.8, "K": 60.0, "alpha": 0.1, "beta": 0.12},
        lambda: _grid(N=_over(1e8, 1e11, 7), D=_over(1e5, 1e9, 6)), NOISE,
    ),
    "overtraining": (
        {"E": 1.84, "a": 212.0, "b": 367.0, "eta": 0.136},
        lambda: _with_ratio(_grid(N=_over(1e7, 1e10, 6), M=_over(5, 640, 7))), NOISE,
    ),
    "data_constrained": (
        {"E": 1.8, "A": 480.0, "B": 2100.0, "alpha": 0.34, "beta": 0.37, "R_N": 6.0, "R_D": 14.0},
        lambda: _grid(N=_over(5e7, 3e10, 6), D=_over(1e9, 1e12, 7), U=(1e9, 1e10, 1e11)), NOISE,
    ),
    "data_constrained_tied": (
        {"E": 1.87, "A": 521.0, "B": 1488.0, "alpha": 0.3527, "R_N": 5.31, "R_D": 15.39},
        lambda: _grid(N=_over(5e7, 3e10, 6), D=_over(1e9, 1e12, 7), U=(1e9, 1e10, 1e11)), NOISE,
    ),
    "broken_D": (
        {"E": 1.5, "K": 300.0, "c0": 0.25, "c1": 0.3, "d": 3e9, "f": 0.4},
        lambda: {"D": _over(1e6, 1e13, 80)}, NOISE,
    ),
    "broken_C": (
        {"E": 1.2, "K": 400.0, "c0": 0.12, "c1": 0.15, "d": 1e20, "f": 0.5},
        lambda: {"C": _over(1e15, 1e25, 80)}, 5e-4,
    ),
    "steps_batch": (
        {"E": 1.6, "A": 300.0, "K": 60.0, "alpha": 0.33, "gamma": 0.4, "B_crit": 8e5},
        lambda: _grid(N=_over(1e7, 1e10, 5), S=_over(1e3, 1e6, 6), B=_over(3e4, 3e7, 5)), NOISE,
    ),
    "precision": (
        {"E": 2.76, "A": 4299.0, "B": 18060.0, "alpha": 0.4965, "beta": 0.4965, "gamma_w": 2.6745},
        lambda: _grid(N=_over(3e7, 1e9, 5), D=_over(1.5e9, 2.6e10, 4), P=(3, 4, 6, 8, 12, 16)), NOISE,
    ),
    "precision_joint": (
        {"E": 2.76, "A": 4299.0, "B": 18060.0, "alpha": 0.4965, "beta": 0.4965, "gamma_w": 2.6745,
         "gamma_a": 2.2102, "gamma_c": 0.9578},
        lambda: _grid(N=_over(3e7, 1e9, 4), D=_over(1.5e9, 2.6e10, 3), P=(3, 6, 16), Pa=(3, 6, 16),
                      Pc=(2, 3, 16)), NOISE,
    ),
    "post_training": (
        {"K": 0.0598, "alpha": 0.3439, "beta": 0.5068, "gamma": 0.5907},
        lambda: _grid(N=_over(3e7, 1e9, 5), D=_over(1.5e9, 2.6e10, 4), P=(3, 4, 5, 6)), 0.05,
    ),
    "qat_share": ({"a": 6.7297}, lambda: {"T": _over(20, 5000, 30)}, 0.1),
    "fine_grained": (
        {"E": 0.47, "A": 18.1, "K": 2.1, "B": 30.8, "alpha": 0.115, "gamma": 0.58, "beta": 0.147},
        lambda: _grid(N=_over(1e7, 1e10, 5), D=_over(1e9, 1e12, 4), G=(1, 2, 4, 8, 16, 32)), 2e-4,
    ),
    "leverage": (
        {"a": 1.23, "d": -7.61e-2, "c": 1.67e-2, "b": -1.17e-1, "X0": 1.63e-2},
        lambda: _grid(X=_over(0.01, 0.5, 6), G=(1, 2, 4, 8, 16), C=_over(1e18, 1e22, 4)), 0.02,
    ),
    "sparsity": (
        {"E": 0.94, "A": 16612.5, "B": 5455.67, "F": 0.4598, "G": 17.26, "alpha": 0.5962, "beta": 0.3954,
         "phi": 0.1666, "delta": 0.1603, "gamma": 0.1595},
        lambda: _grid(N=_over(1e7, 1e11, 8), D=_over(1e8, 1e12, 6), X=_over(0.005, 1, 7)), 1e-4,
    ),
    "upcycling": (
        {"E": 1.6, "A": 30.0, "a1": 0.12, "a2": 0.25, "a3": 0.005},
        lambda: _grid(D1=_over(1e8, 1e12, 6), D=_over(1e8, 1e12, 7)), 1e-3,
    ),
    "average_params": (
        {"E": 1.69, "A": 406.4, "B": 410.7, "alpha": 0.34, "beta": 0.28},
        lambda: _grid(Na=_over(5e7, 1e10, 7), D=_over(1e9, 1e12, 6)), NOISE,
    ),
    "quality": (
        {"E": 0.1, "n0": 4e6, "b": 0.16, "tau": 6.7},
        lambda: _grid(U=(1e7, 1e8, 1e9), D=_over(6e6, 3e10, 20)), 5e-4,
    ),
    "tuned_ND": (
        {"K": 1.79, "p": -0.713, "q": 0.307}, lambda: _grid(N=_over(6e7, 1e9, 5), D=_over(2e9, 1e11, 5)), 0.1,
    ),
    "tuned_D": ({"K": 0.58, "q": 0.571}, lambda: {"D": _over(2e9, 1e11, 18)}, 0.1),
    "coverage": (
        {"U": 0.05, "a": 0.45, "b": 2.0}, lambda: {"K": np.unique(np.round(_over(1, 1e5, 40)))}, 0.01,
    ),
    "coverage_N": (
        {"U": 0.05, "a": 0.45, "b": 8000.0, "gamma": 0.4},
        lambda: _grid(N=_over(5e8, 7e10, 6), K=(1, 3, 10, 30, 100, 1000, 1e4)), 0.01,
    ),
    "solve_verify": ({"K": 2e-8, "p": 0.57}, lambda: {"C": _over(1e13, 1e17, 18)}, 0.1),
    "updates_to_data": (
        {"E": 2e5, "K": 3e5, "alpha": 0.6}, lambda: {"R": np.repeat(_over(0.25, 32, 8), 4)}, 0.02,
    ),
    "recurrence": (
        {"E": 1.6, "A": 300.0, "B": 500.0, "alpha": 0.3, "beta": 0.3, "phi": 0.46},
        lambda: _with_block(_grid(N=_over(3e7, 1e9, 5), share=(0.3, 0.7), J=(1, 2, 4, 8),
                                  D=_over(1e9, 3e10, 4))), NOISE,
    ),
    "dp_sgd": (
        {"E": 1.0, "A": 50.0, "K": 30.0, "alpha": 0.6, "gamma": 0.5},
        lambda: _grid(S=_over(250, 64000, 6), Q=_over(100, 1e5, 7)), NOISE,
    ),
    "ensemble": (
        {"E": 3.2, "A": 900.0, "B": 0.25, "alpha": 0.4, "beta": 0.9},
        lambda: _grid(N=_over(1e8, 3e9, 5), M=(1, 2, 3, 5, 8)), 5e-4,
    ),
    "downstream_exponential": (
        {"top": 0.85, "k": 2.08, "gamma": 0.756}, lambda: {"V": np.linspace(2.0, 4.6, 40)}, 5e-3,
    ),
    "downstream_sigmoid": (
        {"low": 0.15, "top": 0.75, "k": 5.0, "L0": 2.4}, lambda: {"V": np.linspace(1.5, 3.6, 40)}, 5e-3,
    ),
    "energy": (
        {"c0": 2.0, "ci": 2e-2, "cii": 2e-6, "co": 0.4, "coi": 1.5e-5, "coo": 1e-5},
        lambda: _grid(I=_over(16, 32768, 8), O=_over(16, 32768, 8)), 0.02,
    ),
}  # fmt: skip


def planted(name: str) -> tuple[Any, dict[str, float], dict[str, np.ndarray], np.ndarray, float]:
    """The law, its planted parameters, the variables [R], the exact losses [R] and the noise of their logs.

    Raises:
      FitError: no study is planted for that law.
    """
    if name not in STUDIES:
        raise FitError(f"law is {name!r}; studies are planted for {', '.join(STUDIES)}")
    params, grid, noise = STUDIES[name]
    law, x = get_law(name), {k: np.asarray(v, float) for k, v in grid().items()}
    return law, dict(params), x, np.asarray(law.predict(params, x), float), noise


def planted_table(name: str, seed: int = 0, noise: float | None = None) -> dict[str, np.ndarray]:
    """A run table of a planted study, under the columns' own names, with log-normal noise row by row."""
    _, _, x, loss, own = planted(name)
    error = (own if noise is None else noise) * np.random.default_rng(seed).standard_normal(len(loss))
    return {COLUMN_OF[v]: values for v, values in x.items()} | {"loss": loss * np.exp(error)}


def recover(name: str, studies: int = 200, seed: int = 0) -> dict[str, Any]:
    """Fits simulated studies of a law by least squares, and counts how often its intervals hold the truth.

    Parameters whose log is about linear in the rows are judged by it, as a ``Fit`` prints them.

    Returns:
      law, rows, noise, studies (that converged), failed, and for each parameter: within, the share of
      estimates within two of their own standard errors of the truth; covered, the share of 95 % intervals
      that hold it; bias, the mean error over the standard deviation of the estimates.
    """
    law, truth, x, loss, noise = planted(name)
    log_x = {v: np.log(values) for v, values in x.items()}
    rng = np.random.default_rng(seed)
    seen: dict[str, list] = {k: [] for k in law.parameters}
    failed = 0
    for _ in range(studies):
        y = loss * np.exp(noise * rng.standard_normal(len(loss)))
        problem, point = solve(law, log_x, y, loss="least_squares", starts=4)
        if point.status != "converged":
            failed += 1
            continue
        few = FewClusters(problem, point.p_K, np.arange(len(loss)))
        for k in law.parameters:
            scale = np.log if acts_by_its_log(law, k) else np.asarray
            got = few.interval(lambda p, k=k, scale=scale: scale(p[k]))
            error = got["estimate"] - float(scale(truth[k]))
            low, high = (end - got["estimate"] for end in got["95"])
            seen[k].append((error, abs(error) <= 2 * got["sd"], low <= -error <= high))
    return {
        "law": name, "rows": len(loss), "noise": noise, "studies": studies - failed, "failed": failed,
        "parameters": {
            k: {"within": float(np.mean([v[1] for v in got])), "covered": float(np.mean([v[2] for v in got])),
                "bias": float(np.mean([v[0] for v in got]) / np.std([v[0] for v in got]))}
            for k, got in seen.items()
        },
    }  # fmt: skip
