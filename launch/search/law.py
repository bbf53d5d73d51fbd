"""Law estimation: only those cells of a grid are trained that narrow the interval of an exponent most per
FLOP.

The study's grid, with its seeds, is the pool. A cheap corner of it is trained first; after each round the law
is fitted, and the next round is chosen by ``fits.next_cells``, with what each cell costs on top of the trunks
that are there already. It stops where the interval is as narrow as asked for, twice in a row and by two
measures (``fits.adaptive.is_narrow``), or where the budget holds no further cell.
"""

from __future__ import annotations

import math

import numpy as np
import pandas as pd

from fits.adaptive import is_narrow, next_cells, reported_half_width, value_of
from fits.errors import FitError
from fits.estimate import fit_table
from launch.search.session import OverBudget, Session
from scaling.branches import Chain, fork_step
from scaling.config import ConfigError
from scaling.grid import entry, plan
from scaling.layers import with_vocab
from scaling.recipe import FlopsOfSize

START_SIZES, START_TOKENS = 4, 3
"""The corner that is trained first: so many sizes and D, spread over the lower half of each."""
BOOTSTRAPS = 300
ADAPTIVE = {
    "code": "adaptive",
    "text": "the runs were chosen by looking at the fit, and its interval takes them as given; where the "
    "search stopped at a width, and not at its budget, that width may be narrow by luck",
}


class Pool:
    """The cells that may be trained, and the trunks as far as they have come.

    Attributes:
      cells: entries of the plan, trunks left out. groups: of each cell, its trunk's id or its own.
    """

    def __init__(self, manifest: dict):
        self.cells = [e for e in manifest["cells"] if e["role"] in ("cell", "branch")]
        self.groups = [e.get("trunk", e["id"]) for e in self.cells]
        trunks = {e["id"]: e for e in manifest["cells"] if e["role"] == "trunk"}
        self.chains = {name: Chain(entry, t["target"], t["forks"]) for name, t in trunks.items()}
        self.forks = np.array(
            [fork_step(e["config"]) if e["role"] == "branch" else 0 for e in self.cells], float
        )
        steps = np.array([e["config"]["train"]["steps"] for e in self.cells], float)
        self.a_step = np.array([e["achieved"]["flops"] for e in self.cells]) / steps
        self.cooldown = (steps - self.forks) * self.a_step
        self.points = [
            (float(e["achieved"]["params_total"]), float(e["achieved"]["tokens"])) for e in self.cells
        ]

    def prices(self, among: list[int], picks: list[int] = ()) -> np.ndarray:
        """FLOPs that each cell of ``among`` costs on top of the trunks that are there and of ``picks``."""
        ends = {g: chain.end for g, chain in self.chains.items()}
        for i in picks:
            g = self.groups[i]
            ends[g] = max(ends.get(g, 0), self.forks[i])
        now = np.array([ends.get(self.groups[i], 0) for i in among], float)
        return self.cooldown[among] + np.maximum(0.0, self.forks[among] - now) * self.a_step[among]

    def grow(self, picks: list[int]) -> list[dict]:
        """The entries of the picked cells and of the trunk segments that they need, the longest first."""
        out = []
        for i in sorted(picks, key=lambda i: -self.forks[i]):
            chain = self.chains.get(self.groups[i])
            out += [self.cells[i]] if chain is None else chain.add(self.cells[i]["config"])
        return out

    @property
    def whole(self) -> float:
        """FLOPs of the whole pool: every cooldown, and of each trunk its longest fork."""
        trunks: dict[str, float] = {}
        for group, flops in zip(self.groups, self.forks * self.a_step, strict=True):
            trunks[group] = max(trunks.get(group, 0.0), flops)
        return float(self.cooldown.sum() + sum(trunks.values()))


def start(pool: Pool) -> list[int]:
    """The cheap corner: some sizes and D of the lower halves, at the lowest seed.

    Raises:
      ConfigError: the grid leaves none.
    """
    seeds = [e["config"]["train"]["seed"] for e in pool.cells]
    sizes = sorted({n for n, _ in pool.points})
    half = sizes[: max(START_SIZES, math.ceil(len(sizes) / 2) + 1)]
    chosen = {half[round(k)] for k in np.linspace(0, len(half) - 1, min(START_SIZES, len(half)))}
    out = []
    for n in sorted(chosen):
        own = [i for i, p in enumerate(pool.points) if p[0] == n and seeds[i] == min(seeds)]
        own.sort(key=lambda i: pool.points[i][1])
        own = own[: max(START_TOKENS, math.ceil(len(own) / 2))]
        out += [own[round(k)] for k in np.linspace(0, len(own) - 1, min(START_TOKENS, len(own)))]
    out = list(dict.fromkeys(out))
    if len(out) < 6:
        raise ConfigError(f"grid has {len(out)} cells to begin with; a law needs more sizes and D than that")
    return out


