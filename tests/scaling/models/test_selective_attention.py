"""Selective attention: a loop over the chosen, dense attention as its limit, its budget and its cost."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from scaling.config import ConfigError, validate_section
from scaling.flops import ledger
from scaling.layers import budget_places
from scaling.models.attention import Attention, rope_table
from scaling.models.lm import build
from scaling.models.selective_attention import SelectiveAttention

pytestmark = pytest.mark.usefixtures("quick_compiles")
BASE = {"d_model": 16, "layers": 2, "heads": 2, "kv_heads": 1, "head_dim": 8, "ffn_dim": 24, "vocab": 31}
B, T, CUT = 2, 40, 16
SEGMENTS = np.broadcast_to(np.where(np.arange(T) < CUT, 1, 2), (B, T)).astype(np.int32)
POSITIONS = np.broadcast_to(np.r_[:CUT, : T - CUT], (B, T)).astype(np.int32)


def model(pattern=("selective_attention",), **changes):
    return validate_section("model", {**BASE, "family": "hybrid", "pattern": list(pattern), **changes})


def inputs(cfg, seed=0):
    x = np.random.default_rng(seed).standard_normal((B, T, BASE["d_model"])).astype(np.float32)
    return x, rope_table(jnp.asarray(POSITIONS), cfg["head_dim"], cfg["rope_theta"]), SEGMENTS


def by_hand(layer, x, cfg, places, window):
    """One row in float64, a chosen token and a head at a time."""
    p = {k: np.asarray(getattr(layer, k)[...], np.float64) for k in ("q", "k", "v", "out", "router")}
    scores = x.astype(np.float64) @ p["router"][:, 0] + np.asarray(layer.router_bias[...])
    chosen = np.flatnonzero(scores > 0)[:places]
    H = cfg["head_dim"]

    def turned(row, t):  # pairs (i, i + H/2)
        row = row / np.sqrt((row**2).mean() + cfg["norm_eps"])
        z = (row[: H // 2] + 1j * row[H // 2 :]) * np.exp(
            1j * POSITIONS[0, t] * cfg["rope_theta"] ** (-np.arange(0, H, 2) / H)
        )
        return np.r_[z.real, z.imag]

    out = np.zeros(x.shape)
    for n, t in enumerate(chosen):
        seen = [s for s in chosen[max(0, n + 1 - (window or T)) : n + 1] if SEGMENTS[0, s] == SEGMENTS[0, t]]
        heads = []
        for head in range(cfg["heads"]):
            q = turned((x[t] @ p["q"])[head * H : (head + 1) * H], t)
            logits = np.array([q @ turned(x[s] @ p["k"], s) for s in seen]) / np.sqrt(H)
            weights = np.exp(logits - logits.max())
            heads.append(weights / weights.sum() @ np.array([x[s] @ p["v"] for s in seen]))
        out[t] = np.concatenate(heads) @ p["out"] / (1 + np.exp(-scores[t]))
    return out, chosen


@pytest.mark.parametrize(("training", "window"), [(True, None), (True, 3), (False, 3)])
def test_chosen_tokens_attend_to_chosen_ones_of_their_document(training, window):
    cfg = model(attention_budget=0.4, capacity_factor=1.0, local_window=window)
    layer = SelectiveAttention(cfg, nnx.Rngs(0), window)
    x, rope, segments = inputs(cfg, seed=2)
    got, extra = layer(x, rope, segments, training)
    places = budget_places(cfg, T) if training else T
    wanted, scores = zip(*(by_hand(layer, row, cfg, places, window) for row in x), strict=True)
    # float32 sums of tens of terms
    np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-5)
    assert all(3 < len(chosen) < T for chosen in scores)
    if training:  # one row has more than its places, so that they are given out in order
        assert places == 16 and max(len(chosen) for chosen in scores) == places
        assert extra.shape == (B,) and np.all(extra >= 0)
    else:
        assert not np.any(extra) and max(len(chosen) for chosen in scores) > 16


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("window", [None, 5])
def test_whole_budget_with_the_gate_open_is_dense_attention(training, window):
    cfg = model(attention_budget=1.0, local_window=window)
    layer, dense = SelectiveAttention(cfg, nnx.Rngs(0), window), Attention(cfg, nnx.Rngs(0), window)
    args = inputs(cfg)
    half, _ = layer(*args, training)
    layer.router_bias[...] = jnp.full(1, 50.0)  # sigmoid is one, in float32
    got, extra = layer(*args, training)
    np.testing.assert_allclose(got, dense(*args), rtol=1e-6, atol=1e-6)
    assert np.abs(half - got).max() > 0.01 and not np.any(extra)


@pytest.mark.parametrize("training", [True, False])
def test_no_token_sees_a_later_one_in_training_too(training):
    cfg = model(["mamba2", "selective_attention"], attention_budget=0.3, local_window=4, state_dim=8)
    apply, params = build(cfg, seed=0)
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 31, (B, T)).astype(np.int32)
    other = tokens.copy()
    other[:, 25:] = rng.integers(0, 31, (B, T - 25))
    run = jax.jit(lambda t: apply.features(params, t, training=training)[0])
    first, second = np.asarray(run(tokens)), np.asarray(run(other))
    np.testing.assert_array_equal(first[:, :25], second[:, :25])
    assert np.abs(first - second)[:, 25:].max() > 0.1


def test_gate_is_held_to_its_budget():
    """From the quantile that it begins at, and back to it from elsewhere, by the budget's loss alone."""
    cfg = model(attention_budget=0.2)
    graph, state = nnx.split(SelectiveAttention(cfg, nnx.Rngs(0), None))
    params = nnx.to_pure_dict(state)
    x = np.random.default_rng(0).standard_normal((64, 32, 16)).astype(np.float32)

    def share(params):
        return np.mean(x @ np.asarray(params["router"])[:, 0] + np.asarray(params["router_bias"]) > 0)

    # of 2048 tokens, and of one draw of w, whose length is not one: seen 0.2 to 0.02
    assert abs(share(params) - 0.2) < 0.05

    @jax.jit
    def step(params):
        loss = lambda p: nnx.merge(graph, p)(x, None, None, True)[1].mean()  # noqa: E731
        return jax.tree.map(lambda p, g: p - g, params, jax.grad(loss)(params))

    params["router_bias"] = params["router_bias"] + 1.0
    assert share(params) > 0.4
    for _ in range(100):
        params = step(params)
    assert abs(share(params) - 0.2) < 0.02


