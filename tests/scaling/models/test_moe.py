"""A mixture of experts against loops in NumPy, and where it must be the dense model."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from scaling.config import validate_section
from scaling.models.lm import build, init_params
from scaling.models.loss import loss_fn
from scaling.models.moe import MoE, places
from scaling.step import gradients

pytestmark = pytest.mark.usefixtures("quick_compiles")
BASE = {"d_model": 16, "layers": 2, "heads": 2, "kv_heads": 2, "head_dim": 8, "ffn_dim": 24, "vocab": 31}
B, T = 2, 24


def model(**changes):
    return validate_section("model", {**BASE, "family": "moe", **changes})


def layer(cfg):
    """(function of x, its parameters)."""
    graph, state = nnx.split(MoE(cfg, nnx.Rngs(0)))
    params = jax.tree.map(lambda x: 2 * x, nnx.to_pure_dict(state))  # routers that are sure of themselves
    return jax.jit(lambda x: nnx.merge(graph, params)(x)), jax.tree.map(np.float64, params)


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def swiglu(x, gate, up, down):
    g = x @ gate
    return (g / (1 + np.exp(-g)) * (x @ up)) @ down


def by_loops(cfg, p, x_BTD):
    """Token by token, choice by choice: (output, choices that found a place, added loss)."""
    E, k = cfg["experts"], cfg["active_experts"]
    B, T, _ = x_BTD.shape
    room = min(T, int(np.ceil(cfg["capacity_factor"] * k * T / E)))
    y, kept, extra = np.zeros_like(x_BTD), 0, []
    for b in range(B):
        used, share = np.zeros(E, int), np.zeros(E)
        logits = x_BTD[b] @ p["router"]
        probabilities = softmax(logits)
        for t in range(T):
            best = np.argsort(-probabilities[t], kind="stable")[:k]
            weights = probabilities[t][best]
            if cfg["router"] == "chosen":
                weights = weights / weights.sum()
            for e, w in zip(best, weights, strict=True):
                share[e] += 1 / (T * k)
                if used[e] < room:
                    y[b, t] += w * swiglu(x_BTD[b, t], p["gate"][e], p["up"][e], p["down"][e])
                    kept += 1
                used[e] += 1
        balance = E * (share * probabilities.mean(0)).sum()
        z = (np.log(np.exp(logits).sum(-1)) ** 2).mean()
        extra.append(cfg["balance_loss"] * balance + cfg["router_z_loss"] * z)
    if cfg["shared_experts"]:
        y += swiglu(x_BTD, *(p["shared"][n] for n in ("gate", "up", "down")))
    return y, kept, np.array(extra)


@pytest.mark.parametrize(
    "changes",
    [
        {"capacity_factor": 4.0},
        {"capacity_factor": 1.0, "router": "all"},
        {"experts": 6, "active_experts": 3, "expert_fraction": 0.25, "shared_experts": 2},
        {
            "experts": 5,
            "active_experts": 1,
            "capacity_factor": 1.2,
            "balance_loss": 0.5,
            "router_z_loss": 0.1,
        },
    ],
)
def test_layer_is_the_loop_over_tokens_and_choices(changes):
    cfg = model(**changes)
    apply, params = layer(cfg)
    x = np.random.default_rng(0).standard_normal((B, T, cfg["d_model"])).astype(np.float32)
    want, kept, extra = by_loops(cfg, params, x.astype(np.float64))
    y, added = apply(x)
    # float32 sums of some tens of terms
    np.testing.assert_allclose(y, want, rtol=1e-4, atol=1e-4 * want.std())
    np.testing.assert_allclose(added, extra, rtol=1e-5)
    every = B * T * cfg["active_experts"]
    factor = cfg["capacity_factor"]
    assert kept == every if factor == 4 else 0.5 * every < kept <= every - (factor <= 1.2)


@pytest.mark.parametrize(
    "changes",
    [
        {"capacity_factor": 4.0},
        {"capacity_factor": 1.0, "shared_experts": 1},
        {"experts": 6, "active_experts": 3, "expert_fraction": 0.25, "capacity_factor": 1.0},
    ],
)
def test_open_gates_are_the_loop_over_tokens_and_experts(changes):
    cfg = model(router="relu", **{"experts": 8, **changes})
    apply, p = layer(cfg)
    E, k = cfg["experts"], cfg["active_experts"]
    x = np.random.default_rng(0).standard_normal((B, T, cfg["d_model"])).astype(np.float32)
    room = min(T, int(np.ceil(cfg["capacity_factor"] * k * T / E)))
    want, dropped, l1, share = np.zeros(x.shape), 0, np.zeros(B), np.zeros(B)
    for b in range(B):
        gates = np.maximum(np.float64(x[b]) @ p["router"], 0)
        for e in range(E):
            taken = 0
            for t in range(T):
                if gates[t, e] > 0:
                    if taken < room:
                        want[b, t] += gates[t, e] * swiglu(
                            np.float64(x[b, t]), p["gate"][e], p["up"][e], p["down"][e]
                        )
                    dropped += taken >= room
                    taken += 1
            l1[b] += E / (k * T) * taken * gates[:, e].mean()
            share[b] += taken / (T * E)
    if cfg["shared_experts"]:
        want += swiglu(np.float64(x), *(p["shared"][n] for n in ("gate", "up", "down")))
    y, density = apply(x)
    # float32 sums of some tens of terms
    np.testing.assert_allclose(y, want, rtol=1e-4, atol=1e-4 * want.std())
    np.testing.assert_allclose(density.l1, l1, rtol=1e-5)
    np.testing.assert_allclose(density.share, share, rtol=1e-6)
    assert (dropped == 0) == (cfg["capacity_factor"] == 4.0)


def test_one_expert_whose_gate_is_one_is_the_dense_layer():
    cfg = model(router="relu", experts=1, active_experts=1)
    graph, state = nnx.split(MoE(cfg, nnx.Rngs(0)))
    params = nnx.to_pure_dict(state)
    params["router"] = jnp.zeros_like(params["router"]).at[0].set(1.0)
    x = np.random.default_rng(0).standard_normal((B, T, cfg["d_model"])).astype(np.float32)
    x[..., 0] = 1.0  # times the router's only weight
    y, density = nnx.merge(graph, params)(x)
    want = swiglu(np.float64(x), *(np.float64(params[n][0]) for n in ("gate", "up", "down")))
    np.testing.assert_allclose(y, want, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(density.share, 1.0)


def test_places_are_given_in_the_order_of_tokens():
    chosen = jnp.array([[0, 2], [2, 0], [2, 1], [0, 2]])
    assert places(chosen, 3, 2).tolist() == [[0, 4], [5, 1], [6, 2], [6, 6]]


@pytest.mark.parametrize("router", ["chosen", "relu"])
def test_a_later_token_takes_no_place_from_an_earlier_one(router):
    """Causal with places that do not suffice: the logits before a change stay the same, bit for bit."""
    cfg = model(capacity_factor=1.0, router=router)
    apply, params = build(cfg, seed=0)
    apply = jax.jit(apply)
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 31, (B, T))
    other = tokens.copy()
    other[:, 15:] = rng.integers(0, 31, (B, T - 15))
    np.testing.assert_array_equal(apply(params, tokens)[:, :15], apply(params, other)[:, :15])


def test_one_expert_is_the_dense_model():
    cfg = model(experts=1, active_experts=1)
    dense = validate_section("model", BASE)
    (ours, params), (theirs, _) = build(cfg, seed=0), build(dense, seed=0)
    ffn = params["blocks"]["ffn"]
    weights = {k: ffn[k][:, 0] for k in ("gate", "up", "down")}
    moved = {**params, "blocks": {**params["blocks"], "ffn": weights}}
    tokens = np.random.default_rng(0).integers(0, 31, (B, T))
    # one softmax over one expert is exactly 1; the products are those of another shape
    np.testing.assert_allclose(
        jax.jit(ours)(params, tokens), jax.jit(theirs)(moved, tokens), rtol=1e-5, atol=1e-5
    )


def batch_of(rows):
    rng = np.random.default_rng(0)
    ints = rng.integers(0, 31, (rows, T)).astype(np.int32)
    mask = (rng.random((rows, T)) < 0.8).astype(np.float32)
    ones = np.ones((rows, T), np.int32)
    return {"inputs": ints, "targets": np.roll(ints, -1, 1), "segment_ids": ones,
            "positions": np.cumsum(ones, 1, dtype=np.int32) - 1, "loss_mask": mask}  # fmt: skip


@pytest.mark.parametrize("own", [{"balance_loss": 0.3}, {"router": "relu"}])
def test_what_routers_add_to_the_loss_is_the_same_in_parts_and_none_of_the_nats(own):
    cfg = model(**own)
    apply, params = build(cfg, seed=0)
    batch = batch_of(4)
    loss, aux = loss_fn(apply, params, batch, 0.0, router_l1=0.5)
    assert aux["router"] > 0.1
    np.testing.assert_allclose(loss, aux["nats"] + aux["router"], rtol=1e-6)
    read, whole = gradients(apply, params, batch, 0.0, 1, 0.5)
    in_parts, parts = gradients(apply, params, batch, 0.0, 2, 0.5)
    assert set(read) == set(in_parts) == ({"nats", "open"} if "router" in own else {"nats"})
    for name in read:
        np.testing.assert_allclose(read[name], in_parts[name], rtol=1e-5)
    for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(parts), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-6)


def test_balance_loss_balances():
    """Gradient steps on it alone bring the load of every expert near its share."""
    cfg = model(experts=4, active_experts=1, router_z_loss=0.0)
    graph, state = nnx.split(MoE(cfg, nnx.Rngs(0)))
    params = nnx.to_pure_dict(state)
    # the first coordinate is large and always there: one expert takes almost all
    params["router"] = params["router"].at[0].set(jnp.array([4.0, 0, 0, 0]))
    x = np.random.default_rng(0).standard_normal((8, T, cfg["d_model"])).astype(np.float32)
    x[..., 0] = 1.0

    def load(router):
        return np.bincount(np.asarray(jnp.argmax(x @ router, -1)).reshape(-1), minlength=4) / (8 * T)

    @jax.jit
    def step(router):
        extra = lambda r: nnx.merge(graph, {**params, "router": r})(x)[1].mean()  # noqa: E731
        return router - 20 * jax.grad(extra)(router)

    before, router = load(params["router"]), params["router"]
    for _ in range(100):
        router = step(router)
    assert before.max() > 0.9 and load(router).max() < 0.4


def test_experts_start_apart_and_of_the_dense_size():
    params = init_params(model(d_model=64, heads=8, kv_heads=8, ffn_dim=128), 0)["blocks"]["ffn"]
    assert params["gate"].shape == (2, 8, 64, 128)
    np.testing.assert_allclose(np.std(params["gate"]), 1 / 8, rtol=0.02)
    np.testing.assert_allclose(np.std(params["down"]), 1 / np.sqrt(128 * 4), rtol=0.02)
    assert np.abs(np.corrcoef(np.asarray(params["gate"][0]).reshape(8, -1)) - np.eye(8)).max() < 0.1
