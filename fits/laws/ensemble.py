"""The law of ensembles at fixed data: the loss against members and their size."""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from fits.laws.base import PowerSum, Question, Term


def _asymptote(law, params, given):
    one = law.predict(params, {"N": given["params"], "M": given["members"]})
    return {"asymptote": params["E"], "loss": one, "left": one - params["E"]}


def _split(law, params, given):
    """For parameters in all N M = T: A / N^alpha + B (N / T)^beta, convex in log N, has one minimum."""
    total = given["total_params"]
    log_a = np.log(params["alpha"] * params["A"])
    log_b = np.log(params["beta"] * params["B"]) - params["beta"] * np.log(total)
    N = np.exp(np.minimum((log_a - log_b) / (params["alpha"] + params["beta"]), np.log(total)))
    return {"params": N, "members": total / N, "loss": law.predict(params, {"N": N, "M": total / N})}


class Ensemble(PowerSum):
    """L = E + A / N^alpha + B / M^beta: M independently trained members of N parameters each, D fixed.

    E is what unlimited compute leaves of this recipe at this data. Units: N parameters, M members.
    """

    name = "ensemble"
    formula = "L = E + A / N^alpha + B / M^beta"
    source = "asymptotes after Kim et al. 2025 (arXiv:2509.14786); joint form unverified"
    terms = (Term("E"), Term("A", {"N": "alpha"}), Term("B", {"M": "beta"}))
    questions: ClassVar = {
        "asymptote": Question(
            "what would unlimited compute leave, and how far is a recipe from it?",
            _asymptote,
            needs={"params": "of one member", "members": "of the ensemble"},
            gives={"asymptote": "the loss of unlimited compute", "loss": "of this recipe", "left": "between"},
        ),
        "split": Question(
            "few large members or many small ones, for so many parameters in all?",
            _split,
            needs={"total_params": "of all members"},
            gives={"params": "of one member", "members": "of the ensemble", "loss": "the law's"},
        ),
    }  # fmt: skip
