"""SGD on structured features: exactly solvable learning curves, and the best batch at fixed compute.

Bordelon and Pehlevan 2022 ("Learning curves for SGD on structured features"). Gaussian features with
eigenvalues lam_k = k^-b and a target whose power in mode k is lam_k w_k^2 = k^-a, k = 1 .. M, labels with
noise of variance sigma^2; t steps of SGD at rate eta on the mean gradient of m new samples, from theta = 0.
The mean excess loss E(t, m) = sum_k lam_k s_k(t) obeys

    s_k(t+1) = (1 - 2 eta lam_k + eta^2 lam_k^2 (1 + 1/m)) s_k(t) + (eta^2 / m) lam_k (sigma^2 + E(t))

With C = t m samples to spend, a larger batch takes fewer steps and less noise. For eta << 1 and modes enough,

    E = c_1 (eta t)^-rho + c_2 eta sigma^2 / m,   rho = (a - 1) / b

so that at fixed C the best batch grows as m* ~ C^x and the excess falls as E* ~ C^-x, x = rho / (1 + rho):
what is learned faster (larger rho) wants larger batches. Without label noise m* does not grow.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from scaling.theory.plrf import Moments


@dataclasses.dataclass(frozen=True)
class Structured:
    """One problem.

    Attributes:
      decay: b. target: a. modes: M. rate: eta, with lam_1 = 1. noise: sigma^2. batch: m, any positive number
        for the mean.
    """

    decay: float
    target: float
    modes: int
    rate: float = 0.1
    noise: float = 0.1
    batch: float = 1

    def __post_init__(self):
        if not (self.decay > 1 and self.target > 1 and self.modes >= 1 and self.batch > 0):
            raise ValueError(f"{self}: need decay > 1, target > 1, modes >= 1 and batch > 0")
        if not (0 < self.rate < 1 and self.noise >= 0):
            raise ValueError(f"{self}: need 0 < rate < 1 and noise >= 0")

    @property
    def exponent(self) -> float:
        """x of m* ~ C^x and E* ~ C^-x with label noise."""
        rho = (self.target - 1) / self.decay
        return rho / (1 + rho)

    def moments(self) -> Moments:
        """The recursion above, solved for any number of steps; its loss is E + sigma^2."""
        k = np.arange(1.0, self.modes + 1)
        power = k**-self.decay, k ** (self.decay - self.target)
        return Moments.of_spectrum(*power, self.noise, self.rate / self.batch, self.batch)


def excess(problem: Structured, steps) -> np.ndarray:
    """Mean of sum_k lam_k s_k after each number of steps (any positive numbers)."""
    return problem.moments().loss(steps) - problem.noise


def best_batch(problem: Structured, samples: float, per_octave: int = 2) -> tuple[float, float]:
    """The batch, a real number, of the least excess at C = t m samples, and that excess.

    Returns:
      The vertex of a parabola of log excess over log m through the best three of a grid.

    Raises:
      ValueError: the best lies at an end: one sample, or one step.
    """
    m = 2.0 ** (np.arange(0, per_octave * np.log2(samples)) / per_octave)
    found = np.full(len(m), np.inf)
    for i, batch in enumerate(m):
        value = float(excess(dataclasses.replace(problem, batch=batch), samples / batch))
        found[i] = value if np.isfinite(value) and value > 0 else np.inf
        if found[i] > 4 * found.min():  # far beyond the only minimum
            break
    i = int(np.argmin(found))
    if i in (0, len(m) - 1):
        raise ValueError(f"the best batch at {samples:g} samples is {m[i]:g}, an end of what was tried")
    c2, c1, c0 = np.polyfit(np.log(m[i - 1 : i + 2]), np.log(found[i - 1 : i + 2]), 2)
    return float(np.exp(-c1 / (2 * c2))), float(np.exp(c0 - c1**2 / (4 * c2)))
