"""How often nominal 95 % intervals hold the truth, on simulated isoFLOP grids.

Each data set is a Chinchilla law on a grid of budgets by sizes, with log-normal noise by row (0.002) and,
in most studies, a common error of each size (0.004). The quantities: the exponent a; log N* and the log
loss of the true optimum, at the top of the grid and at ten times its budget. The intervals: percentiles of
the pairs bootstrap; the same widened about the estimate by Student's t of (clusters - 1) over the normal
quantile; and what a ``Fit`` prints, the interval of ``fits.few_clusters``.
Then pairs of data sets with a planted speed-up, and the intervals of ``fits.compare``.

    python benchmarks/coverage.py [--sets 120] [--resamples 200] [--pairs 100] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import numpy as np
from scipy import stats

from fits import fit_table, uncertainty
from fits.allocate import optimum
from fits.compare import compare
from fits.few_clusters import FewClusters
from fits.laws import get_law
from fits.laws.base import balance
from fits.rowloss import RowLoss
from fits.solve import solve

LAW = get_law("chinchilla")
TRUTH = {"E": 1.69, "A": 406.4, "B": 410.7, "alpha": 0.34, "beta": 0.28}
NOISE, EFFECT, DELTA = 2e-3, 4e-3, 1e-3
# sizes, sizes in a budget, effect of a size, loss, cluster
STUDIES = [
    (9, 5, 0.0, "least_squares", "row"),
    (9, 5, EFFECT, "least_squares", "row"),
    (6, 5, EFFECT, "least_squares", "size"),
    (9, 5, EFFECT, "least_squares", "size"),
    (14, 6, EFFECT, "least_squares", "size"),
    (9, 5, 0.0, "huber", "row"),
    (9, 5, EFFECT, "huber", "row"),
    (9, 5, EFFECT, "huber", "size"),
    (14, 6, EFFECT, "huber", "size"),
]


def make_grid(sizes: int, per_budget: int, budgets: int = 6):
    """Size number, N and D per run, and the budgets, whose optima lie along the ladder of sizes."""
    step = 0.9 * np.log(2) * 9 / (sizes - 1)
    ladder = np.log(3e7) + step * np.arange(sizes)
    log_c = np.linspace(30, 75, 20001)
    log_n, _ = balance(*(TRUTH[k] for k in ("A", "alpha", "B", "beta")), np.exp(log_c))
    middles = np.linspace(ladder[0] + 1.5 * step, ladder[-1] - 1.5 * step, budgets)
    C = np.exp(np.interp(middles, np.log(log_n), log_c))
    number = np.concatenate([np.sort(np.argsort(np.abs(ladder - m))[:per_budget]) for m in middles])
    N = np.exp(ladder[number])
    return np.unique(number, return_inverse=True)[1], N, np.repeat(C, per_budget) / 6 / N, C


def make_quantities(top: float):
    """Functions of the parameters, arrays [B] to [B]."""
    best = {c: optimum(LAW, TRUTH, c, None) for c in (top, 10 * top)}
    point = {c: {v: float(np.squeeze(o[v])) for v in ("N", "D")} for c, o in best.items()}
    out = {"a": lambda p: np.atleast_1d(LAW.compute_exponents(p)["a"])}
    for c, name in ((top, "top"), (10 * top, "10x")):
        out[f"N* {name}"] = lambda p, c=c: np.atleast_1d(np.log(optimum(LAW, p, c, None)["N"]))
        out[f"loss {name}"] = lambda p, c=c: np.atleast_1d(np.log(LAW.predict(p, point[c])))
    return out


def study(sizes, per_budget, effect, loss, cluster, sets: int, resamples: int, seed: int = 0) -> dict:
    """Shares of intervals that hold the truth, and median widths over 3.92 true standard deviations."""
    number, N, D, budgets = make_grid(sizes, per_budget)
    ids = number if cluster == "size" else np.arange(len(N))
    groups = int(ids.max()) + 1
    widen = stats.t.ppf(0.975, groups - 1) / stats.norm.ppf(0.975)
    quantities = make_quantities(float(budgets.max()))
    truth = {k: float(f(TRUTH)[0]) for k, f in quantities.items()}
    log_loss = np.log(LAW.predict(TRUTH, {"N": N, "D": D}))
    rng = np.random.default_rng(seed)
    found, estimates, skipped = {}, {k: [] for k in quantities}, 0
    for s in range(sets):
        error = NOISE * rng.standard_normal(len(N)) + effect * rng.standard_normal(sizes)[number]
        x, y = {"N": np.log(N), "D": np.log(D)}, np.exp(log_loss + error)
        problem, point = solve(LAW, x, y, loss=loss, delta=DELTA, starts=4)
        if point.status != "converged":
            skipped += 1
            continue
        few = FewClusters(problem, point.p_K, ids, RowLoss(loss, DELTA))
        draws = None
        if resamples:
            weights = uncertainty.resample_weights(ids, resamples, "pairs", s)
            p_BxK, kept = uncertainty.refit(problem, point.p_K, weights, loss, DELTA)
            draws = problem.to_params(p_BxK[kept])
        for name, quantity in quantities.items():
            middle = float(quantity(point.params)[0])
            estimates[name].append(middle)
            ends = {"printed": few.interval(quantity)["95"]}
            if draws:
                low, high = np.quantile(quantity(draws), [0.025, 0.975])
                wide = (middle + widen * (low - middle), middle + widen * (high - middle))
                ends = {"percentile": (low, high), "widened by t": wide} | ends
            for method, (low, high) in ends.items():
                got = found.setdefault(method, {}).setdefault(name, [])
                got.append((bool(low <= truth[name] <= high), high - low))
    out = {
        "sizes": sizes, "rows": len(N), "size_effect": effect, "loss": loss, "cluster": cluster,
        "sets": sets - skipped, "skipped": skipped, "coverage": {}, "width": {},
    }  # fmt: skip
    for method, by_name in found.items():
        out["coverage"][method] = {k: float(np.mean([h for h, _ in v])) for k, v in by_name.items()}
        out["width"][method] = {
            k: float(np.median([w for _, w in v]) / 3.92 / np.std(estimates[k])) for k, v in by_name.items()
        }
    return out


def print_studies(sets: int, resamples: int) -> list[dict]:
    """Runs and prints every case of STUDIES."""
    out = []
    error = 100 * np.sqrt(0.95 * 0.05 / sets)
    print(f"{sets} data sets of {resamples} resamples; standard error of 95 %: {error:.1f} %")
    names = list(make_quantities(1e20))
    print("| grid | fit | interval | " + " | ".join(names) + " |\n|" + "---|" * (3 + len(names)))
    for case in STUDIES:
        r = study(*case, sets, resamples)
        out.append(r)
        kind = "size effect" if r["size_effect"] else "independent"
        grid = f"{r['sizes']} sizes, {r['rows']} rows, {kind}"
        for method, got in r["coverage"].items():
            cells = [f"{100 * got[k]:.0f} % ({r['width'][method][k]:.2f})" for k in names]
            print(f"| {grid} | {r['loss']}, by {r['cluster']} | {method} | {' | '.join(cells)} |", flush=True)
    return out


SPEEDUP, FRACTIONS = 1.5, (0.1, 1.0, 10.0)  # of B over A; budgets over the largest of the grid
# sizes, sizes in a budget, effect of a size, loss, cluster
PAIRS = [
    (9, 5, 0.0, "huber", "row"),
    (9, 5, EFFECT, "huber", "size"),
    (9, 5, EFFECT, "least_squares", "size"),
    (14, 6, EFFECT, "huber", "size"),
    (14, 6, EFFECT, "least_squares", "size"),
]


def speedup_study(
    sizes, per_budget, effect, loss, cluster, pairs: int, resamples: int, seed: int = 0
) -> dict:
    """Shares of 95 % intervals of ``fits.compare`` that hold the planted speed-up of B over A.

    B is A's surface with all compute multiplied by SPEEDUP, so that the speed-up is known at every budget.

    Returns:
      Per fraction of the largest budget: coverage, and the median width of the log interval over 3.92 true
      standard deviations.
    """
    number, N, D, budgets = make_grid(sizes, per_budget)
    better = TRUTH | {c: TRUTH[c] * SPEEDUP ** (-TRUTH[e] / 2) for c, e in (("A", "alpha"), ("B", "beta"))}
    at = [f * float(budgets.max()) for f in FRACTIONS]
    rng = np.random.default_rng(seed)
    held, logs, widths, skipped = [], [], [], 0
    for s in range(pairs):
        fits = []
        for side, params in enumerate((TRUTH, better)):
            error = NOISE * rng.standard_normal(len(N)) + effect * rng.standard_normal(sizes)[number]
            y = LAW.predict(params, {"N": N, "D": D}) * np.exp(error)
            table = {"params": N, "tokens": D, "loss": y}
            fits.append(fit_table(table, LAW, loss=loss, delta=DELTA, bootstraps=resamples, cluster=cluster,
                                  sensitivity=False, seed=2 * s + side))  # fmt: skip
        if any(f.status != "converged" for f in fits):
            skipped += 1
            continue
        told = [row["speedup"] for row in compare(*fits, at, search=(at[0], 1.01 * at[0])).speedups]
        ends = np.array([[np.inf if e == "infinite" else e for e in t["95"]] for t in told])
        held.append((ends[:, 0] <= SPEEDUP) & (ends[:, 1] >= SPEEDUP))
        logs.append([np.log(t["estimate"]) for t in told])
        widths.append(np.log(ends[:, 1] / ends[:, 0]))
    width = np.median(widths, 0) / 3.92 / np.std(logs, 0)
    names = [f"{f:g}x top" for f in FRACTIONS]
    return {
        "sizes": sizes, "rows": len(N), "size_effect": effect, "loss": loss, "cluster": cluster,
        "pairs": len(held), "skipped": skipped, "speedup": SPEEDUP,
        "coverage": dict(zip(names, np.mean(held, 0).tolist(), strict=True)),
        "width": dict(zip(names, width.tolist(), strict=True)),
    }  # fmt: skip


def print_speedups(pairs: int, resamples: int) -> list[dict]:
    """Runs and prints every case of PAIRS."""
    print(f"\n{pairs} pairs of data sets, a planted speed-up of {SPEEDUP:g}, {resamples} resamples each")
    names = [f"{f:g}x top" for f in FRACTIONS]
    print("| grid | fit | " + " | ".join(names) + " |\n|" + "---|" * (2 + len(names)))
    out = []
    for case in PAIRS:
        r = speedup_study(*case, pairs, resamples)
        out.append(r)
        kind = "size effect" if r["size_effect"] else "independent"
        cells = [f"{100 * r['coverage'][n]:.0f} % ({r['width'][n]:.2f})" for n in names]
        grid = f"{r['sizes']} sizes, {r['rows']} rows, {kind}"
        print(f"| {grid} | {r['loss']}, by {r['cluster']} | {' | '.join(cells)} |", flush=True)
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sets", type=int, default=120, help="simulated data sets a study")
    parser.add_argument("--resamples", type=int, default=200, help="0: the printed interval alone")
    parser.add_argument("--pairs", type=int, default=100, help="of data sets a case of speed-ups; 0 for none")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    args = parser.parse_args()
    began, out = time.perf_counter(), []
    for part, count in ((print_studies, args.sets), (print_speedups, args.pairs)):
        out += part(count, args.resamples) if count else []
        if args.json:
            args.json.write_text(json.dumps(out, indent=1) + "\n")
    print(f"\n{time.perf_counter() - began:.0f} s")


if __name__ == "__main__":
    main()
