"""The law of training under differential privacy: steps, and the batch over the noise of a step."""

from __future__ import annotations

import math
from typing import ClassVar

import numpy as np

from fits.laws.base import PowerSum, Question, Term

LEAST_SIGMA = 2.0  # from about here on the privacy budget depends on the total noise alone


def privacy(batch, sigma, steps, examples):
    """eta = q / sigma (S / 2)^0.5 of Sander et al. 2023, q = B / examples; its inverse is the total noise."""
    return batch / examples / sigma * np.sqrt(steps / 2)


def _scale(law, params, given):
    """The same training at a smaller batch and noise: B / sigma and the steps stay, so each update does."""
    batch, sigma = given["batch"] / given["times"], given["sigma"] / given["times"]
    eta = privacy(given["batch"], given["sigma"], given["steps"], given["examples"])
    loss = law.predict(params, {"S": given["steps"], "Q": batch / sigma})
    return {
        "batch": batch, "sigma": sigma, "steps": given["steps"], "noise": 1 / eta,
        "noise_scaled": 1 / privacy(batch, sigma, given["steps"], given["examples"]),
        "examples_seen": batch * given["steps"], "loss": loss,
    }  # fmt: skip


def _steps(law, params, given):
    """The best steps at a fixed total noise: B / sigma = R S^-0.5 makes K's term K R^-gamma S^(gamma/2)."""
    ratio = math.sqrt(2) * given["examples"] / given["noise"]  # B / sigma at one step
    alpha, half = params["alpha"], params["gamma"] / 2
    log_rise = np.log(half * params["K"]) - params["gamma"] * math.log(ratio)
    steps = np.exp((np.log(alpha * params["A"]) - log_rise) / (alpha + half))
    Q = ratio / np.sqrt(steps)
    sigma = given["batch"] / Q
    return {
        "steps": steps, "sigma": sigma, "batch_per_sigma": Q, "examples_seen": given["batch"] * steps,
        "loss": law.predict(params, {"S": steps, "Q": Q}), "least_batch": LEAST_SIGMA * Q,
    }  # fmt: skip


class DPSGD(PowerSum):
    """L = E + A / S^alpha + K / (B / sigma)^gamma: S steps of batch B, noise sigma times the clipping norm.

    The noise of an averaged gradient is sigma / B clipping norms, so that runs of equal B / sigma and S train
    alike where it outweighs the batch's own. Units: B examples, sigma none; E, A, K the loss's.
    """

    name = "dp_sgd"
    formula = "L = E + A / S^alpha + K / (B / sigma)^gamma"
    source = "after Sander et al. 2023, TAN (arXiv:2210.03403); form unverified"
    terms = (Term("E"), Term("A", {"S": "alpha"}), Term("K", {"Q": "gamma"}))
    questions: ClassVar = {
        "scale": Question(
            "which batch and noise stand in for a private training at less compute?",
            _scale,
            needs={
                "batch": "of the private training, examples", "sigma": "its noise multiplier",
                "steps": "of both", "examples": "in the data set",
            },
            takes={"times": (100.0, "less compute")},
            gives={
                "batch": "examples a step", "sigma": "noise multiplier; B / sigma stays",
                "steps": "as before",
                "noise": "total, of the private training: 1 / eta", "noise_scaled": "the same",
                "examples_seen": "by the cheaper run", "loss": "the law's, of both",
            },
        ),
        "steps": Question(
            "how many steps, and how noisy, at a total amount of noise?",
            _steps,
            needs={
                "noise": "total: 1 / eta, with eta = q / sigma (S / 2)^0.5",
                "examples": "in the data set", "batch": "that can be afforded, examples",
            },
            gives={
                "steps": "best", "sigma": "noise multiplier at that batch", "batch_per_sigma": "B / sigma",
                "examples_seen": "in all", "loss": "the law's, whatever the batch",
                "least_batch": "at which sigma is 2, below which the noise buys less privacy",
            },
        ),
    }  # fmt: skip