def test_costs_by_hand():
    """D 16, 2 heads of 8 on one of keys and values, ffn 24, rows of 40: a quarter is 10, places for 15."""
    account = ledger(model(attention_budget=0.25, layers=1), 40)
    weights = 16 * 16 + 2 * 16 * 8 + 16 * 16
    rest = 2 * 3 * 16 * 24 + 2 * 16 * 31
    exact = (10 * 2 * weights + 4 * 16 * (10 * 11 / 2)) / 40
    assert account.forward_flops_per_token() == pytest.approx(exact + rest + 2 * 16, rel=1e-12)
    full = (15 * 2 * weights + 4 * 16 * 15 * 15) / 40
    assert account.forward_flops_per_token("full") == pytest.approx(full + rest + 2 * 16, rel=1e-12)
    # the gate's gradient is one product, not two
    assert account.train_flops_per_token() == pytest.approx(3 * (exact + rest) + 2 * 2 * 16, rel=1e-12)
    assert account.params_total - account.params_active == 0.75 * (weights + 2 * 8)
    assert account.decode_bytes(100) == 2 * 2 * 8 * 25
    windowed = ledger(model(attention_budget=0.25, layers=1, local_window=20), 40)
    assert windowed.decode_bytes(1000) == 2 * 2 * 8 * 20


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"attention_budget": 0.0}, "model.attention_budget is 0.0"),
        ({"attention_budget": 1.5}, "model.attention_budget is 1.5"),
        ({"budget_loss": -1.0}, "model.budget_loss is -1.0"),
        ({"pattern": ["attention"], "attention_budget": 0.5}, "it is for 'selective_attention'"),
        ({"pattern": ["attention"], "capacity_factor": 2.0}, "it is for 'moe' and 'selective_attention'"),
    ],
)
def test_bad_budgets(changes, words):
    with pytest.raises(ConfigError, match=words):
        model(**changes)
