"""Laws of mixtures of experts: how fine the experts, and what sparsity is worth against a dense model."""

from __future__ import annotations

import math
from typing import ClassVar

import numpy as np

from fits.errors import FitError
from fits.laws.base import Law, PowerSum, Question, Term

ROUTER_FLOPS, OTHER_FLOPS = 14.0, 6.0  # a parameter of the router, and of the rest, for a token (c_r and c_f)
WIDTH_PER_BLOCK = 64.0  # of the shapes of the paper: d_model = 64 blocks


def shape_cost(width, granularity, expansion):
    """Total parameters, active parameters and training FLOPs a token of a model of that width."""
    blocks = width / WIDTH_PER_BLOCK
    total = width**2 * (8 * expansion + 4) * blocks
    active = 12 * width**2 * blocks
    router = ROUTER_FLOPS * width * expansion * granularity * blocks
    return total, active, OTHER_FLOPS * active + router


def _best_size(law, params, budget, granularity, expansion):
    """Log of the width that minimises the loss at a budget, by golden section; arrays as ``params``."""
    ratio = (math.sqrt(5) - 1) / 2

    def loss(log_width):
        total, _, per_token = shape_cost(np.exp(log_width), granularity, expansion)
        return law.predict(params, {"N": total, "D": budget / per_token, "G": granularity})

    shape = np.broadcast_shapes(np.shape(params["E"]), np.shape(granularity))
    low, high = np.full(shape, math.log(8.0)), np.full(shape, math.log(1e7))
    for _ in range(60):
        a, b = high - ratio * (high - low), low + ratio * (high - low)
        left = loss(a) < loss(b)
        low, high = np.where(left, low, a), np.where(left, b, high)
    return 0.5 * (low + high)


def _granularity(law, params, given):
    from fits.search import vertex  # it reads the laws

    budget, expansion = given["flops"], given["expansion"]
    wide = {k: v[:, None] for k, v in params.items()}
    lanes = len(params["E"])
    grid = np.broadcast_to(np.log(2.0) * np.arange(0, 12.01, 0.5), (lanes, 25))

    def loss_at(log_g):
        g = np.exp(log_g)
        total, _, per_token = shape_cost(np.exp(_best_size(law, wide, budget, g, expansion)), g, expansion)
        return law.predict(wide, {"N": total, "D": budget / per_token, "G": g})

    loss = loss_at(grid)
    coarse = loss[:, 0]
    for _ in range(2):  # a grid of half octaves, then twice one 12 times finer, about a parabola's vertex
        middle = vertex(grid, loss, np.argmin(loss, 1))
        step = (grid[:, 1] - grid[:, 0])[:, None] / 12
        grid = np.maximum(middle[:, None] + step * np.arange(-12, 13), 0.0)
        loss = loss_at(grid)
    best = np.exp(np.take_along_axis(grid, np.argmin(loss, 1)[:, None], 1))[:, 0]
    width = np.exp(_best_size(law, params, budget, best, expansion))
    total, active, per_token = shape_cost(width, best, expansion)
    return {
        "granularity": best, "params": total, "active_params": active, "tokens": budget / per_token,
        "loss": loss.min(1), "loss_at_1": coarse,
    }  # fmt: skip


class FineGrained(PowerSum):
    """L = E + (A + K / G^gamma) / N^alpha + B / D^beta at one expansion rate.

    G, the granularity, is the width of the dense feed-forward layer over that of one expert; G experts serve
    a token, so that active parameters do not change with it. Units: N parameters without embeddings, of all
    experts; D tokens; E, A, K, B the loss's.
    """

    name = "fine_grained"
    formula = "L = E + (A + K / G^gamma) / N^alpha + B / D^beta"
    source = "Krajewski et al. 2024 (arXiv:2402.07871)"
    terms = (
        Term("E"), Term("A", {"N": "alpha"}), Term("K", {"N": "alpha", "G": "gamma"}),
        Term("B", {"D": "beta"}),
    )  # fmt: skip
    PUBLISHED: ClassVar = {
        "E": 0.47, "A": 18.1, "K": 2.1, "B": 30.8, "alpha": 0.115, "gamma": 0.58, "beta": 0.147,
    }  # fmt: skip
    questions: ClassVar = {
        "granularity": Question(
            "how fine should the experts be at a budget, when routing them costs FLOPs too?",
            _granularity,
            needs={"flops": "training FLOPs"},
            takes={"expansion": (64.0, "parameters of all experts over those of a dense layer")},
            gives={
                "granularity": "dense width over an expert's", "params": "of all experts, without embeddings",
                "active_params": "for a token", "tokens": "training tokens", "loss": "the law's",
                "loss_at_1": "with experts as wide as a dense layer, for the same budget",
            },
        )
    }  # fmt: skip


