"""Learning-rate schedules as pure functions of the step: every one ends at the cell's own D.

A schedule takes traced numbers, so that two cells of one shape and different length share one
compiled program.
"""

from __future__ import annotations

import jax.numpy as jnp


def wsd(step, lr, steps, warmup, decay_fraction, final_fraction):
    """Warm-up, constant, then a linear cooldown over the last ``decay_fraction`` of the run.

    Source: Hu et al. 2024 (MiniCPM); linear cooldown to zero, Haegele et al. 2024.
    """
    decay = jnp.maximum(1.0, decay_fraction * steps)
    progress = jnp.clip((step - (steps - decay)) / decay, 0.0, 1.0)
    return _warm(step, warmup) * lr * (1.0 - (1.0 - final_fraction) * progress)


def cosine(step, lr, steps, warmup, decay_fraction, final_fraction):
    """Warm-up, then half a cosine down to ``final_fraction`` of the peak (Loshchilov & Hutter 2017)."""
    progress = jnp.clip((step - warmup) / jnp.maximum(1.0, steps - warmup), 0.0, 1.0)
    share = final_fraction + (1.0 - final_fraction) * 0.5 * (1.0 + jnp.cos(jnp.pi * progress))
    return _warm(step, warmup) * lr * share


def constant(step, lr, steps, warmup, decay_fraction, final_fraction):
    """Warm-up, then constant: the trunk of a WSD run."""
    return _warm(step, warmup) * lr


def _warm(step, warmup):
    return jnp.minimum(1.0, (step + 1.0) / jnp.maximum(1.0, warmup))


SCHEDULES = {"wsd": wsd, "cosine": cosine, "constant": constant}


def learning_rate(name: str, step, hp) -> jnp.ndarray:
    """The learning rate used by update number ``step`` (from 0).

    Args:
      name: ``wsd``, ``cosine`` or ``constant``.
      step: int32 or float32 scalar (or array).
      hp: mapping with float32 scalars ``lr, steps, warmup, decay_fraction, final_fraction``.

    Returns:
      float32, the shape of ``step``.
    """
    step = jnp.asarray(step, jnp.float32)
    return SCHEDULES[name](
        step, hp["lr"], hp["steps"], hp["warmup"], hp["decay_fraction"], hp["final_fraction"]
    )
