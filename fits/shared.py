"""One surface for several families, each with its own multipliers, and whether that is true.

A run of family f with N parameters and D tokens is taken to behave as one of the first family with k_N N
parameters and k_D D tokens. On C = 6ND the family's best loss at a budget C is then the first one's at k C,
k = k_N k_D: a compute multiplier, whatever the budget. With one multiplier a family, k_N = k_D = sqrt(k).
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
from fits.laws import Law, PowerSum, get_law
from fits.printed import Printed
from fits.solve import solve
from fits.table import clean

MULTIPLIERS = ("compute", "separate", "auto")
LEVEL = 0.05  # of the F test by which "auto" chooses separate multipliers
SOUND = ("converged", "boundary")


class _SharedLaw(Law):
    """A sum of powers of (k_N N) and (k_D D); variable F_i is e in family i, else 1.

    Multipliers are "k f" (of compute, one a family but the first) or "kN f" and "kD f".
    """

    def __init__(self, law: PowerSum, families: list[str], begins: list[dict], separate: bool):
        self.law, self.separate, self.begins = law, separate, begins
        self.name, self.source = f"shared {law.name}", law.source
        self.formula = law.formula + (" at (kN N, kD D)" if separate else " at (sqrt(k) N, sqrt(k) D)")
        kinds = ("kN", "kD") if separate else ("k",)
        self.multipliers = [f"{k} {f}" for f in families[1:] for k in kinds]
        self.variables = ("N", "D", *(f"F{i + 1}" for i in range(len(families) - 1)))
        self.parameters = (*law.parameters, *self.multipliers)
        self.bounds = dict.fromkeys(self.parameters, (0.0, math.inf)) | dict(law.bounds)

    def __eq__(self, other):  # equal formulas share one compilation
        return isinstance(other, _SharedLaw) and self._key() == other._key()

    def __hash__(self):
        return hash(self._key())

    def _key(self):
        return self.law.name, repr(self.law.terms), self.parameters

    def _log_shift(self, params, x, variable: str, xp):
        """Log of the variable's multiplier in each row."""
        shift = 0.0
        for i in range(len(self.variables) - 2):
            if self.separate:
                log_k = xp.log(params[self.multipliers[2 * i + (variable == "D")]])
            else:
                log_k = 0.5 * xp.log(params[self.multipliers[i]])
            shift = shift + log_k * xp.log(x[f"F{i + 1}"])
        return shift

    def predict(self, params, x, xp=np):
        logs = {v: xp.log(x[v]) + self._log_shift(params, x, v, xp) for v in ("N", "D")}
        total = 0.0
        for term in self.law.terms:
            value = params[term.coefficient]
            if term.powers:  # in logs, where no coefficient overflows
                value = xp.exp(xp.log(value) - sum(params[e] * logs[v] for v, e in term.powers.items()))
            total = total + value
        return total

    def to_solver(self, params, centre, xp=np):
        """Logs, with each term at the mean row: nearly independent directions."""
        means = self._means(params, centre)
        return [xp.log(params[k]) - means.get(k, 0.0) for k in self.parameters]

    def from_solver(self, p, centre, xp=np):
        at = dict(zip(self.parameters, p, strict=True))
        out = {k: xp.exp(v) for k, v in at.items()}
        return out | {k: xp.exp(at[k] + mean) for k, mean in self._means(out, centre).items()}

    def _means(self, params, centre) -> dict[str, Any]:
        """The power of each term at the mean row, by its coefficient."""
        return {
            t.coefficient: sum(params[e] * centre[v] for v, e in t.powers.items())
            for t in self.law.terms
            if t.powers
        }

    def starts(self, x, y):
        """Each family's own shape (and bent ones), with the best multipliers on a grid, one at a time."""
        exponents = dict.fromkeys(e for t in self.law.terms for e in t.powers.values())
        out = []
        for begin in self.begins:
            for bend in (1.0, 0.8, 1.25):
                p = {k: max(begin[k], 1e-6) for k in self.law.parameters} | dict.fromkeys(
                    self.multipliers, 1.0
                )
                for term in self.law.terms:  # the bent term keeps its mean
                    change = sum((bend - 1.0) * p[e] * np.log(x[v]).mean() for v, e in term.powers.items())
                    p[term.coefficient] *= math.exp(change)
                p |= {e: p[e] * bend for e in exponents}
                for name in self.multipliers * (2 if self.separate else 1):
                    tried = [p | {name: k} for k in np.geomspace(1e-3, 1e3, 61)]
                    costs = [np.square(np.log(self.predict(t, x) / y)).sum() for t in tried]
                    p = tried[int(np.argmin(costs))]
                out.append(p)
        return out

    def compute_multipliers(self, params) -> dict[str, Any]:
        """The "k f" of each family but the first, as given or the product of its two."""
        if not self.separate:
            return {k: params[k] for k in self.multipliers}
        pairs = zip(self.multipliers[::2], self.multipliers[1::2], strict=True)
        return {"k " + n.split(" ", 1)[1]: params[n] * params[d] for n, d in pairs}


