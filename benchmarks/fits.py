"""Our fits against the peers' on published tables: who reaches the lowest objective, at what cost.

All sides run in one script, taking turns in rounds, on one thread each; CPU seconds are those of this
process and its children. Every answer is judged by one objective written here, apart from the library:
the sum over runs of Huber(log predicted - log observed) with delta 1e-3 (Hoffmann et al. 2022).

    python benchmarks/fits.py [--data FOLDER] [--full]

Peers: the package ``chinchilla`` (BFGS from every point of its documented grid), SciPy's L-BFGS-B with
gradient from the 4,500 published starts, a bootstrap of single-start BFGS refits, and a 32 x 32 grid of
exponents with linear solves and a Nelder-Mead finish (least squares of raw loss: its own objective).
Without ``--full`` the package runs its documented grid on the first table only, and on the others 3 of the
5 values of each axis (243 starts), the cost of the full grid being scaled up from those.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib.util
import itertools
import json
import math
import os
import pathlib
import platform
import resource
import subprocess
import sys
import tempfile
import time
import warnings
from importlib.metadata import version

for _name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(_name, "1")
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("MPLBACKEND", "Agg")
HERE = pathlib.Path(__file__).resolve().parent
# run as a script, this file would be found in place of the package of the same name
sys.path[:] = [p for p in sys.path if pathlib.Path(p or ".").resolve() != HERE]

import numpy as np  # noqa: E402

from fits import uncertainty  # noqa: E402
from fits.laws import get_law  # noqa: E402
from fits.objective import RowLoss  # noqa: E402
from fits.solve import newton, solve  # noqa: E402

DELTA = 1e-3
BOOTSTRAPS = 4000
NAMES = ("E", "A", "B", "alpha", "beta")
# A start ends elsewhere when its objective is a thousandth above the lowest: leniently, since a fit that
# has met the optimum agrees to a part in a million.
ELSEWHERE = 1e-3
RESTARTS = 3
TARGETS = {"point_fit_s": 0.010, "bootstraps_cpu_s": 3.0, "shell_wall_s": 10.0}


def objective(params, table) -> float:
    """Sum of Huber losses of the log residuals of one set of parameters (E, A, B, alpha, beta)."""
    E, A, B, alpha, beta = params
    with np.errstate(all="ignore"):
        r = np.abs(np.log(E + A * table["N"] ** -alpha + B * table["D"] ** -beta) - np.log(table["L"]))
    value = np.where(r <= DELTA, 0.5 * r * r, DELTA * (r - 0.5 * DELTA)).sum()
    return float(value) if np.isfinite(value) else math.inf


def raw_squares(params, table) -> float:
    """Half the sum of squared residuals of raw loss, the objective of the exponent-grid peer."""
    E, A, B, alpha, beta = params
    return float(0.5 * ((E + A * table["N"] ** -alpha + B * table["D"] ** -beta - table["L"]) ** 2).sum())


def log_objective(theta, log_n, log_d, log_l, weights=1.0):
    """Value and gradient at (log E, log A, log B, alpha, beta), written for SciPy."""
    e, a, b, alpha, beta = theta
    terms = np.stack([np.full_like(log_n, e), a - alpha * log_n, b - beta * log_d])
    top = terms.max(0)
    scaled = np.exp(terms - top)
    total = scaled.sum(0)
    r = top + np.log(total) - log_l
    size = np.abs(r)
    slope = weights * np.clip(r, -DELTA, DELTA) * (scaled / total)
    value = (weights * np.where(size <= DELTA, 0.5 * r * r, DELTA * (size - 0.5 * DELTA))).sum()
    sums = slope.sum(1)
    return value, np.array([*sums, -(slope[1] @ log_n), -(slope[2] @ log_d)])


def load_tables(folder: pathlib.Path) -> dict[str, dict]:
    """The published tables as columns N, D, L; an absent one is left out."""
    import pandas as pd

    def read(name, pick):
        if not (folder / name).is_file():
            print(f"skipped {name}: not in {folder}")
            return None
        return pick(pd.read_csv(folder / name))

    found = {
        "Chinchilla, Epoch's digitisation": read("chinchilla_epoch.csv", lambda t: t[t.kept == 1]),
        "Chinchilla, Takano's digitisation": read("chinchilla_kyo.csv", lambda t: t),
        "over-training, C4, loss on C4": read(
            "overtraining_mlfoundations.csv",
            lambda t: t[t.dataset == "c4_original"].assign(loss=t.loss_eval1),
        ),
    }
    return {
        name: {k: t[c].to_numpy(float) for k, c in (("N", "params"), ("D", "tokens"), ("L", "loss"))}
        for name, t in found.items()
        if t is not None
    }


def logs(table):
    return np.log(table["N"]), np.log(table["D"]), np.log(table["L"])


def as_params(theta):
    with np.errstate(over="ignore"):
        return (*np.exp(theta[:3]), *theta[3:])


class Clock:
    """CPU seconds (with children) and wall seconds of a block."""

    def __enter__(self):
        self.start = self._cpu(), time.perf_counter()
        return self

    def __exit__(self, *_):
        cpu, wall = self.start
        self.cpu, self.wall = self._cpu() - cpu, time.perf_counter() - wall

    @staticmethod
    def _cpu():
        use = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
        return sum(u.ru_utime + u.ru_stime for u in use)


def ours(table, **options):
    """The problem and point fit of our solver."""
    x = {"N": np.log(table["N"]), "D": np.log(table["D"])}
    return solve(get_law("chinchilla"), x, table["L"], **{"loss": "huber", "delta": DELTA, **options})


def random_start_study(problem, best_value: float, count: int = 256, seed: int = 0) -> dict:
    """Newton from random starts all over a wide box: does any end lower than the reported optimum?

    The box: E anywhere below the lowest loss, each term at the mean run from a thousandth of the mean
    loss to three times it, and exponents from 0.01 to 3 (both evenly in the log).

    Args:
      problem: of the Chinchilla law, as ``solve`` returns it. best_value: the objective reported.

    Returns:
      starts, the lowest objective over the reported one less 1 (below zero: beaten), and the shares of
      starts that end at the reported optimum, converge elsewhere, and give up without converging.
    """
    rng, y = np.random.default_rng(seed), problem.y_R
    start = np.concatenate(
        [
            rng.uniform(0.0, y.min(), (count, 1)),
            y.mean() * np.exp(rng.uniform(np.log(1e-3), np.log(3.0), (count, 2))),
            np.exp(rng.uniform(np.log(0.01), np.log(3.0), (count, 2))),
        ],
        1,
    )
    weights = np.ones((count, len(y)))
    for _ in range(RESTARTS):  # Newton gives up after some hundred steps; far starts need more
        end = newton(problem, start, weights, RowLoss("huber", DELTA))
        start = end.p_BxK
    at_best = np.abs(end.value_B - best_value) <= 1e-6 * best_value
    return {
        "starts": count,
        "lowest_over_reported": float(np.nanmin(end.value_B) / best_value - 1.0),
        "at_optimum": share(at_best),
        "elsewhere": share(end.converged_B & ~at_best),
        "unconverged": share(~end.converged_B & ~at_best),
    }


def published_starts() -> np.ndarray:
    """The 4,500 starts of Hoffmann et al. 2022, appendix D.3: log E, log A, log B, alpha, beta."""
    exponents, e, ab = np.arange(0, 2.01, 0.5), np.arange(-1, 1.01, 0.5), np.arange(0, 25.01, 5.0)
    return np.array(list(itertools.product(e, ab, ab, exponents, exponents)))


def lbfgsb(table, starts) -> list:
    from scipy import optimize

    arguments = logs(table)
    return [optimize.minimize(log_objective, s, arguments, method="L-BFGS-B", jac=True) for s in starts]


def chinchilla_package(table, per_axis: int):
    """``Chinchilla.fit`` over its documented grid (README, "Fitting the scaling law on existing dataset").

    Its log-Huber loss with our delta, its own optimiser and precision; only its figure is left out.
    Returns E, A, B, alpha, beta and the seconds of ``fit``.
    """
    import pandas as pd
    from chinchilla import Chinchilla
    from chinchilla._metrics import log_huber

    wide, steep = np.linspace(1, 10, per_axis), np.linspace(0.1, 0.7, per_axis)
    grid = {"E": np.linspace(1, 2, per_axis), "a": wide, "b": wide, "alpha": steep, "beta": steep}
    with tempfile.TemporaryDirectory() as folder:
        columns = {"C": 6 * table["N"] * table["D"], "N": table["N"], "D": table["D"], "loss": table["L"]}
        pd.DataFrame(columns).to_csv(pathlib.Path(folder) / "df.csv", index=False)
        peer = Chinchilla(
            folder, param_grid=grid, loss_fn=functools.partial(log_huber, delta=DELTA), log_level=50
        )
        peer.visualizer.optim = lambda *a, **k: None
        with Clock() as clock, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            peer.fit(parallel=False)
    return [float(getattr(peer, n)) for n in NAMES], clock


def exponent_grid_nelder_mead(table, per_axis: int = 32):
    """Non-negative least squares of the coefficients at every grid point, then Nelder-Mead from the best."""
    from scipy import optimize

    def coefficients(pair):
        with np.errstate(all="ignore"):
            X = np.stack([np.ones_like(table["L"]), table["N"] ** -pair[0], table["D"] ** -pair[1]], 1)
        scale = np.linalg.norm(X, axis=0)
        if not np.isfinite(scale).all() or not (scale > 0).all():
            return np.zeros(3), math.inf
        best, norm = optimize.nnls(X / scale, table["L"])
        return best / scale, norm

    axis = np.linspace(0.05, 1.5, per_axis)
    start = min(itertools.product(axis, axis), key=lambda pair: coefficients(pair)[1])
    tight = {"xatol": 1e-10, "fatol": 1e-14, "maxfev": 2000}
    end = optimize.minimize(lambda p: coefficients(p)[1] ** 2, start, method="Nelder-Mead", options=tight)
    return (*coefficients(end.x)[0], *end.x)


def bfgs_refits(table, start, weights) -> list:
    """One BFGS run per resample from the point fit, with gradient: the published bootstrap."""
    from scipy import optimize

    arguments = logs(table)
    return [
        optimize.minimize(log_objective, start, (*arguments, w), method="BFGS", jac=True) for w in weights
    ]


def share(mask) -> float:
    return float(np.mean(mask))


def measure(name: str, table: dict, full: bool, rounds: int) -> dict:
    """One table: every side in turn, round by round; returns what was measured."""
    problem, point = ours(table)  # warm: imports, caches and compilations are filled here
    _, compiled = ours(table, backend="jax")
    point_cpu, point_wall = {"numpy": [], "jax": []}, {"numpy": [], "jax": []}

    def time_ours(times):
        for backend in ("numpy", "jax") * times:
            with Clock() as clock:
                ours(table, backend=backend)
            point_cpu[backend].append(clock.cpu)
            point_wall[backend].append(clock.wall)

    starts = published_starts()
    weights = uncertainty.resample_weights(np.arange(len(table["L"])), BOOTSTRAPS, "pairs", 0)
    theta = np.concatenate(
        [np.log([point.params[n] for n in NAMES[:3]]), [point.params[n] for n in NAMES[3:]]]
    )
    tried = 100 if full else 30
    ends, lbfgsb_cpu, grid_cpu, bfgs_ends, bfgs_cpu, refit_cpu = [], 0.0, [], [], 0.0, []
    for k in range(rounds):
        time_ours(10)
        with Clock() as clock:
            ends += lbfgsb(table, starts[k::rounds])
        lbfgsb_cpu += clock.cpu
        with Clock() as clock:
            draws, converged = uncertainty.refit(problem, point.p_K, weights, "huber", DELTA)
        refit_cpu.append(clock.cpu)
        with Clock() as clock:
            bfgs_ends += bfgs_refits(table, theta, weights[:tried][k::rounds])
        bfgs_cpu += clock.cpu
        with Clock() as clock:
            grid_params = exponent_grid_nelder_mead(table)
        grid_cpu.append(clock.cpu)
    order = np.concatenate([np.arange(tried)[k::rounds] for k in range(rounds)])
    draws_at = problem.to_params(draws)
    mine = np.array([weighted(np.array([draws_at[n][i] for n in NAMES]), table, weights[i]) for i in order])
    bfgs_value = np.array([e.fun for e in bfgs_ends])
    best = objective([point.params[n] for n in NAMES], table)
    ends_value = np.array([e.fun for e in ends])
    claimed = np.array([bool(e.success) for e in ends])
    away = ends_value > best * (1 + ELSEWHERE)
    _, squares = ours(table, loss="least_squares", space="raw")
    out = {
        "table": name,
        "rows": len(table["L"]),
        "ours": {
            "objective": best,
            "params": {n: point.params[n] for n in NAMES},
            "status": point.status,
            "cpu_s": float(np.median(point_cpu["numpy"])),
            "wall_s": float(np.median(point_wall["numpy"])),
            "compiled_cpu_s": float(np.median(point_cpu["jax"])),
            "compiled_wall_s": float(np.median(point_wall["jax"])),
            "compiled_apart": max(abs(compiled.params[n] / point.params[n] - 1) for n in NAMES),
            "bootstraps_cpu_s": float(np.median(refit_cpu)),
            "bootstraps_converged": share(converged),
            "least_squares_objective": raw_squares([squares.params[n] for n in NAMES], table),
            "random_starts": random_start_study(problem, point.objective),
        },
        "lbfgsb": {
            "starts_run": len(starts),
            "objective": float(ends_value.min()),
            "cpu_s_4500": lbfgsb_cpu,
            "success": share(claimed),
            "elsewhere": share(away),
            "elsewhere_of_successes": share(away[claimed]) if claimed.any() else None,
        },
        "bfgs_bootstrap": {
            "refits_run": tried,
            "cpu_s_4000": bfgs_cpu * BOOTSTRAPS / tried,
            "above_ours": share(bfgs_value > mine * (1 + 1e-6)),
            "below_ours": share(bfgs_value < mine * (1 - 1e-9)),
            "success": share([e.success for e in bfgs_ends]),
        },
        "exponent_grid": {
            "objective": objective(grid_params, table),
            "least_squares_objective": raw_squares(grid_params, table),
            "cpu_s": float(np.median(grid_cpu)),
        },
    }
    if importlib.util.find_spec("chinchilla"):
        per_axis = 5 if full else 3
        params, clock = chinchilla_package(table, per_axis)
        out["chinchilla"] = {
            "starts_run": per_axis**5,
            "objective": objective(params, table),
            "cpu_s_3125": clock.cpu * 5**5 / per_axis**5,
            "params": dict(zip(NAMES, params, strict=True)),
        }
    else:
        print("skipped the package chinchilla: not installed (extra 'peers')")
    time_ours(5)
    return out


def weighted(params, table, weights) -> float:
    theta = np.concatenate([np.log(params[:3]), params[3:]])
    return float(log_objective(theta, *logs(table), weights)[0])


def time_shell(table: dict) -> dict | None:
    """``scaling fit`` of one table with 4,000 bootstraps in a fresh process, command to exit."""
    import pandas as pd

    command = pathlib.Path(sys.executable).parent / "scaling"
    if not command.is_file():
        print("skipped the command line: scaling is not installed beside this Python")
        return None
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "runs.csv"
        pd.DataFrame({"params": table["N"], "tokens": table["D"], "loss": table["L"]}).to_csv(
            path, index=False
        )
        call = [
            command,
            "fit",
            path,
            "--bootstraps",
            str(BOOTSTRAPS),
            "--out",
            pathlib.Path(folder) / "fit.json",
        ]
        with Clock() as clock:
            done = subprocess.run(list(map(str, call)), capture_output=True, text=True, check=False)
    if done.returncode not in (0, 1):  # 1: fitted, with doubts
        raise RuntimeError(f"scaling fit ended with {done.returncode}: {done.stderr[-500:]}")
    return {"wall_s": clock.wall, "cpu_s": clock.cpu, "exit_code": done.returncode}


def processor() -> str:
    with contextlib.suppress(OSError):
        for line in pathlib.Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def times(peer: float, own: float) -> str:
    return f"{peer / own:,.0f}" if peer / own >= 10 else f"{peer / own:.1f}"


def is_lowest(measured: dict) -> bool:
    """Whether no peer's objective lies below ours by more than rounding."""
    peers = [measured[k]["objective"] for k in ("lbfgsb", "chinchilla", "exponent_grid") if k in measured]
    return all(measured["ours"]["objective"] <= value * (1 + 1e-12) for value in peers)


