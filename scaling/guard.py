"""Skipping the update of a step whose loss or gradient is a spike.

OLMo's rule (OLMo 2, 2025, and its ``SkipStepOptimizer``): a step is skipped where its loss or its gradient's
norm lies more than ``sigma`` standard deviations above the mean of the last ``window`` steps. Data and
learning rate go on; parameters and optimizer state stay. Skipped steps enter the window too, so that a
lasting change of level is soon accepted.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Guard(NamedTuple):
    """The trailing window, part of the train state; infinity marks a place without a reading."""

    losses: jax.Array  # float32 [window]
    grad_norms: jax.Array  # float32 [window]
    skipped: jax.Array  # int32 scalar: steps skipped so far


def new_guard(window: int) -> Guard:
    """A guard that has seen nothing."""
    empty = jnp.full(window, jnp.inf, jnp.float32)
    return Guard(empty, empty, jnp.int32(0))


def judge(guard: Guard, step, loss, grad_norm, sigma):
    """Whether to skip a step, and the guard after it.

    A loss or norm that is not finite is always skipped and never read; others only once half of the
    window is filled.

    Args:
      step: int32 scalar, the step's number; its reading takes place ``step % window``.
      loss, grad_norm: float32 scalars of this step.
      sigma: standard deviations (with n - 1) above the mean that are allowed.

    Returns:
      (skip, guard): a boolean scalar, a ``Guard``.
    """
    skip = _is_spike(guard.losses, loss, sigma) | _is_spike(guard.grad_norms, grad_norm, sigma)
    place = step % guard.losses.shape[0]
    return skip, Guard(
        guard.losses.at[place].set(jnp.where(jnp.isfinite(loss), loss, jnp.inf)),
        guard.grad_norms.at[place].set(jnp.where(jnp.isfinite(grad_norm), grad_norm, jnp.inf)),
        guard.skipped + skip,
    )


def _is_spike(readings, value, sigma):
    there = jnp.isfinite(readings)
    count = jnp.sum(there)
    mean = jnp.mean(readings, where=there)
    deviation = jnp.std(readings, where=there, ddof=1)
    enough = count >= max(2, readings.shape[0] // 2)
    return ~jnp.isfinite(value) | (enough & (value > mean + sigma * deviation))
