"""Laws of models whose size changes on the way: up-cycled to experts, pruned or grown."""

from __future__ import annotations

import math
from typing import ClassVar

import numpy as np

from fits.bisection import bisect
from fits.errors import FitError
from fits.laws.base import Law, PowerSum, Question, Term


def _slope(law, params, given):
    """The exponent of D that D1 leaves, and the D1 that leaves none."""
    left = params["a2"] - params["a3"] * np.log(given["dense_tokens"])
    limit = np.where(params["a3"] > 0, np.exp(params["a2"] / params["a3"]), np.inf)
    return {"exponent": left, "useless_dense_tokens": limit}


def _scratch(law, params, given):
    """Tokens at which training from scratch, E + K / D^beta, is as good as up-cycling for as many tokens."""
    dense = given["dense_tokens"]
    E, K, beta = (given[k] for k in ("scratch_E", "scratch_K", "scratch_beta"))

    def is_ahead(log_d):
        return law.predict(params, {"D1": dense, "D": np.exp(log_d)}) < E + K * np.exp(-beta * log_d)

    grid = np.linspace(math.log(1e6), math.log(1e18), 2401)
    ahead = is_ahead(grid[:, None])
    # the last crossing: from there on training from scratch stays ahead
    last = len(grid) - 1 - np.argmax(ahead[::-1], axis=0)
    _, log_tokens = bisect(is_ahead, grid[last], grid[np.minimum(last + 1, len(grid) - 1)])
    tokens = np.where(ahead.any(0), np.exp(log_tokens), 0.0)
    tokens = np.where(ahead[-1], np.inf, tokens)
    crosses = (tokens > 0) & np.isfinite(tokens)
    loss = E + K * np.where(crosses, tokens, 1.0) ** -beta
    return {"tokens": tokens, "loss": np.where(crosses, loss, np.nan)}


class Upcycling(Law):
    """L = E + A D1^-a1 D^(-a2 + a3 ln D1): D1 tokens of the dense model, then D of the up-cycled one.

    a3 is the interaction: the more the dense model was trained, the slower the up-cycled one learns. Units:
    D and D1 tokens; E and A the loss's.
    """

    name = "upcycling"
    formula = "L = E + A D1^-a1 D^(-a2 + a3 ln D1)"
    source = "after Liew et al. 2025 (arXiv:2502.03009); form unverified"
    variables = ("D1", "D")
    parameters = ("E", "A", "a1", "a2", "a3")
    bounds: ClassVar = dict.fromkeys(("E", "A"), (0.0, math.inf)) | dict.fromkeys(
        ("a1", "a2", "a3"), (-math.inf, math.inf)
    )
    questions: ClassVar = {
        "slope": Question(
            "how fast does a model that was up-cycled after so many dense tokens still learn?",
            _slope,
            needs={"dense_tokens": "tokens of the dense model, D1"},
            gives={
                "exponent": "a2 - a3 ln D1, of the tokens that follow",
                "useless_dense_tokens": "D1 after which they teach nothing",
            },
        ),
        "scratch": Question(
            "up-cycle, or train from scratch? For how many tokens is up-cycling ahead?",
            _scratch,
            needs={
                "dense_tokens": "tokens of the dense model, D1",
                "scratch_E": "of a power_D fit of runs from scratch", "scratch_K": "its coefficient B",
                "scratch_beta": "its exponent",
            },
            gives={"tokens": "from which on training from scratch is ahead", "loss": "of both there"},
        ),
    }  # fmt: skip

    def predict(self, params, x, xp=np):
        dense, more = xp.log(x["D1"]), xp.log(x["D"])
        power = -params["a1"] * dense + (-params["a2"] + params["a3"] * dense) * more
        return params["E"] + xp.exp(xp.log(params["A"]) + power)

    def to_solver(self, params, centre, xp=np):
        """The term and its two slopes at the mean row, and the interaction."""
        dense, more = centre["D1"], centre["D"]
        a1, a2, a3 = (params[k] for k in ("a1", "a2", "a3"))
        at = xp.log(params["A"]) - a1 * dense - a2 * more + a3 * dense * more
        return [xp.log(params["E"]), at, a1 - a3 * more, a2 - a3 * dense, a3]

    def from_solver(self, p, centre, xp=np):
        dense, more = centre["D1"], centre["D"]
        a1, a2, a3 = p[2] + p[4] * more, p[3] + p[4] * dense, p[4]
        log_a = p[1] + a1 * dense + a2 * more - a3 * dense * more
        return {"E": xp.exp(p[0]), "A": xp.exp(log_a), "a1": a1, "a2": a2, "a3": a3}

    def starts(self, x, y):
        """For a given E the log of the rest is linear in the other parameters."""
        dense, more = np.log(x["D1"]), np.log(x["D"])
        columns = np.stack([np.ones(len(y)), -dense, -more, dense * more], 1)
        out = []
        for share in (0.1, 0.4, 0.7, 0.9, 0.97):
            E = share * float(y.min())
            log_a, a1, a2, a3 = map(float, np.linalg.lstsq(columns, np.log(y - E), rcond=None)[0])
            out.append({"E": E, "A": math.exp(min(log_a, 600.0)), "a1": a1, "a2": a2, "a3": a3})
        return out


def ramp_average(params, final, start, end):
    """Parameters averaged over training, of a linear ramp from ``params`` to ``final`` between two shares.

    Constant before ``start`` and after ``end``, each in [0, 1]; pruning where ``final`` is the smaller.
    """
    return params * start + 0.5 * (params + final) * (end - start) + final * (1.0 - end)


def _ramp(law, params, given):
    start, end = given["start"], given["end"]
    if not start <= end <= 1:
        raise FitError(f"start is {start:g} and end {end:g}; they must be shares of training, in order")
    average = ramp_average(given["params"], given["final"], start, end)
    loss = law.predict(params, {"Na": average, "D": given["tokens"]})
    return {"average_params": average, "flops": 6 * average * given["tokens"], "loss": loss}


class AverageParams(PowerSum):
    """L = E + A / Nbar^alpha + B / D^beta with Nbar the parameters averaged over training tokens.

    One law for models that are dense, pruned on the way or grown. Units: Nbar parameters, D tokens.
    """

    name = "average_params"
    formula = "L = E + A / Nbar^alpha + B / D^beta"
    source = "Jin et al. 2025 (arXiv:2501.12486)"
    terms = (Term("E"), Term("A", {"Na": "alpha"}), Term("B", {"D": "beta"}))
    questions: ClassVar = {
        "ramp": Question(
            "what does a linear ramp of the size during training cost, and to which loss?",
            _ramp,
            needs={"params": "parameters at first", "final": "at the end", "tokens": "training tokens"},
            takes={"start": (1e-9, "share of training before the ramp"), "end": (1.0, "and at its end")},
            gives={"average_params": "over training", "flops": "6 Nbar D", "loss": "the law's"},
        )
    }  # fmt: skip