def to_markdown(result: dict) -> str:
    machine, tables = result["machine"], result["tables"]
    part = "Every peer ran all of its starts."
    if not result["full"]:
        part = "Where a peer ran fewer starts than it documents, its full cost is scaled up from those."
    lines = [
        "# Our fits against the peers'",
        "",
        f"`python benchmarks/fits.py{' --full' if result['full'] else ''}`, {machine['cpus']} CPUs "
        f"({machine['processor']}), one thread a side; {machine['versions']}. "
        f"Load {machine['load_before']:.1f} before, {machine['load_after']:.1f} after. Seconds are CPU "
        f"seconds of the process and its children, all sides in one script taking turns. {part}",
        "",
        "Objective: the sum over runs of Huber(log predicted - log observed), delta 1e-3, recomputed for "
        "every answer by one function of the script.",
        "",
        "## Point fit",
        "",
        "| table | method | starts run | objective | CPU s | over ours |",
        "|---|---|---|---|---|---|",
    ]
    for t in tables:
        own = t["ours"]
        head = f"| {t['table']}, {t['rows']} runs"
        lines.append(
            f"{head} | ours, 12 starts, NumPy ({own['status']}) | 12 | {own['objective']:.10g} "
            f"| {own['cpu_s']:.4f} | 1 |"
        )
        lines.append(
            f"{head} | ours, 12 starts, compiled and warm | 12 "
            f"| parameters {own['compiled_apart']:.0e} apart | {own['compiled_cpu_s']:.4f} "
            f"| {times(own['compiled_cpu_s'], own['cpu_s'])} |"
        )
        peers = [("SciPy L-BFGS-B, 4,500 published starts", t["lbfgsb"], "cpu_s_4500")]
        if "chinchilla" in t:
            peers.append(("chinchilla, its 3,125 documented starts", t["chinchilla"], "cpu_s_3125"))
        for method, peer, key in peers:
            lines.append(
                f"{head} | {method} | {peer['starts_run']:,} | {peer['objective']:.10g} | {peer[key]:.1f} "
                f"| {times(peer[key], own['cpu_s'])} |"
            )
        grid = t["exponent_grid"]
        lines.append(
            f"{head} | 32 x 32 exponents, Nelder-Mead | 1,024 | {grid['objective']:.10g} "
            f"(not what it minimises) | {grid['cpu_s']:.2f} | {times(grid['cpu_s'], own['cpu_s'])} |"
        )
    lowest = all(is_lowest(t) for t in tables)
    lines += ["", f"Ours is the lowest objective on every table: {'yes' if lowest else 'NO'}."]
    lines += ["", "On its own objective, half the sum of squares of raw loss, the exponent grid ends at:", ""]
    lines += ["| table | exponent grid | ours |", "|---|---|---|"]
    for t in tables:
        grid, own = t["exponent_grid"], t["ours"]
        lines.append(
            f"| {t['table']} | {grid['least_squares_objective']:.10g} "
            f"| {own['least_squares_objective']:.10g} |"
        )
    lines += [
        "",
        "## What the published starts come to",
        "",
        "Elsewhere: an objective more than 0.1 % above the lowest.",
        "",
        "| table | L-BFGS-B says success | ends elsewhere | of its successes, elsewhere |",
        "|---|---|---|---|",
    ]
    for t in tables:
        p = t["lbfgsb"]
        of = "none" if p["elsewhere_of_successes"] is None else f"{p['elsewhere_of_successes']:.1%}"
        lines.append(f"| {t['table']} | {p['success']:.1%} | {p['elsewhere']:.1%} | {of} |")
    lines += [
        "",
        "Our Newton without our choice of starts, from 256 random ones in a wide box (`random_start_study`):",
        "",
        "| table | lowest over reported, less 1 | at the optimum | converged elsewhere | unconverged |",
        "|---|---|---|---|---|",
    ]
    for t in tables:
        s = t["ours"]["random_starts"]
        lines.append(
            f"| {t['table']} | {s['lowest_over_reported']:.1e} | {s['at_optimum']:.1%} "
            f"| {s['elsewhere']:.1%} | {s['unconverged']:.1%} |"
        )
    lines += [
        "",
        f"## {BOOTSTRAPS:,} bootstraps",
        "",
        "BFGS: one start, the point fit, with gradient; both sides refit the same resamples. Above: its "
        "objective is more than a millionth above ours; below: more than a billionth below.",
        "",
        "| table | ours, CPU s | converged | BFGS, CPU s | over ours | ends above | below | refits run |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for t in tables:
        own, p = t["ours"], t["bfgs_bootstrap"]
        lines.append(
            f"| {t['table']} | {own['bootstraps_cpu_s']:.2f} | {own['bootstraps_converged']:.1%} "
            f"| {p['cpu_s_4000']:.0f} | {times(p['cpu_s_4000'], own['bootstraps_cpu_s'])} "
            f"| {p['above_ours']:.0%} | {p['below_ours']:.0%} | {p['refits_run']} |"
        )
    lines += ["", "## Targets", "", "| what | target | measured |", "|---|---|---|"]
    first = tables[0]["ours"]
    lines.append(
        f"| warm point fit, {tables[0]['rows']} runs | 10 ms "
        f"| compiled {1e3 * first['compiled_wall_s']:.1f} ms wall, "
        f"{1e3 * first['compiled_cpu_s']:.1f} ms CPU; NumPy, with nothing to compile, "
        f"{1e3 * first['wall_s']:.1f} and {1e3 * first['cpu_s']:.1f} ms |"
    )
    lines.append(f"| {BOOTSTRAPS:,} bootstraps | 3 CPU s | {first['bootstraps_cpu_s']:.2f} CPU s |")
    if result["shell"]:
        shell = result["shell"]
        lines.append(
            f"| `scaling fit`, {BOOTSTRAPS:,} bootstraps, cold from the shell | 10 s wall "
            f"| {shell['wall_s']:.1f} s wall, {shell['cpu_s']:.1f} CPU s |"
        )
    return "\n".join(lines) + "\n"


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=pathlib.Path, default=HERE.parents[1] / "shared" / "data")
    parser.add_argument("--full", action="store_true", help="every start of every peer (five minutes)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=pathlib.Path, default=HERE / "results" / "fits")
    args = parser.parse_args()
    tables = load_tables(args.data)
    if not tables:
        raise SystemExit(f"no published table in {args.data}")
    load = os.getloadavg()[0]
    measured = []
    for name, table in tables.items():
        measured.append(measure(name, table, args.full or not measured, args.rounds))
        print(json.dumps(measured[-1]), flush=True)
    shell = time_shell(next(iter(tables.values())))
    packages = ["numpy", "scipy", "jax"] + (["chinchilla"] if importlib.util.find_spec("chinchilla") else [])
    result = {
        "machine": {
            "processor": processor(),
            "cpus": os.cpu_count(),
            "versions": ", ".join(
                [f"Python {platform.python_version()}", *(f"{p} {version(p)}" for p in packages)]
            ),
            "load_before": load,
            "load_after": os.getloadavg()[0],
        },
        "full": args.full,
        "rounds": args.rounds,
        "targets": TARGETS,
        "tables": measured,
        "shell": shell,
    }
    text = to_markdown(result)
    args.out.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")
    args.out.with_suffix(".md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
