"""Where a search looks: points of its space, drawn by a plain seeded sampler or by optuna's.

A point depends on (seed, stream, index) alone and, under ``tpe``, on the results before it: drawing it again
gives the same.
"""

from __future__ import annotations

import itertools
import math
import zlib
from collections.abc import Mapping, Sequence

import numpy as np

from scaling.config import ConfigError
from scaling.files import StudyError
from scaling.recipe import round4

LEAST_SEEN = 4
"""Results a dimension before ``tpe`` takes over from random points."""


def generator(seed: int, stream: str, index: int) -> np.random.Generator:
    """Random numbers of one draw."""
    return np.random.default_rng([seed, zlib.crc32(stream.encode()), index])


def draw(search: Mapping, stream: str, index: int, seen: Sequence[tuple[Mapping, float]] = ()) -> dict:
    """Point number ``index`` of a stream: field to value, numbers rounded to four digits.

    Args:
      search: the validated section. stream: points of different streams are independent.
      seen: points and their losses at one D, for ``tpe``; a loss may be infinite.

    Raises:
      ConfigError: a grid has no more points. StudyError: ``tpe`` without optuna.
    """
    space, sampler = search["space"], search.get("sampler", "random")
    if sampler == "grid":
        return _of_grid(search, stream, index)
    if sampler == "tpe" and len(seen) >= LEAST_SEEN * len(space):
        return _by_tpe(search, stream, index, seen)
    if sampler == "tpe":
        _optuna()  # said before anything is trained
    rng = generator(search["seed"], stream, index)
    return {name: _random(rng, values) for name, values in space.items()}


def _random(rng: np.random.Generator, values):
    if not isinstance(values, Mapping):
        return values[int(rng.integers(len(values)))]
    return _between(values, float(rng.uniform()))


def _between(values: Mapping, u: float) -> float:
    low, high = values["low"], values["high"]
    if values.get("log", True):
        return round4(math.exp(math.log(low) + u * math.log(high / low)))
    return round4(low + u * (high - low))


def _of_grid(search: Mapping, stream: str, index: int) -> dict:
    axes = []
    for values in search["space"].values():
        if isinstance(values, Mapping):
            count = int(values["points"])
            values = [_between(values, i / max(1, count - 1)) for i in range(count)]
        axes.append(values)
    points = list(itertools.product(*axes))
    if index >= len(points):
        raise ConfigError(
            f"search.space has {len(points)} grid points and the search begins more configurations than "
            "that; use more points, or search.sampler = 'random'"
        )
    order = generator(search["seed"], stream, 0).permutation(len(points))
    return dict(zip(search["space"], points[order[index]], strict=True))


def _optuna():
    try:
        import optuna
    except ImportError as error:
        raise StudyError(
            "search.sampler is 'tpe', which needs the package optuna; install the extra: "
            "pip install 'scaling[search]', or use 'random'"
        ) from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna


def _by_tpe(search: Mapping, stream: str, index: int, seen) -> dict:
    """The tree-structured Parzen estimator (Bergstra et al. 2011), as BOHB uses it between rungs (2018)."""
    optuna = _optuna()
    d = optuna.distributions
    dims = {
        name: d.FloatDistribution(v["low"], v["high"], log=v.get("log", True))
        if isinstance(v, Mapping)
        else d.CategoricalDistribution(list(v))
        for name, v in search["space"].items()
    }
    own = int(generator(search["seed"], stream, index).integers(2**31))
    sampler = optuna.samplers.TPESampler(seed=own, n_startup_trials=0)
    study = optuna.create_study(sampler=sampler)
    worst = max((loss for _, loss in seen if math.isfinite(loss)), default=0.0)
    for point, loss in seen:
        inside = {
            k: min(max(v, dims[k].low), dims[k].high) if isinstance(dims[k], d.FloatDistribution) else v
            for k, v in point.items()
        }  # rounding may have put it a hair outside
        value = loss if math.isfinite(loss) else worst + 1.0
        study.add_trial(optuna.trial.create_trial(params=inside, distributions=dims, value=value))
    params = study.ask(dims).params
    return {k: round4(v) if isinstance(d_, d.FloatDistribution) else v
            for (k, d_), v in zip(dims.items(), (params[k] for k in dims), strict=True)}  # fmt: skip


def perturbed(search: Mapping, point: Mapping, rng: np.random.Generator) -> dict:
    """A point changed as population-based training explores: each number by one of the factors, in its range.

    Of a list, one of the neighbours (Jaderberg et al. 2017, section 4.1.1 and appendix A).
    """
    out = {}
    for name, values in search["space"].items():
        if isinstance(values, Mapping):
            factor = search["factors"][int(rng.integers(len(search["factors"])))]
            out[name] = round4(min(max(point[name] * factor, values["low"]), values["high"]))
        else:
            at = values.index(point[name]) + int(rng.choice([-1, 1]))
            out[name] = values[min(max(at, 0), len(values) - 1)]
    return out
