"""Laws of numerical precision: low-precision parameters count as fewer; rounding afterwards costs loss."""

from __future__ import annotations

import itertools
import math
from typing import ClassVar

import numpy as np

from fits.bisection import bisect
from fits.errors import FitError
from fits.laws.base import EXPONENT_BOUNDS, Centred, Law, Question, balance, linear_starts

FULL_BITS = 16.0  # a product at P bits is taken to cost P / 16 of one at 16


def _kept(law, params, bits):
    """N' / N with weights, and what else the law knows, all at ``bits``; arrays [B]."""
    return np.prod([-np.expm1(-bits / params[g]) for g in law.bits.values()], axis=0)


def _size(law, params, given):
    """Under C = 6 N D P / 16 the product N' D is fixed: N' and D balance as in Chinchilla's law."""
    bits, budget = given["weight_bits"], given["flops"]
    kept = _kept(law, params, bits)
    p = [params[k] for k in ("A", "alpha", "B", "beta")]
    N, D = balance(*p, budget * kept * FULL_BITS / bits)
    x = {"N": N / kept, "D": D} | dict.fromkeys(law.bits, bits)
    return {"params": N / kept, "tokens": D, "effective_share": kept, "loss": law.predict(params, x)}


def _bits(law, params, given):
    """N' D goes as f(P) / P, whatever the budget: the best P has sum u / (e^u - 1) = 1, u = P / gamma."""

    def more(log_p):
        u = [np.exp(log_p) / params[g] for g in law.bits.values()]
        return sum(v / np.expm1(v) for v in u) > 1

    low, high = bisect(more, np.full(len(params["E"]), -10.0), np.full(1, 10.0))
    best = np.exp(0.5 * (low + high))
    got = _size(law, params, {**given, "weight_bits": best})
    full = _size(law, params, {**given, "weight_bits": FULL_BITS})
    return {"bits": best, **got, "loss_at_16": full["loss"]}


SIZE = Question(
    "which size for a budget, trained at so many bits, if a product costs bits / 16 of one at 16?",
    _size,
    needs={"flops": "16-bit FLOPs: C = 6 N D P / 16", "weight_bits": "bits P"},
    gives={
        "params": "parameters", "tokens": "training tokens", "effective_share": "N' / N", "loss": "the law's",
    },
)  # fmt: skip
BITS = Question(
    "which precision for a budget, if weights, activations and cache share it and the cost falls with it?",
    _bits,
    needs={"flops": "16-bit FLOPs: C = 6 N D P / 16"},
    gives={"bits": "bits", **SIZE.gives, "loss_at_16": "the law's at 16 bits for the same cost"},
)


class Precision(Centred):
    """L = E + A / N'^alpha + B / D^beta with N' = N (1 - exp(-P / gamma_w)): weights trained at P bits.

    Units: P bits, gamma_w bits, N parameters, D tokens; E, A, B the loss's.
    """

    name = "precision"
    formula = "L = E + A / N'^alpha + B / D^beta, N' = N (1 - exp(-P / gamma_w))"
    source = "Kumar et al. 2024, eq. 3 (arXiv:2411.04330)"
    variables: tuple[str, ...] = ("N", "D", "P")
    parameters: tuple[str, ...] = ("E", "A", "B", "alpha", "beta", "gamma_w")
    bounds: ClassVar = (
        dict.fromkeys(("E", "A", "B"), (0.0, math.inf))
        | dict.fromkeys(("alpha", "beta"), EXPONENT_BOUNDS)
        | dict.fromkeys(("gamma_w", "gamma_a", "gamma_c"), (0.0, math.inf))
    )
    bits: ClassVar = {"P": "gamma_w"}
    questions: ClassVar = {"size": SIZE}

    def log_effective(self, params, x, xp=np):
        """Log of N'."""
        kept = sum(xp.log(-xp.expm1(-x[v] / params[g])) for v, g in self.bits.items())
        return xp.log(x["N"]) + kept

    def predict(self, params, x, xp=np):
        size = xp.exp(-params["alpha"] * self.log_effective(params, x, xp))
        return params["E"] + params["A"] * size + params["B"] * xp.exp(-params["beta"] * xp.log(x["D"]))

    def shifts(self, params, centre, xp=np):
        return {"A": params["alpha"] * centre["N"], "B": params["beta"] * centre["D"]}

    def starts(self, x, y):
        def features(values):
            size = np.exp(-values["alpha"] * self.log_effective(values, x))
            return {"E": np.ones(1), "A": size, "B": x["D"] ** -values["beta"]}

        gammas = list(self.bits.values())
        exponents = (0.2, 0.35, 0.5, 0.8)
        grid = itertools.product(exponents, exponents, *([(0.7, 1.5, 3.0)] * len(gammas)))
        names = ("alpha", "beta", *gammas)
        return linear_starts(self, features, y, [dict(zip(names, v, strict=True)) for v in grid])


