"""Power-law random features: the "4+3 phases" of compute-optimal scaling (Paquette et al. 2024).

The problem has two exponents, alpha of the data and beta of the target. With v ambient dimensions:

    x_j ~ j^-alpha N(0, 1),  target <b, x> with b_j = j^-beta,  features W^T x,  W [v, d] of N(0, 1/d)
    loss P(theta) = E (<theta, W^T x> - <b, x>)^2,   one-pass SGD: every batch of B samples is new

Three ways to its loss stand here, each exact in its own sense, and ``scaling.theory.sgd`` is the fourth:

* ``Moments``: for one W, the mean over the data of SGD's loss after any number of steps. The features are
  Gaussian, and at the minimiser the residual is independent of them, so that second moments obey a closed
  linear recursion; in the eigenbasis of W^T D W, with D = diag(j^-2 alpha), it closes on the diagonal. As one
  equation for the loss it is the paper's Volterra equation, P(r) = F(r) + sum_s K(r - 1 - s) P(s).
* ``Equivalent``: the same with the resolvent of D^1/2 W W^T D^1/2 in place of one W's: its deterministic
  equivalent at (d, v), for sizes at which nothing could be trained. Solved as a generating function.
* ``theory``: the exponents of the seven phases as f -> infinity.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence

import numpy as np

TALBOT_NODES = 24
"""On the contour that inverts the generating function (Dingfelder and Weideman 2015); rounding dominates."""
LEAST_STEPS = 24
"""Of ``Equivalent.loss``: the contour then lies within a strip of width 2 pi, one sheet of w = exp(-s)."""
EXACT_TERMS = 128
"""Of a sum over the ambient dimensions; the rest is an integral over log j, midpoint errors under 1e-6."""
PHASES = ("Ia", "Ib", "Ic", "II", "III", "IVa", "IVb")


@dataclasses.dataclass(frozen=True)
class Exponents:
    """What the best loss and size do with compute: P* ~ f^-loss, d* ~ f^size, at f = d B steps.

    Attributes:
      phase: one of ``PHASES``. loss, size: the exponents, both positive.
    """

    phase: str
    loss: float
    size: float


def theory(alpha: float, beta: float) -> Exponents:
    """The exponents at (alpha, beta) with v / d constant (Paquette et al. 2024).

    Each follows from the two of four terms that balance at the optimum. With u = gamma B r, and gamma ~ 1
    where 2 alpha > 1, else d^(2 alpha - 1):

        F_0  = d^(-2 alpha + max(0, 1 - 2 beta))     what d features cannot express
        F_pp = u^-((2 alpha + 2 beta - 1) / 2 alpha)   what is not learned yet
        F_ac = u^(-1 + 1 / 2 alpha) / d                what the features distort (2 alpha > 1, 2 beta > 1)
        K_pp = gamma u^(-2 + 1 / 2 alpha)              the noise of SGD (alpha > 1/4, 2 beta > 1)

    Ia, Ib, Ic balance F_pp and F_0; II F_pp and F_ac; III F_ac and K_pp; IVa K_pp and F_0; IVb F_pp and
    K_pp. In IVb the next term is smaller by f^-(2 alpha size - loss) alone, a few hundredths in the exponent.

    Raises:
      ValueError: alpha + beta at most 1/2 (the loss grows with v), or a point on a border between phases.
    """
    a, b = alpha, beta
    if a <= 0 or a + b <= 0.5:
        raise ValueError(f"alpha = {a}, beta = {b}: need alpha > 0 and alpha + beta > 1/2")
    borders = {"alpha = 1/2": a - 0.5, "beta = 1/2": b - 0.5}
    if b > 0.5 and a > 0.5:
        borders["alpha = beta"] = a - b
    if b > 0.5 and a < 0.5:
        borders |= {"alpha = 1/4": a - 0.25, "alpha = 1 - sqrt(1/2)": a - (1 - 0.5**0.5)}
    for name, distance in borders.items():
        if abs(distance) < 1e-12:
            raise ValueError(f"alpha = {a}, beta = {b} is on the border {name}; choose a point in a phase")
    decay = 2 * a + 2 * b - 1
    if b < 0.5:
        if a > 0.5:
            return Exponents("Ia", decay / (2 * a + 1), 1 / (2 * a + 1))
        return Exponents("Ib", decay / 2, 0.5)
    if a > 0.5:
        if b < a:
            return Exponents("II", decay / (2 * (a + b)), b / (a + b))
        return Exponents("III", (4 * a - 1) / (4 * a), 0.5)
    if a < 0.25:
        cost = 3 * a + 2 * b - 1 - 2 * a * b
        return Exponents("Ic", a * decay / cost, decay / (2 * cost))
    if a < 1 - 0.5**0.5:
        cost = 2 * b - a - 2 * a * b
        return Exponents("IVb", (1 - 2 * a) * decay / (2 * cost), (b - a) / cost)
    return Exponents("IVa", a, 0.5)


@dataclasses.dataclass(frozen=True)
class Problem:
    """One problem at one size.

    Attributes:
      alpha, beta: exponents of the data and of the target. d: features. ambient: v over d.
      batch: B. rate: the learning rate gamma is 2 rate / ((B + 1) sum_j j^-2 alpha); SGD is stable well
        below 1, and at 1/2 its noise amplifies the loss by about two.
    """

    alpha: float
    beta: float
    d: float
    ambient: float = 4.0
    batch: int = 1
    rate: float = 0.5

    @property
    def v(self) -> int | float:
        return round(self.ambient * self.d)

    def __post_init__(self):
        if not self.alpha > 0 or not self.alpha + self.beta > 0.5:
            raise ValueError(
                f"alpha = {self.alpha}, beta = {self.beta}: need alpha > 0 and alpha + beta > 1/2"
            )
        if not (self.d >= 1 and self.ambient >= 1 and self.batch >= 1 and 0 < self.rate < 1):
            raise ValueError(f"{self}: need d >= 1, ambient >= 1, batch >= 1 and 0 < rate < 1")


class Population:
    """Sums over the ambient dimensions: exact to ``EXACT_TERMS``, then Gauss-Legendre panels in log j.

    Attributes:
      weight_J: how many dimensions a node stands for. lam_J: their j^-2 alpha. target_J: weight x lam x b^2.
      trace: sum of j^-2 alpha. gamma: the learning rate.
    """

    def __init__(self, problem: Problem):
        j, self.weight_J = _nodes(problem.v)
        self.lam_J = j ** (-2 * problem.alpha)
        self.target_J = self.weight_J * j ** (-2 * problem.alpha - 2 * problem.beta)
        self.trace = float(self.weight_J @ self.lam_J)
        self.gamma = 2 * problem.rate / ((problem.batch + 1) * self.trace)


def _nodes(v: float) -> tuple[np.ndarray, np.ndarray]:
    """Nodes and weights for sums over 1 .. v of what is smooth in log j."""
    if v <= 4 * EXACT_TERMS:
        j = np.arange(1.0, v + 1)
        return j, np.ones_like(j)
    x, w = _gauss()
    low, high = np.log(EXACT_TERMS + 0.5), np.log(v + 0.5)
    ends = np.linspace(low, high, 1 + int(np.ceil((high - low) / 1.2)))
    half = 0.5 * np.diff(ends)[:, None]
    j = np.exp(half * (x + 1) + ends[:-1, None]).ravel()
    first = np.arange(1.0, EXACT_TERMS + 1)
    return np.concatenate([first, j]), np.concatenate([np.ones(EXACT_TERMS), (half * w).ravel() * j])


@functools.cache
def _gauss() -> tuple[np.ndarray, np.ndarray]:
    return np.polynomial.legendre.leggauss(16)


class Moments:
    """SGD's mean loss for one draw of the features, by the exact recursion of second moments.

    With theta* the minimiser, lam_i, u_i the eigenpairs of K = W^T D W and s_i = E <u_i, theta - theta*>^2:

        s_i(r+1) = (1 - 2 gamma B lam_i + gamma^2 B (B+1) lam_i^2) s_i(r) + gamma^2 B lam_i P(r)
        P(r)     = P_inf + sum_i lam_i s_i(r)

    a symmetric linear map, diagonalised once, so that any number of steps costs the same.

    Args:
      W_VxD: float [v, d]. problem: its exponents, batch and rate; d and v are the array's.
    """

    def __init__(self, W_VxD: np.ndarray, problem: Problem):
        j = np.arange(1.0, len(W_VxD) + 1)
        gamma = 2 * problem.rate / ((problem.batch + 1) * float((j ** (-2 * problem.alpha)).sum()))
        left_VxD, sigma_D, _ = np.linalg.svd(j[:, None] ** -problem.alpha * W_VxD, full_matrices=False)
        y_V = j ** (-problem.alpha - problem.beta)
        along_D = left_VxD.T @ y_V
        floor = float(((y_V - left_VxD @ along_D) ** 2).sum())
        self._solve(sigma_D**2, along_D**2 / sigma_D**2, floor, gamma, problem.batch)

    @classmethod
    def of_spectrum(cls, lam_D, start_D, floor: float, gamma: float, batch: float) -> Moments:
        """The same recursion of given eigenvalues, s_i(0), P_inf, gamma and B."""
        moments = cls.__new__(cls)
        moments._solve(np.asarray(lam_D, float), np.asarray(start_D, float), floor, gamma, batch)
        return moments

    def _solve(self, lam_D, start_D, floor: float, gamma: float, B: float) -> None:
        self.lam_D, self.start_D, self.floor, self.gamma = lam_D, start_D, floor, gamma
        gain = gamma**2 * B
        keep_D = 1 - 2 * gamma * B * lam_D + gain * (B + 1) * lam_D**2
        values_D, basis_DxD = np.linalg.eigh(np.diag(keep_D) + gain * np.outer(lam_D, lam_D))
        drive_D = basis_DxD.T @ lam_D
        fixed_D = gain * floor * drive_D / (1 - values_D)
        self.values_D, self.stable = values_D, bool(values_D.max() < 1)
        self.limit = floor + float(drive_D @ fixed_D)
        self.modes_D = drive_D * (basis_DxD.T @ start_D - fixed_D)

    def loss(self, steps) -> np.ndarray:
        """Mean loss after each number of steps."""
        return self.limit + (self.modes_D * self.values_D ** np.asarray(steps, float)[..., None]).sum(-1)


class Equivalent:
    """The deterministic equivalent of ``Moments`` over the draw of the features, at any size.

    The resolvent of D^1/2 W W^T D^1/2 at z is taken to be diag(1 / (lam_j m(z) - z)), where
    m = 1 / (1 + (1/d) sum_j lam_j / (lam_j m - z)) (Paquette et al. 2024). With kappa = -z / m it
    is z = -kappa (1 - df1(kappa) / d), df1 = sum_j lam_j / (lam_j + kappa): explicit in kappa, found from z
    by Newton's method along an arc that begins on the negative axis, where the root is unique.

    The generating function of the Volterra equation is F(w) / (1 - w K(w)), with

        F(w) = sum over eigenvalues of (what of y lies there) / (1 - w q(lam))
        K(w) = gamma^2 B sum over eigenvalues of lam^2 / (1 - w q(lam))

    and q(lam) = 1 - 2 gamma B lam + gamma^2 B (B+1) lam^2, a quadratic, so that each is a difference of two
    resolvents. Its coefficients, the losses, are read off a contour around its singularities: the number of
    steps may be 10^20.
    """

    def __init__(self, problem: Problem):
        self.problem, self.population = problem, Population(problem)

    def loss(self, steps) -> np.ndarray:
        """Mean loss after each number of steps.

        Args:
          steps: array of any shape, each at least ``LEAST_STEPS``.
        """
        r = np.asarray(steps, float)
        if r.size and r.min() < LEAST_STEPS:
            raise ValueError(f"steps has {r.min():g}; the contour needs at least {LEAST_STEPS}")
        theta = (2 * np.arange(TALBOT_NODES // 2, TALBOT_NODES) + 1) * np.pi / TALBOT_NODES - np.pi
        c = -0.4814 + 0.6122 * theta / np.tan(0.6407 * theta) + 0.2645j * theta
        slope = 0.6122 / np.tan(0.6407 * theta) + 0.2645j
        slope = slope - 0.6122 * 0.6407 * theta / np.sin(0.6407 * theta) ** 2
        s = TALBOT_NODES * c / r[..., None]
        terms = np.exp(TALBOT_NODES * c) * self.generating(s) * slope / r[..., None]
        return 2 * np.imag(terms.sum(-1))  # half of the nodes: the rest are their conjugates

    def generating(self, s: np.ndarray) -> np.ndarray:
        """sum_r P(r) exp(-s r), complex as ``s``; ``s`` off the negative axis."""
        pop, B = self.population, self.problem.batch
        a, w, grown = pop.gamma**2 * B * (B + 1), np.exp(-s), np.expm1(s)  # (1 - w) / w without cancelling
        root = np.sqrt((pop.gamma * B) ** 2 + a * grown)
        z = np.stack([-grown / (pop.gamma * B + root), (pop.gamma * B + root) / a])  # 1 = w q(z)
        kappa = self.kappa(z)
        df1 = _chunked(lambda k: (pop.weight_J * pop.lam_J / (pop.lam_J + k)).sum(-1), kappa)
        there = -kappa / z * _chunked(lambda k: (pop.target_J / (pop.lam_J + k)).sum(-1), kappa)
        apart = z[0] - z[1]
        F = -(there[0] - there[1]) / (a * w * apart)
        wK = -(z[0] * df1[0] - z[1] * df1[1]) / ((B + 1) * apart)
        return F / (1 - wK)

    def kappa(self, z: np.ndarray, turns: int = 10) -> np.ndarray:
        """-z / m(z), complex as ``z``; ``z`` off the spectrum."""
        radius, angle = np.abs(z), np.angle(z)
        turn = np.where(angle < 0, angle + np.pi, angle - np.pi)  # from the negative axis, the shorter way
        kappa = self._newton((radius + self.population.trace / self.problem.d).astype(complex), -radius)
        for share in np.linspace(0, 1, turns + 1)[1:]:
            target = -radius * np.exp(1j * share * turn)
            kappa = self._newton(kappa, target, 2 if share < 1 else 60)
        return kappa

    def _newton(self, kappa, z, most: int = 200):
        """Solves kappa (1 - df1(kappa) / d) + z = 0; on the positive axis convex and increasing."""
        pop, d = self.population, self.problem.d
        for _ in range(most):

            def share(k):
                q = pop.lam_J / (pop.lam_J + k)
                return np.stack([(pop.weight_J * q).sum(-1), (pop.weight_J * q * q).sum(-1)], -1)

            sums = _chunked(share, kappa) / d
            step = (kappa * (1 - sums[..., 0]) + z) / (1 - sums[..., 1])
            kappa = kappa - step
            if (np.abs(step) <= 1e-13 * np.abs(kappa)).all():
                break
        return kappa


def _chunked(function, k: np.ndarray, rows: int = 512) -> np.ndarray:
    """``function`` of k[..., None] in blocks that stay in the processor's cache."""
    flat = k.reshape(-1, 1)
    parts = [function(flat[i : i + rows]) for i in range(0, len(flat), rows)]
    out = np.concatenate(parts)
    return out.reshape(k.shape + out.shape[1:])


