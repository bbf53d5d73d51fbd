"""The question of serving: which size is cheapest to train and to serve, at a loss that is wanted?"""

from __future__ import annotations

import numpy as np

from fits.bisection import bisect
from fits.laws.base import Question


def compute_optimal_tokens(law, params, size):
    """The D for which ``size`` is the optimal N under C = 6ND, by bisection in log C; arrays [B]."""
    low, high = bisect(
        lambda log_c: law.optimum(params, np.exp(log_c))["N"] < size,
        np.zeros(len(next(iter(params.values())))),
        np.full(1, 100.0),
    )
    return np.exp(0.5 * (low + high)) / 6.0 / size


def _serve(law, params, given):
    from fits.choices import least_budget  # these read the laws
    from fits.constraints import Limits, with_inference
    from fits.search import six_nd

    size, served = given["params"], given["inference_tokens"]
    D = compute_optimal_tokens(law, params, size)
    loss = law.predict(params, {"N": size, "D": D})
    cost = with_inference(six_nd, served)
    best = least_budget(law, params, loss, cost, Limits())
    plain = cost(size, D)
    return {
        "params": best["N"], "tokens": best["D"], "tokens_per_param": best["D"] / best["N"],
        "flops": best["budget"], "saved_flops": plain - best["budget"],
        "saved_share": 1.0 - best["budget"] / plain, "loss": loss,
    }  # fmt: skip


SERVE = Question(
    "which size serves so many tokens most cheaply, as good as the compute-optimal model of a given size?",
    _serve,
    needs={"params": "the compute-optimal model's parameters", "inference_tokens": "tokens to be served"},
    gives={
        "params": "parameters to train", "tokens": "training tokens", "tokens_per_param": "of them",
        "flops": "6 N D + 2 N T, to train and to serve", "saved_flops": "against the compute-optimal model",
        "saved_share": "of its cost", "loss": "of both",
    },
)  # fmt: skip
