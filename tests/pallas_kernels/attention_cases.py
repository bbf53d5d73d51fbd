"""Attention problems that every implementation is held against the reference on."""

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import block_sparse_attention, dot_product_attention
from pallas_kernels.reference import attention as reference

# Sums of up to 400 products of unit normals; float32 rounds at 1.2e-7, and blocks add up in another order
# than the float64 oracle: some 1e-6 of the largest terms, ten times that in gradients of gradients' size.
FLOAT32 = {"rtol": 2e-5, "atol": 2e-5}
# Inputs are exact in both; outputs, probabilities and their gradients are rounded to 8 bits before they
# meet the next product, and gradients of k and v are sums of up to 400 such terms of size about 1/T.
BFLOAT16 = {"rtol": 2**-6, "atol": 2**-5}


def segments(rng, B, n, edges):
    """Ids that change at the given tokens, other ids in every row."""
    ids = np.zeros((B, n), np.int32)
    for b in range(B):
        ids[b] = np.searchsorted(edges, np.arange(n), side="right") + rng.integers(0, 5)
    return ids


def problem(seed, B=1, T=200, S=None, N=2, K=1, H=64, dtype=np.float32, bias=None, mask=None,
            edges=None, block_mask=None, block=128, **options):  # fmt: skip
    """Arrays, and options of the public functions.

    ``bias`` and ``mask`` are shapes; ``edges`` tokens at which segments begin; ``block_mask`` (rows, heads).
    """
    rng = np.random.default_rng(seed)
    S = T if S is None else S
    shapes = {"q": (B, T, N, H), "k": (B, S, K, H), "v": (B, S, K, H), "bias": bias}
    arrays = {n: rng.standard_normal(s).astype(dtype) for n, s in shapes.items() if s is not None}
    if mask is not None:
        options["mask"] = rng.random(mask) < 0.7
    if edges is not None:
        options["q_segment_ids"] = segments(rng, B, T, edges)
        options["kv_segment_ids"] = options["q_segment_ids"] if S == T else segments(rng, B, S, edges)
    if block_mask is not None:
        blocks = (-(-T // block), -(-S // block))
        options["block_mask"], options["block_size"] = rng.random((*block_mask, *blocks)) < 0.6, block
    dout, dlse = rng.standard_normal((B, T, N, H)).astype(dtype), rng.standard_normal((B, T, N))
    return arrays, options, (dout, dlse.astype(np.float32))


def solve(arrays, options, cotangents, implementation, **more):
    """Output, log-sum-exp and the gradients of every array, as NumPy float64."""
    options = options | more

    def run(arrays):
        arrays = arrays | {"implementation": implementation, "return_lse": True}
        if "block_mask" in options:
            rest = {n: x for n, x in options.items() if n != "block_mask"}
            return block_sparse_attention(**arrays, block_mask=options["block_mask"], **rest)
        return dot_product_attention(**arrays, **options)

    @jax.jit
    def everything(arrays, cotangents):
        (out, lse), pull = jax.vjp(run, arrays)
        cotangents = cotangents[0].astype(out.dtype), cotangents[1].astype(lse.dtype)
        return {"out": out, "lse": lse} | {f"d{n}": d for n, d in pull(cotangents)[0].items()}

    found = everything({n: jnp.asarray(x) for n, x in arrays.items()}, cotangents)
    return {n: np.asarray(x, np.float64) for n, x in found.items()}


def oracle(arrays, options, cotangents):
    """The same by the reference in float64."""
    options = dict(options)
    window = options.pop("local_window_size", None)
    scale = options.pop("scale", None) or arrays["q"].shape[-1] ** -0.5
    options["block_sizes"] = None
    if "block_size" in options:
        options["block_sizes"] = (options.pop("block_size"),) * 2
        options["block_mask"] = jnp.asarray(options["block_mask"])
    defaults = dict.fromkeys(("bias", "mask", "q_segment_ids", "kv_segment_ids", "logits_soft_cap"))
    options = defaults | {"is_causal": False} | options | {"scale": scale, "window": window}
    with jax.enable_x64(True):

        def run(arrays):
            x = {n: jnp.asarray(a, jnp.float64) for n, a in arrays.items()}
            return reference.dot_product_attention(x.pop("q"), x.pop("k"), x.pop("v"), **options | x)

        wide = {n: jnp.asarray(np.asarray(x, np.float64)) for n, x in arrays.items()}
        (out, lse), pull = jax.vjp(run, wide)
        gradients = pull(tuple(jnp.asarray(np.asarray(x, np.float64)) for x in cotangents))[0]
        found = {"out": out, "lse": lse} | {f"d{n}": d for n, d in gradients.items()}
        return {n: np.asarray(x) for n, x in found.items()}


def assert_same(found, expected, tolerance):
    for name, want in expected.items():
        np.testing.assert_allclose(found[name], want, err_msg=name, **tolerance)


CAUSAL = {"is_causal": True}
CASES = {
    "plain": {},
    "causal, ragged, grouped": {"T": 300, "N": 4, "K": 2} | CAUSAL,
    "one token": {"T": 1, "S": 1},
    "one query of many keys": {"T": 1, "S": 140},
    "more queries than keys": {"T": 260, "S": 70} | CAUSAL,
    "more keys than queries": {"T": 70, "S": 260, "local_window_size": (30, 40)},
    "causal window": {"T": 400, "local_window_size": (90, 0)} | CAUSAL,
    "window that leaves the last queries none": {"T": 400, "S": 100, "local_window_size": (20, 20)},
    "segments at block edges": {"T": 384, "edges": [128, 256]} | CAUSAL,
    "segments inside blocks": {"T": 300, "B": 2, "edges": [1, 70, 200]} | CAUSAL,
    "segments of other lengths": {"T": 100, "S": 150, "edges": [40, 90]},
    "everything": {
        "T": 300, "B": 2, "N": 4, "K": 2, "edges": [33, 128, 250], "local_window_size": (140, 0),
        "logits_soft_cap": 3.0, "scale": 0.2, "bias": (1, 4, 300, 300), "mask": (2, 1, 300, 300),
    } | CAUSAL,
    "bias of a head and a key": {"T": 150, "bias": (1, 2, 1, 150), "N": 2} | CAUSAL,
    "soft cap, odd head size": {"H": 40, "logits_soft_cap": 2.0},
    "head size 256": {"H": 256, "T": 130} | CAUSAL,
    "large logits": {"scale": 30.0} | CAUSAL,
    "block mask": {"T": 500, "S": 400, "N": 4, "K": 2, "block_mask": (1, 4)},
    "block mask and all else": {
        "T": 390, "B": 2, "N": 4, "K": 2, "block_mask": (2, 1), "edges": [50, 300], "logits_soft_cap": 5.0,
        "local_window_size": (200, 0),
    } | CAUSAL,
}  # fmt: skip
