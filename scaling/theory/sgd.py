"""One-pass SGD on power-law random features and on structured ones, batched over problems and draws."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from scaling.theory.plrf import Problem
from scaling.theory.structured import Structured

CHUNK = 256
"""Steps whose samples are drawn and turned into features together: one matrix product for all of them."""
MOST_NORMALS = 2**24
"""Random numbers in memory at once; fewer steps are taken together where they would be more."""


def features(problem: Problem, seed: int, draw: int = 0) -> np.ndarray:
    """W, float64 [v, d], entries N(0, 1/d)."""
    v, d = problem.v, int(problem.d)
    return np.random.default_rng([seed, draw, v, d]).standard_normal((v, d)) / np.sqrt(d)


def sgd_losses(
    problems: Sequence[Problem],
    steps: Sequence[int],
    draws: int,
    seed: int = 0,
    first_draw: int = 0,
    same_features: bool = False,
    on_step=None,
    begin=(0, None),
) -> np.ndarray | None:
    """The population loss of SGD from theta = 0 after each number of steps, in float32.

    Problems of several sizes are padded with zeros to the largest and run as one program; a padded feature is
    zero, so that its parameter stays zero.

    Args:
      problems: of one batch. steps: increasing. draws: independent runs of each problem, features and data.
      seed: of both. first_draw: number of the first draw; a draw depends on its number and the seed alone.
      same_features: whether the draws of a problem share the features of draw 0.
      on_step, begin: see ``run_lanes``.

    Returns:
      float64 [problem, draw, step]; None where ``on_step`` asked to stop.

    Raises:
      ValueError: batches that differ, or steps that do not increase.
    """
    if len({p.batch for p in problems}) > 1:
        raise ValueError(f"problems have batches {sorted({p.batch for p in problems})}; one program has one")
    v, d = max(p.v for p in problems), max(int(p.d) for p in problems)
    lanes = len(problems) * draws
    A = np.zeros((lanes, v, d), np.float32)
    y, gamma = np.zeros((lanes, v), np.float32), np.zeros(lanes, np.float32)
    for lane in range(lanes):
        p, draw = problems[lane // draws], lane % draws
        j = np.arange(1.0, p.v + 1)
        W = features(p, seed, 0 if same_features else first_draw + draw)
        A[lane, : p.v, : W.shape[1]] = j[:, None] ** -p.alpha * W
        y[lane, : p.v] = j ** (-p.alpha - p.beta)
        gamma[lane] = 2 * p.rate / ((p.batch + 1) * (j ** (-2 * p.alpha)).sum())
    keys = jnp.tile(_keys(seed, first_draw, draws), len(problems))
    losses = run_lanes(A, y, gamma, keys, steps, problems[0].batch, on_step, begin)
    return None if losses is None else losses.reshape(len(problems), draws, len(steps))


def structured_losses(
    problem: Structured, steps: Sequence[int], draws: int, seed: int = 0, on_step=None, begin=(0, None)
) -> np.ndarray | None:
    """The excess loss of SGD on structured features after each number of steps, in float32.

    Args:
      on_step, begin: see ``run_lanes``.

    Returns:
      float64 [draw, step], sum_k lam_k (theta_k - w_k)^2; None where ``on_step`` asked to stop.
    """
    k = np.arange(1.0, problem.modes + 1)
    root_M = np.append(k ** (-problem.decay / 2), 0.0)  # the last coordinate is the labels' noise
    A = np.tile(np.diag(root_M)[:, :-1].astype(np.float32), (draws, 1, 1))
    y = np.append(k ** (-problem.target / 2), problem.noise**0.5).astype(np.float32)
    gamma = np.full(draws, problem.rate / problem.batch, np.float32)
    keys, batch = _keys(seed, 0, draws), int(problem.batch)
    losses = run_lanes(A, np.tile(y, (draws, 1)), gamma, keys, steps, batch, on_step, begin)
    return None if losses is None else losses - float(y[-1]) ** 2


def _keys(seed: int, first: int, count: int):
    """A key a draw, which depends on the seed and its number alone."""
    return jax.vmap(lambda i: jax.random.fold_in(jax.random.key(seed), i))(first + jnp.arange(count))


def run_lanes(
    A_LxVxD, y_LxV, gamma_L, keys_L, steps: Sequence[int], batch: int, on_step=None, begin=(0, None)
):
    """SGD from zero on |A^T z theta - y z|^2, z normal, of several lanes side by side.

    Args:
      on_step: called with the steps done and theta, float32 [lane, d], after each chunk; true: stop.
      begin: the same two of an earlier run, to go on from; before the first of ``steps``.

    Returns:
      float64 [lane, step]: E over fresh z; None where ``on_step`` asked to stop.

    Raises:
      ValueError: steps that do not increase.
    """
    if not len(steps) or list(steps) != sorted(set(steps)) or steps[0] < 1:
        raise ValueError(f"steps is {list(steps)!r}; it must increase from 1 or more")
    A, y, gamma = map(jnp.asarray, (A_LxVxD, y_LxV, gamma_L))
    chunk = int(np.clip(MOST_NORMALS // (batch * y.size), 1, CHUNK))
    done, theta = begin
    theta = jnp.zeros((A.shape[0], A.shape[2]), jnp.float32) if theta is None else jnp.asarray(theta)
    out = []
    for target in steps:
        while done < target:
            count = min(chunk, target - done)
            theta = _advance(theta, keys_L, done, A, y, gamma, count, batch, chunk)
            done += count
            if on_step is not None and on_step(done, theta):
                return None
        out.append(np.asarray(_loss(theta, A, y), np.float64))
    return np.stack(out, -1)


@functools.partial(jax.jit, static_argnames=("batch", "chunk"))
def _advance(theta_LxD, keys_L, done, A_LxVxD, y_LxV, gamma_L, count, batch: int, chunk: int):
    """``count`` steps of every lane, at most ``chunk``; ``done`` before them chooses the samples."""

    def lane(theta_D, key, A_VxD, y_V, gamma):
        z_TxBxV = jax.random.normal(jax.random.fold_in(key, done), (chunk, batch, y_V.size))
        samples = z_TxBxV @ A_VxD, z_TxBxV @ y_V, jnp.arange(chunk) < count

        def step(theta_D, sample):
            a_BxD, target_B, taken = sample
            error_B = a_BxD @ theta_D - target_B
            return theta_D - taken * gamma * (error_B @ a_BxD), None

        return jax.lax.scan(step, theta_D, samples)[0]

    return jax.vmap(lane)(theta_LxD, keys_L, A_LxVxD, y_LxV, gamma_L)


@jax.jit
def _loss(theta_LxD, A_LxVxD, y_LxV):
    """E (<theta, W^T x> - <b, x>)^2 of every lane, over fresh x."""
    return ((jnp.einsum("lvd,ld->lv", A_LxVxD, theta_LxD) - y_LxV) ** 2).sum(-1)
