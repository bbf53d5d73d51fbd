"""How sparse ReLU routers are kept: a coefficient of the gates' L1 norm that follows what is seen.

Wang et al. 2024 ("ReMoE", arXiv 2412.14711, eqs. 7 and 8): after every step lambda is multiplied by
alpha^sign(target - sparsity), target = 1 - active / experts, sparsity = the share of gates that are shut.
One thing is added: lambda never falls below its first value. Where gates stay sparser than the target by
themselves it would else shrink without end, to zero in float32, and be as long in coming back.
"""

from __future__ import annotations

from collections.abc import Mapping

import jax.numpy as jnp

from scaling.layers import has


def is_adaptive(model: Mapping) -> bool:
    """Whether a ``model`` section has ReLU routers, so that its train state has a coefficient."""
    return has(model, "moe") and model.get("router") == "relu"


def first_l1(model: Mapping):
    """The coefficient before the first step, float32."""
    return jnp.float32(model["router_l1"])


def next_l1(model: Mapping, l1, open_share):
    """The coefficient after a step.

    Args:
      model: a ``model`` section. l1: float32, that of the step.
      open_share: float32, of all gates of the step's batch, those that were open.
    """
    target = jnp.float32(model["active_experts"] / model["experts"])
    moved = l1 * jnp.float32(model["router_l1_factor"]) ** jnp.sign(open_share - target)
    return jnp.maximum(moved, first_l1(model))
