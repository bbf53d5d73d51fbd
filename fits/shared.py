"""One surface for several families, each with its own compute multiplier, and whether that is true.

A run of family f with N parameters and D tokens is taken to behave as one of the first family with
N sqrt(k_f) and D sqrt(k_f): as if its compute 6ND were multiplied by k_f.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from fits import uncertainty
from fits.checks import flag
from fits.errors import FitError
from fits.estimate import fit_table
from fits.laws import EXPONENT_BOUNDS, Law, get_law
from fits.printed import Printed
from fits.solve import solve
from fits.table import clean

SHAPE = ("E", "A", "B", "alpha", "beta")
SOUND = ("converged", "boundary")


class _SharedLaw(Law):
    """L = E + A / (N sqrt(k_f))^alpha + B / (D sqrt(k_f))^beta; variable F_i is e in family i, else 1."""

    source = "Hoffmann et al. 2022, eq. 2, with a multiplier of compute per family"
    formula = "L = E + A / (N sqrt(k))^alpha + B / (D sqrt(k))^beta"

    def __init__(self, families: list[str], begins: list[dict]):
        self.name = "shared chinchilla"
        self.multipliers = [f"k {f}" for f in families[1:]]
        self.variables = ("N", "D", *(f"F{i + 1}" for i in range(len(self.multipliers))))
        self.parameters = (*SHAPE, *self.multipliers)
        self.bounds = dict.fromkeys(self.parameters, (0.0, math.inf))
        self.bounds |= dict.fromkeys(("alpha", "beta"), EXPONENT_BOUNDS)
        self.begins = begins

    def __eq__(self, other):  # equal formulas share one compilation
        return isinstance(other, _SharedLaw) and self.parameters == other.parameters

    def __hash__(self):
        return hash(self.parameters)

    def predict(self, params, x, xp=np):
        shift = 0.0
        for i, name in enumerate(self.multipliers):
            shift = shift + 0.5 * xp.log(params[name]) * xp.log(x[f"F{i + 1}"])
        size = xp.log(params["A"]) - params["alpha"] * (xp.log(x["N"]) + shift)
        data = xp.log(params["B"]) - params["beta"] * (xp.log(x["D"]) + shift)
        return params["E"] + xp.exp(size) + xp.exp(data)

    def to_solver(self, params, centre, xp=np):
        """Logs, with both terms at the mean row: nearly independent directions."""
        out = [xp.log(params[k]) for k in self.parameters]
        out[1] = out[1] - params["alpha"] * centre["N"]
        out[2] = out[2] - params["beta"] * centre["D"]
        return out

    def from_solver(self, p, centre, xp=np):
        out = {k: xp.exp(v) for k, v in zip(self.parameters, p, strict=True)}
        out["A"] = xp.exp(p[1] + out["alpha"] * centre["N"])
        out["B"] = xp.exp(p[2] + out["beta"] * centre["D"])
        return out

    def starts(self, x, y):
        """Each family's own shape (and bent ones), with the best multipliers on a grid, one at a time."""
        out = []
        for begin in self.begins:
            for bend in (1.0, 0.8, 1.25):
                p = {k: max(begin[k], 1e-6) for k in SHAPE} | dict.fromkeys(self.multipliers, 1.0)
                for exponent, coefficient, v in (("alpha", "A", "N"), ("beta", "B", "D")):
                    change = p[exponent] * (bend - 1.0)
                    p[exponent] += change
                    p[coefficient] *= math.exp(change * np.log(x[v]).mean())
                for name in self.multipliers:
                    tried = [p | {name: k} for k in np.geomspace(1e-3, 1e3, 61)]
                    costs = [np.square(np.log(self.predict(t, x) / y)).sum() for t in tried]
                    p = tried[int(np.argmin(costs))]
                out.append(p)
        return out


@dataclasses.dataclass
class SharedFit(Printed):
    """A shared surface with compute multipliers, beside the separate fits.

    Attributes:
      families: the first is the reference (k = 1). intervals: of the shape's parameters and of each "k f".
      separate: per family the parameters, a and status of its own fit.
      differences: "f - reference" -> alpha, beta and a -> {"estimate", "sd", "80", "95"}.
      f_test: {"F", "p", "df": [numerator, denominator]} of the separate fits against the shared one, by
        least squares; exact only for independent normal residuals of one size.
    """

    families: list[str]
    params: dict[str, float]
    status: str
    reasons: list[str]
    intervals: dict[str, dict]
    separate: dict[str, dict]
    differences: dict[str, dict]
    f_test: dict[str, Any] | None
    flags: list[dict]
    rows: dict[str, int]

    def to_dict(self) -> dict:
        return dataclasses.asdict(self)

    def __str__(self) -> str:
        lines = [f"flag: {f['text']}" for f in self.flags]
        lines.append(f"One surface, {_SharedLaw.formula}; k = 1 for {self.families[0]}")
        lines.append(f"status: {self.status} ({'; '.join(self.reasons)})")
        for name, got in self.intervals.items():
            ends = f"   95 %: {got['95'][0]:.4g} to {got['95'][1]:.4g}" if got["95"] else ""
            lines.append(f"  {name:12}{got['estimate']:.6g}{ends}")
        for pair, by in self.differences.items():
            for name, got in by.items():
                ends = f", 95 %: {got['95'][0]:+.3g} to {got['95'][1]:+.3g}" if got["95"] else ""
                lines.append(f"  {name} of {pair}: {got['estimate']:+.4g}{ends}")
        if self.f_test:
            F, p, (one, two) = self.f_test["F"], self.f_test["p"], self.f_test["df"]
            lines.append(f"Separate surfaces against one: F({one}, {two}) = {F:.3g}, p = {p:.2g}")
        return "\n".join(lines)


