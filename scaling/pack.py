"""How the cells of a pack share their devices: in turns by one cell's program, or as one vmapped program."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from scaling.config import ConfigError
from scaling.mesh import RowFeed, pad_rows, row_parts, rows_with_padding
from scaling.program import Plan, Static, compiled, compiled_evaluation, step_function


class Turns:
    """Each cell's step by the program of a cell alone, one after another; states stay apart."""

    def __init__(self, static: Static, plan: Plan, batch: int):
        self.one_step, self.evaluate_rows = compiled(static, plan)
        self.static, self.plan = static, plan
        self.row_parts = row_parts(plan.mesh)
        parts = self.row_parts * plan.accumulate
        self.rows = rows_with_padding(batch, parts)
        self.feed = None if plan.mesh is None else RowFeed(plan.mesh, batch, parts)
        self.mine = slice(None) if self.feed is None else self.feed.mine

    def gather(self, trees: Sequence) -> list:
        """What the cells have, each its own, as ``step`` takes it."""
        if self.plan.mesh is not None:  # numbers of this process would be its own; NumPy's are everybody's
            trees = [jax.tree.map(lambda x: x if x.ndim else np.asarray(x), tree) for tree in trees]
        return list(trees)

    def place(self, batch):
        """A batch of ``mine`` rows where the step takes it, filled up with rows that count for nothing."""
        return pad_rows(batch, self.rows) if self.feed is None else self.feed.place(batch)

    def evaluate(self, params, batch, blocks=None):
        """Summed nats and tokens of each row of a whole batch, as ``scaling.models.loss.eval_sums``.

        Args:
          blocks: which blocks of attention are computed (``BlockChoice``); None: all.
        """
        evaluate_rows = self.evaluate_rows
        if blocks is not None:
            evaluate_rows = compiled_evaluation(self.static, self.plan.mesh, blocks)
        if self.feed is None:
            return evaluate_rows(params, batch)
        rows = len(batch["inputs"])
        feed = RowFeed(self.plan.mesh, rows, self.row_parts)
        out = evaluate_rows(params, feed.place({k: v[feed.mine] for k, v in batch.items()}))
        return tuple(np.asarray(x)[:rows] for x in out)

    def step(self, states: list, batches: Sequence, hp: Sequence):
        """One update of every cell that has a batch; the others stay as they are.

        Args:
          states, hp: gathered. batches: one a cell, None for a cell that has ended.

        Returns:
          (states, metrics), metrics as ``metrics_of`` takes them.
        """
        metrics: list = [None] * len(states)
        for j, batch in enumerate(batches):
            if batch is not None:
                states[j], metrics[j] = self.one_step(states[j], self.place(batch), hp[j])
        return states, metrics

    def lane(self, states: list, j: int):
        """The state of cell j."""
        return states[j]

    def metrics_of(self, metrics: list, j: int) -> dict:
        """The numbers of cell j."""
        return metrics[j]


class Vmapped:
    """One program over all cells: every array has a leading axis of cells. Same methods as ``Turns``."""

    mine = slice(None)

    def __init__(self, static: Static, plan: Plan):
        self.static = static
        self.all_steps, self.one_of = vmapped(static, plan)
        self.filler: dict | None = None

    def gather(self, trees: Sequence):
        return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)

    def evaluate(self, params, batch, blocks=None):
        return compiled_evaluation(self.static, None, blocks)(params, batch)

    def step(self, states, batches: Sequence, hp):
        there = next(b for b in batches if b is not None)
        if self.filler is None:  # rows that count: an all-zero mask has no mean loss
            self.filler = {k: np.zeros_like(v) for k, v in there.items()}
            self.filler["loss_mask"] = np.ones_like(there["loss_mask"])
        rows = [self.filler if b is None else b for b in batches]
        stacked = {k: np.stack([row[k] for row in rows]) for k in there}
        return self.all_steps(states, stacked, hp, np.array([b is not None for b in batches]))

    def lane(self, states, j: int):
        return self.one_of(states, j)

    def metrics_of(self, metrics, j: int) -> dict:
        return {k: np.asarray(v)[j] for k, v in metrics.items()}


@functools.lru_cache(maxsize=8)
def vmapped(static: Static, plan: Plan):
    """The jitted step over a leading axis of cells (it donates the states), and a jitted pick of one."""
    one_step = step_function(static, plan)

    def all_steps(states, batches, hp, active):
        stepped, metrics = jax.vmap(one_step)(states, batches, hp)

        def keep(new, old):
            return jnp.where(active.reshape((-1,) + (1,) * (new.ndim - 1)), new, old)

        return jax.tree.map(keep, stepped, states), metrics

    return jax.jit(all_steps, donate_argnums=0), jax.jit(lambda t, j: jax.tree.map(lambda x: x[j], t))


def program_for(static: Static, plan: Plan, batch: int, cells: int, together: str | None) -> Turns | Vmapped:
    """How so many cells of one shape run on these devices.

    Raises:
      ConfigError: ``together`` is neither None nor 'turns' nor 'vmap', or a mesh or parts with 'vmap'.
    """
    if together not in (None, "turns", "vmap"):
        raise ConfigError(f"together is {together!r}; it must be None, 'turns' or 'vmap'")
    whole = plan.mesh is None and plan.accumulate == 1
    if together == "vmap" and cells > 1 and not whole:
        raise ConfigError(
            "together is 'vmap' with a mesh or accumulate > 1; in one program for several cells each takes "
            "whole batches on one device: use 'turns'"
        )
    if together is None:
        together = "turns" if jax.default_backend() == "cpu" or not whole else "vmap"
    return Vmapped(static, plan) if cells > 1 and together == "vmap" else Turns(static, plan, batch)
