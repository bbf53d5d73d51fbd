"""The coordinate check: how the size of activations, and of what training does to them, follows the shape.

Yang et al. 2022, appendix D.1: train models of several widths (here depths as well) for a few steps and look
at the typical size of every activation's entries. Where a parametrization is right nothing grows or vanishes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from scaling.config import validate_cell
from scaling.optim import hyper_parameters
from scaling.program import Static, compiled, first_state

KINDS = ("embedding", "attention", "feed-forward", "stream", "logits")


def activations(apply, params, inputs_BT) -> dict:
    """What flows through a model, in one row per document.

    Args:
      apply, params: from ``scaling.models.lm.build``.
      inputs_BT: int [B, T].

    Returns:
      float arrays: ``embedding`` [B, T, D]; ``attention`` and ``feed-forward``, what each branch adds to the
      stream, and ``stream``, after each layer, [L, B, T, D]; ``logits`` [B, T, V].
    """
    model = nnx.merge(apply.graphdef, params)
    rope = model.rope(None, inputs_BT.shape)

    def layer(x_BTD, block, depth):
        after, mixed, fed, _ = block.with_branches(x_BTD, rope, None, depth)
        return after, (mixed, jnp.zeros_like(mixed) if fed is None else fed, after)

    embedding = model.embed(inputs_BT)
    _, (mixed, fed, stream) = model.fold_layers(embedding, layer)
    logits = model.logits(*model.before_head(stream[-1]))
    return dict(zip(KINDS, (embedding, mixed, fed, stream, logits), strict=True))


def sizes(model: Mapping, *, lr: float, steps: int = 4, seeds: Sequence[int] = (0, 1), optim=None) -> dict:
    """The sizes of one shape's activations at the start and of their change after a few steps.

    Real cells' steps (``scaling.step.train_step``) on random tokens of unequal frequencies, a new batch of
    8 x 32 every step, at a constant learning rate; the same tokens for every shape.

    Args:
      model: a ``model`` section of a cell config.
      lr: the learning rate at the base shape.
      steps: updates.
      seeds: of weights and tokens; sizes are averaged over them (as squares).
      optim: other fields of the ``optim`` section.

    Returns:
      ``{kind: {"start": rms, "change": rms}}`` for every kind of ``KINDS``: the root mean square over all
      entries of the activation before the first step, and of its change on the same tokens after the last;
      ``stream`` and the branches: sums over layers of the branches, the stream after the last layer.
    """
    cell = validate_cell(
        {
            "model": model,
            "optim": {**(optim or {}), "lr": lr},
            "schedule": {"name": "constant", "warmup_steps": 0},
            "train": {"batch": 8, "steps": steps},
        }
    )
    static, hp = Static.of(cell), hyper_parameters(cell)
    step, _ = compiled(static)
    apply = static.apply()

    @jax.jit
    def seen(params, inputs):
        found = activations(apply, params, inputs)
        layers = {"attention": found["attention"].sum(0), "feed-forward": found["feed-forward"].sum(0)}
        return found | layers | {"stream": found["stream"][-1]}

    squares = {kind: {"start": [], "change": []} for kind in KINDS}
    for seed in seeds:
        state = first_state(static, seed, hp)
        batches = [random_batch(cell["model"]["vocab"], 8, 32, (seed, i)) for i in range(steps + 1)]
        inputs = batches.pop()["inputs"]
        before = seen(state.params, inputs)
        for batch in batches:
            state, _ = step(state, batch, hp)
        after = seen(state.params, inputs)
        for kind in KINDS:
            squares[kind]["start"].append(jnp.mean(before[kind] ** 2))
            squares[kind]["change"].append(jnp.mean((after[kind] - before[kind]) ** 2))
    return {k: {w: float(np.sqrt(np.mean(s))) for w, s in found.items()} for k, found in squares.items()}


def random_batch(vocab: int, batch: int, seq: int, seed) -> dict:
    """Random tokens of frequencies 1 / rank, each row one document; arrays as a step takes them."""
    weights = 1 / np.arange(1, vocab + 1)
    tokens = np.random.default_rng(seed).choice(vocab, (batch, seq + 1), p=weights / weights.sum())
    tokens = tokens.astype(np.int32)
    ones = np.ones((batch, seq), np.int32)
    return {
        "inputs": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "segment_ids": ones,
        "positions": np.broadcast_to(np.arange(seq, dtype=np.int32), (batch, seq)),
        "loss_mask": ones.astype(np.float32),
    }


def slope(at: Sequence[float], values: Sequence[float]) -> float:
    """The exponent of a power law through the values: least squares in logarithms."""
    return float(np.polyfit(np.log(at), np.log(values), 1)[0])
