"""The law of sparse mixtures: total parameters, tokens and the active share of experts."""

from __future__ import annotations

import itertools
import math
from typing import ClassVar

import numpy as np

from fits.errors import FitError
from fits.laws.base import Centred, Question, linear_starts

LEAST_SHARE = 1e-4  # the sparsest mixture that is looked at


def _active(size, share, given):
    """Parameters at work for a token, of ``size`` in all."""
    return size * (1 - given["expert_share"] * (1 - share))


def _best_share(law, params, given):
    """Log of the active share of experts with the least loss: a grid, four times refined; [lanes]."""
    wide, lanes = {k: v[:, None] for k, v in params.items()}, np.arange(len(params["E"]))
    low, size = math.log(given["least_share"]), given["params"]
    grid = np.broadcast_to(np.linspace(low, 0, 81), (len(lanes), 81))
    step = -low / 80
    for _ in range(5):
        X = np.exp(grid)
        loss = law.predict(wide, {"N": size, "D": given["flops"] / (6 * _active(size, X, given)), "X": X})
        best, step = grid[lanes, np.argmin(loss, 1)], step / 20
        grid = np.clip(best[:, None] + step * np.arange(-40, 41), low, 0)
    return best


def _sparsity(law, params, given):
    for name, top in (("expert_share", 1.0), ("least_share", 0.999)):
        if given[name] > top:
            raise FitError(f"{name} is {given[name]:g}; it must be at most {top:g}")
    size, budget = given["params"], given["flops"]
    share = np.exp(_best_share(law, params, given))
    active = _active(size, share, given)
    D = budget / (6 * active)
    return {
        "sparsity": 1 - share, "active_share": share, "active_params": active, "tokens": D,
        "loss": law.predict(params, {"N": size, "D": D, "X": share}),
        "loss_all_active": law.predict(params, {"N": size, "D": budget / (6 * size), "X": 1.0}),
    }  # fmt: skip


class Sparsity(Centred):
    """L = E + A / N^alpha + B / D^beta + F X^phi + G / (X^delta N^gamma), X = 1 - S.

    X is the share of experts at work. The paper writes c / (1 - S)^lambda with lambda = -phi below 0: fewer
    experts at work help by themselves, and cost more the smaller the model. Units: N parameters of all
    experts, D tokens, X none; E, A, B, F, G the loss's.
    """

    name = "sparsity"
    formula = "L = E + A / N^alpha + B / D^beta + F X^phi + G / (X^delta N^gamma)"
    source = "Abnar et al. 2025, equation 6 and table 3 (arXiv:2501.12370)"
    variables = ("N", "D", "X")
    parameters = ("E", "A", "B", "F", "G", "alpha", "beta", "phi", "delta", "gamma")
    bounds: ClassVar = dict.fromkeys("EABFG", (0.0, math.inf)) | dict.fromkeys(
        ("alpha", "beta", "phi", "delta", "gamma"), (1e-3, 10.0)
    )
    PUBLISHED: ClassVar = {
        "E": 0.94, "A": 16612.5, "B": 5455.67, "F": 0.4598, "G": 17.26, "alpha": 0.5962, "beta": 0.3954,
        "phi": 0.1666, "delta": 0.1603, "gamma": 0.1595,
    }  # fmt: skip
    questions: ClassVar = {
        "sparsity": Question(
            "how sparse should a mixture of a given total size be, at a training budget?",
            _sparsity,
            needs={"flops": "training, 6 an active parameter and token", "params": "of all experts"},
            takes={
                "expert_share": (1.0, "of the parameters that are experts"),
                "least_share": (LEAST_SHARE, "of experts, the least looked at"),
            },
            gives={
                "sparsity": "S, experts at rest over all", "active_share": "1 - S",
                "active_params": "for a token", "tokens": "training tokens", "loss": "the law's",
                "loss_all_active": "of the same size with all experts active, for the same budget",
            },
        )
    }  # fmt: skip

    def predict(self, params, x, xp=np):
        N, D, X = xp.log(x["N"]), xp.log(x["D"]), xp.log(x["X"])
        return (
            params["E"]
            + params["A"] * xp.exp(-params["alpha"] * N)
            + params["B"] * xp.exp(-params["beta"] * D)
            + params["F"] * xp.exp(params["phi"] * X)
            + params["G"] * xp.exp(-params["delta"] * X - params["gamma"] * N)
        )

    def shifts(self, params, centre, xp=np):
        return {
            "A": params["alpha"] * centre["N"], "B": params["beta"] * centre["D"],
            "F": -params["phi"] * centre["X"],
            "G": params["delta"] * centre["X"] + params["gamma"] * centre["N"],
        }  # fmt: skip

    def starts(self, x, y):
        names = ("alpha", "beta", "phi", "delta", "gamma")
        grid = itertools.product((0.4, 0.7), (0.3, 0.5), (0.1, 0.25), (0.15, 0.3), (0.1, 0.25))

        def features(p):
            return {
                "E": np.ones_like(y), "A": x["N"] ** -p["alpha"], "B": x["D"] ** -p["beta"],
                "F": x["X"] ** p["phi"], "G": x["X"] ** -p["delta"] * x["N"] ** -p["gamma"],
            }  # fmt: skip

        return linear_starts(self, features, y, [dict(zip(names, v, strict=True)) for v in grid])
