"""Newton as one XLA program, for tables that are fitted again and again.

The rule of a step is ``newton``'s own; the loop runs inside XLA, all lanes together, in float64. The first
fit of a law compiles for some seconds; rows are padded to few lengths, so later tables of about the same
length find the program ready. Results agree with NumPy's to 1e-10 of a parameter.
"""

from __future__ import annotations

import functools

import numpy as np

from fits import newton as rule
from fits.objective import Evaluation, Problem, RowLoss
from fits.traced import padded

LANES = 4  # lanes are padded to a multiple of this


def newton(problem: Problem, p_BxK, weights_BxR, row_loss: RowLoss) -> rule.Solution:
    """``newton.newton`` compiled; same arguments, same result but for the last digits.

    Args:
      problem: of a sum of power terms, or of a law with derivatives by JAX.
    """
    import jax

    p = np.clip(np.array(p_BxK, float), problem.lower_K, problem.upper_K)
    B = len(p)
    lane, p, weights, data, target_R = padded(problem, p, weights_BxR, -(-B // LANES) * LANES)
    floor = rule.rounding_floor(problem, weights, row_loss)
    run = _compiled(lane, problem.space, row_loss.name)
    with jax.enable_x64(True), jax.default_device(jax.devices("cpu")[0]):
        got = run(
            p, weights, data, target_R, rule.bounds_of(problem), floor,
            float(row_loss.delta), float(row_loss.tau),
        )  # fmt: skip
        got = [np.array(x) for x in got]
    p, value, gradient, hessian, majoriser, decrement, converged, held = (x[:B] for x in got[:8])
    return rule.Solution(
        p, value, decrement, converged, held, Evaluation(value, gradient, hessian, majoriser), int(got[8])
    )


@functools.lru_cache(maxsize=64)
def _compiled(lane, space: str, loss: str):
    """The jitted loop for one lane function; see ``traced``."""
    import jax
    import jax.numpy as jnp

    def linear(A_BxKxK, b_BxK):
        lower = jnp.linalg.cholesky(A_BxKxK)  # NaN where not positive definite
        solve = jax.vmap(lambda c, b: jax.scipy.linalg.cho_solve((c, True), b))
        x = solve(lower, b_BxK)
        return x, jnp.isfinite(x).all(1)

    def run(p_BxK, weights_BxR, data, target_R, bounds, floor_B, delta, tau):
        row_loss = RowLoss(loss, delta, tau)
        lanes = jax.vmap(lambda p, w: lane(p, w, data, target_R, space, row_loss))

        def evaluate(p):
            value, *rest = lanes(p, weights_BxR)
            good = jnp.isfinite(value)
            for x in rest:
                good &= jnp.isfinite(x).reshape(len(p), -1).all(1)
            return Evaluation(jnp.where(good, value, jnp.inf), *rest)

        def pick(taken, new, old):
            return jnp.where(taken.reshape(-1, *(1,) * (new.ndim - 1)), new, old)

        def body(state):
            p, at, damping, small_count, going, converged, decrement, held, iterations = state
            evaluation = Evaluation(*at)
            step, promised, good, now_held = rule.newton_step(p, evaluation, damping, bounds, linear, jnp)
            trial_p = jnp.clip(p + step, bounds[0], bounds[1])
            trial = evaluate(trial_p)
            better, small, done, next_damping = rule.judge_step(
                evaluation.value_B, trial.value_B, promised, good, damping, floor_B, jnp
            )
            better &= going
            new = (trial.value_B, trial.gradient_BxK, trial.hessian_BxKxK, trial.majoriser_BxKxK)
            at = tuple(pick(better, n, o) for n, o in zip(new, at, strict=True))
            small_count = small_count + small
            return (
                pick(better, trial_p, p), at, jnp.where(going, next_damping, damping), small_count,
                going & ~done & (next_damping < rule.MOST_DAMPING) & (small_count < rule.SMALL_STEPS),
                jnp.where(going, done, converged),
                jnp.where(going, jnp.where(good, promised, jnp.inf), decrement),
                pick(going, now_held, held), iterations + 1,
            )  # fmt: skip

        first = evaluate(p_BxK)
        at = (first.value_B, first.gradient_BxK, first.hessian_BxKxK, first.majoriser_BxKxK)
        B = len(p_BxK)
        state = (
            p_BxK, at, jnp.full(B, rule.FIRST_DAMPING), jnp.zeros(B, int), jnp.isfinite(first.value_B),
            jnp.zeros(B, bool), jnp.full(B, jnp.inf), jnp.zeros(p_BxK.shape, bool), 0,
        )  # fmt: skip
        state = jax.lax.while_loop(lambda s: s[4].any() & (s[8] < rule.MAX_ITERATIONS), body, state)
        p, at, _, _, _, converged, decrement, held, iterations = state
        return p, *at, decrement, converged, held, iterations

    return jax.jit(run)
