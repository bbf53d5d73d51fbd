"""Mixture of sparse attention: each head's own tokens cut out, dense attention as its limit, its cost."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from scaling.config import ConfigError, validate_section
from scaling.flops import ledger
from scaling.models.attention import Attention, rope_table
from scaling.models.lm import build
from scaling.models.mosa import MoSA

pytestmark = pytest.mark.usefixtures("quick_compiles")
BASE = {"d_model": 16, "layers": 2, "heads": 2, "kv_heads": 2, "head_dim": 8, "ffn_dim": 24, "vocab": 31}
B, T, CUT = 2, 24, 10
SEGMENTS = np.broadcast_to(np.where(np.arange(T) < CUT, 1, 2), (B, T)).astype(np.int32)
POSITIONS = np.broadcast_to(np.r_[:CUT, : T - CUT], (B, T)).astype(np.int32)


def model(pattern=("mosa",), **changes):
    return validate_section("model", {**BASE, "family": "hybrid", "pattern": list(pattern), **changes})


def inputs(cfg, seed=0):
    x = np.random.default_rng(seed).standard_normal((B, T, BASE["d_model"])).astype(np.float32)
    return x, rope_table(jnp.asarray(POSITIONS), cfg["head_dim"], cfg["rope_theta"]), SEGMENTS


def one_head(cfg, layer, e):
    """Dense attention of one head, with the weights of head e."""
    dense = Attention({**cfg, "heads": 1, "kv_heads": 1}, nnx.Rngs(0), None)
    for name in ("q", "k", "v", "out"):
        getattr(dense, name)[...] = getattr(layer, name)[e]
    return dense


@pytest.mark.parametrize("training", [True, False])
def test_every_head_attends_among_the_tokens_that_it_takes(training):
    cfg = model(head_capacity=0.3)
    layer = MoSA(cfg, nnx.Rngs(0))
    x, rope, segments = inputs(cfg)
    got, extra = layer(x, rope, segments, training)
    scores = x @ np.asarray(layer.router[...])
    says = x @ np.asarray(layer.predictor[...])
    want, missed = np.zeros_like(x), np.zeros((B, 4))
    for b in range(B):
        for e in range(4):
            top = np.sort(np.argsort(-scores[b, :, e])[:8])  # 0.3 of 24, rounded up
            taken = top if training else np.flatnonzero(says[b, :, e] > 0)
            part = tuple(table[b : b + 1, taken] for table in rope)
            read = one_head(cfg, layer, e)(x[b : b + 1, taken], part, segments[b : b + 1, taken])
            want[b, taken] += np.asarray(read)[0] / (1 + np.exp(-scores[b, taken, e]))[:, None]
            p = 1 / (1 + np.exp(-says[b, :, e]))
            missed[b, e] = -np.mean(np.where(np.isin(np.arange(T), top), np.log(p), np.log(1 - p)))
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)  # float32 sums in another order
    np.testing.assert_allclose(extra, 0.01 * missed.mean(1) if training else 0, rtol=1e-5)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("qk_norm", [True, False])
def test_all_tokens_with_a_weight_of_one_are_dense_attention(training, qk_norm):
    """k = T, twice the heads of the model, as dense attention of so many."""
    cfg = model(head_capacity=1.0, qk_norm=qk_norm)
    layer = MoSA(cfg, nnx.Rngs(0))
    dense = Attention({**cfg, "heads": 4, "kv_heads": 4}, nnx.Rngs(0), None)
    for name in ("q", "k", "v"):
        getattr(dense, name)[...] = jnp.moveaxis(getattr(layer, name)[...], 0, 1).reshape(16, 32)
    dense.out[...] = layer.out[...].reshape(32, 16)
    x, rope, segments = inputs(cfg)
    x[..., 3] = 1.0
    half, _ = layer(x, rope, segments, training)
    layer.router[...] = jnp.zeros((16, 4)).at[3].set(50.0)  # sigmoid is one, in float32
    got, _ = layer(x, rope, segments, training)
    np.testing.assert_allclose(got, dense(x, rope, segments), rtol=1e-5, atol=1e-6)
    assert np.abs(half - got).max() > 0.1


def test_output_begins_as_large_as_that_of_dense_attention():
    """Of as many heads as take a token on average: routers that choose by chance, weights of a half."""
    cfg = model(d_model=256, heads=32, kv_heads=32, sparse_heads=4, head_capacity=0.25)
    sparse, dense = MoSA(cfg, nnx.Rngs(0)), Attention(cfg, nnx.Rngs(0), None)
    for layer, fan_in in ((sparse, 32), (dense, 32)):
        std = np.asarray(layer.out[...]).std()
        # a branch of four; 65 thousand draws
        assert std == pytest.approx(1 / np.sqrt(4 * fan_in * 8), rel=0.02)


def test_evaluation_sees_no_later_token_where_training_does():
    cfg = model(["attention", "mosa"], head_capacity=0.25)
    apply, params = build(cfg, seed=0)
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 31, (B, T)).astype(np.int32)
    other = tokens.copy()
    other[:, 15:] = rng.integers(0, 31, (B, T - 15))

    def before(tokens, training):
        run = jax.jit(lambda t: apply.features(params, t, training=training)[0])
        return np.asarray(run(tokens))[:, :15]

    np.testing.assert_array_equal(before(tokens, False), before(other, False))
    assert np.abs(before(tokens, True) - before(other, True)).max() > 0.01


def test_costs_by_hand():
    """D 16, 4 heads of 8 that take 10 of 40 tokens each, ffn 24."""
    account = ledger(model(head_capacity=0.25, layers=1), 40)
    weights, rest, choice = 4 * 4 * 16 * 8, 2 * 3 * 16 * 24 + 2 * 16 * 31, 2 * 16 * 4
    exact = (10 * 2 * weights + 4 * 4 * 8 * (10 * 11 / 2)) / 40
    assert account.forward_flops_per_token() == pytest.approx(exact + rest + 2 * choice, rel=1e-12)
    # of the predictors one gradient, not two
    assert account.train_flops_per_token() == pytest.approx(3 * (exact + rest) + 5 * choice, rel=1e-12)
    assert account.params_total - account.params_active == 0.75 * (weights + 2 * 8)
    assert account.decode_bytes(100) == 2 * 2 * 4 * 8 * 25


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"head_capacity": 0.0}, "model.head_capacity is 0.0"),
        ({"sparse_heads": 0}, "model.sparse_heads is 0"),
        ({"pattern": ["attention"], "head_capacity": 0.5}, "it is for 'mosa'"),
    ],
)
def test_bad_sparse_heads(changes, words):
    with pytest.raises(ConfigError, match=words):
        model(**changes)
