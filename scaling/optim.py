"""The optimizer of a cell, built from optax parts with traced hyper-parameters.

All four share one frame: clip, find a direction, decay weights, scale by the learning rate. They
differ in the direction alone (``schedule_free`` also in what is stepped and what is averaged).
"""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import optax
from optax import contrib

from scaling.parametrization import HIDDEN, is_vector, update_scales
from scaling.schedules import as_compiled, learning_rate

HYPER_PARAMETERS = (
    *(
        "lr",
        "beta1",
        "beta2",
        "eps",
        "weight_decay",
        "grad_clip",
        "momentum",
        "update_rms",
        "steps",
        "warmup",
    ),
    *("decay_fraction", "final_fraction", "z_loss", "skip_sigma"),
)
"""Names of the numbers that a compiled step takes, besides the seed."""


def hyper_parameters(cell: Mapping) -> dict:
    """The numbers of a cell that its compiled step takes as inputs: float32 scalars, the seed uint32.

    Cells of one shape share one compiled program because none of these is a constant in it.
    """
    optim, schedule, train = cell["optim"], cell["schedule"], cell["train"]
    values = {
        "lr": optim["lr"],
        "beta1": optim["beta1"],
        "beta2": optim["beta2"],
        "eps": optim["eps"],
        "weight_decay": optim["weight_decay"],
        "grad_clip": float("inf") if optim["grad_clip"] is None else optim["grad_clip"],
        "momentum": optim["momentum"],
        "update_rms": optim["update_rms"],
        "steps": train["steps"],
        "warmup": schedule["warmup_steps"],
        "decay_fraction": as_compiled(schedule)[1],
        "final_fraction": schedule["final_fraction"],
        "z_loss": train["z_loss"],
        "skip_sigma": train["skip_sigma"],
    }
    return {k: jnp.float32(values[k]) for k in HYPER_PARAMETERS} | {"seed": jnp.uint32(train["seed"])}


def hyper_parameter_shapes() -> dict:
    """Shapes and dtypes of ``hyper_parameters``, whatever the cell."""
    numbers = {k: jax.ShapeDtypeStruct((), jnp.float32) for k in HYPER_PARAMETERS}
    return numbers | {"seed": jax.ShapeDtypeStruct((), jnp.uint32)}


def decays(path, leaf) -> bool:
    """Whether weight decay acts on a parameter: on matrices, taps and embeddings, not on gains and biases."""
    return not is_vector(_names(path))


def is_hidden_matrix(path, leaf) -> bool:
    """Whether Muon acts on a parameter: matrices of the layers, stacked [layers, ..., in, out].

    The token table, the head, taps and vectors are left to AdamW (Jordan et al. 2024; Liu et al. 2025,
    section 2).
    """
    names = _names(path)
    return names[0] == "blocks" and names[-1] in HIDDEN


def _names(path) -> tuple[str, ...]:
    return tuple(str(getattr(k, "key", k)) for k in path)


def make_optimizer(static, hp: Mapping, params, step=None, scales=None) -> optax.GradientTransformation:
    """The optimizer ``static.optim`` with gradient clipping by global norm and decoupled weight decay.

    ``adamw``: Loshchilov & Hutter 2019. ``lion``: Chen et al. 2023. ``muon``: Jordan et al. 2024 with the
    update scale of Liu et al. 2025, so that one learning rate and weight decay serve its matrices and the
    AdamW of the rest. ``schedule_free``: AdamW of Defazio et al. 2024; the state's parameters are y, where
    gradients are taken, and ``eval_params`` gives the averages x.

    Args:
      static: names of the optimizer and the schedule, a ``scaling.program.Static``.
      hp: see ``hyper_parameters``; may be traced.
      params: the parameter tree (or its shapes).
      step: int32 scalar, the update's number, for the learning rate; by default the optimizer's own count.
        They differ once an update was skipped.
      scales: multipliers of a parametrisation, a dict of trees like ``params``, one scalar a leaf:
        ``lr`` (of the whole step, weight decay included), ``eps`` and ``weight_decay``. None: those of
        ``scaling.parametrization.update_scales`` for the model, all one under ``standard``.
    """
    if scales is None:
        scales = update_scales(dict(static.model), params)

    def schedule(count):
        return learning_rate(static.schedule, count if step is None else step, hp, static.decay)

    to_step = [add_weight_decay(hp["weight_decay"], params, scales)]
    if scales is not None:
        to_step += [multiply(scales["lr"])]
    to_step += [optax.scale_by_learning_rate(schedule)]
    before = [clip_by_global_norm(hp["grad_clip"])]
    if scales is not None:
        # Adam of g / s with eps equals Adam of g with s * eps; the other directions ignore scale
        before += [multiply(jax.tree.map(lambda s: 1 / s, scales["eps"]))]
    if static.optim != "schedule_free":
        return optax.chain(*before, direction(static.optim, hp, params), *to_step)
    # Adam without its first moment, whose part interpolation takes; optax counts from 1 here
    adam = optax.scale_by_rms(decay=hp["beta2"], eps=hp["eps"], eps_in_sqrt=False, bias_correction=True)
    averaged = contrib.schedule_free(
        optax.chain(adam, *to_step), lambda count: schedule(count - 1), b1=hp["beta1"]
    )
    return optax.chain(*before, averaged)


