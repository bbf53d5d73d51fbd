"""Mixture of depths: the chosen tokens alone, the dense block as its limit, and evaluation that is causal."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from scaling.config import ConfigError, validate_section
from scaling.flops import ledger
from scaling.layers import Layer, depth_places
from scaling.models.attention import rope_table
from scaling.models.lm import Block, build
from scaling.models.loss import eval_sums, loss_fn

pytestmark = pytest.mark.usefixtures("quick_compiles")
BASE = {"d_model": 16, "layers": 2, "heads": 2, "kv_heads": 2, "head_dim": 8, "ffn_dim": 24, "vocab": 31}
B, T, CUT = 2, 24, 10
SEGMENTS = np.broadcast_to(np.where(np.arange(T) < CUT, 1, 2), (B, T)).astype(np.int32)
POSITIONS = np.broadcast_to(np.r_[:CUT, : T - CUT], (B, T)).astype(np.int32)


def model(**changes):
    return validate_section("model", {**BASE, "family": "mixture_of_depths", **changes})


def blocks(cfg, mixer="attention"):
    """(routed block, the dense one of the same weights), arrays of a seed."""
    routed = Block(cfg, nnx.Rngs(0), Layer.parse(f"routed:{mixer}"))
    dense = Block(cfg, nnx.Rngs(0), Layer.parse(mixer))
    return routed, dense


def stream(seed=0):
    return np.random.default_rng(seed).standard_normal((B, T, BASE["d_model"])).astype(np.float32)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("mixer", ["attention", "full_attention+none", "min_gru"])
def test_layer_is_the_dense_block_of_the_chosen_alone(mixer, training):
    """Row by row: the chosen cut out, at their own positions and in their documents, through the block."""
    cfg = model(depth_capacity=0.3, **({"local_window": 3} if mixer == "attention" else {}))
    routed, dense = blocks(cfg, mixer)
    x = stream()
    rope = rope_table(jnp.asarray(POSITIONS), cfg["head_dim"], cfg["rope_theta"])
    got, mixed, fed, _ = routed.with_branches(x, rope, SEGMENTS, jnp.int32(0), training)
    router = routed.depth_router
    weights = x @ np.asarray(router.router[...])[:, 0]
    assert depth_places(0.3, T) == 8
    for b in range(B):
        if training:
            chosen = np.sort(np.argsort(-weights[b])[:8])
        else:
            chosen = np.flatnonzero(x[b] @ np.asarray(router.predictor[...])[:, 0] > 0)
            assert 0 < len(chosen) < T
        part = tuple(table[b : b + 1, chosen] for table in rope)
        after, _ = dense(x[b : b + 1, chosen], part, SEGMENTS[b : b + 1, chosen], jnp.int32(0), training)
        want = x[b].copy()
        want[chosen] += weights[b][chosen, None] * (np.asarray(after)[0] - x[b, chosen])
        # the same float32 sums in other shapes
        np.testing.assert_allclose(got[b], want, rtol=1e-5, atol=1e-5)
        assert np.abs(want[chosen] - x[b, chosen]).max() > 0.01
    np.testing.assert_allclose(x + mixed + (0 if fed is None else fed), got, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("training", [True, False])
def test_all_tokens_with_a_weight_of_one_are_the_dense_block(training):
    routed, dense = blocks(model(depth_capacity=1.0))
    x = stream()
    x[..., 3] = 1.0
    routed.depth_router.router[...] = jnp.zeros((16, 1)).at[3].set(1.0)
    args = (x, rope_table(jnp.asarray(POSITIONS), 8, 1e4), SEGMENTS, jnp.int32(0), training)
    np.testing.assert_allclose(routed(*args)[0], dense(*args)[0], rtol=1e-5, atol=1e-5)


def test_evaluation_sees_no_later_token_where_training_does():
    """The number that is recorded is a likelihood: tokens before a change keep theirs, bit for bit."""
    cfg = model(depth_capacity=0.25, layers=4)
    apply, params = build(cfg, seed=0)
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 31, (B, T)).astype(np.int32)
    other = tokens.copy()
    other[:, 15:] = rng.integers(0, 31, (B, T - 15))

    def nats(tokens, training):
        x, head, _ = jax.jit(lambda t: apply.features(params, t, training=training))(tokens)
        return np.asarray(x @ head)[:, :15]

    np.testing.assert_array_equal(nats(tokens, False), nats(other, False))
    assert np.abs(nats(tokens, True) - nats(other, True)).max() > 1e-3
    called = jax.jit(apply)(params, tokens)[:, :15]
    np.testing.assert_allclose(nats(tokens, False), called, rtol=1e-5, atol=1e-5)  # another program
    # the held-out loss is the causal one
    ones = np.ones((B, T), np.int32)
    batch = {
        "inputs": tokens,
        "targets": np.roll(tokens, -1, 1),
        "segment_ids": ones,
        "positions": np.cumsum(ones, 1, dtype=np.int32) - 1,
        "loss_mask": ones.astype(np.float32),
    }
    logits = np.asarray(apply(params, tokens), np.float64)
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    causal = -np.take_along_axis(log_p, batch["targets"][..., None], -1)[..., 0]
    np.testing.assert_allclose(eval_sums(apply, params, batch)[0], causal.sum(-1), rtol=1e-5)
    assert abs(loss_fn(apply, params, batch, 0.0)[1]["nats"] - causal.mean()) > 1e-4


def test_predictor_learns_the_choice_and_moves_nothing_else():
    routed, _ = blocks(model(depth_capacity=0.25))
    graph, state = nnx.split(routed.depth_router)
    params = nnx.to_pure_dict(state)
    x = np.random.default_rng(1).standard_normal((32, 64, 16)).astype(np.float32)

    def added(params, x):
        return nnx.merge(graph, params)(x, True)[2].mean()

    gradient, to_stream = jax.grad(added, argnums=(0, 1))(params, x)
    assert not np.any(to_stream) and not np.any(gradient["router"])

    @jax.jit
    def step(params):
        return jax.tree.map(lambda p, g: p - 300 * g, params, jax.grad(added)(params, x))

    for _ in range(200):
        params = step(params)
    fresh = np.random.default_rng(2).standard_normal((32, 64, 16)).astype(np.float32)
    taken, weights, _ = nnx.merge(graph, params)(fresh, False)
    chosen = np.zeros((32, 64), bool)
    np.put_along_axis(chosen, np.asarray(taken), np.asarray(weights) != 0, axis=1)
    top = np.argsort(-(fresh @ np.asarray(params["router"])[:, 0]), axis=1)[:, :16]
    wanted = np.zeros((32, 64), bool)
    np.put_along_axis(wanted, top, True, axis=1)
    # one threshold against each row's own: rows of 64 differ by some tokens. Never to choose is right on 0.75
    assert (chosen == wanted).mean() > 0.93


def test_a_routed_layer_costs_its_share_by_hand():
    """D 16, 2 heads of 8, ffn 24, rows of 32, a quarter of them: one dense layer and one of 8 tokens."""
    account = ledger(model(depth_capacity=0.25), 32)
    projections, feed_forward, head = 2 * 4 * 16 * 16, 2 * 3 * 16 * 24, 2 * 16 * 31
    dense = projections + feed_forward + 4 * 16 * 33 / 2
    routed = (8 * (projections + feed_forward) + 4 * 16 * (8 * 9 / 2)) / 32
    choice = 2 * 16 + 2 * 16
    assert account.forward_flops_per_token() == dense + routed + choice + head
    # router and predictor: one product in the backward pass, not two
    assert account.train_flops_per_token() == 3 * (dense + routed + head) + 2 * choice
    assert account.params_total - account.params_active == 0.75 * (4 * 16 * 16 + 3 * 16 * 24 + 2 * 8)
    # keys and values of 100 tokens, and of a quarter of them
    assert account.decode_bytes(100) == 2 * 2 * 16 * (100 + 25)
    windowed = ledger(model(depth_capacity=0.25, local_window=20), 32)
    assert windowed.decode_bytes(100) == 64 * (20 + 20) and windowed.decode_bytes(40) == 64 * (20 + 10)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"depth_capacity": 0.0}, "model.depth_capacity is 0.0"),
        ({"depth_capacity": 1.5}, "model.depth_capacity is 1.5"),
        ({"family": "transformer", "depth_capacity": 0.5}, "does not read it; it is for 'routed'"),
        ({"family": "hybrid", "pattern": ["routed:rglu"]}, r"model.pattern\[0\] is 'routed:rglu'; it must"),
        ({"family": "hybrid", "pattern": ["route:rglru"]}, r"model.pattern\[0\] is 'route:rglru'; it must"),
    ],
)
def test_bad_routed_layers(changes, words):
    with pytest.raises(ConfigError, match=words):
        model(**changes)
