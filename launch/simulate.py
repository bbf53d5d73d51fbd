"""`scaling simulate`: a study folder whose losses come from a law and noise, with every file of a real one.

What is planted is known, so that a fit of the folder can be held against it. The manifest says that it is
simulated and how, and such a folder is never trained. A cell's noise depends on the seed and on its own id
(its size's on the size): it stays the same when the study grows.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np

import fits
from fits.laws.base import COLUMN_OF
from scaling import __version__
from scaling.claims import FolderStore, Observer, read_attempts, take
from scaling.config import ConfigError
from scaling.files import CellFolder, StudyError, read_json, write_json, write_whole
from scaling.trainers import achieved, tokens_per_step

SPEED = 1e11
"""FLOP/s at which simulated cells are said to have run."""
STRAGGLE = 8.0
"""How many times longer a straggler took."""
CURVE_POINTS = 20
FAILURES = 2
"""Attempts of a cell that ends without a result: as many as it may have."""
DEVICE = "simulated"


@dataclasses.dataclass(frozen=True)
class Noise:
    """What goes wrong, in a simulated study.

    Attributes:
      seed_noise: standard deviation of log loss between runs that differ in their seed alone.
      size_effect: of log loss, common to all runs of one N. diverged, failed, stragglers: shares of the cells
        that diverge, end without a result, or take eight times as long with a preemption on the way.
      seed: of all of these.
    """

    seed_noise: float = 0.003
    size_effect: float = 0.0
    diverged: float = 0.0
    failed: float = 0.0
    stragglers: float = 0.0
    seed: int = 0

    def __post_init__(self):
        for name in ("seed_noise", "size_effect"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)!r}; it must be a number in [0, 1)")
        shares = [self.diverged, self.failed, self.stragglers]
        if not all(0 <= s <= 1 for s in shares) or sum(shares) > 1:
            raise ConfigError(
                f"diverged, failed and stragglers are {shares}; they must be shares from 0 to 1 that sum to "
                "at most 1"
            )


def planted(name: str, given: Mapping[str, float]) -> tuple[fits.Law, dict[str, float]]:
    """The law and its parameters, checked.

    Raises:
      ConfigError: a parameter that is missing, unknown or out of bounds. FitError: no such law.
    """
    law = fits.get_law(name)
    for key in given:
        if key not in law.parameters:
            raise ConfigError(f"--param {key!r} is not of {law.name}; it has {', '.join(law.parameters)}")
    for key in law.parameters:
        if key not in given:
            raise ConfigError(f"--param {key} is missing; {law.name} is {law.formula}")
        low, high = law.bounds.get(key, (-math.inf, math.inf))
        if not low <= given[key] <= high:
            raise ConfigError(f"--param {key} is {given[key]!r}; it must be from {low:g} to {high:g}")
    return law, {key: float(given[key]) for key in law.parameters}


def simulate(manifest: dict, law: fits.Law, params: Mapping[str, float], noise: Noise) -> dict:
    """The manifest of the simulated study: that of the real one, and what was planted."""
    if any(entry.get("role", "cell") != "cell" for entry in manifest["cells"]):
        raise ConfigError("grid.trunks or grid.sentinels is set; a simulated study has plain cells alone")
    about = {
        "law": law.name,
        "formula": law.formula,
        "params": dict(params),
        "noise": dataclasses.asdict(noise),
    }
    data = {k: v for k, v in manifest["data"].items() if k not in ("ideal_loss", "entropy_rate")}
    return {**manifest, "data": data, "simulated": about}


def check_same(study: Path, manifest: Mapping) -> None:
    """Raises ``StudyError`` where a folder holds a study from another law or noise, or a real one."""
    path = Path(study) / "manifest.json"
    if not path.exists():
        return
    there = read_json(path).get("simulated")
    if there != manifest["simulated"]:
        raise StudyError(
            f"{study} was simulated with {there}, not with {manifest['simulated']}; use another folder "
            "(--study)"
            if there
            else f"{study} is of a real training; simulate into another folder (--study)"
        )


def write_cells(
    study: Path, manifest: dict, law: fits.Law, params: Mapping[str, float], noise: Noise
) -> dict:
    """Writes the files of every cell that was not simulated before.

    Returns:
      Counts by status.

    Raises:
      StudyError: a cell was trained for real.
    """
    counts: dict[str, int] = {}
    for entry in manifest["cells"]:
        folder = CellFolder(study, entry["id"])
        if is_written(folder):
            continue
        status = write_cell(folder, entry, law, params, noise, manifest["data"])
        counts[status] = counts.get(status, 0) + 1
    return counts


def is_written(folder: CellFolder) -> bool:
    """Whether a cell was simulated before, to its end; raises as ``write_cells``."""
    attempts = read_attempts(FolderStore(folder.attempts))
    real = any(a.get("device_kind") != DEVICE for a in attempts if a["outcome"] is not None)
    if real or (folder.result.exists() and DEVICE not in folder.result.read_text()):
        raise StudyError(f"{folder.path} is of a real training; simulate into another folder (--study)")
    return folder.result.exists() or [a["outcome"] for a in attempts].count("failed") == FAILURES


def generator(*words) -> np.random.Generator:
    """Random numbers that depend on the words alone."""
    digest = hashlib.sha256(repr(words).encode()).digest()
    return np.random.default_rng(np.frombuffer(digest, np.uint32))


def loss_of(law: fits.Law, params: Mapping, cell: Mapping, tokens: float, unique: float) -> float:
    """The law's loss of a cell after so many tokens."""
    got, each = achieved(cell), tokens_per_step(cell)
    known = {
        "params": got["params_total"],
        "tokens": tokens,
        "flops": got["flops"] * tokens / got["tokens"],
        "unique_tokens": min(unique, tokens),
        "steps": tokens / each,
        "batch_tokens": each,
    }
    x = {v: np.float64(known[COLUMN_OF[v]]) for v in law.variables}
    return float(law.predict(params, x))


