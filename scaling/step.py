"""One training step: loss, gradient, update. A pure function of arrays."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from scaling import optim
from scaling.models.loss import loss_fn
from scaling.schedules import learning_rate


class TrainState(NamedTuple):
    """Everything that a resumed run needs besides its config; the data position is ``step``."""

    step: jax.Array  # int32 scalar: updates done
    params: dict  # float32 arrays
    opt_state: optax.OptState


def init_state(params, static, hp) -> TrainState:
    """The state before the first step, owning fresh buffers."""
    opt_state = optim.make_optimizer(static, hp, params).init(params)
    return jax.tree.map(jnp.array, TrainState(jnp.int32(0), params, opt_state))


def eval_params(static, state: TrainState):
    """The parameters by which a state is judged (``scaling.optim.eval_params``)."""
    return optim.eval_params(static, state.params, state.opt_state)


def train_step(apply, static, state: TrainState, batch, hp):
    """One update.

    Args:
      apply: the model, a ``scaling.models.lm.Apply``.
      static: names of the optimizer and the schedule, a ``scaling.program.Static``.
      state: before the step.
      batch: arrays ``inputs, targets, segment_ids, positions, loss_mask``, each [batch, seq].
      hp: traced hyper-parameters (``scaling.optim.hyper_parameters``).

    Returns:
      The state after the step, and float32 scalars ``loss`` (nats per token, before the update),
      ``grad_norm`` (before clipping) and ``lr``.
    """

    def loss_of(params):
        return loss_fn(apply, params, batch, hp["z_loss"])

    (_, aux), grads = jax.value_and_grad(loss_of, has_aux=True)(state.params)
    optimizer = optim.make_optimizer(static, hp, state.params, state.step)
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    metrics = {
        "loss": aux["nats"],
        "grad_norm": optax.global_norm(grads),
        "lr": learning_rate(static.schedule, state.step, hp, static.decay),
    }
    return TrainState(state.step + 1, params, opt_state), metrics