def direction(name: str, hp: Mapping, params) -> optax.GradientTransformation:
    """From gradients to the direction of the step, before weight decay and learning rate.

    Raises:
      ValueError: an unknown name.
    """
    adam = optax.scale_by_adam(b1=hp["beta1"], b2=hp["beta2"], eps=hp["eps"])
    if name == "adamw":
        return adam
    if name == "lion":
        return optax.scale_by_lion(b1=hp["beta1"], b2=hp["beta2"])
    if name == "muon":
        labels = jax.tree_util.tree_map_with_path(
            lambda path, x: "muon" if is_hidden_matrix(path, x) else "adam", params
        )
        return optax.partition({"muon": muon(hp), "adam": adam}, labels)
    raise ValueError(f"optim.name is {name!r}; it must be 'adamw', 'lion', 'muon' or 'schedule_free'")


def muon(hp: Mapping) -> optax.GradientTransformation:
    """optax's Muon (Nesterov, five Newton-Schulz steps) on stacks of matrices [..., in, out], one by one.

    Its update is scaled by ``update_rms * sqrt(max(in, out))``: 0.2 gives the root mean square that AdamW's
    updates usually have (Liu et al. 2025, equation 4).
    """

    def each_matrix(updates):
        return jax.tree.map(lambda x: contrib.MuonDimensionNumbers(x.ndim - 2, x.ndim - 1), updates)

    def rescale(updates, params=None):
        return jax.tree.map(lambda u: u * (hp["update_rms"] * max(u.shape[-2:]) ** 0.5), updates)

    orthogonal = contrib.scale_by_muon(beta=hp["momentum"], weight_dimension_numbers=each_matrix)
    return optax.chain(orthogonal, optax.stateless(rescale))


def add_weight_decay(rate, params, scales) -> optax.GradientTransformation:
    """Adds ``rate`` (times its leaf's multiplier) x parameter where ``decays``."""
    mask = jax.tree_util.tree_map_with_path(decays, params)
    if scales is None:
        return optax.add_decayed_weights(rate, mask=mask)
    rates = jax.tree.map(lambda on, s: rate * s if on else jnp.zeros_like(rate), mask, scales["weight_decay"])
    return optax.stateless(lambda updates, p: jax.tree.map(lambda u, w, r: u + r * w, updates, p, rates))


def multiply(factors) -> optax.GradientTransformation:
    """Multiplies every leaf by its own factor."""
    return optax.stateless(lambda updates, p: jax.tree.map(jnp.multiply, updates, factors))


def clip_by_global_norm(max_norm) -> optax.GradientTransformation:
    """As ``optax.clip_by_global_norm``, for a traced (and possibly infinite) ``max_norm``."""

    def update(grads, state, params=None):
        norm = optax.global_norm(grads)
        scale = jnp.where(norm <= max_norm, 1.0, max_norm / norm)
        return jax.tree.map(lambda g: g * scale, grads), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def eval_params(static, params, opt_state):
    """The parameters to evaluate: the averages x under ``schedule_free``, else those that are trained."""
    if static.optim != "schedule_free":
        return params
    return contrib.schedule_free_eval_params(opt_state[-1], params)