@dataclasses.dataclass
class SharedFit(Printed):
    """A shared surface with compute multipliers, beside the separate fits.

    Attributes:
      families: the first is the reference (k = 1). intervals: of the shape's parameters and of each "k f",
        and of "kN f" and "kD f" where these are separate.
      separate: per family the parameters, a and status of its own fit.
      differences: "f - reference" -> alpha, beta and a -> {"estimate", "sd", "80", "95"}.
      f_test: {"F", "p", "df": [numerator, denominator]} of the separate fits against the shared one, by
        least squares; exact only for independent normal residuals of one size, and too ready to tell apart
        where runs of one size err together.
      multipliers: "compute" or "separate". multiplier_test: the same of separate multipliers against one.
      criteria: AICc by least squares, lower is better: "compute", "separate" and "own surfaces".
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
    law: str = ""
    formula: str = ""
    multipliers: str = "compute"
    multiplier_test: dict[str, Any] | None = None
    criteria: dict[str, float | None] = dataclasses.field(default_factory=dict)
    choice: str = ""

    def to_dict(self) -> dict:
        return dataclasses.asdict(self)

    def __str__(self) -> str:
        lines = [f"flag: {f['text']}" for f in self.flags]
        lines.append(f"One surface, {self.formula}; k = 1 for {self.families[0]}")
        lines.append(f"multipliers: {self.multipliers} ({self.choice})")
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
        known = {k: v for k, v in self.criteria.items() if v is not None}
        if known:
            lines.append(
                "AICc: " + ", ".join(f"{k} {v:.1f}" for k, v in known.items()) + " (lower is better)"
            )
        return "\n".join(lines)


def shared_fit(
    tables: Mapping[str, Any],
    law: str | Law = "chinchilla",
    *,
    multipliers: str = "compute",
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
    """Fits one surface to several families, and tests it against a surface for each.

    Args:
      tables: family name -> run table; the first is the reference. The losses must be on one
        evaluation set, in one unit: the floor E is shared.
      law: a sum of powers in N and D, such as chinchilla or tied.
      multipliers: "compute" (one a family), "separate" (of parameters and of tokens), or "auto": separate
        where the F test of separate ones against one has p < 0.05.
      loss, delta: of residuals of the log loss. Other arguments as in ``fit_table``.

    Raises:
      FitError: fewer than two families, a law that is no sum of powers in N and D (or, for separate
        multipliers, has both in one term), or a family that cannot be fitted.
    """
    law = _check(tables, law, multipliers)
    read = {"columns": columns, "token_unit": token_unit, "param_unit": param_unit, "exclude": exclude}
    families = [str(f) for f in tables]
    parts = [clean(t, **read) for t in tables.values()]
    fits = {
        f: fit_table(t, law, loss=loss, delta=delta, bootstraps=bootstraps, cluster=cluster,
                     sensitivity=False, seed=seed + i, **read)
        for i, (f, t) in enumerate(zip(families, tables.values(), strict=True))
    }  # fmt: skip
    for f, fit in fits.items():
        if fit.status not in SOUND:
            raise FitError(f"the family {f} is {fit.status} on its own ({'; '.join(fit.reasons)})")
    member = np.repeat(np.arange(len(parts)), [len(p) for p in parts])
    x = {v: np.concatenate([p.log_x()[v] for p in parts]) for v in ("N", "D")}
    x |= {f"F{i}": (member == i).astype(float) for i in range(1, len(parts))}
    y = np.concatenate([p.loss for p in parts])
    begins = [f.params for f in fits.values()]
    kinds = ("compute", "separate") if _separable(law) else ("compute",)
    laws = {k: _SharedLaw(law, families, begins, k == "separate") for k in kinds}
    tests = _tests(law, laws, x, y, parts)
    choice = "as asked"
    if multipliers == "auto":
        multipliers, choice = _choose(tests["separate"])
    shared = laws[multipliers]
    problem, point = solve(shared, x, y, loss=loss, delta=delta)
    draws = {k: np.empty(0) for k in shared.parameters}
    if bootstraps and point.status in SOUND:
        per = [uncertainty.find_clusters(p, cluster)[0] for p in parts]
        weights = [uncertainty.resample_weights(c, bootstraps, "pairs", seed + i) for i, c in enumerate(per)]
        p_BxK, good = uncertainty.refit(problem, point.p_K, np.concatenate(weights, 1), loss, delta)
        draws = problem.to_params(p_BxK[good])
    params = point.params | shared.compute_multipliers(point.params)
    intervals = uncertainty.summarise(params, draws | shared.compute_multipliers(draws))
    own = {f: {"params": fit.params, "status": fit.status, "a": _a(fit)} for f, fit in fits.items()}
    return SharedFit(
        families, params, point.status, point.reasons, intervals, own,
        {f"{f} - {families[0]}": _difference(fits[families[0]], fits[f], seed) for f in families[1:]},
        tests[f"own {multipliers}"], _flags(point, fits),
        {f: len(p) for f, p in zip(families, parts, strict=True)}, law.name, shared.formula, multipliers,
        tests["separate"], tests["criteria"], choice,
    )  # fmt: skip


def _check(tables, law, multipliers: str) -> PowerSum:
    if not isinstance(tables, Mapping) or len(tables) < 2:
        raise FitError("tables must be a mapping of at least two families, name -> run table")
    if multipliers not in MULTIPLIERS:
        raise FitError(f"multipliers is {multipliers!r}; it must be one of {', '.join(MULTIPLIERS)}")
    law = get_law(law)
    if not isinstance(law, PowerSum) or set(law.variables) != {"N", "D"}:
        raise FitError(
            f"law is {law.name!r}; a shared fit needs a sum of powers in N and D, such as chinchilla"
        )
    if multipliers == "separate" and not _separable(law):
        raise FitError(f"law is {law.name!r}, with N and D in one term, which tells no two multipliers apart")
    return law


def _separable(law: PowerSum) -> bool:
    return all(len(t.powers) < 2 for t in law.terms)


def _choose(test: dict | None) -> tuple[str, str]:
    if test is None:
        return "compute", "chosen: separate ones could not be tested"
    F, p, (one, two) = test["F"], test["p"], test["df"]
    words = f"chosen: F({one}, {two}) = {F:.3g} of separate ones against one, p = {p:.2g}"
    return ("separate" if p < LEVEL else "compute"), words


def _flags(point, fits: Mapping) -> list[dict]:
    flags = []
    if point.status not in SOUND:
        flags.append(flag(point.status.replace(" ", "_"), f"the shared surface is {point.status}"))
    for f, fit in fits.items():
        grave = ("boundary", "few_clusters", "uncertain", "no_intervals")
        flags += [flag(g["code"], f"{f}: {g['text']}") for g in fit.flags if g["code"] in grave]
    return flags


def _a(fit) -> float | None:
    a = fit.law.compute_exponents(fit.params).get("a")
    return None if a is None else float(a)


def _difference(reference, other, seed: int) -> dict[str, dict]:
    """Differences of the separate fits' exponents, from independent draws."""
    count = min(len(reference.draws), len(other.draws))
    rng = np.random.default_rng(seed)
    exponents = dict.fromkeys(e for t in reference.law.terms for e in t.powers.values())
    sides = []
    for fit in (reference, other):
        order = rng.permutation(len(fit.draws))[:count]
        draws = {k: v[order] for k, v in fit.draw_params().items()}
        more = fit.law.compute_exponents(draws)
        point = {k: fit.params[k] for k in exponents} | fit.law.compute_exponents(fit.params)
        sides.append((point, {k: draws[k] for k in exponents} | more))
    (p0, d0), (p1, d1) = sides
    kinds = [k for k in p0 if k != "b"]
    return {k: uncertainty.interval(d1[k] - d0[k], p1[k] - p0[k]) for k in kinds}


