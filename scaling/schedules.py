"""Learning-rate schedules as pure functions of the step: every one but ``constant`` ends at the cell's own D.

A schedule takes traced numbers, so that two cells of one shape and different length share one
compiled program. Decay is written ``1 - (1 - final_fraction) * fall`` with ``fall`` from 0 to 1: before
it begins the factor is exactly one, so that a WSD cell and its constant trunk agree bit for bit.
"""

from __future__ import annotations

from collections.abc import Mapping

import jax.numpy as jnp

FALLS = {
    "linear": lambda p: p,
    "1-sqrt": jnp.sqrt,
}
"""Shapes of a cooldown over its progress p in [0, 1]; both are Haegele et al. 2024's (section 3)."""


def wsd(step, hp, decay="linear"):
    """Warm-up, constant, then a cooldown over the last ``decay_fraction`` of the run.

    Source: Hu et al. 2024 (MiniCPM); the cooldowns ``linear`` and ``1-sqrt``, Haegele et al. 2024.
    """
    return _warm(step, hp) * hp["lr"] * _left(FALLS[decay](_cooldown(step, hp)), hp)


def inverse_sqrt(step, hp, decay="linear"):
    """Warm-up, then lr * sqrt(warmup / (step + 1)), with the same cooldown at the end as ``wsd``.

    Source: Vaswani et al. 2017 (section 5.3); with a cooldown, Zhai et al. 2022 (section 3.5).
    """
    warmup = jnp.maximum(1.0, hp["warmup"])
    slow = jnp.sqrt(warmup / jnp.maximum(warmup, step + 1.0))
    return _warm(step, hp) * hp["lr"] * slow * _left(FALLS[decay](_cooldown(step, hp)), hp)


def cosine(step, hp, decay="linear"):
    """Warm-up, then half a cosine down to ``final_fraction`` of the peak (Loshchilov & Hutter 2017)."""
    share = hp["final_fraction"] + (1.0 - hp["final_fraction"]) * 0.5 * (
        1.0 + jnp.cos(jnp.pi * _after_warmup(step, hp))
    )
    return _warm(step, hp) * hp["lr"] * share


def linear(step, hp, decay="linear"):
    """Warm-up, then a straight line down to ``final_fraction`` at the last step (Bergsma et al. 2025)."""
    return _warm(step, hp) * hp["lr"] * _left(_after_warmup(step, hp), hp)


def rex(step, hp, decay="linear"):
    """Warm-up, then (1 - p) / (1/2 + (1 - p)/2) over the progress p (Chen et al. 2021, REX).

    1, 2/3, 0.1818, 0 at p = 0, 0.5, 0.9, 1: flatter than a line at first, steeper at the end.
    """
    progress = _after_warmup(step, hp)
    # 1 - (1 - p) / (1/2 + (1 - p)/2) = p / (2 - p)
    return _warm(step, hp) * hp["lr"] * _left(progress / (2.0 - progress), hp)


def constant(step, hp, decay="linear"):
    """Warm-up, then constant: the trunk of a WSD run."""
    return _warm(step, hp) * hp["lr"]


def as_compiled(schedule: Mapping) -> tuple[str, float]:
    """The schedule that a ``schedule`` section is compiled as, and its ``decay_fraction``.

    A constant rate is a WSD without a cooldown, so that a trunk and its branches share one program.
    """
    if schedule["name"] == "constant":
        return "wsd", 0.0
    return schedule["name"], schedule["decay_fraction"]


def _warm(step, hp):
    return jnp.minimum(1.0, (step + 1.0) / jnp.maximum(1.0, hp["warmup"]))


def _after_warmup(step, hp):
    """Progress from the end of warm-up to the last step, in [0, 1]."""
    return jnp.clip((step - hp["warmup"]) / jnp.maximum(1.0, hp["steps"] - hp["warmup"]), 0.0, 1.0)


def _cooldown(step, hp):
    """Progress over the last ``decay_fraction`` of the run, in [0, 1]."""
    length = jnp.maximum(1.0, hp["decay_fraction"] * hp["steps"])
    return jnp.clip((step - (hp["steps"] - length)) / length, 0.0, 1.0)


def _left(fall, hp):
    return 1.0 - (1.0 - hp["final_fraction"]) * fall


SCHEDULES = {f.__name__: f for f in (wsd, cosine, linear, inverse_sqrt, rex, constant)}


def learning_rate(name: str, step, hp, decay: str = "linear") -> jnp.ndarray:
    """The learning rate used by update number ``step`` (from 0).

    Args:
      name: a key of ``SCHEDULES``.
      step: int32 or float32 scalar (or array).
      hp: mapping with float32 scalars ``lr, steps, warmup, decay_fraction, final_fraction``.
      decay: a key of ``FALLS``, the shape of the cooldown of ``wsd`` and ``inverse_sqrt``; others ignore it.

    Returns:
      float32, the shape of ``step``.
    """
    return SCHEDULES[name](jnp.asarray(step, jnp.float32), hp, decay)
