"""Our fits against the peers' on published tables: who reaches the lowest objective, at what cost.

All sides run in one script, taking turns in rounds, on one thread each; CPU seconds are those of this
process and its children. Every answer is judged by one objective written here, apart from the library:
the sum over runs of Huber(log predicted - log observed) with delta 1e-3 (Hoffmann et al. 2022).

    python benchmarks/fit_speed.py [--data FOLDER] [--full]

Peers: the package ``chinchilla`` (BFGS from every point of its documented grid), SciPy's L-BFGS-B with
gradient from the 4,500 published starts, a bootstrap of single-start BFGS refits, and a 32 x 32 grid of
exponents with linear solves and a Nelder-Mead finish (least squares of raw loss: its own objective).
Without ``--full`` the package runs its documented grid on the first table only, and on the others 3 of the
5 values of each axis (243 starts), the cost of the full grid being scaled up from those.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import math
import os
import pathlib
import platform
import subprocess
import sys
import tempfile
from importlib.metadata import version

for _name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(_name, "1")
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("MPLBACKEND", "Agg")

import fit_peers as peers  # noqa: E402
import numpy as np  # noqa: E402
from fit_peers import DELTA, NAMES, Clock  # noqa: E402
from fit_tables import to_markdown  # noqa: E402

from fits import uncertainty  # noqa: E402
from fits.laws import get_law  # noqa: E402
from fits.objective import RowLoss  # noqa: E402
from fits.solve import newton, solve  # noqa: E402

HERE = pathlib.Path(__file__).resolve().parent
BOOTSTRAPS = 4000
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


def share(mask) -> float:
    return float(np.mean(mask))


class Point:
    """Point fits of one table by both of our backends, timed whenever ``turn`` is called."""

    def __init__(self, table: dict):
        self.table, self.cpu, self.wall = table, {"numpy": [], "jax": []}, {"numpy": [], "jax": []}
        self.problem, self.fit = ours(table)  # warm: imports, caches and compilations are filled here
        _, self.compiled = ours(table, backend="jax")

    def turn(self, times: int) -> None:
        for backend in ("numpy", "jax") * times:
            with Clock() as clock:
                ours(self.table, backend=backend)
            self.cpu[backend].append(clock.cpu)
            self.wall[backend].append(clock.wall)

    def measured(self) -> dict:
        best = [self.fit.params[n] for n in NAMES]
        _, squares = ours(self.table, loss="least_squares", space="raw")
        return {
            "objective": objective(best, self.table),
            "params": dict(zip(NAMES, best, strict=True)),
            "status": self.fit.status,
            "cpu_s": float(np.median(self.cpu["numpy"])),
            "wall_s": float(np.median(self.wall["numpy"])),
            "compiled_cpu_s": float(np.median(self.cpu["jax"])),
            "compiled_wall_s": float(np.median(self.wall["jax"])),
            "compiled_apart": max(abs(self.compiled.params[n] / self.fit.params[n] - 1) for n in NAMES),
            "least_squares_objective": raw_squares([squares.params[n] for n in NAMES], self.table),
            "random_starts": random_start_study(self.problem, self.fit.objective),
        }


class Bootstraps:
    """Our refits of all resamples and the peer's of the first ``tried``, a part of them each ``turn``."""

    def __init__(self, point: Point, tried: int):
        rows = np.arange(len(point.table["L"]))
        self.point, self.tried = point, tried
        self.weights = uncertainty.resample_weights(rows, BOOTSTRAPS, "pairs", 0)
        self.cpu, self.peer_cpu, self.order, self.ends = [], 0.0, [], []

    def turn(self, part: slice) -> None:
        point, params = self.point, self.point.fit.params
        with Clock() as clock:
            self.draws, self.converged = uncertainty.refit(
                point.problem, point.fit.p_K, self.weights, "huber", DELTA
            )
        self.cpu.append(clock.cpu)
        theta = np.array([*(math.log(params[n]) for n in NAMES[:3]), *(params[n] for n in NAMES[3:])])
        with Clock() as clock:
            self.ends += peers.bfgs_refits(point.table, theta, self.weights[: self.tried][part])
        self.peer_cpu += clock.cpu
        self.order += range(self.tried)[part]

    def measured(self) -> tuple[dict, dict]:
        """Ours and the peer's, whose objectives are compared resample by resample."""
        at = self.point.problem.to_params(self.draws)
        mine = np.array(
            [weighted([at[n][i] for n in NAMES], self.point.table, self.weights[i]) for i in self.order]
        )
        value = np.array([e.fun for e in self.ends])
        own = {
            "bootstraps_cpu_s": float(np.median(self.cpu)),
            "bootstraps_converged": share(self.converged),
        }
        return own, {
            "refits_run": self.tried,
            "cpu_s_4000": self.peer_cpu * BOOTSTRAPS / self.tried,
            "above_ours": share(value > mine * (1 + 1e-6)),
            "below_ours": share(value < mine * (1 - 1e-9)),
            "success": share([e.success for e in self.ends]),
        }


def from_published_starts(ends: list, cpu: float, best: float) -> dict:
    """What SciPy's runs came to, against our objective ``best``."""
    value, claimed = np.array([e.fun for e in ends]), np.array([bool(e.success) for e in ends])
    away = value > best * (1 + ELSEWHERE)
    return {
        "starts_run": len(ends),
        "objective": float(value.min()),
        "cpu_s_4500": cpu,
        "success": share(claimed),
        "elsewhere": share(away),
        "elsewhere_of_successes": share(away[claimed]) if claimed.any() else None,
    }


def package(table: dict, per_axis: int) -> dict:
    params, clock = peers.chinchilla_package(table, per_axis)
    return {
        "starts_run": per_axis**5,
        "objective": objective(params, table),
        "cpu_s_3125": clock.cpu * 5**5 / per_axis**5,
        "params": dict(zip(NAMES, params, strict=True)),
    }


def measure(name: str, table: dict, full: bool, rounds: int) -> dict:
    """One table: every side in turn, round by round; returns what was measured."""
    point, starts = Point(table), peers.published_starts()
    resampled = Bootstraps(point, tried=100 if full else 30)
    ends, lbfgsb_cpu, grid_cpu = [], 0.0, []
    for k in range(rounds):
        point.turn(10)
        with Clock() as clock:
            ends += peers.lbfgsb(table, starts[k::rounds])
        lbfgsb_cpu += clock.cpu
        resampled.turn(slice(k, None, rounds))
        with Clock() as clock:
            grid_params = peers.exponent_grid_nelder_mead(table)
        grid_cpu.append(clock.cpu)
    found = {}
    if importlib.util.find_spec("chinchilla"):
        found["chinchilla"] = package(table, 5 if full else 3)
    else:
        print("skipped the package chinchilla: not installed (extra 'peers')")
    point.turn(5)
    own, bfgs = resampled.measured()
    own = point.measured() | own
    return {
        "table": name,
        "rows": len(table["L"]),
        "ours": own,
        "lbfgsb": from_published_starts(ends, lbfgsb_cpu, own["objective"]),
        "bfgs_bootstrap": bfgs,
        "exponent_grid": {
            "objective": objective(grid_params, table),
            "least_squares_objective": raw_squares(grid_params, table),
            "cpu_s": float(np.median(grid_cpu)),
        },
        **found,
    }


def weighted(params, table, weights) -> float:
    theta = np.concatenate([np.log(params[:3]), params[3:]])
    return float(peers.log_objective(theta, *peers.logs(table), weights)[0])


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
        "bootstraps": BOOTSTRAPS,
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