def shared_fit(
    tables: Mapping[str, Any],
    law: str | Law = "chinchilla",
    *,
    loss: str = "huber",
    delta: float = 1e-3,
    bootstraps: int = 200,
    cluster: str = "auto",
    columns: Mapping[str, str] | None = None,
    token_unit: float = 1.0,
    param_unit: float = 1.0,
    exclude=(),
    seed: int = 0,
) -> SharedFit:
    """Fits one Chinchilla surface to several families, and tests it against a surface for each.

    Args:
      tables: family name -> run table; the first is the reference. The losses must be on one
        evaluation set, in one unit: the floor E is shared.
      loss, delta: of residuals of the log loss. Other arguments as in ``fit_table``.

    Raises:
      FitError: fewer than two families, another law than chinchilla, or a family that cannot be fitted.
    """
    if not isinstance(tables, Mapping) or len(tables) < 2:
        raise FitError("tables must be a mapping of at least two families, name -> run table")
    if get_law(law).name != "chinchilla":
        raise FitError(f"law is {get_law(law).name!r}; a shared fit is made with 'chinchilla' only")
    read = {"columns": columns, "token_unit": token_unit, "param_unit": param_unit, "exclude": exclude}
    families = [str(f) for f in tables]
    parts = [clean(t, **read) for t in tables.values()]
    fits = {
        f: fit_table(t, loss=loss, delta=delta, bootstraps=bootstraps, cluster=cluster, sensitivity=False,
                     seed=seed + i, **read)
        for i, (f, t) in enumerate(zip(families, tables.values(), strict=True))
    }  # fmt: skip
    for f, fit in fits.items():
        if fit.status not in SOUND:
            raise FitError(f"the family {f} is {fit.status} on its own ({'; '.join(fit.reasons)})")
    member = np.repeat(np.arange(len(parts)), [len(p) for p in parts])
    x = {v: np.concatenate([p.log_x()[v] for p in parts]) for v in ("N", "D")}
    x |= {f"F{i}": (member == i).astype(float) for i in range(1, len(parts))}
    y = np.concatenate([p.loss for p in parts])
    shared = _SharedLaw(families, [f.params for f in fits.values()])
    problem, point = solve(shared, x, y, loss=loss, delta=delta)
    draws = {k: np.empty(0) for k in shared.parameters}
    if bootstraps and point.status in SOUND:
        per = [uncertainty.find_clusters(p, cluster)[0] for p in parts]
        weights = [uncertainty.resample_weights(c, bootstraps, "pairs", seed + i) for i, c in enumerate(per)]
        p_BxK, good = uncertainty.refit(problem, point.p_K, np.concatenate(weights, 1), loss, delta)
        draws = problem.to_params(p_BxK[good])
    flags = []
    if point.status not in SOUND:
        flags.append(flag(point.status.replace(" ", "_"), f"the shared surface is {point.status}"))
    for f, fit in fits.items():
        grave = ("boundary", "few_clusters", "uncertain", "no_intervals")
        flags += [flag(g["code"], f"{f}: {g['text']}") for g in fit.flags if g["code"] in grave]
    return SharedFit(
        families, point.params, point.status, point.reasons, uncertainty.summarise(point.params, draws),
        {f: {"params": fit.params, "status": fit.status, "a": _a(fit)} for f, fit in fits.items()},
        {f"{f} - {families[0]}": _difference(fits[families[0]], fits[f], seed) for f in families[1:]},
        _f_test(shared, x, y, parts), flags, {f: len(p) for f, p in zip(families, parts, strict=True)},
    )  # fmt: skip


def _a(fit) -> float:
    return float(fit.law.compute_exponents(fit.params)["a"])


def _difference(reference, other, seed: int) -> dict[str, dict]:
    """Differences of the separate fits' exponents, from independent draws."""
    count = min(len(reference.draws), len(other.draws))
    rng = np.random.default_rng(seed)
    sides = []
    for fit in (reference, other):
        order = rng.permutation(len(fit.draws))[:count]
        draws = {k: v[order] for k, v in fit.draw_params().items()}
        sides.append((fit.params | {"a": _a(fit)}, draws | {"a": fit.law.compute_exponents(draws)["a"]}))
    (p0, d0), (p1, d1) = sides
    return {k: uncertainty.interval(d1[k] - d0[k], p1[k] - p0[k]) for k in ("alpha", "beta", "a")}


def _f_test(shared: _SharedLaw, x, y, parts) -> dict | None:
    """Separate surfaces against the shared one, by least squares on log loss; None where a fit fails."""
    from scipy.stats import f as f_distribution

    own = []
    for p in parts:
        own.append(solve(get_law("chinchilla"), p.log_x(), p.loss, loss="least_squares")[1])
    one = solve(shared, x, y, loss="least_squares")[1]
    more = len(SHAPE) * len(parts) - len(shared.parameters)
    left = len(y) - len(SHAPE) * len(parts)
    if left < 1 or any(p.status not in SOUND for p in (one, *own)):
        return None
    within = sum(p.objective for p in own)
    F = max(one.objective - within, 0.0) / more / max(within / left, 1e-300)
    return {"F": float(F), "p": float(f_distribution.sf(F, more, left)), "df": [more, left]}
