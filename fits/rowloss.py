"""The loss of one residual, with derivatives, and what an evaluation of many lanes returns."""

from __future__ import annotations

import dataclasses

import numpy as np

LOSSES = ("huber", "lad", "least_squares", "quantile", "expectile")
ASYMMETRIC = ("quantile", "expectile")  # the losses that take tau
NARROWED = ("lad", "quantile")  # those solved as Huber losses of vanishing width


@dataclasses.dataclass(frozen=True)
class RowLoss:
    """A loss of one residual. ``huber``: r^2/2 up to ``delta``, then delta(|r| - delta/2) (absolute units).

    ``lad`` (|r|) is solved as huber/delta while delta shrinks; ``delta`` is then the current width.
    ``least_squares``: r^2/2. With s = ``tau`` where the observed loss lies above the predicted one (r < 0)
    and 1 - tau where it lies below, ``quantile`` is s |r| (Koenker and Bassett 1978; half of lad at tau
    1/2; narrowed like lad) and ``expectile`` is s r^2 (Newey and Powell 1987; least squares at tau 1/2).
    """

    name: str
    delta: float
    tau: float = 0.5

    def value(self, r, xp=np):
        if self.name == "least_squares":
            return 0.5 * r * r
        if self.name == "expectile":
            return self._side(r, xp) * r * r
        inside = xp.minimum(xp.abs(r), self.delta)
        huber = inside * (xp.abs(r) - 0.5 * inside)
        if self.name == "quantile":
            return self._side(r, xp) * huber / self.delta
        return huber / self.delta if self.name == "lad" else huber

    def exact(self, r):
        """The loss that the narrowing widths of lad and quantile lead to; every other loss as it is."""
        if self.name == "quantile":
            return self._side(r, np) * np.abs(r)
        return np.abs(r) if self.name == "lad" else self.value(r)

    def _side(self, r, xp):
        return xp.where(r > 0, 1.0 - self.tau, self.tau)

    def derivatives(self, r, xp=np):
        """First derivative, second derivative, and the weight s of the quadratic s r^2/2 that majorises."""
        if self.name == "least_squares":
            one = xp.ones_like(r)
            return r, one, one
        if self.name == "expectile":
            side = 2.0 * self._side(r, xp)
            return side * r, side, xp.full_like(r, 2.0) * xp.maximum(self.tau, 1.0 - self.tau)
        if self.name == "quantile":
            # a parabola through r that stays above both branches needs a curvature of 1/|r| at most
            side, size = self._side(r, xp) / self.delta, xp.abs(r)
            first = side * xp.clip(r, -self.delta, self.delta)
            return first, xp.where(size <= self.delta, side, 0.0), 1.0 / xp.maximum(size, self.delta)
        scale = 1.0 / self.delta if self.name == "lad" else 1.0
        size = xp.abs(r)
        first = xp.clip(r, -self.delta, self.delta) * scale
        second = xp.where(size <= self.delta, scale, 0.0)
        return first, second, xp.minimum(1.0, self.delta / xp.maximum(size, 1e-300)) * scale


@dataclasses.dataclass
class Evaluation:
    """Objective, gradient, Hessian and the positive majoriser of the Hessian, one per lane."""

    value_B: np.ndarray
    gradient_BxK: np.ndarray
    hessian_BxKxK: np.ndarray
    majoriser_BxKxK: np.ndarray

    def take(self, lanes: np.ndarray) -> Evaluation:
        return Evaluation(
            self.value_B[lanes],
            self.gradient_BxK[lanes],
            self.hessian_BxKxK[lanes],
            self.majoriser_BxKxK[lanes],
        )

    def where(self, keep_B: np.ndarray, other: Evaluation) -> Evaluation:
        """This evaluation in the lanes to keep, the other one's elsewhere."""
        if keep_B.all():
            return self
        lanes, keep_Bx1x1 = keep_B[:, None], keep_B[:, None, None]
        return Evaluation(
            np.where(keep_B, self.value_B, other.value_B),
            np.where(lanes, self.gradient_BxK, other.gradient_BxK),
            np.where(keep_Bx1x1, self.hessian_BxKxK, other.hessian_BxKxK),
            np.where(keep_Bx1x1, self.majoriser_BxKxK, other.majoriser_BxKxK),
        )

    def put(self, lanes: np.ndarray, other: Evaluation) -> None:
        for field in dataclasses.fields(self):
            getattr(self, field.name)[lanes] = getattr(other, field.name)