class PrecisionJoint(Precision):
    """``precision`` with a factor each for weights, activations and the cache of keys and values."""

    name = "precision_joint"
    formula = "L = E + A / N'^alpha + B / D^beta, N' = N prod_i (1 - exp(-P_i / gamma_i)), i = w, a, c"
    source = "Kumar et al. 2024, eq. 4 (arXiv:2411.04330)"
    variables = ("N", "D", "P", "Pa", "Pc")
    parameters = ("E", "A", "B", "alpha", "beta", "gamma_w", "gamma_a", "gamma_c")
    bits: ClassVar = {"P": "gamma_w", "Pa": "gamma_a", "Pc": "gamma_c"}
    questions: ClassVar = {"bits": BITS, "size": SIZE}


def _limit(law, params, given):
    """The D at which the fall of B / D^beta is the rise of the loss that rounding adds."""
    B, beta, N, bits = (given[k] for k in ("B", "beta", "params", "weight_bits"))
    rise = params["beta"] * params["K"] * N ** -params["alpha"] * np.exp(-bits / params["gamma"])
    D = (beta * B / rise) ** (1.0 / (beta + params["beta"]))
    return {"tokens": D, "added": law.predict(params, {"N": N, "D": D, "P": bits})}


class PostTraining(Centred):
    """The loss that rounding to P bits after training adds: K D^beta / N^alpha exp(-P / gamma).

    It grows with D: the longer a model was trained, the more it loses. The fitted column is the loss added:
    map it to ``loss``. Units: P and gamma bits; K the loss's.
    """

    name = "post_training"
    formula = "L = K D^beta / N^alpha exp(-P / gamma)"
    source = "Kumar et al. 2024, eq. 2 (arXiv:2411.04330)"
    variables = ("N", "D", "P")
    parameters = ("K", "alpha", "beta", "gamma")
    bounds: ClassVar = {"K": (0.0, math.inf), "gamma": (0.0, math.inf)} | dict.fromkeys(
        ("alpha", "beta"), EXPONENT_BOUNDS
    )
    offset = None
    questions: ClassVar = {
        "limit": Question(
            "beyond how many tokens does more training make the rounded model worse?",
            _limit,
            needs={
                "params": "parameters", "weight_bits": "bits P", "B": "of the loss's data term B / D^beta",
                "beta": "its exponent",
            },
            gives={"tokens": "training tokens", "added": "the loss that rounding adds there"},
        )
    }  # fmt: skip

    def predict(self, params, x, xp=np):
        power = params["beta"] * xp.log(x["D"]) - params["alpha"] * xp.log(x["N"]) - x["P"] / params["gamma"]
        return xp.exp(xp.log(params["K"]) + power)

    def shifts(self, params, centre, xp=np):
        bits = xp.exp(centre["P"]) / params["gamma"]
        return {"K": params["alpha"] * centre["N"] - params["beta"] * centre["D"] + bits}

    def starts(self, x, y):
        columns = np.stack([np.ones(len(y)), -np.log(x["N"]), np.log(x["D"]), -x["P"]], 1)
        K, alpha, beta, rate = np.linalg.lstsq(columns, np.log(y), rcond=None)[0]
        alpha, beta, rate = (float(np.clip(v, 0.01, 9.0)) for v in (alpha, beta, rate))
        start = {"K": float(np.exp(np.clip(K, -300, 300))), "alpha": alpha, "beta": beta, "gamma": 1.0 / rate}
        return [start, {**start, "gamma": 0.5 / rate}, {**start, "alpha": 0.5 * alpha}]


def _share(law, params, given):
    S = given["tokens"] / (given["params"] * given["weight_bits"] / 8)
    if S <= 1:
        raise FitError(f"tokens, {S:.3g} a parameter-byte, are too few; the law holds above one")
    share = law.predict(params, {"T": np.array([S])})
    return {"share": share, "tokens": share * given["tokens"], "tokens_per_param_byte": S}


class QatShare(Law):
    """f* = exp(-a / ln S): the share of training tokens best spent on quantization-aware training.

    S is tokens per byte of quantized parameters, D / (N P / 8), above 1. The fitted column is the best share
    of each setting: map it to ``loss``. Units: none.
    """

    name = "qat_share"
    formula = "f* = exp(-a / ln S), S = D / (N P / 8)"
    source = "Dremov et al. 2025 (arXiv:2509.22935)"
    variables = ("T",)
    parameters = ("a",)
    bounds: ClassVar = {"a": (0.0, math.inf)}
    offset = None
    PUBLISHED: ClassVar = {"a": 6.7297}
    questions: ClassVar = {
        "share": Question(
            "which share of the tokens should be trained quantization-aware?",
            _share,
            needs={"params": "parameters", "tokens": "training tokens in all", "weight_bits": "bits P"},
            gives={
                "share": "of all tokens", "tokens": "trained quantization-aware",
                "tokens_per_param_byte": "S",
            },
        )
    }  # fmt: skip

    def predict(self, params, x, xp=np):
        return xp.exp(-params["a"] / xp.log(x["T"]))

    def starts(self, x, y):
        a = max(float(np.median(-np.log(y) * np.log(x["T"]))), 1e-3)
        return [{"a": k * a} for k in (1.0, 0.5, 2.0)]
