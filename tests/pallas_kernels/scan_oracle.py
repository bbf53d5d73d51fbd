"""The diagonal recurrence and its gradients as loops in NumPy, and random problems for it."""

import functools

import jax
import numpy as np

from pallas_kernels import linear_scan


def problem(B=2, T=21, F=200, dtype="float32", seed=0, segments=False):
    """a, b, h0, dh, dh_last and segment ids or None; |a| up to 1.1: states neither vanish nor grow."""
    rng = np.random.default_rng(seed)
    is_complex = np.issubdtype(np.dtype(dtype), np.complexfloating)

    def normal(*shape):
        x = rng.standard_normal(shape)
        return x + 1j * rng.standard_normal(shape) if is_complex else x

    a = 1.1 * rng.random((B, T, F)) * np.sign(rng.standard_normal((B, T, F)))
    a = a * np.exp(1j * rng.standard_normal((B, T, F))) if is_complex else a
    state = "complex64" if dtype == "complex64" else "float32" if dtype != "float64" else dtype
    state = "complex128" if dtype == "complex128" else state
    arrays = (a, normal(B, T, F), normal(B, F), normal(B, T, F), normal(B, F))
    dtypes = (dtype, dtype, state, dtype, state)
    # starts at the edges of tiles (8) and blocks (16), inside them, and one segment of a single token
    starts = [t for t in (3, 8, 9, 16) if t < T]
    ids = np.zeros((B, T), np.int32)
    for t in starts:
        ids[1:, t:] += 1
    ids[:1, T // 2 :] = 7
    return [x.astype(d) for x, d in zip(arrays, dtypes, strict=True)], ids if segments else None


def exact(a, b, h0, dh, dh_last, *, reverse=False, ids=None):
    """h, h_last, da, db, dh0 in float64 or complex128; no conjugates, as JAX defines cotangents."""
    wide = np.complex128 if np.iscomplexobj(a) else np.float64
    a, b, h0, dh, dh_last = (np.asarray(x).astype(wide) for x in (a, b, h0, dh, dh_last))
    if reverse:
        a, b, dh = (x[:, ::-1] for x in (a, b, dh))
        ids = None if ids is None else ids[:, ::-1]
    B, T, _ = a.shape
    h, da, db, dh0 = np.zeros_like(b), np.zeros_like(a), np.zeros_like(b), np.zeros_like(h0)
    for n in range(B):
        fresh = [ids is not None and t > 0 and ids[n, t] != ids[n, t - 1] for t in range(T)]
        x = h0[n]
        for t in range(T):
            x = (0 if fresh[t] else a[n, t] * x) + b[n, t]
            h[n, t] = x
        later = dh_last[n]
        for t in reversed(range(T)):
            db[n, t] = dh[n, t] + later
            da[n, t] = 0 if fresh[t] else db[n, t] * (h[n, t - 1] if t else h0[n])
            later = 0 * later if fresh[t] else a[n, t] * db[n, t]
        dh0[n] = later
    h_last = h[:, -1]
    if reverse:
        h, da, db = (x[:, ::-1] for x in (h, da, db))
    return h, h_last, da, db, dh0


@functools.cache
def _compiled(function, with_ids, **options):
    def run(a, b, h0, dh, dh_last, ids):
        options_ = dict(options, segment_ids=ids) if with_ids else options
        out, pull = jax.vjp(lambda a, b, h0: function(a, b, h0, **options_), a, b, h0)
        return *out, *pull((dh, dh_last))

    return jax.jit(run)


def with_gradients(arrays, ids=None, function=linear_scan, **options):
    """h, h_last, da, db, dh0 of the function, as NumPy arrays."""
    return [np.asarray(x) for x in _compiled(function, ids is not None, **options)(*arrays, ids)]


def check(got, want, rtol, atol):
    """Compares in NumPy: on a CPU ``jnp.max`` may drop a NaN."""
    names = ("h", "h_last", "da", "db", "dh0")
    for name, x, y in zip(names, got, want, strict=True):
        wide = np.complex128 if np.iscomplexobj(y) else np.float64
        np.testing.assert_allclose(x.astype(wide), y, rtol=rtol, atol=atol, err_msg=name)
