"""The causal convolution and its gradients as loops in NumPy, and random problems for it."""

import functools

import jax
import numpy as np

from pallas_kernels import causal_conv1d

NAMES = ("y", "dx", "dw", "dbias", "dstate")


def problem(B=2, T=21, C=5, W=4, dtype="float32", seed=0, segments=False, scale=1.0):
    """x, w, bias, state, dy and segment ids or None."""
    rng = np.random.default_rng(seed)
    shapes = (B, T, C), (W, C), (C,), (B, W - 1, C), (B, T, C)
    arrays = [(scale * rng.standard_normal(s)).astype(dtype) for s in shapes]
    # starts at the edges of parts (16), inside them, next to one another; one id comes back later
    ids = np.zeros((B, T), np.int32)
    for t in (2, 3, 16, 21, 40):
        ids[1:, t:] += 1
    ids[:1, T // 2 :] = 7
    ids[:1, T // 2 + 5 :] = 0
    return arrays, ids if segments else None


def exact(x, w, bias, state, dy, *, ids=None, silu=False):
    """y, dx, dw, dbias, dstate in float64, one token and tap at a time."""
    x, w, bias, state, dy = (np.asarray(a).astype(np.float64) for a in (x, w, bias, state, dy))
    (B, T, _), W = x.shape, w.shape[0]
    y, dx, dw, dbias, dstate = (np.zeros_like(a) for a in (x, x, w, bias, state))
    for n in range(B):
        for t in range(T):
            taps = []  # row of w, where the token is, its gradient, its index (from the end of the state)
            for back in range(W):
                s = t - back
                if ids is not None and back and s >= 0 and ids[n, s] != ids[n, s + 1]:
                    break
                taps.append((W - 1 - back, *((x[n], dx[n]) if s >= 0 else (state[n], dstate[n])), s))
            z = bias + sum(w[i] * source[s] for i, source, _, s in taps)
            y[n, t], dz = z, dy[n, t]
            if silu:
                gate = 1 / (1 + np.exp(-z))
                y[n, t], dz = z * gate, dz * gate * (1 + z * (1 - gate))
            for i, source, gradient, s in taps:
                gradient[s] += dz * w[i]
                dw[i] += dz * source[s]
            dbias += dz
    return y, dx, dw, dbias, dstate


@functools.cache
def _compiled(function, with_ids, **options):
    def run(x, w, bias, state, dy, ids):
        options_ = dict(options, segment_ids=ids) if with_ids else options
        y, pull = jax.vjp(
            lambda x, w, b, s: function(x, w, b, initial_state=s, **options_), x, w, bias, state
        )
        return y, *pull(dy)

    return jax.jit(run)


def with_gradients(arrays, ids=None, function=causal_conv1d, silu=False, **options):
    """y, dx, dw, dbias, dstate of the function, as NumPy arrays."""
    options["activation"] = "silu" if silu else None
    return [np.asarray(x) for x in _compiled(function, ids is not None, **options)(*arrays, ids)]


def check(got, want, rtol, atol, sums=1.0):
    """Compares in NumPy: on a CPU ``jnp.max`` may drop a NaN. ``sums``: times atol for dw and dbias."""
    for name, x, y in zip(NAMES, got, want, strict=True):
        more = sums if name in ("dw", "dbias") else 1.0
        np.testing.assert_allclose(x.astype(np.float64), y, rtol=rtol, atol=more * atol, err_msg=name)
