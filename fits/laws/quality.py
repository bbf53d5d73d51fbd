"""The law of a data pool's utility: what a pass over it teaches, and how fast that fades."""

from __future__ import annotations

import itertools
import math
from typing import ClassVar

import numpy as np

from fits.errors import FitError
from fits.laws.base import Law, Question, linear_starts

MOST_PASSES = 64  # that a fit tells apart; it takes further ones to teach nothing


def passes_seen(total, unique, xp=np, most=MOST_PASSES):
    """ln n_j / n_(j-1) of the passes j = 2, 3, ... over ``unique`` samples, on a new last axis."""
    before = np.arange(1.0, most)
    seen = xp.clip((total / unique)[..., None], before, before + 1.0)
    return xp.log(seen) - np.log(before)


def _fading(half_life, xp=np, most=MOST_PASSES):
    return xp.exp2(-np.arange(1.0, most) / xp.asarray(half_life)[..., None])


def mixture_loss(floor, first, utility, half_life, pool, samples):
    """The loss of training on several pools at once, each of ``pool`` samples.

    A pass over K pools takes K times as long, so that each half-life is K times as many passes of one pool's
    length, and the utility of a pass is the mean over the pools (Goyal et al. 2024, section 4).

    Args:
      floor, first: E and n0, arrays [B]. utility, half_life: b and tau of each pool, [K].
    """
    count, unique = len(utility), float(pool) * len(utility)
    # passes beyond 1,100 of the longest half-life are worth 0 in float64
    most = int(np.ceil(min(samples / unique, 1100 * count * max(half_life)))) + 1
    growth = passes_seen(np.float64(samples), np.float64(unique), most=most)
    worth = np.mean(
        [b * _fading(tau * count, most=most) for b, tau in zip(utility, half_life, strict=True)], 0
    )
    head = np.mean(utility) * (np.log(min(samples, unique)) - np.log(first))
    return floor + np.exp(-head - (worth * growth).sum())


def _filter(law, params, given):
    """The best first pools, in order of utility, taken as one mixture."""
    utility, half_life = (np.atleast_1d(given[k]) for k in ("utility", "half_life"))
    if len(utility) != len(half_life):
        raise FitError(
            f"utility has {len(utility)} values and half_life {len(half_life)}; one a pool is needed"
        )
    order = np.argsort(-utility)
    utility, half_life = utility[order], half_life[order]
    loss = np.stack([
        mixture_loss(params["E"], params["n0"], utility[:k], half_life[:k], given["pool"], given["tokens"])
        for k in range(1, len(utility) + 1)
    ])  # fmt: skip
    best = np.argmin(loss, 0)
    return {
        "pools": best + 1.0, "loss": loss.min(0), "loss_of_the_best_pool": loss[0], "loss_of_all": loss[-1],
        "passes": given["tokens"] / given["pool"] / (best + 1.0),
    }  # fmt: skip


class Quality(Law):
    """L = E + (n_1 / n0)^-b prod_j (n_j / n_(j-1))^(-b 2^(-(j-1)/tau)): utility b, half-life of tau passes.

    n_j are the tokens (or samples) seen by the end of pass j over U unique ones; n0 is what all pools of one
    study share. Units: D, U and n0 tokens, tau passes; E the loss's.
    """

    name = "quality"
    formula = "L = E + (n_1/n0)^-b prod_j (n_j/n_(j-1))^(-b 2^(-(j-1)/tau)), n_j = min(D, j U)"
    source = "Goyal et al. 2024 (arXiv:2404.07177), with the floor outside the product"
    variables = ("D", "U")
    parameters = ("E", "n0", "b", "tau")
    bounds: ClassVar = dict.fromkeys(("E", "n0", "b", "tau"), (0.0, math.inf))
    # the released constants of the best tenth of T-MARS' CLIP scores; the others stand in the docs
    PUBLISHED: ClassVar = {"E": 0.1, "n0": 1e5 / 0.025, "b": 0.16, "tau": 6.7272727}
    questions: ClassVar = {
        "filter": Question(
            "which filter for so many tokens: only the best pool, or the best few together?",
            _filter,
            needs={
                "tokens": "to be trained on, repeats included", "pool": "tokens of each pool",
                "utility": "b of each pool", "half_life": "tau of each pool",
            },
            gives={
                "pools": "how many of the best to keep", "passes": "over them", "loss": "the law's",
                "loss_of_the_best_pool": "alone", "loss_of_all": "pools together",
            },
            many=("utility", "half_life"),
        )
    }  # fmt: skip

    def _progress(self, params, x, xp=np):
        fading = (_fading(params["tau"], xp) * passes_seen(x["D"], x["U"], xp)).sum(-1)
        return xp.log(xp.minimum(x["D"], x["U"])) + fading

    def predict(self, params, x, xp=np):
        return params["E"] + xp.exp(params["b"] * (xp.log(params["n0"]) - self._progress(params, x, xp)))

    def to_solver(self, params, centre, xp=np):
        """The first pass's term at the mean row in place of n0."""
        at = xp.minimum(centre["D"], centre["U"])
        term = params["b"] * (xp.log(params["n0"]) - at)
        return [xp.log(params["E"]), term, xp.log(params["b"]), xp.log(params["tau"])]

    def from_solver(self, p, centre, xp=np):
        at, b = xp.minimum(centre["D"], centre["U"]), xp.exp(p[2])
        return {"E": xp.exp(p[0]), "n0": xp.exp(p[1] / b + at), "b": b, "tau": xp.exp(p[3])}

    def starts(self, x, y):
        def features(values):
            return {"E": np.ones(1), "n0": np.exp(-values["b"] * self._progress(values, x))}

        grid = [{"b": b, "tau": t} for b, t in itertools.product((0.05, 0.1, 0.2, 0.3, 0.5), (0.7, 2.0, 6.0))]
        found = linear_starts(self, features, y, grid)
        return [s | {"n0": float(np.exp(np.clip(np.log(s["n0"]) / s["b"], -300, 300)))} for s in found]
