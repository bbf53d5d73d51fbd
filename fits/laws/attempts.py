"""Test-time compute: which size and how many attempts at a budget; solving and verifying."""

from __future__ import annotations

import itertools
from typing import ClassVar

import numpy as np

from fits.errors import FitError
from fits.laws.base import Centred, Question
from fits.laws.coverage import log_gamma_ratio
from fits.laws.tuning import Tuned

CACHE_BYTES = 2.0  # of a key or value in bfloat16, as the paper counts them
INTENSITY = 562.5  # FLOPs a byte of an NVIDIA B200 (4.5 PFLOPs over 8 TB/s), the paper's machine
# keys and values a token of Qwen3 (0.6B to 14B: 28 to 40 layers, 8 key heads of 128): 59,000 (N / 1e9)^0.12
CACHE_AT_1B, CACHE_POWER = 5.9e4, 0.12


def attempt_cost(params, prompt, tokens, cache, queries, intensity):
    """Equivalent FLOPs of one more attempt, and those that all attempts on one prompt share.

    Each generated token costs 2 N for the weights, 2 r D c for attention over a context of c tokens, and
    ``intensity`` for each byte of the cache that is read; attempts at once read the prompt's cache together.

    Args:
      params: N. prompt, tokens: a prompt's and an answer's. cache: D, how many keys and values a token.
      queries: r, query heads a key head. intensity: FLOPs that the machine does while it reads a byte, or 0.
    """
    own, ahead = tokens**2 / 2, prompt * tokens  # the sums of the context over an answer, new and given
    attempt = (
        2 * params * tokens + 2 * queries * cache * (ahead + own) + intensity * CACHE_BYTES * cache * own
    )
    return attempt, intensity * CACHE_BYTES * cache * ahead


def _costs(params, given, intensity):
    cache = given["cache"] * (params / 1e9) ** given["cache_power"]
    return attempt_cost(params, given["prompt_tokens"], given["tokens"], cache, given["queries"], intensity)


def _best_size(law, params, given, intensity):
    """Log of the size with the fewest failures at the budget, NaN where none makes one attempt.

    By a grid in log N, three times refined.
    """
    low, high = np.log(given["smallest"]), np.log(given["largest"])
    if low >= high:
        raise FitError(f"smallest is {given['smallest']:g}; it must be below largest, {given['largest']:g}")
    wide = {k: v[:, None] for k, v in params.items()}
    lanes = np.arange(len(params["U"]))
    grid = np.broadcast_to(np.linspace(low, high, 161), (len(lanes), 161))
    step = (high - low) / 160
    for _ in range(4):
        attempt, shared = _costs(np.exp(grid), given, intensity)
        k = (given["flops"] - shared) / attempt
        left = law.predict(wide, {"N": np.exp(grid), "K": np.maximum(k, 1.0)})
        best = grid[lanes, np.argmin(np.where(k >= 1, left, np.inf), 1)]
        step = step / 40
        grid = np.clip(best[:, None] + step * np.arange(-80, 81), low, high)
    return np.where((k >= 1).any(1), best, np.nan)


def _allocate(law, params, given):
    out, memory = {}, given["intensity"]
    for suffix, intensity in (("", memory), ("_flops_only", 0.0)):
        size = np.exp(_best_size(law, params, given, intensity))
        attempt, shared = _costs(size, given, memory)  # what the choice costs in truth
        k = (given["flops"] - shared) / attempt
        left = law.predict(params, {"N": size, "K": np.maximum(k, 1.0)})
        out |= {
            f"params{suffix}": size, f"samples{suffix}": np.where(k >= 1, k, np.nan),
            f"coverage{suffix}": np.where(k >= 1, 1 - left, np.nan),
        }  # fmt: skip
        if not suffix:
            weights = 2 * size * given["tokens"]
            out["cache_share"] = 1 - weights * k / given["flops"]
    return out


