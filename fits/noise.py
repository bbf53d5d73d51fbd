"""Seed noise: the scatter between runs that repeat one another but for the seed, and what is left over it.

Repeats measure the noise without any law. If residuals scatter more than repeats do, the rest is not noise:
the law bends elsewhere, or runs differ in something that the table does not say (the pure-error test of lack
of fit; Draper and Smith 1998, ch. 2).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from fits.table import Table

SAME = 1e-9  # relative: repeats have the very same inputs, but for rounding
LACK_LEVEL = 0.01


def find_repeats(table: Table, variables: Sequence[str]) -> tuple[np.ndarray, str]:
    """Groups rows with the same inputs (the law's variables).

    Where the table has a column ``seed``, a group counts only if all its seeds are different: runs of one
    seed at one point differ in something else (a rate, a batch), which is no noise.

    Returns:
      Group number per row, int [R]; and "seeds", or "repeats" where no column says what differs.
    """
    x = table.log_x()
    keys = np.stack([np.round(x[v] / SAME).astype(np.int64) for v in variables], 1)
    ids = np.unique(keys, axis=0, return_inverse=True)[1].reshape(-1)
    if "seed" not in table.extra:
        return ids, "repeats"
    seeds = [str(s) for s in table.extra["seed"]]
    out, fresh = ids.copy(), int(ids.max()) + 1
    for g in np.flatnonzero(np.bincount(ids) > 1):
        rows = np.flatnonzero(ids == g)
        named = {seeds[i] for i in rows} - {"nan", "None", ""}
        if len(named) < len(rows):
            out[rows] = fresh + np.arange(len(rows))  # each on its own
            fresh += len(rows)
    return np.unique(out, return_inverse=True)[1], "seeds"


def seed_noise(
    table: Table, variables: Sequence[str], log_residual_R: np.ndarray, free: int, level: float = 0.95
) -> dict[str, Any] | None:
    """Pooled standard deviation of log loss over repeats, and the test of lack of fit; None without repeats.

    Args:
      variables: of the law. log_residual_R: log of observed over fitted loss. free: parameters estimated.

    Returns:
      kind ("seeds" or "repeats"), groups, degrees_of_freedom, sd (of the log of the loss), interval (chi
      squared, for normal noise) and level; lack_of_fit: sd, F, degrees_of_freedom [2] and p, or None where
      there are no more points than parameters or the repeats are equal. The residuals need not be of
      least squares: a robust fit leaves a larger sum, so p errs on the side of a lack.
    """
    from scipy.stats import chi2
    from scipy.stats import f as fisher

    ids, kind = find_repeats(table, variables)
    counts = np.bincount(ids)
    freedom = int((counts - 1).sum())
    if freedom < 1:
        return None
    log_loss = np.log(table.loss)
    means = np.bincount(ids, log_loss) / counts
    pure = float(((log_loss - means[ids]) ** 2).sum())
    tail = (1 - level) / 2
    ends = [float(np.sqrt(pure / chi2.ppf(q, freedom))) for q in (1 - tail, tail)]
    out = {
        "kind": kind, "groups": int((counts > 1).sum()), "degrees_of_freedom": freedom,
        "sd": float(np.sqrt(pure / freedom)), "interval": ends, "level": level, "lack_of_fit": None,
    }  # fmt: skip
    spare = len(counts) - free
    if spare < 1 or not pure > 0 or not np.isfinite(log_residual_R).all():
        return out
    # of each group the mean residual is what the law misses, the rest is noise
    centre = np.bincount(ids, log_residual_R) / counts
    lack = float((counts * centre**2).sum())
    ratio = (lack / spare) / (pure / freedom)
    out["lack_of_fit"] = {
        "sd": float(np.sqrt(lack / spare)), "F": float(ratio), "degrees_of_freedom": [spare, freedom],
        "p": float(fisher.sf(ratio, spare, freedom)),
    }  # fmt: skip
    return out


def noise_flags(noise: dict[str, Any] | None) -> list[dict[str, str]]:
    """A flag where the residuals scatter more than repeats do."""
    lack = noise and noise["lack_of_fit"]
    if not lack or lack["p"] > LACK_LEVEL:
        return []
    text = (
        f"points lie {lack['sd']:.2g} off the surface (in log loss) where {noise['kind']} alone would leave "
        f"{noise['sd']:.2g} (p {lack['p']:.1g}): something besides noise is not in the law"
    )
    return [{"code": "lack_of_fit", "text": text}]
