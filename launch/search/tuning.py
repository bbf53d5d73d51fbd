"""Successive halving, Hyperband and its iterative deepening over the points of a space.

A configuration's trunk grows segment by segment from rung to rung; at each rung a cooldown leaves it, whose
final held-out loss is what configurations are ranked by. No step is trained twice.
"""

from __future__ import annotations

import dataclasses
import math

from launch.search.points import draw
from launch.search.session import Session
from scaling.branches import Chain
from scaling.grid import entry
from scaling.halving import Bracket, halving, hyperband, levels, promoted


@dataclasses.dataclass
class Pool:
    """Configurations of one bracket, kept while it is extended.

    Attributes:
      points: in the order drawn. losses: by D and configuration, of every pass so far.
    """

    stream: str
    points: list[dict] = dataclasses.field(default_factory=list)
    losses: dict[float, dict[int, float]] = dataclasses.field(default_factory=dict)


def halve(session: Session) -> None:
    """Successive halving of ``configs`` (Jamieson & Talwalkar 2016)."""
    s = session.search
    bracket = halving(s["configs"], s["least_tokens"], s["tokens"], s["eta"])
    run_bracket(session, bracket, Pool("halving"), _span(session))


def band(session: Session) -> None:
    """Every bracket of Hyperband, the one of most configurations first (Li et al. 2018)."""
    s = session.search
    for k, bracket in enumerate(hyperband(s["least_tokens"], s["tokens"], s["eta"])):
        run_bracket(session, bracket, Pool(f"bracket {k}"), _span(session))


def deepen(session: Session) -> None:
    """Hyperband up to each of ``tokens`` in turn: brackets are extended, not rerun (Brandt et al. 2023)."""
    s = session.search
    pools: list[Pool] = []
    for most in s["tokens"]:
        for k, bracket in enumerate(hyperband(s["least_tokens"], most, s["eta"])):
            if k == len(pools):  # the new bracket, which begins at the new maximum
                pools.append(Pool(f"bracket {k}"))
            run_bracket(session, bracket, pools[k], _span(session), s["strategy"])


def _span(session: Session) -> tuple[float, float]:
    """The shortest rung of the whole search, and the first D that was called longest."""
    s = session.search
    most = float(s["tokens"][0] if isinstance(s["tokens"], list) else s["tokens"])
    return most * s["eta"] ** -levels(s["least_tokens"], most, s["eta"]), most


def run_bracket(session: Session, bracket: Bracket, pool: Pool, span, strategy: str = "discarding") -> None:
    """One successive halving; where the pool has been through shorter ones, their results are kept."""
    while len(pool.points) < bracket.rungs[0].configs:
        pool.points.append(draw(session.search, pool.stream, len(pool.points), observed(session)))
    tokens = [_rounded(r.resource) for r in bracket.rungs]
    before = {d: dict(found) for d, found in pool.losses.items()}
    current = list(range(bracket.rungs[0].configs))
    for i, d in enumerate(tokens):
        measure(session, pool, current, tokens[: i + 1], span)
        if i + 1 == len(tokens):
            break
        further = before.get(tokens[i + 1], {})
        kept = promoted(
            current, pool.losses[d], bracket.rungs[i + 1].configs, strategy, further,
            [c for c in before.get(d, {})],
        )  # fmt: skip
        current = [c for c in kept if math.isfinite(pool.losses[d][c])]
        session.decide(promoted=current)
        if not current:
            return


def _rounded(tokens: float) -> float:
    """A D as a key: R eta^-s eta^i is the same rung in every bracket."""
    return float(f"{tokens:.9g}")


def measure(session: Session, pool: Pool, current: list[int], tokens: list[float], span) -> None:
    """Trains configurations of a pool up to the last of ``tokens`` and keeps their losses there."""
    entries, names = [], []
    for c in current:
        point = pool.points[c]
        chain = Chain(entry, session.target(point))
        grown = [e for d in tokens for e in chain.add(session.cell(point, d, span))]
        entries += grown
        names.append(grown[-1]["id"])
    d = tokens[-1]
    points = [pool.points[c] for c in current]
    losses = session.ask(entries, names, bracket=pool.stream, tokens=d, configs=current, points=points)
    pool.losses.setdefault(d, {}).update(zip(current, losses, strict=True))
    session.seen += [(p, d, x, n) for p, x, n in zip(points, losses, names, strict=True)]
    session.answer = best(session)


def observed(session: Session) -> list[tuple[dict, float]]:
    """Points and losses at the largest D that has enough to learn from (Falkner et al. 2018, BOHB)."""
    by_tokens: dict[float, dict[str, tuple[dict, float]]] = {}
    for point, d, loss, name in session.seen:
        by_tokens.setdefault(d, {})[name] = (point, loss)
    enough = [d for d, found in by_tokens.items() if len(found) >= 4 * len(session.search["space"])]
    return list(by_tokens[max(enough)].values()) if enough else []


def best(session: Session) -> dict | None:
    """The best point at the largest D that any was trained for."""
    found = [x for x in session.seen if math.isfinite(x[2])]
    if not found:
        return None
    point, d, loss, name = min(found, key=lambda x: (-x[1], x[2]))
    return {"point": point, "tokens": d, "loss": loss, "cell": name}
