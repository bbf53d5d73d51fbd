"""Attention to checkpoints: a loop over the tokens that each sees; segments of one token are attention."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from scaling.config import validate_section
from scaling.layers import checkpoints
from scaling.models.attention import Attention, rope_table
from scaling.models.checkpoint_attention import CheckpointAttention
from scaling.models.lm import build, init_params

pytestmark = pytest.mark.usefixtures("quick_compiles")
SHAPE = {"d_model": 32, "layers": 2, "heads": 4, "kv_heads": 2, "head_dim": 8, "ffn_dim": 24, "vocab": 31}
T, CUT = 43, 18
SEGMENTS = np.where(np.arange(T) < CUT, 1, 2)[None].astype(np.int32)


def config(segment, **changes):
    given = {"family": "hybrid", "pattern": ["checkpoint_attention"], "segment_length": segment}
    return validate_section("model", {**SHAPE, **given, **changes})


def positions(segments):
    return np.arange(T) if segments is None else np.r_[:CUT, : T - CUT]


def looped(layer, x, rope, segments, segment, cap=None):
    """Softmax over itself and the checkpoints before it in its document, a token at a time, in float64."""
    q, k, v = (np.asarray(a, np.float64)[0] for a in layer.heads_of(x, rope))
    at, ids = positions(segments), np.ones(T) if segments is None else segments[0]
    out = np.zeros_like(q)
    for t in range(T):
        seen = [s for s in range(t) if (at[s] + 1) % segment == 0 and ids[s] == ids[t]] + [t]
        for n in range(4):
            logits = np.array([q[t, n] @ k[s, n // 2] for s in seen]) / np.sqrt(8)
            logits = logits if cap is None else cap * np.tanh(logits / cap)
            weights = np.exp(logits - logits.max())
            out[t, n] = weights @ v[seen, n // 2] / weights.sum()
    return out.reshape(T, -1) @ np.asarray(layer.out[...], np.float64)


@pytest.mark.parametrize(
    ("segment", "segments", "cap"),
    [(5, None, None), (5, SEGMENTS, 2.0), (1, SEGMENTS, None), (60, None, None)],
)
def test_each_token_sees_itself_and_the_ends_of_segments(segment, segments, cap):
    cfg = config(segment, attention_soft_cap=cap)
    layer = CheckpointAttention(cfg, nnx.Rngs(0))
    x = 2 * np.random.default_rng(0).standard_normal((1, T, 32)).astype(np.float32)
    rope = rope_table(jnp.asarray(positions(segments))[None], 8, 1e4)
    got = np.asarray(jax.jit(layer)(x, rope, segments))[0]
    want = looped(layer, x, rope, segments, segment, cap)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5 * want.std())
    if segment == 60:  # no segment is whole: a token's own value
        assert checkpoints(segment, T) == 1


@pytest.mark.parametrize("segments", [None, SEGMENTS])
def test_segments_of_one_token_are_attention(segments):
    """The layer and its gradients; float32 sums in another order."""
    x = 2 * np.random.default_rng(0).standard_normal((1, T, 32)).astype(np.float32)
    rope = rope_table(jnp.asarray(positions(segments))[None], 8, 1e4)

    def loss(kind, segment):
        own = () if kind is CheckpointAttention else (None,)
        graph, state = nnx.split(kind(config(segment), nnx.Rngs(0), *own))

        def run(state, x):
            return jnp.sum(jnp.sin(3 * nnx.merge(graph, state)(x, rope, segments)))

        return jax.jit(jax.value_and_grad(run, argnums=(0, 1)))(state, x)

    dense, ones, fives = loss(Attention, 1), loss(CheckpointAttention, 1), loss(CheckpointAttention, 5)
    for ours, theirs in zip(*map(jax.tree.leaves, (ones, dense)), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4)
    assert abs(fives[0] - dense[0]) > 0.01


def test_after_windows_of_the_whole_row_segments_of_one_token_are_the_dense_model():
    """Windows before checkpoints, as one of theirs: the same weights, the same logits."""
    pattern = ["attention", "checkpoint_attention"]
    dense = validate_section("model", SHAPE)
    params = init_params(dense, 0)
    moved = {**params, "blocks": {}}
    for i, kind in enumerate(pattern):
        moved["blocks"][f"{i}_{kind}"] = jax.tree.map(lambda a, i=i: a[i : i + 1], params["blocks"])
    tokens = np.random.default_rng(0).integers(0, 31, (2, T))
    want = jax.jit(build(dense, seed=0)[0])(params, tokens)
    for segment, window, same in ((1, T, True), (1, 3, False), (4, T, False)):
        cfg = config(segment, pattern=pattern, local_window=window)
        got = jax.jit(build(cfg, seed=0)[0])(moved, tokens)
        assert (np.abs(got - want).max() < 1e-4) == same


def test_an_early_token_reaches_others_through_its_checkpoint():
    """In a layer alone what is no checkpoint is seen by nobody else."""
    layer = CheckpointAttention(config(5), nnx.Rngs(0))
    x = np.random.default_rng(0).standard_normal((1, T, 32)).astype(np.float32)
    rope = rope_table(jnp.arange(T)[None], 8, 1e4)
    run = jax.jit(layer)
    base = np.asarray(run(x, rope, None))
    for changed, reached in ((3, [3]), (4, range(4, T)), (T - 1, [T - 1])):
        other = x.copy()
        other[:, changed] += 1
        moved = np.abs(np.asarray(run(other, rope, None)) - base).max((0, 2)) > 1e-6
        assert np.nonzero(moved)[0].tolist() == list(reached)
