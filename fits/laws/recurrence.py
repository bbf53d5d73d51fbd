"""The law of computation at fixed parameters: a block that is applied again and again."""

from __future__ import annotations

import itertools
import math
from typing import ClassVar

import numpy as np

from fits.errors import FitError
from fits.laws.base import EXPONENT_BOUNDS, Centred, Question, linear_starts

MOST_ITERATIONS = 4096.0
SHAPE = {"params": "all parameters, N", "recurrent_params": "of the block that is repeated, N_r"}


def _shape(given):
    size, block = given["params"], given["recurrent_params"]
    if block > size:
        raise FitError(f"recurrent_params is {block:g}; it must be at most params, {size:g}")
    return size - block, block


def _worth(law, params, given):
    once, block = _shape(given)
    times, phi = given["iterations"], params["phi"]
    cost, same = once + block * times, once + block * times**phi
    return {"equivalent_params": same, "cost_params": cost, "phi": phi, "kept": same / cost}


def _helps(law, params, given):
    once, block = _shape(given)
    x = {"N": once + block, "Nr": block, "D": given["tokens"]}
    one, more = (law.predict(params, x | {"J": j}) for j in (1.0, given["iterations"]))
    # passes without end make the block worth all, itself or nothing
    phi, data = params["phi"], params["E"] + params["B"] * given["tokens"] ** -params["beta"]
    alone = data + params["A"] * np.float64(once) ** -params["alpha"]
    end = np.where(phi > 0, data, np.where(phi < 0, alone, one))
    return {"gain": one - more, "loss": more, "loss_at_one": one, "limit": end, "phi": phi}


def _iterations(law, params, given):
    """Over log r, from 1 on: more computation a token leaves fewer tokens."""
    from fits.search import vertex  # it reads the laws

    once, block = _shape(given)
    wide = {k: v[:, None] for k, v in params.items()}

    def spend(times):
        return given["flops"] / (6 * (once + block * times))

    def loss(times, params):
        return law.predict(params, {"N": once + block, "Nr": block, "J": times, "D": spend(times)})

    grid = np.broadcast_to(np.linspace(0.0, math.log(MOST_ITERATIONS), 401), (len(params["E"]), 401))
    losses = loss(np.exp(grid), wide)
    best = np.argmin(losses, 1)
    # a vertex beside an end may lie beyond it, and once is the least
    times = np.exp(np.where(best == 0, 0.0, np.maximum(vertex(grid, losses, best), 0.0)))
    return {
        "iterations": times, "tokens": spend(times), "loss": loss(times, params),
        "loss_at_one": loss(np.ones(len(times)), params),
    }  # fmt: skip


class Recurrence(Centred):
    """L = E + A / (N - N_r + r^phi N_r)^alpha + B / D^beta: N_r of N parameters are applied r times.

    phi says what one more pass is worth: 1, a new block; 0, nothing; below 0, harm. The computation of a
    token is that of N - N_r + r N_r parameters. Units: N and N_r parameters, r passes, D tokens; of a policy
    D is environment steps and the loss a shortfall, such as the share of failures.
    """

    name = "recurrence"
    formula = "L = E + A / (N - N_r + r^phi N_r)^alpha + B / D^beta"
    source = "Schwethelm et al. 2026 (arXiv:2604.21106), looped language models; for policies form unverified"
    variables = ("N", "Nr", "J", "D")
    parameters = ("E", "A", "B", "alpha", "beta", "phi")
    bounds: ClassVar = (
        dict.fromkeys(("E", "A", "B"), (0.0, math.inf))
        | dict.fromkeys(("alpha", "beta"), EXPONENT_BOUNDS)
        | {"phi": (-5.0, 5.0)}
    )
    PUBLISHED: ClassVar = {"phi": 0.46}  # the one constant that is printed where we could read it
    questions: ClassVar = {
        "worth": Question(
            "to how many parameters, each used once, do these amount?",
            _worth,
            needs={**SHAPE, "iterations": "passes r"},
            gives={
                "equivalent_params": "of a model without repetition, as good",
                "cost_params": "of one that computes as much", "phi": "what a pass is worth",
                "kept": "the first over the second",
            },
        ),
        "helps": Question(
            "does more computation at fixed parameters and data help, and how far?",
            _helps,
            needs={**SHAPE, "iterations": "passes r", "tokens": "training tokens, or environment steps"},
            gives={
                "gain": "loss at one pass less loss at r", "loss": "at r", "loss_at_one": "pass",
                "limit": "of ever more passes", "phi": "what a pass is worth; above 0: it helps",
            },
        ),
        "iterations": Question(
            "how many passes at a training budget, if they leave fewer tokens?",
            _iterations,
            needs={**SHAPE, "flops": "C = 6 (N - N_r + r N_r) D"},
            gives={
                "iterations": f"passes r, from 1 to {MOST_ITERATIONS:g}",
                "tokens": "that the budget leaves", "loss": "the law's",
                "loss_at_one": "the same budget at one pass",
            },
        ),
    }  # fmt: skip

    def _log_size(self, params, log_x, xp):
        """Log of the parameters that the repeated ones amount to, from logs of the variables."""
        all_, block = xp.exp(log_x["N"]), xp.exp(log_x["Nr"])
        return xp.log(all_ - block + xp.exp(params["phi"] * log_x["J"]) * block)

    def predict(self, params, x, xp=np):
        log_x = {v: xp.log(x[v]) for v in self.variables}
        size = xp.exp(-params["alpha"] * self._log_size(params, log_x, xp))
        data = xp.exp(-params["beta"] * log_x["D"])
        return params["E"] + params["A"] * size + params["B"] * data

    def shifts(self, params, centre, xp=np):
        size = self._log_size(params, centre, xp)
        return {"A": params["alpha"] * size, "B": params["beta"] * centre["D"]}

    def starts(self, x, y):
        def features(values):
            return {
                "E": np.ones(1),
                "A": np.exp(-values["alpha"] * self._log_size(values, log_x, np)),
                "B": np.exp(-values["beta"] * log_x["D"]),
            }

        log_x = {v: np.log(x[v]) for v in self.variables}
        powers = itertools.product((0.15, 0.35, 0.7), (0.15, 0.35, 0.7), (0.0, 0.4, 0.8))
        return linear_starts(
            self, features, y, [dict(zip(("alpha", "beta", "phi"), p, strict=True)) for p in powers]
        )
