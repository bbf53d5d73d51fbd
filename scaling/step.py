"""One training step: loss, gradient, update. A pure function of arrays."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from scaling import optim
from scaling.guard import Guard, judge, new_guard
from scaling.models.loss import loss_fn
from scaling.precision import cast, rounding_key, store
from scaling.schedules import learning_rate
from scaling.sparsity import first_l1, is_adaptive, next_l1


class TrainState(NamedTuple):
    """Everything that a resumed run needs besides its config; the data position is ``step``."""

    step: jax.Array  # int32 scalar: updates done
    params: dict  # arrays, float32 or all bfloat16
    opt_state: optax.OptState  # moments in the parameters' dtype


class GuardedState(NamedTuple):
    """The train state of a cell that skips spikes: apart, so that others' checkpoints keep their tree."""

    step: jax.Array
    params: dict
    opt_state: optax.OptState
    guard: Guard


class RoutedState(NamedTuple):
    """The train state of a cell with ReLU routers, apart as ``GuardedState`` is."""

    step: jax.Array
    params: dict
    opt_state: optax.OptState
    router_l1: jax.Array  # float32 scalar: coefficient of the gates' L1 norm (scaling.sparsity)


class GuardedRoutedState(NamedTuple):
    """Both."""

    step: jax.Array
    params: dict
    opt_state: optax.OptState
    guard: Guard
    router_l1: jax.Array


State = TrainState | GuardedState | RoutedState | GuardedRoutedState


def init_state(params, static, hp) -> State:
    """The state before the first step, owning fresh buffers."""
    params = cast(params, static.params_dtype)
    opt_state = optim.make_optimizer(static, hp, params).init(params)
    state = TrainState(jnp.int32(0), params, opt_state)
    if static.skip_window is not None:
        state = GuardedState(*state, new_guard(static.skip_window))
    model = dict(static.model)
    if is_adaptive(model):
        routed = RoutedState if static.skip_window is None else GuardedRoutedState
        state = routed(*state, first_l1(model))
    return jax.tree.map(jnp.array, state)


def eval_params(static, state: State):
    """The parameters by which a state is judged (``scaling.optim.eval_params``)."""
    return optim.eval_params(static, state.params, state.opt_state)


def gradients(apply, params, batch, z_loss, accumulate: int, router_l1=0.0):
    """What a batch reads, and the gradient of its mean loss with what is added to it.

    Args:
      accumulate: parts that the rows are split into, one after another; each must have as many. The tokens
        of all parts weigh the same, so that only the order of sums differs from one part.
      router_l1: see ``scaling.models.loss.loss_fn``.

    Returns:
      (read, grads): float32 scalars ``nats`` (the mean loss) and, of ReLU routers, ``open`` (share of open
      gates); a tree like ``params``, float32 where there are several parts.
    """

    def loss(params, batch, tokens=None):
        total, aux = loss_fn(apply, params, batch, z_loss, tokens, router_l1)
        return total, {k: aux[k] for k in ("nats", "open") if k in aux}

    if accumulate == 1:
        (_, read), grads = jax.value_and_grad(loss, has_aux=True)(params, batch)
        return read, grads
    tokens = jnp.sum(batch["loss_mask"])
    # row r goes to part r mod K: rows of one device stay on it
    parts = jax.tree.map(lambda x: x.reshape(-1, accumulate, *x.shape[1:]).swapaxes(0, 1), batch)

    def of_part(part):
        (_, read), grads = jax.value_and_grad(loss, has_aux=True)(params, part, tokens)
        return read, cast(grads, "float32")

    def add(total, part):
        return jax.tree.map(jnp.add, total, of_part(part)), None

    shapes = jax.eval_shape(of_part, jax.tree.map(lambda x: x[0], parts))
    zero = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    return jax.lax.scan(add, zero, parts)[0]


def train_step(apply, static, state: State, batch, hp, accumulate: int = 1):
    """One update.

    Args:
      apply: the model, a ``scaling.models.lm.Apply``.
      static: names of the optimizer and the schedule, a ``scaling.program.Static``.
      state: before the step.
      batch: arrays ``inputs, targets, segment_ids, positions, loss_mask``, each [batch, seq].
      hp: traced hyper-parameters (``scaling.optim.hyper_parameters``).
      accumulate: parts that the batch's gradient is summed over (``gradients``).

    Returns:
      The state after the step, and float32 scalars ``loss`` (nats per token, before the update),
      ``grad_norm`` (before clipping) and ``lr``; with a guard also ``skipped`` (int32, steps so far); with
      ReLU routers ``router_l1`` (of this step) and ``open_experts`` (of a token and layer, in the mean).
    """

    model = dict(static.model)
    l1 = (state.router_l1,) if is_adaptive(model) else ()
    read, grads = gradients(apply, state.params, batch, hp["z_loss"], accumulate, *l1)
    # the update's arithmetic is float32 however its operands are stored
    grads, old_params, old_opt_state = cast((grads, state.params, state.opt_state), "float32")
    optimizer = optim.make_optimizer(static, hp, old_params, state.step)
    updates, opt_state = optimizer.update(grads, old_opt_state, old_params)
    new = optax.apply_updates(old_params, updates), opt_state
    old = state.params, state.opt_state
    if static.params_dtype != "float32":
        new = store(new, old, rounding_key(hp["seed"], state.step) if static.stochastic_rounding else None)
    metrics = {
        "loss": read["nats"],
        "grad_norm": optax.global_norm(grads),
        "lr": learning_rate(static.schedule, state.step, hp, static.decay),
    }
    if l1:
        metrics |= {"router_l1": state.router_l1, "open_experts": model["experts"] * read["open"]}
        new, old = (*new, next_l1(model, state.router_l1, read["open"])), (*old, state.router_l1)
    if static.skip_window is not None:
        new = jax.lax.optimization_barrier(new)  # fused as without a guard, so that the bits are the same
        skip, guard = judge(state.guard, state.step, metrics["loss"], metrics["grad_norm"], hp["skip_sigma"])
        new = jax.tree.map(lambda after, before: jnp.where(skip, before, after), new, old)
        state = state._replace(guard=guard)
        metrics["skipped"] = guard.skipped
    if l1:
        state = state._replace(router_l1=new[2])
    return state._replace(step=state.step + 1, params=new[0], opt_state=new[1]), metrics
