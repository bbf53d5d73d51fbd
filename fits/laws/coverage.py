"""The law of repeated sampling: the share of problems that no one of k attempts solves."""

from __future__ import annotations

import itertools
import math
from typing import ClassVar

import numpy as np

from fits.bisection import bisect
from fits.errors import FitError
from fits.laws.base import Law, Question

SHIFT = 12  # from here on Stirling's series with five terms is exact to a few 1e-15
STIRLING = (1 / 12, -1 / 360, 1 / 1260, -1 / 1680, 1 / 1188)
MOST_SAMPLES = 1e300  # beyond which none is looked for


def log_gamma_ratio(z, a, xp=np):
    """ln Gamma(z) - ln Gamma(z + a) for z > 0, a > 0, without the cancellation of two large logs.

    By the recurrence up to z + SHIFT, then Stirling's series of the difference (Abramowitz and Stegun
    6.1.40); on new last axes, which compile much faster than a loop.
    """
    z, a = xp.broadcast_arrays(xp.asarray(z), xp.asarray(a))
    below = xp.log1p(a[..., None] / (z[..., None] + np.arange(float(SHIFT)))).sum(-1)
    z = z + SHIFT
    odd = -(2.0 * np.arange(len(STIRLING)) + 1)
    tail = (np.array(STIRLING) * (z[..., None] ** odd - (z + a)[..., None] ** odd)).sum(-1)
    return below - (z - 0.5) * xp.log1p(a / z) - a * xp.log(z + a) + a + tail


def _samples(law, params, given):
    """The least k by bisection in log k; infinite where the floor lies above."""
    wanted = given["coverage"]
    if wanted >= 1:
        raise FitError(f"coverage is {wanted:g}; it must be below 1")
    _, high = bisect(
        lambda log_k: law.predict(params, {"K": np.exp(log_k)}) > 1 - wanted,
        np.zeros(len(params["U"])),
        np.full(1, math.log(MOST_SAMPLES)),
    )
    samples = np.where(high > math.log(MOST_SAMPLES) - 1e-6, np.inf, np.exp(high))
    cost = samples * 2 * given["params"] * given["tokens"]
    return {"samples": samples, "flops": cost, "limit": 1.0 - params["U"]}


def _pass(law, params, given):
    k = given["samples"]
    left = law.predict(params, {"K": k})
    return {"coverage": 1 - left, "single": 1 - law.predict(params, {"K": 1.0}), "slope": params["a"]}


class Coverage(Law):
    """1 - pass@k = U + (1 - U) B(a, b + k) / B(a, b): success rates are Beta(a, b), a share U never succeeds.

    For large k the part above U falls as Gamma(a + b) / Gamma(b) k^-a: a power law, though each problem's
    failures fall exponentially. The fitted column is 1 - pass@k: map it to ``loss``. Units: k attempts.
    """

    name = "coverage"
    formula = "1 - pass@k = U + (1 - U) B(a, b + k) / B(a, b)"
    source = "Beta difficulty after Schaeffer et al. 2025 (arXiv:2502.17578), with a floor"
    variables = ("K",)
    parameters = ("U", "a", "b")
    bounds: ClassVar = {"U": (0.0, 1.0), "a": (0.0, math.inf), "b": (0.0, math.inf)}
    offset = "U"
    questions: ClassVar = {
        "samples": Question(
            "how many attempts a problem until so large a share is solved by one of them?",
            _samples,
            needs={"coverage": "the share, below 1"},
            takes={"params": (1.0, "parameters of the model"), "tokens": (1.0, "tokens an attempt")},
            gives={
                "samples": "attempts", "flops": "2 N a token, for all of them",
                "limit": "that no number of attempts passes",
            },
        ),
        "coverage": Question(
            "which share of problems does one of k attempts solve?",
            _pass,
            needs={"samples": "attempts k"},
            gives={
                "coverage": "pass@k", "single": "pass@1",
                "slope": "by which log failures above U fall with log k, for large k",
            },
        ),
    }  # fmt: skip

    def predict(self, params, x, xp=np):
        a, b, k = params["a"], params["b"], x["K"]
        left = xp.exp(log_gamma_ratio(b + k, a, xp) - log_gamma_ratio(b, a, xp))
        return params["U"] + (1.0 - params["U"]) * left

    def starts(self, x, y):
        low = float(y.min())
        grid = itertools.product((0.1, 0.5, 0.9), (0.2, 0.5, 1.0, 2.0), (0.5, 2.0, 10.0))
        return [{"U": u * low, "a": a, "b": b} for u, a, b in grid]