def write_cell(folder: CellFolder, entry: Mapping, law, params, noise: Noise, data: Mapping) -> str:
    """Writes one cell's files; returns its status."""
    cell, got = entry["config"], entry["achieved"]
    own = generator("cell", noise.seed, entry["id"])
    lot, wobble = own.random(), own.standard_normal()
    size = generator("size", noise.seed, got["params_total"]).standard_normal()
    ends = np.cumsum([noise.diverged, noise.failed, noise.stragglers])
    kind = ("diverged", "failed", "straggler", "finished")[int(np.searchsorted(ends, lot, side="right"))]
    steps, each, tokens = cell["train"]["steps"], tokens_per_step(cell), got["tokens"]
    unique = data.get("unique_tokens") or math.inf
    factor = math.exp(noise.seed_noise * wobble + noise.size_effect * size)
    cut = steps if kind in ("finished", "straggler") else max(1, round(steps * own.uniform(0.1, 0.9)))
    at = sorted({max(1, round(cut * (i + 1) / CURVE_POINTS)) for i in range(CURVE_POINTS)})
    losses = [factor * loss_of(law, params, cell, s * each, unique) for s in at]
    seconds = got["flops"] * cut / steps / SPEED * (STRAGGLE if kind == "straggler" else 1.0)
    write_json(folder.config, cell)
    rows = [{"step": s, "tokens": s * each, "loss": y} for s, y in zip(at, losses, strict=True)]
    write_whole(folder.metrics, "".join(json.dumps(row) + "\n" for row in rows))
    if kind == "straggler":
        _attempt(folder, "preempted", cut // 2, seconds / 2)
    if kind == "failed":
        for _ in range(FAILURES):
            _attempt(
                folder, "failed", cut, seconds, reason="RuntimeError: simulated failure", log=["simulated"]
            )
        return "failed"
    status = "diverged" if kind == "diverged" else "finished"
    final = losses[-1] if status == "finished" else None
    bits = (
        None
        if final is None or not data.get("bytes_per_token")
        else final / math.log(2) / data["bytes_per_token"]
    )
    score = {"loss": final, "loss_stderr": None if final is None else noise.seed_noise * final}
    score["bits_per_byte"] = bits
    done = cut * each
    result = {
        "cell": entry["id"],
        "status": status,
        "reason": None if status == "finished" else f"the training loss was nan at step {cut}",
        **score,
        "steps": cut,
        "tokens": done,
        "unique_tokens": int(min(unique, done)),
        "epochs": float(max(1.0, done / unique)) if math.isfinite(unique) else 1.0,
        "flops": got["flops"] * done / tokens,
        "spikes": 0,
        "skipped_steps": 0,
        "evals": [{"step": cut, "tokens": done, **score}] if status == "finished" else [],
        "data": data.get("fingerprint"),
        "device_kind": DEVICE,
        "devices": 1,
        "cpu_cores": None,
        "versions": {"scaling": __version__},
    }
    speed = done / seconds
    timing = {
        "wall_seconds": seconds,
        "device_seconds": seconds,
        "tokens_per_second": speed,
        "flops_per_second": got["flops"] / tokens * speed,
        "finished_at": time.time(),
    }
    write_json(folder.timing, timing)
    write_json(folder.result, result)
    _attempt(folder, status, cut, seconds)
    return status


def _attempt(folder: CellFolder, outcome: str, step: int, seconds: float, **words) -> None:
    """An attempt's file, as a worker leaves it."""
    claim = take(FolderStore(folder.attempts), folder.path.name, Observer())
    claim.record |= {"device_kind": DEVICE, "devices": 1, "pack": 1, "began": time.time() - seconds}
    claim.step = step
    claim.close(outcome, **words)


def planted_words(manifest: Mapping, fit) -> str | None:
    """What was planted beside what was found; None for a study that is not simulated, or of another law."""
    about = manifest.get("simulated")
    if about is None or about["law"] != fit.law.name:
        return None
    parts, missed = [], []
    for key, value in about["params"].items():
        interval = (fit.intervals.get(key) or {}).get("95")
        if interval is not None and not interval[0] <= value <= interval[1]:
            missed.append(key)
        parts.append(f"{key} {value:g} (found {fit.params[key]:.5g})")
    held = f"the 95 % intervals of {', '.join(missed)} miss it" if missed else "every 95 % interval holds it"
    return f"simulated; planted {', '.join(parts)}; {held}"
