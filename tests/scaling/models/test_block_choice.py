"""Blocks that evaluation computes: scores tile by tile, the fewest that hold the threshold, all at 1."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tiny_study import tiny_cell

from scaling.config import ConfigError, validate_cell, validate_section
from scaling.files import CellFolder
from scaling.models.attention import Attention, rope_table
from scaling.models.block_choice import XAttention
from scaling.models.lm import init_params, make_apply
from scaling.records import COLUMNS
from scaling.train import train

pytestmark = pytest.mark.usefixtures("quick_compiles")
BASE = {"d_model": 32, "layers": 1, "heads": 4, "kv_heads": 2, "head_dim": 8, "ffn_dim": 24, "vocab": 31}
B, T, CUT = 2, 52, 21  # neither divides into blocks of 8
SEGMENTS = np.broadcast_to(np.where(np.arange(T) < CUT, 1, 2), (B, T)).astype(np.int32)


def queries_and_keys(seed=0, size=3.0):
    rng = np.random.default_rng(seed)
    q, k = (size * rng.standard_normal((B, T, n, 8)).astype(np.float32) for n in (4, 2))
    return q, k


def masses(q, k, segments, window, block=8, stride=4):
    """Of one row and head, a tile and an antidiagonal entry at a time, in float64."""
    tiles = -(-T // block) * block // stride
    pad = tiles * stride - T
    q, k = (np.pad(a.astype(np.float64), ((0, pad), (0, 0))) for a in (q, k))
    ids = np.pad(segments, (0, pad), constant_values=-1)
    weights = np.zeros((tiles, tiles))
    for g in range(tiles):
        for j in range(g + 1):
            rows, columns = g * stride + np.arange(stride), j * stride + np.arange(stride)
            shared = set(ids[rows]) & set(ids[columns])
            near = window is None or rows[0] - columns[-1] < window
            if shared and near:
                score = np.mean([q[rows[stride - 1 - r]] @ k[columns[r]] for r in range(stride)])
                weights[g, j] = np.exp(score / np.sqrt(8))
    weights /= weights.sum(1, keepdims=True)
    weights[np.arange(tiles) * stride >= T] = 0
    n = block // stride
    mass = weights.reshape(tiles // n, n, tiles // n, n).sum((1, 3))
    return mass / mass.sum(1, keepdims=True)


@pytest.mark.parametrize(("window", "segments"), [(None, None), (11, SEGMENTS), (None, SEGMENTS)])
def test_fewest_blocks_that_hold_the_threshold(window, segments):
    q, k = queries_and_keys()
    ids = np.ones((B, T), np.int32) if segments is None else segments
    for threshold in (0.5, 0.9, 1.0):
        chosen = np.asarray(XAttention(threshold, 8, 4)(q, k, segments, window=window))
        fewer = 0
        for b in range(B):
            for n in range(4):
                mass = masses(q[b, :, n], k[b, :, n // 2], ids[b], window)
                for i, (kept, row) in enumerate(zip(chosen[b, n], mass, strict=True)):
                    assert kept[i] and not kept[row == 0].any()
                    if threshold == 1:
                        assert kept.sum() == (row > 0).sum()
                        continue
                    fewer += (row > 0).sum() - kept.sum()
                    assert row[kept].sum() >= threshold - 1e-5  # float32 sums
                    needed = np.sort(row)[::-1]
                    count = 1 + int(np.searchsorted(np.cumsum(needed), threshold))
                    assert kept.sum() in (count, count + 1)  # its own block besides
                    if kept.sum() > count:
                        assert row[i] < needed[count - 1]
        assert threshold == 1 or fewer > 10


@pytest.mark.parametrize("window", [None, 11])
def test_a_threshold_of_one_is_attention(window):
    cfg = validate_section("model", {**BASE, "local_window": window})
    x = np.random.default_rng(0).standard_normal((B, T, 32)).astype(np.float32)
    rope = rope_table(jnp.broadcast_to(jnp.arange(T), (B, T)), 8, 1e4)
    dense = Attention(cfg, nnx.Rngs(0), window)(x, rope, SEGMENTS)
    run = lambda t: Attention({**cfg, "blocks": XAttention(t, 8, 4)}, nnx.Rngs(0), window)(x, rope, SEGMENTS)  # noqa: E731
    np.testing.assert_allclose(run(1.0), dense, rtol=1e-5, atol=1e-6)
    assert np.abs(run(0.5) - dense).max() > 0.01


def test_a_far_block_that_matters_is_kept():
    """Every query of the last block looks for one passage, four blocks before."""
    q, k = np.zeros((1, 48, 1, 8), np.float32), np.zeros((1, 48, 1, 8), np.float32)
    q[:, 40:, :, 0], k[:, 8:16, :, 0] = 5.0, 5.0
    kept = np.asarray(XAttention(0.9, 8, 4)(q, k))[0, 0]
    assert kept[5].tolist() == [False, True, False, False, False, True]
    # where nothing stands out, nine tenths of the blocks before
    assert kept[4].all(where=np.arange(6) < 5)


def test_a_model_evaluated_by_blocks():
    cfg = validate_section("model", {**BASE, "layers": 2})
    params = init_params(cfg, 0)
    tokens = np.random.default_rng(0).integers(0, 31, (B, T))
    logits = {
        t: np.asarray(jax.jit(make_apply(cfg, blocks=t and XAttention(t, 8, 4)))(params, tokens, SEGMENTS))
        for t in (None, 0.5, 1.0)
    }
    np.testing.assert_allclose(logits[1.0], logits[None], rtol=1e-4, atol=1e-5)
    # half of what an untrained model attends to, which is flat; seen 0.6
    assert 0.1 < np.sqrt(np.mean((logits[0.5] - logits[None]) ** 2)) < logits[None].std()
    routed = validate_section("model", {**BASE, "family": "mixture_of_depths"})
    with pytest.raises(ConfigError, match="blocks are given for a model whose layers choose tokens"):
        make_apply(routed, blocks=XAttention(0.5))


@pytest.mark.parametrize(
    ("values", "words"),
    [((0.0,), "threshold is 0.0"), ((1.2,), "threshold is 1.2"), ((0.5, 12, 8), "block is 12 with stride 8")],
)
def test_bad_choices(values, words):
    with pytest.raises(ConfigError, match=words):
        XAttention(*values)


def test_a_record_has_the_loss_by_blocks_at_its_last_evaluation(corpus, tmp_path):
    losses = {}
    for threshold in (0.3, 1.0):
        settings = {"block_threshold": threshold, "block": 8}
        folder = CellFolder(tmp_path, str(threshold))
        first, losses[threshold] = train(tiny_cell(corpus, eval=settings), folder)["evals"]
        assert "block_loss" not in first and "block_loss" in COLUMNS
    assert losses[0.3]["loss"] == losses[1.0]["loss"]
    assert losses[1.0]["block_loss"] == pytest.approx(losses[1.0]["loss"], rel=1e-6)
    assert abs(losses[0.3]["block_loss"] - losses[1.0]["loss"]) > 1e-5


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"eval": {"block_threshold": 1.5}}, "eval.block_threshold is 1.5"),
        ({"eval": {"block": 64}}, "eval.block is 64 without eval.block_threshold"),
        ({"eval": {"block_choice": "flexprefill"}}, "eval.block_choice is 'flexprefill' without"),
        (
            {"eval": {"block_divergence": 0.2, "block_threshold": 0.5}},
            "eval.block_divergence is 0.2 with eval.block_choice = 'xattention'",
        ),
        ({"eval": {"block": 12, "block_threshold": 0.5}}, "eval.block is 12"),
        ({"model": {"family": "min_gru"}, "eval": {"block_threshold": 0.5}}, "for models with attention"),
        ({"model": {"family": "scout"}, "eval": {"block_threshold": 0.5}}, "see checkpoints alone"),
        ({"model": {"family": "mixture_of_depths"}, "eval": {"block_threshold": 0.5}}, "choose tokens"),
    ],
)
def test_bad_settings(corpus, changes, words):
    with pytest.raises(ConfigError, match=words):
        validate_cell(tiny_cell(corpus, **changes))
