"""The parameters of a mixture of experts out of a dense model's."""

import jax
import jax.numpy as jnp

from scaling import layers


def upcycled_params(dense_cfg, cfg, dense, fresh):
    """Every expert a copy of its layer's feed-forward, routers as they are initialised, all else the dense's.

    Komatsuzaki et al. 2022, section 3.1. Where a token's weights sum to 1 (``router`` 'chosen') and every
    choice finds a place, the model is the dense one.

    Args:
      dense_cfg, cfg: the ``model`` sections, which ``scaling.upcycle.check_same`` lets pass.
      dense: the dense model's parameters. fresh: initial ones of the other.

    Returns:
      A tree like ``fresh``.
    """
    before, kinds = layers.pattern(dense_cfg), layers.pattern(cfg)
    stacks = lambda blocks, kinds: [  # noqa: E731
        blocks if len(kinds) == 1 else blocks.get(f"{i}_{kind.mixer}") for i, kind in enumerate(kinds)
    ]
    old, new = stacks(dense["blocks"], before), stacks(fresh["blocks"], kinds)

    def stack_of(i, kind, own):
        depths = range(i, cfg["layers"], len(kinds))
        parts = [jax.tree.map(lambda a, d=d: a[d // len(before)], old[d % len(before)]) for d in depths]
        whole = jax.tree.map(lambda *a: jnp.stack(a), *parts)
        if kind.ffn == "moe":
            copies = {k: jnp.repeat(w[:, None], cfg["experts"], axis=1) for k, w in whole["ffn"].items()}
            whole = {**whole, "ffn": {**copies, "router": own["ffn"]["router"]}}
        return whole

    made = [own if own is None else stack_of(i, kinds[i], own) for i, own in enumerate(new)]
    if len(kinds) == 1:
        blocks = made[0]
    else:
        blocks = {name: made[int(name.partition("_")[0])] for name in fresh["blocks"]}
    return {**dense, "blocks": blocks}
