"""Shared by the tests of ``ssd`` and ``mlstm``: random inputs, oracles in float64, comparisons."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import dispatch
from pallas_kernels.reference import ssd as reference

# (of each element, of the largest): sums of some hundred products in float32, whose epsilon is 6e-8; the
# gradient of log_decay is the difference of such sums.
FLOAT32 = (1e-5, 3e-6)
# The same in float64.
FLOAT64 = (1e-12, 1e-14)
NAMES = ("o", "state", "dq", "dk", "dv", "dlog_decay", "dstate0")


def make(B=2, T=37, K=2, N=4, D=8, E=6, channel=False, dtype=np.float32, seed=0, extreme=True):
    """q, k, v, log_decay, state0, and cotangents of o and of the state."""
    rng = np.random.default_rng(seed)
    q, k = rng.standard_normal((2, B, T, K, D))
    v, do = rng.standard_normal((2, B, T, N, E))
    g = -rng.exponential(0.5, (B, T, N, D) if channel else (B, T, N))
    if extreme:  # decays of 1, of nearly 1, of 0 by size and by infinity
        for decay in (0.0, -1e-7, -1e4, -np.inf):
            g = np.where(rng.random(g.shape) < 0.05, decay, g)
    state0, dstate = rng.standard_normal((2, B, N, D, E))
    wide = np.float64 if dtype == np.float64 else np.float32
    arrays = (q, k, v, g, state0, do, dstate)
    dtypes = (dtype, dtype, dtype, wide, wide, dtype, wide)
    return [np.asarray(x, t) for x, t in zip(arrays, dtypes, strict=True)]


def segments(B, T, seed=0, few=3):
    return np.sort(np.random.default_rng(seed).integers(0, few, (B, T)), axis=1).astype(np.int32)


def with_gradients(function, arrays, *, segment_ids=None, **options):
    """o, state and the gradients of q, k, v, log_decay and state0, as NumPy arrays; programs are reused."""
    *inputs, do, dstate = map(jnp.asarray, arrays)
    out = _run(function, tuple(options.items()), segment_ids, inputs, (do, dstate))
    return [np.asarray(x) for x in out]


@functools.partial(jax.jit, static_argnums=(0, 1))
def _run(function, options, segment_ids, inputs, cotangents):
    def f(q, k, v, g, state0):
        return function(q, k, v, g, state0=state0, segment_ids=segment_ids, **dict(options))

    out, pull = jax.vjp(f, *inputs)
    return (*out, *pull(cotangents))


def exact(arrays, *, scale=1.0, segment_ids=None):
    """The reference in float64."""
    with jax.enable_x64(True):
        arrays = [np.asarray(x, np.float64) for x in arrays]
        return with_gradients(reference.ssd, arrays, scale=scale, segment_ids=segment_ids)


def agree(ours, oracle, tolerance, names=NAMES):
    for name, a, b in zip(names, ours, oracle, strict=True):
        atol = tolerance[1] * max(1, np.abs(b).max())
        np.testing.assert_allclose(np.asarray(a, np.float64), b, rtol=tolerance[0], atol=atol, err_msg=name)


def running(name):
    """The context in which an implementation runs on a CPU."""
    return dispatch.interpret(name == "pallas_tpu")