class CoverageN(Centred):
    """``Coverage`` over sizes: success rates are Beta(a, b N^-gamma), a share U never succeeds.

    A mean success of about a N^gamma / b while it is small, so that a larger model needs fewer attempts. The
    fitted column is 1 - pass@k: map it to ``loss``. Units: N parameters, k attempts, b parameters^gamma.
    """

    name = "coverage_N"
    formula = "1 - pass@k = U + (1 - U) B(a, b N^-gamma + k) / B(a, b N^-gamma)"
    source = "cost of Sadhukhan et al. 2025 (arXiv:2506.05333); the form in N unverified"
    variables = ("N", "K")
    parameters = ("U", "a", "b", "gamma")
    bounds: ClassVar = {
        "U": (0.0, 1.0), "a": (0.0, np.inf), "b": (0.0, np.inf), "gamma": (1e-3, 10.0),
    }  # fmt: skip
    offset = "U"
    questions: ClassVar = {
        "allocate": Question(
            "which size and how many attempts at an inference budget, when reading the cache costs too?",
            _allocate,
            needs={
                "flops": "budget a problem, in equivalent FLOPs", "tokens": "generated an attempt",
            },
            takes={
                "prompt_tokens": (512.0, "of the problem"),
                "intensity": (INTENSITY, "FLOPs that the machine does while it reads a byte"),
                "cache": (CACHE_AT_1B, "keys and values a token at 1e9 parameters"),
                "cache_power": (CACHE_POWER, "of N with which they grow"),
                "queries": (4.0, "query heads a key head"),
                "smallest": (1e8, "parameters to choose from"),
                "largest": (1e12, "parameters to choose from"),
            },
            gives={
                "params": "of the best size (never: one attempt costs more)",
                "samples": "attempts, at least 1",
                "coverage": "pass@k", "cache_share": "of the cost, for attention and its cache",
                "params_flops_only": "the choice that counts the FLOPs alone",
                "samples_flops_only": "its attempts at the full cost",
                "coverage_flops_only": "its pass@k at the full cost",
            },
        )
    }  # fmt: skip

    def predict(self, params, x, xp=np):
        a, b = params["a"], xp.exp(xp.log(params["b"]) - params["gamma"] * xp.log(x["N"]))
        left = xp.exp(log_gamma_ratio(b + x["K"], a, xp) - log_gamma_ratio(b, a, xp))
        return params["U"] + (1.0 - params["U"]) * left

    def shifts(self, params, centre, xp=np):
        return {"b": params["gamma"] * centre["N"]}

    def starts(self, x, y):
        low, size = float(y.min()), float(np.exp(np.log(x["N"]).mean()))
        grid = itertools.product((0.1, 0.6, 0.9), (0.2, 0.5, 1.0), (0.5, 2.0, 10.0), (0.3, 0.8))
        return [{"U": u * low, "a": a, "b": b * size**g, "gamma": g} for u, a, b, g in grid]


def _budget(law, params, given):
    value = law.predict(params, {"C": given["flops"]})
    return {"best": value, "grows": given["times"] ** params["p"]}


class SolveVerify(Tuned):
    """y = K C^p: the best number of solutions a problem, or of verifications a solution, at a budget.

    C counts FLOPs a problem, 2 N T S (1 + lambda V) for S solutions of T tokens and V verifications of each
    of lambda T. Fit each of the two; the fitted column is the number: map it to ``loss``. Units: K counts.
    """

    name = "solve_verify"
    formula = "y = K C^p"
    source = "Singhi et al. 2025 (arXiv:2504.01005): p about 0.57 of solutions, 0.39 of verifications"
    powers: ClassVar = {"C": "p"}
    questions: ClassVar = {
        "budget": Question(
            "how many at a budget, and how do they grow with it?",
            _budget,
            needs={"flops": "a problem"},
            takes={"times": (10.0, "by which the budget grows")},
            gives={"best": "solutions, or verifications a solution", "grows": "times as many"},
        )
    }  # fmt: skip
