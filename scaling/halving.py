"""How successive halving, Hyperband and its iterative deepening share out a resource: arithmetic alone.

The resource of a configuration is what it is trained for (here tokens). Successive halving (Jamieson &
Talwalkar 2016) trains n configurations for r, keeps the best 1/eta of them for eta r, and so on up to R.
Hyperband (Li et al. 2018, algorithm 1) does so in brackets s = s_max ... 0, where s_max is
floor(log_eta(R / r_min)): bracket s begins with n = ceil((s_max + 1) / (s + 1) eta^s) configurations at
r = R eta^-s, and its rung i holds n_i = floor(n eta^-i) of them at r_i = r eta^i, so that every bracket costs
about (s_max + 1) R.

Raising R to eta R turns bracket s into bracket s + 1: it begins at the same r and needs more configurations
there, and one bracket is new, which begins at eta R. So nothing that ran is wasted (Brandt et al. 2023,
"Iterative Deepening Hyperband", whose three ways to promote are ``promoted``).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Mapping, Sequence

STRATEGIES = ("discarding", "preserving", "efficient")


@dataclasses.dataclass(frozen=True)
class Rung:
    """So many configurations, each trained for ``resource`` in all, counted from its beginning."""

    configs: int
    resource: float


@dataclasses.dataclass(frozen=True)
class Bracket:
    """One successive halving: its rungs from the smallest resource to the largest."""

    rungs: tuple[Rung, ...]

    def cost(self, reuse: bool = True) -> float:
        """Resource spent in all; ``reuse``: a configuration goes on from its last rung."""
        before = [0.0] + [r.resource for r in self.rungs[:-1]]
        return sum(
            r.configs * (r.resource - (b if reuse else 0.0)) for r, b in zip(self.rungs, before, strict=True)
        )


def levels(least: float, most: float, eta: float) -> int:
    """s_max: how often ``least`` can be multiplied by eta without passing ``most``.

    Raises:
      ValueError: eta not above 1, a resource that is not positive, or least above most.
    """
    if not eta > 1:
        raise ValueError(f"eta is {eta!r}; it must be above 1")
    if not 0 < least <= most < math.inf:
        raise ValueError(f"the least resource is {least!r} and the most {most!r}; need 0 < least <= most")
    s = 0
    while least * eta ** (s + 1) <= most * (1 + 1e-9):  # a logarithm would round 8 = 2^3 down now and then
        s += 1
    return s


def halving(configs: int, least: float, most: float, eta: float = 3) -> Bracket:
    """Successive halving of ``configs`` from ``least`` (or just above it) to ``most``, or until none is left.

    Raises:
      ValueError: as ``levels``, or no configuration.
    """
    if configs < 1:
        raise ValueError(f"configs is {configs!r}; it must be at least 1")
    s = levels(least, most, eta)
    rungs = (Rung(math.floor(configs * eta**-i + 1e-9), most * eta ** (i - s)) for i in range(s + 1))
    return Bracket(tuple(r for r in rungs if r.configs))


def hyperband(least: float, most: float, eta: float = 3) -> list[Bracket]:
    """Hyperband's brackets, the one that begins with most configurations first (Li et al. 2018, algorithm 1).

    Raises:
      ValueError: as ``levels``.
    """
    top = levels(least, most, eta)
    out = []
    for s in range(top, -1, -1):
        n = math.ceil((top + 1) / (s + 1) * eta**s - 1e-9)
        out.append(halving(n, most * eta**-s, most, eta))
    return out


def promoted(
    pool: Sequence,
    loss: Mapping,
    k: int,
    strategy: str = "discarding",
    further: Collection = (),
    others: Sequence = (),
) -> list:
    """The k configurations of a rung that go on, best first; ties go to the one that came first.

    Args:
      pool: configurations at this rung, in order. loss: of each at this rung; infinite where it diverged.
      strategy: when a bracket is extended (Brandt et al. 2023): ``discarding``, the best k of the pool, as if
        run anew; ``preserving``, the best k of the pool and of what earlier passes had brought to this rung
        (``others``); ``efficient``, what earlier passes promoted stays (``further``) and the best of the rest
        fill up.
      further: configurations that earlier passes trained beyond this rung.
      others: configurations that earlier passes trained up to this rung, in order.

    Raises:
      ValueError: another strategy.
    """
    if strategy not in STRATEGIES:
        raise ValueError(f"strategy is {strategy!r}; it must be one of {', '.join(STRATEGIES)}")
    first, rest = [], list(pool)
    if strategy == "preserving":
        rest += [c for c in others if c not in rest]
    elif strategy == "efficient":
        first = [c for c in rest if c in further]
        rest = [c for c in rest if c not in further]
    best = sorted(rest, key=lambda c: loss[c])  # stable: ties by order
    return first + best[: max(0, k - len(first))]