def narrow(session: Session) -> None:
    """Trains cells of the grid, round by round, until the interval is narrow or the budget is spent.

    Raises:
      ConfigError: the grid leaves no corner to begin with.
    """
    s = session.search
    settings = {k: v for k, v in session.settings.items() if k != "search"}
    if "plan" not in session.memo:
        session.memo["plan"] = plan(settings, session.data)
    pool = Pool(session.memo["plan"])
    cost = None
    if s["quantity"] == "N*" and session.recipe is not None:  # a trainer's C is 6 N D
        seq = pool.cells[0]["config"]["data"]["seq"]
        cost = FlopsOfSize(session.recipe, with_vocab(settings["model"], session.data["vocab"]), seq)
    asked = {"quantity": s["quantity"], "at": s["at"], "flops": cost}
    picks, done, widths, losses = start(pool), [], [], {}
    while True:
        got = session.ask(pool.grow(picks), [pool.cells[i]["id"] for i in picks], chosen=len(picks))
        losses |= dict(zip(picks, got, strict=True))
        done += picks
        fit = fit_of(session, pool, losses)
        left = s["budget"] - session.spent
        rest = [i for i in range(len(pool.cells)) if i not in losses]
        cheapest = min(pool.prices(rest), default=math.inf)
        spend = min(left, max(s["growth"] * session.spent, float(cheapest)))
        picks, linear = choose(fit, pool, losses, rest, spend, asked)
        widths.append((reported_half_width(fit, **asked) if fit is not None else math.inf, linear))
        session.answer = describe(fit, widths[-1], session, pool, asked)
        found = session.answer and session.answer["estimate"]
        session.decide(estimate=found, half_width=_finite(widths[-1][0]), linear_half_width=_finite(linear))
        if not rest or (s["within"] is not None and is_narrow(widths, s["within"])):
            return
        if not picks:
            raise OverBudget(float(cheapest))


def fit_of(session: Session, pool: Pool, losses: dict[int, float]):
    """The fit of what has a loss, or None where it cannot be made."""
    key = tuple(sorted(losses.items()))
    if key not in session.memo:
        good = [i for i in sorted(losses) if math.isfinite(losses[i])]
        table = pd.DataFrame(
            {
                "params": [pool.points[i][0] for i in good],
                "tokens": [pool.points[i][1] for i in good],
                "flops": [pool.cells[i]["achieved"]["flops"] for i in good],
                "seed": [pool.cells[i]["config"]["train"]["seed"] for i in good],
                "loss": [losses[i] for i in good],
            }
        )
        try:
            made = fit_table(
                table, session.search["law"], bootstraps=BOOTSTRAPS, sensitivity=False,
                seed=session.search["seed"],
            )  # fmt: skip
        except FitError:
            made = None
        session.memo[key] = made
    return session.memo[key]


def choose(
    fit, pool: Pool, losses: dict, rest: list[int], spend: float, asked: dict
) -> tuple[list[int], float]:
    """The next round's cells, and the half-width now by the linear model.

    Where the law is not determined yet, the cheapest cells.
    """
    if fit is not None and fit.status in ("converged", "boundary"):
        done = [pool.points[i] for i in losses if math.isfinite(losses[i])]
        try:
            chosen = next_cells(
                fit, done, [pool.points[i] for i in rest],
                lambda picks: pool.prices(rest, [rest[k] for k in picks]), spend, **asked,
            )  # fmt: skip
            return [rest[k] for k in chosen.picks], chosen.before
        except FitError:  # N* is nowhere under this fit
            pass
    picks: list[int] = []
    for i in sorted(rest, key=lambda i: pool.prices([i])[0]):
        price = float(pool.prices([i], picks)[0])
        if price > spend:
            break
        picks.append(i)
        spend -= price
    return picks, math.inf


def _finite(x: float) -> float | None:
    return x if math.isfinite(x) else None


def describe(fit, widths, session: Session, pool: Pool, asked: dict) -> dict | None:
    """The answer so far, with what to doubt."""
    if fit is None:
        return None
    estimate = float(np.squeeze(value_of(fit.law, **asked)(fit.params)))  # NaN: N* is nowhere under this fit
    flags = [ADAPTIVE, *fit.flags]
    return {
        "quantity": asked["quantity"],
        "estimate": _finite(math.exp(estimate) if asked["quantity"] == "N*" else estimate),
        "half_width": _finite(widths[0]),
        "linear_half_width": _finite(widths[1]),
        "status": fit.status,
        "params": fit.params,
        "rows": int(sum(r["outcome"] == "used" for r in fit.rows)),
        "pool": len(pool.cells),
        "pool_flops": pool.whole,
        "share": session.spent / pool.whole,
        "flags": flags,
    }
