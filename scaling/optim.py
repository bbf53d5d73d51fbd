"""The optimizer of a cell, built from optax parts with traced hyper-parameters."""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import optax

from scaling.schedules import learning_rate


def hyper_parameters(cell: Mapping) -> dict:
    """The numbers of a cell that its compiled step takes as inputs: float32 scalars.

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
        "steps": train["steps"],
        "warmup": schedule["warmup_steps"],
        "decay_fraction": 0.0 if schedule["name"] == "constant" else schedule["decay_fraction"],
        "final_fraction": schedule["final_fraction"],
        "z_loss": train["z_loss"],
    }
    return {k: jnp.float32(v) for k, v in values.items()}


def decays(path, leaf) -> bool:
    """Whether weight decay acts on a parameter: on matrices and embeddings, not on norm gains."""
    return not any("norm" in str(getattr(k, "key", k)) for k in path)


def make_optimizer(static, hp: Mapping, params) -> optax.GradientTransformation:
    """AdamW (Loshchilov & Hutter 2019) with gradient clipping by global norm.

    Args:
      static: names of the optimizer and the schedule, a ``scaling.program.Static``.
      hp: see ``hyper_parameters``; may be traced.
      params: the parameter tree (or its shapes), for the weight-decay mask.
    """
    if static.optim != "adamw":
        raise ValueError(f"optim.name is {static.optim!r}; it must be 'adamw'")
    mask = jax.tree_util.tree_map_with_path(decays, params)
    return optax.chain(
        clip_by_global_norm(hp["grad_clip"]),
        optax.scale_by_adam(b1=hp["beta1"], b2=hp["beta2"], eps=hp["eps"]),
        optax.add_decayed_weights(hp["weight_decay"], mask=mask),
        optax.scale_by_learning_rate(lambda count: learning_rate(static.schedule, count, hp)),
    )


def clip_by_global_norm(max_norm) -> optax.GradientTransformation:
    """As ``optax.clip_by_global_norm``, for a traced (and possibly infinite) ``max_norm``."""

    def update(grads, state, params=None):
        norm = optax.global_norm(grads)
        scale = jnp.where(norm <= max_norm, 1.0, max_norm / norm)
        return jax.tree.map(lambda g: g * scale, grads), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)
