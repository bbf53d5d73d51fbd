"""The law of tuned hyper-parameters: the best learning rate or batch as powers of size and data."""

from __future__ import annotations

import math
from typing import ClassVar

import numpy as np

from fits.laws.base import Centred, Question


def _rate(law, params, given):
    """The best rate, and that at another batch by the square root, as Adam wants below its critical batch."""
    best = law.predict(params, {"N": given["params"], "D": given["tokens"]})
    return {"lr": best, "lr_at_batch": best * math.sqrt(given["batch"] / given["tuned_batch"])}


class Tuned(Centred):
    """y = K prod x^exponent, with exponents of either sign, for the best learning rate or batch of each run.

    The fitted column is the hyper-parameter: map it to ``loss``. Units: K the hyper-parameter's.
    """

    offset = None
    powers: ClassVar = {}

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        cls.variables, cls.parameters = tuple(cls.powers), ("K", *cls.powers.values())
        cls.bounds = {"K": (0.0, math.inf)} | dict.fromkeys(cls.powers.values(), (-10.0, 10.0))

    def predict(self, params, x, xp=np):
        power = sum(params[e] * xp.log(x[v]) for v, e in self.powers.items())
        return xp.exp(xp.log(params["K"]) + power)

    def shifts(self, params, centre, xp=np):
        return {"K": -sum(params[e] * centre[v] for v, e in self.powers.items())}

    def starts(self, x, y):
        columns = np.stack([np.ones(len(y)), *(np.log(x[v]) for v in self.powers)], 1)
        log_k, *found = map(float, np.linalg.lstsq(columns, np.log(y), rcond=None)[0])
        K, powers = math.exp(np.clip(log_k, -600, 600)), dict(zip(self.powers.values(), found, strict=True))
        return [{"K": k * K, **powers} for k in (1.0, 0.5, 2.0)]


class TunedND(Tuned):
    """``Tuned`` in N and D. N counts parameters without embeddings, as published for the learning rate."""

    name = "tuned_ND"
    formula = "y = K N^p D^q"
    source = "Li et al. 2025, Step Law, for the learning rate (arXiv:2503.04715)"
    powers: ClassVar = {"N": "p", "D": "q"}
    PUBLISHED: ClassVar = {"K": 1.79, "p": -0.713, "q": 0.307}
    questions: ClassVar = {
        "lr": Question(
            "which learning rate, at the batch it was tuned for and at another?",
            _rate,
            needs={"params": "parameters without embeddings", "tokens": "training tokens"},
            takes={
                "batch": (1.0, "tokens a step that are wanted"),
                "tuned_batch": (1.0, "tokens a step that the law was tuned at"),
            },
            gives={"lr": "peak learning rate", "lr_at_batch": "times the root of batch / tuned_batch"},
        )
    }  # fmt: skip


class TunedD(Tuned):
    """``Tuned`` in tokens alone: the best batch grows with data and hardly with size."""

    name = "tuned_D"
    formula = "y = K D^q"
    source = "Li et al. 2025, Step Law, for the batch (arXiv:2503.04715)"
    powers: ClassVar = {"D": "q"}
    PUBLISHED: ClassVar = {"K": 0.58, "q": 0.571}
    questions: ClassVar = {
        "batch": Question(
            "which batch for so many tokens?",
            lambda law, params, given: {
                "batch": law.predict(params, {"D": given["tokens"]}),
                "steps": given["tokens"] / law.predict(params, {"D": given["tokens"]}),
            },
            needs={"tokens": "training tokens"},
            gives={"batch": "tokens a step", "steps": "of them"},
        )
    }  # fmt: skip