def _tests(law: PowerSum, laws: Mapping[str, _SharedLaw], x, y, parts) -> dict:
    """F tests of nested surfaces and AICc of each, by least squares on log loss; None where a fit fails.

    Keys: "separate" (against "compute"), "own compute" and "own separate" (a surface each against the
    shared one), and "criteria".
    """
    own = [solve(law, p.log_x(), p.loss, loss="least_squares")[1] for p in parts]
    sums = {"own surfaces": (_sum(own), len(law.parameters) * len(parts))}
    for name, shared in laws.items():
        sums[name] = _sum([solve(shared, x, y, loss="least_squares")[1]]), len(shared.parameters)
    out = {"separate": None, "criteria": {k: _aicc(*v, len(y)) for k, v in sums.items()}}
    if "separate" in laws:
        out["separate"] = _f_test(sums["compute"], sums["separate"], len(y))
    return out | {f"own {k}": _f_test(sums[k], sums["own surfaces"], len(y)) for k in laws}


def _sum(points) -> float | None:
    return None if any(p.status not in SOUND for p in points) else sum(p.objective for p in points)


def _f_test(small: tuple, large: tuple, rows: int) -> dict | None:
    """Of nested models given as (sum of squares, parameters)."""
    from scipy.stats import f as f_distribution

    (rss, fewer), (within, more) = small, large
    added, left = more - fewer, rows - more
    if rss is None or within is None or left < 1 or added < 1:
        return None
    F = max(rss - within, 0.0) / added / max(within / left, 1e-300)
    return {"F": float(F), "p": float(f_distribution.sf(F, added, left)), "df": [added, left]}


def _aicc(rss: float | None, parameters: int, rows: int) -> float | None:
    """Akaike's criterion for small samples (Hurvich and Tsai 1989); the variance counts as a parameter."""
    k = parameters + 1
    if rss is None or rows <= k + 1:
        return None
    return float(rows * math.log(max(rss, 1e-300) / rows) + 2 * k + 2 * k * (k + 1) / (rows - k - 1))
