"""The Monarch mixer's convolution against sums over tokens in float64, its matrices against dense ones."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from scaling import layers
from scaling.config import validate_section
from scaling.models.lm import build, init_params
from scaling.models.monarch_mixer import MonarchMixer, causal_convolution, factors, transform

pytestmark = pytest.mark.usefixtures("quick_compiles")
SHAPE = {"d_model": 16, "layers": 2, "heads": 2, "kv_heads": 2, "head_dim": 8, "ffn_dim": 32}
MODEL = {**SHAPE, "vocab": 31, "family": "monarch_mixer", "cross_document": True, "filter_dim": 12}


def convolved(x_TR, filter_TR):
    """Every pair of tokens."""
    out = np.zeros_like(x_TR)
    for t in range(len(x_TR)):
        for s in range(t + 1):
            out[t] += filter_TR[t - s] * x_TR[s]
    return out


@pytest.mark.parametrize("T", [1, 2, 7, 40, 67])
def test_the_factors_are_a_fourier_transform_and_the_convolution_is_direct(T):
    """In float64: frequencies are the dense transform's, the product of both factors; nothing comes round."""
    rng = np.random.default_rng(0)
    x, h = rng.standard_normal((2, T, 3)), rng.standard_normal((T, 3))
    p, q = layers.monarch_lengths(T)
    assert p % 2 == 0 and p * q >= 2 * T
    dense = np.exp(-2j * np.pi * np.outer(np.arange(p * q), np.arange(T)) / (p * q))
    with jax.enable_x64(True):
        seen = np.asarray(transform(jnp.asarray(x)))
        got = np.asarray(causal_convolution(jnp.asarray(x), jnp.asarray(h)))
    want = np.einsum("kt,btr->bkr", dense, x)
    for m in range(p // 2 + 1):
        ours = seen[:, m, :, 0] + 1j * seen[:, m, :, 1]
        np.testing.assert_allclose(ours, want[:, m::p], rtol=1e-12, atol=1e-12)
    for row in range(2):
        np.testing.assert_allclose(got[row], convolved(x[row], h), rtol=1e-12, atol=1e-12)
    single = causal_convolution(jnp.float32(x), jnp.float32(h))
    np.testing.assert_allclose(single, got, atol=2e-6 * np.sqrt(T))  # sums of T products of order one


def test_both_factors_are_one_monarch_matrix():
    """Block-diagonal matrices with a permutation between: written out, the dense transform of real pairs."""
    T = 24
    right, left, _ = factors(T)
    p, q = layers.monarch_lengths(T)
    half, M = p // 2, p // 2 + 1
    first = np.zeros((half * q, M * q * 2))
    second = np.zeros((M * q * 2, M * q * 2))
    for l in range(q):
        for i in range(half):
            for m in range(M):
                first[i * q + l, [(m * q + l) * 2, (m * q + l) * 2 + 1]] = right[i, m]
    for m in range(M):  # one block each
        block = slice(m * q * 2, (m + 1) * q * 2)
        second[block, block] = left[m].reshape(2 * q, 2 * q)
    x = np.random.default_rng(0).standard_normal((1, T, 1))
    with jax.enable_x64(True):
        got = np.asarray(transform(jnp.asarray(x)))
    padded = np.pad(x[0, :, 0], (0, half * q - T))
    np.testing.assert_allclose(got.ravel(), padded @ first @ second, rtol=1e-12, atol=1e-12)


def test_the_layer_is_gates_around_the_convolution_token_by_token():
    cfg = validate_section("model", MODEL)
    layer = MonarchMixer(cfg, nnx.Rngs(0))
    x = np.random.default_rng(1).standard_normal((1, 21, 16)).astype(np.float32)
    got = np.asarray(jax.jit(layer)(x, None, None))[0]
    p = jax.tree.map(lambda a: np.asarray(a, np.float64), nnx.to_pure_dict(nnx.state(layer)))

    def projected(name):
        z, taps = x[0].astype(np.float64) @ p[name], p["conv"][name]
        W = len(taps["conv"])
        return np.array([
            taps["conv_bias"] + sum(taps["conv"][W - 1 - d] * z[t - d] for d in range(W) if t >= d)
            for t in range(len(z))
        ])  # fmt: skip

    q, k, v = map(projected, "qkv")
    waves = [2 * np.pi * np.arange(21)[:, None] / 2**j for j in range(1, 13)]
    waves = np.concatenate([*map(np.cos, waves), *map(np.sin, waves)], axis=1)
    decay = 1 / np.geomspace(2, 2048, 16)
    h = np.sin(waves @ p["filter_in"] + p["filter_bias"]) @ p["filter_out"]
    h = h * np.exp(-np.arange(21)[:, None] * decay) * np.sqrt(1 - np.exp(-2 * decay))
    want = (q * (convolved(k * v, h) + p["skip"] * k * v)) @ p["out"]
    # float32, angles of the waves among it
    np.testing.assert_allclose(got, want, atol=2e-5 * want.std(), rtol=1e-4)


def test_no_token_sees_a_later_one_and_a_filter_is_the_same_in_any_row():
    cfg = validate_section("model", MODEL)
    params, apply = init_params(cfg, 0), jax.jit(build(cfg, seed=0)[0])
    tokens = np.random.default_rng(0).integers(0, 31, (2, 50))
    other = tokens.copy()
    other[:, 30:] = (other[:, 30:] + 7) % 31
    logits = np.asarray(apply(params, tokens))
    # rounding of transforms over the row alone, logits of order one
    np.testing.assert_allclose(apply(params, other)[:, :30], logits[:, :30], atol=1e-5)
    np.testing.assert_allclose(apply(params, tokens[:, :30]), logits[:, :30], atol=1e-5)
    assert np.abs(apply(params, other)[:, 30:] - logits[:, 30:]).max() > 0.1
    early = tokens.copy()
    early[:, 0] = (early[:, 0] + 7) % 31
    # the last token feels the first, 49 tokens before, beyond all short convolutions
    assert np.abs(apply(params, early)[:, -1] - logits[:, -1]).max() > 1e-4


def test_filters_begin_with_squares_that_sum_to_one():
    cfg = validate_section("model", {**MODEL, "d_model": 512, "heads": 64, "filter_dim": 64})
    h = MonarchMixer(cfg, nnx.Rngs(0)).filter(8192)
    sums = np.sum(np.asarray(h) ** 2, axis=0)
    # a mean over channels, which share 64 sines
    assert np.mean(sums) == pytest.approx(1, abs=0.15)