def _checked_share(given):
    if given["active_share"] > 1:
        raise FitError(f"active_share is {given['active_share']:g}; it must be at most 1")
    return given["active_share"]


def _leverage(law, params, given):
    x = {"X": _checked_share(given), "G": given["granularity"], "C": given["flops"]}
    value = law.predict(params, x)
    return {"leverage": value, "dense_flops": value * given["flops"]}


def _best_granularity(law, params, given):
    share = _checked_share(given)
    # a share above 1 - X0 has its base above 1, where the least exponent would be the least leverage
    best = (params["c"] > 0) & (share + params["X0"] < 1)
    best = np.where(best, 2.0 ** (-params["b"] / (2 * params["c"])), np.nan)
    x = {"X": share, "G": best, "C": given["flops"]}
    return {"granularity": best, "leverage": law.predict(params, x)}


class Leverage(Law):
    """Compute that a dense model needs over that of a mixture of experts, for the same loss.

    EL = (X + X0)^(a + d log10 C + c (log2 G)^2 + b log2 G): a power of the active share X that saturates at
    X0, whose exponent grows with compute C and has a best granularity 2^(-b / 2c). The fitted column is the
    leverage itself: map it to ``loss``. Units: X and G have none, C in FLOPs.
    """

    name = "leverage"
    formula = "EL = (X + X0)^(a + d log10(C) + c log2(G)^2 + b log2(G))"
    source = "after Tian et al. 2025 (arXiv:2507.17702); form unverified"
    variables = ("X", "G", "C")
    parameters = ("a", "d", "c", "b", "X0")
    bounds: ClassVar = dict.fromkeys(("a", "d", "c", "b"), (-math.inf, math.inf)) | {"X0": (0.0, math.inf)}
    offset = None
    PUBLISHED: ClassVar = {"a": 1.23, "d": -7.61e-2, "c": 1.67e-2, "b": -1.17e-1, "X0": 1.63e-2}
    questions: ClassVar = {
        "leverage": Question(
            "how much more compute would a dense model need for the same loss?",
            _leverage,
            needs={
                "active_share": "experts at work over all", "granularity": "dense width over an expert's",
                "flops": "training FLOPs",
            },
            gives={"leverage": "times the compute", "dense_flops": "FLOPs of the dense model"},
        ),
        "granularity": Question(
            "which granularity has the most leverage?",
            _best_granularity,
            needs={"active_share": "experts at work over all", "flops": "training FLOPs"},
            gives={"granularity": "dense width over an expert's", "leverage": "times the compute"},
        ),
    }  # fmt: skip

    def predict(self, params, x, xp=np):
        fine, budget = xp.log(x["G"]) / math.log(2), xp.log(x["C"]) / math.log(10)
        exponent = params["a"] + params["d"] * budget + params["c"] * fine**2 + params["b"] * fine
        return xp.exp(exponent * xp.log(x["X"] + params["X0"]))

    def to_solver(self, params, centre, xp=np):
        """The exponent at the mean compute in place of a."""
        at = params["a"] + params["d"] * centre["C"] / math.log(10)
        return [at, params["d"], params["c"], params["b"], xp.log(params["X0"])]

    def from_solver(self, p, centre, xp=np):
        at = p[0] - p[1] * centre["C"] / math.log(10)
        return {"a": at, "d": p[1], "c": p[2], "b": p[3], "X0": xp.exp(p[4])}

    def starts(self, x, y):
        fine, budget = np.log2(x["G"]), np.log10(x["C"])
        columns = np.stack([np.ones(len(y)), budget, fine**2, fine], 1)
        out = []
        for share in (0.03, 0.1, 0.3, 1.0, 3.0):
            X0 = share * float(np.exp(np.log(x["X"]).mean()))
            scale = np.log(x["X"] + X0)
            best = np.linalg.lstsq(columns * scale[:, None], np.log(y), rcond=None)[0]
            out.append({**dict(zip(("a", "d", "c", "b"), map(float, best), strict=True)), "X0": X0})
        return out