def _lowest(loss: Callable[[int], float], allowed: Sequence[bool]) -> tuple[int, np.ndarray]:
    """Where a function with one minimum is lowest, and its values: infinite where they were not needed.

    From the middle downhill, a step at a time: few of a window's sizes are looked at.
    """
    values, within = np.full(len(allowed), np.inf), np.flatnonzero(allowed)
    if not len(within):
        return 0, values
    i, last = int(within[abs(within - len(allowed) // 2).argmin()]), None
    while i != last:
        last = i
        for k in within[abs(within - i) <= 1]:
            values[k] = loss(k) if np.isinf(values[k]) else values[k]
        i = int(values.argmin())
    return i, values


def frontier(
    alpha: float,
    beta: float,
    flops,
    guess: float | None = None,
    spread: float = 8.0,
    sizes: int = 9,
    **fields,
) -> tuple[np.ndarray, np.ndarray]:
    """The best size and loss at each budget f = d B r, from the deterministic equivalent.

    Args:
      flops: budgets. guess: exponent of the best size; by default the theory's. spread: sizes tried lie
        within this factor of f^guess (a search that ends at its border moves on). sizes: how many.
      fields: of ``Problem``.

    Returns:
      d* and P* at each budget: the vertex of a parabola of log loss over log size through the best three.
    """
    guess = theory(alpha, beta).size if guess is None else guess
    best = []
    for f in np.asarray(flops, float):
        centre = f**guess
        for _ in range(40):
            log_d = np.log(centre) + np.linspace(-1, 1, sizes) * np.log(spread)
            problems = [Problem(alpha, beta, size, **fields) for size in np.maximum(np.exp(log_d), 1)]
            steps = [f / (p.d * p.batch) for p in problems]
            allowed = [p.d >= 2 and r >= LEAST_STEPS for p, r in zip(problems, steps, strict=True)]
            i, losses = _lowest(lambda k: Equivalent(problems[k]).loss(steps[k]), allowed)  # noqa: B023
            inside = 0 < i < sizes - 1 and np.isfinite(losses[i - 1 : i + 2]).all()
            if inside:
                break
            centre = float(np.exp(log_d[i]))
        else:
            raise ValueError(f"no best size at {f:g} with alpha = {alpha}, beta = {beta}")
        if not losses.min() > 0:
            raise ValueError(f"at {f:g} the loss is below what float64 resolves; take smaller budgets")
        c2, c1, c0 = np.polyfit(log_d[i - 1 : i + 2] - log_d[i], np.log(losses[i - 1 : i + 2]), 2)
        best.append((np.exp(log_d[i] - c1 / (2 * c2)), np.exp(c0 - c1**2 / (4 * c2))))
    d, loss = np.array(best).T
    return d, loss
