"""SGD of a cell's draws, a block of them after another, saved on the way."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from scaling import trainers


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Progress:
    """What is saved of a cell.

    Attributes:
      step: int32, those done of all blocks together. theta: float32 [draw of the block, parameter].
      losses: float32 [draw], of the blocks that have ended.
    """

    step: jax.Array
    theta: jax.Array
    losses: jax.Array


def progress(step: int, theta, losses) -> Progress:
    """On this device; losses that come from a device in float32 lose nothing."""
    return Progress(jnp.int32(step), jnp.asarray(theta), jnp.asarray(losses, jnp.float32))


def in_blocks(cell: Mapping, at_once: int, run: Callable, on_step, keep) -> np.ndarray | None:
    """The final losses of a cell's draws, float64 [draw], from wherever it was saved.

    Args:
      at_once: draws in a block. run: (first draw, begin, on_step) -> losses [at_once]; see ``sgd.run_lanes``.
      on_step, keep: what a trainer is given (``trainers.Trainer``); told are the mean steps of all blocks.

    Returns:
      None where ``on_step`` asked to stop, unless that was after the last step of all.
    """
    own, steps = cell["trainer"], cell["train"]["steps"]
    blocks, size = -(-own["draws"] // at_once), own[trainers.of(cell).size]
    losses, block, done, theta = np.zeros(blocks * at_once), 0, 0, None
    saved = keep.restore(progress(0, np.zeros((at_once, size), np.float32), losses))
    if saved is not None:
        (block, done), theta = divmod(int(saved.step), steps), saved.theta
        losses[:] = saved.losses

    asked = False

    def each_chunk(done, theta):
        nonlocal asked
        asked = on_step((block * steps + done) // blocks)
        if done == steps:  # saved below, with the block's losses in place of its parameters
            return False
        if asked or keep.due():
            keep.save(progress(block * steps + done, theta, losses))
        return asked

    while block < blocks:
        got = run(block * at_once, (done, theta), each_chunk)
        if got is None:
            return None
        losses[block * at_once :][:at_once] = got.reshape(-1)
        block, done, theta = block + 1, 0, None
        if block < blocks and (asked or keep.due()):
            keep.save(progress(block * steps, np.zeros((at_once, size), np.float32), losses))
            if asked:
                return None
    return losses[: own["draws"]]
