"""What a run of (N, D) costs a family: FLOPs, measured time, and time by a chip's compute and memory."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from launch.fitting import cost_and_shape
from scaling.chips import BANDWIDTH, PEAK_FLOPS
from scaling.flops import ledger, memory_bytes
from scaling.layers import with_vocab
from scaling.recipe import batch_sequences, make_shape, recipe_from_config
from scaling.records import collect, read_manifest

AXES = {
    "flops": "training FLOPs, by the exact ledger",
    "seconds": "device-seconds of training steps, as measured in this study's own runs",
    "roofline": "seconds of a chip by the larger of compute and memory traffic, an estimate",
}
"""Name of a cost, and what it is."""

UNITS = {"flops": "FLOPs", "seconds": "device-seconds", "roofline": "seconds of a {chip}, estimated"}
"""Name of a cost to the unit of its budgets."""


class ByTheToken:
    """Cost of (N, D) from the cost a token at some N: linear between them in logs, end slopes beyond."""

    def __init__(self, params, per_token, label: str):
        order = np.argsort(params)
        self.log_n, self.log_c = (
            np.log(np.asarray(params, float)[order]),
            np.log(np.asarray(per_token)[order]),
        )
        self.label = label

    def __call__(self, N, D):
        log_n = np.log(np.asarray(N, float))
        inside = np.interp(log_n, self.log_n, self.log_c)
        if len(self.log_n) < 2:
            return np.exp(inside) * D
        slopes = np.diff(self.log_c) / np.diff(self.log_n)
        below, above = np.minimum(0, log_n - self.log_n[0]), np.maximum(0, log_n - self.log_n[-1])
        return np.exp(inside + below * slopes[0] + above * slopes[-1]) * D


def cost_functions(study: Path, chip: str) -> dict[str, Callable]:
    """``AXES`` to a function of (N, D), for a trained study."""
    return {
        "flops": cost_and_shape(study)[0],
        "seconds": measured_seconds(study),
        "roofline": roofline_seconds(study, chip),
    }


def measured_seconds(study: Path) -> ByTheToken:
    """Device-seconds a token at every N that was trained: the median of its runs."""
    table = collect(study)
    table = table[table["tokens_per_second"].notna()]
    per = table.groupby("params")["tokens_per_second"].median()
    return ByTheToken(per.index.to_numpy(), 1 / per.to_numpy(), "measured device-seconds")


def roofline_seconds(study: Path, chip: str) -> ByTheToken:
    """Seconds of one chip a token along the study's shapes, at the batch of its median run."""
    manifest = read_manifest(study)
    config = manifest["config"]
    recipe = recipe_from_config(config["recipe"])
    model = with_vocab(config["model"], manifest["data"]["vocab"]) | {"dtype": "bfloat16"}
    seq = manifest["cells"][0]["config"]["data"]["seq"]
    tokens = float(np.median([e["achieved"]["tokens"] for e in manifest["cells"]]))
    batch = batch_sequences(recipe, tokens, seq)
    shapes = {(e["config"]["model"]["d_model"], e["config"]["model"]["layers"]) for e in manifest["cells"]}
    params, seconds = [], []
    for width, depth in shapes:
        built = make_shape(recipe, model, width, depth)
        account = ledger(built, seq)
        compute = account.train_flops_per_token() / PEAK_FLOPS[chip]
        memory = step_traffic(built, batch, seq) / (batch * seq) / BANDWIDTH[chip]
        params.append(account.params_total)
        seconds.append(max(compute, memory))
    return ByTheToken(params, seconds, f"roofline seconds of one {chip}")


def step_traffic(model, batch: int, seq: int) -> float:
    """Bytes that one step moves to and from memory, estimated.

    Weights in bfloat16 three times (forward, and twice backward), float32 parameters, gradient and two
    moments there and back (28 bytes each), what layers keep written and read.
    """
    estimate = memory_bytes(model, batch, seq)
    params = estimate.params // 4
    return (3 * 2 + 28) * params + 2 * estimate.activations
