"""Compute-optimal laws that others published, to be drawn beside a study's own.

Each was fitted on other data, with another tokenizer and other models, and none was fitted at
the budgets of a small study: they are company for the eye, not a test of it.
"""

from __future__ import annotations

import dataclasses

import numpy as np

PF_DAY = 1e15 * 86_400
"""FLOPs in a petaflop/s-day, Kaplan et al.'s unit."""


@dataclasses.dataclass(frozen=True)
class PublishedLaw:
    """N* = k_N C^a and D* = k_D C^b, C in FLOPs, N in parameters, D in tokens.

    Attributes:
      name: short label; source: where it stands; note: what differs from counting all parameters.
    """

    name: str
    source: str
    k_N: float
    a: float
    k_D: float
    b: float
    note: str = ""

    def N(self, flops):
        """Compute-optimal parameters at ``flops``."""
        return self.k_N * np.asarray(flops, float) ** self.a

    def D(self, flops):
        """Compute-optimal tokens at ``flops``."""
        return self.k_D * np.asarray(flops, float) ** self.b


def _through(name: str, source: str, first: tuple, last: tuple, note: str = "") -> PublishedLaw:
    """The power laws through two rows (N, C, D) of a published table."""
    (n0, c0, d0), (n1, c1, d1) = first, last
    a = float(np.log(n1 / n0) / np.log(c1 / c0))
    b = float(np.log(d1 / d0) / np.log(c1 / c0))
    return PublishedLaw(name, source, n0 / c0**a, a, d0 / c0**b, b, note)


def _from_surface(name: str, source: str, A, B, alpha, beta, note: str = "") -> PublishedLaw:
    """The optimum of E + A/N^alpha + B/D^beta on C = 6ND (Hoffmann et al. 2022, eq. 4)."""
    g = (alpha * A / (beta * B)) ** (1.0 / (alpha + beta))
    a, b = beta / (alpha + beta), alpha / (alpha + beta)
    return PublishedLaw(name, source, g * 6.0**-a, a, 6.0**-b / g, b, note)


# The paper prints exponents to two digits and no coefficients; its tables of optimal runs, from
# 0.4 billion to 10 trillion parameters, give both.
PUBLISHED = (
    _through(
        "Hoffmann et al. 2022, approach 1",
        "arXiv:2203.15556, table 3, first and last row",
        (0.4e9, 1.92e19, 8.0e9),
        (10e12, 1.30e28, 216.2e12),
    ),
    _through(
        "Hoffmann et al. 2022, approach 2",
        "arXiv:2203.15556, table A3, first and last row",
        (0.4e9, 1.84e19, 7.7e9),
        (10e12, 1.75e28, 292.0e12),
    ),
    _through(
        "Hoffmann et al. 2022, approach 3",
        "arXiv:2203.15556, table A3, first and last row",
        (0.4e9, 2.21e19, 9.2e9),
        (10e12, 8.55e28, 1425.5e12),
    ),
    _from_surface(
        "Besiroglu et al. 2024",
        "arXiv:2404.10102, a refit of approach 3 on the same runs",
        A=482.01, B=2085.43, alpha=0.3478, beta=0.3658,
    ),
    PublishedLaw(
        "Kaplan et al. 2020",
        "arXiv:2001.08361, table 6",
        1.3e9 / PF_DAY**0.73, 0.73, 2e10 / PF_DAY**0.27, 0.27,
        "N without embeddings; C at a batch far below the critical one",
    ),
    PublishedLaw("20 tokens per parameter", "rule of thumb, C = 6ND", 120**-0.5, 0.5, 20 * 120**-0.5, 0.5),
)  # fmt: skip
