"""FlexPrefill's blocks: both patterns and the choice between them, written out in loops in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tiny_study import tiny_cell

from scaling.config import ConfigError, validate_section
from scaling.files import CellFolder
from scaling.models.attention import Attention, rope_table
from scaling.models.block_choice import XAttention
from scaling.models.flex_prefill import FlexPrefill, block_choice
from scaling.models.lm import init_params, make_apply
from scaling.train import train

pytestmark = pytest.mark.usefixtures("quick_compiles")
B, T, BLOCK, CUT = 2, 52, 8, 21  # neither divides into blocks
BLOCKS = -(-T // BLOCK)
SEGMENTS = np.broadcast_to(np.where(np.arange(T) < CUT, 1, 2), (B, T)).astype(np.int32)


def queries_and_keys(seed=0, size=2.0):
    rng = np.random.default_rng(seed)
    q, k = (size * rng.standard_normal((B, T, n, 8)).astype(np.float32) for n in (4, 2))
    return q, k


def softmax(x):
    weights = np.exp(np.array(x) - max(x))
    return weights / weights.sum()


def fewest(weights, threshold):
    """Indices of the largest until they hold the threshold."""
    chosen, held = [], 0.0
    for i in sorted(range(len(weights)), key=lambda i: -weights[i]):
        if held < threshold * sum(weights):
            chosen.append(i)
            held += weights[i]
    return chosen


def oracle(q, k, ids, window, threshold, divergence):
    """Of one row and head: the blocks kept, whether its queries are looked at, a token or block at a time."""
    q, k = q.astype(np.float64) / np.sqrt(8), k.astype(np.float64)
    sees = lambda t, s: s <= t and ids[t] == ids[s] and (window is None or t - s < window)  # noqa: E731
    spans = [range(i * BLOCK, min(T, (i + 1) * BLOCK)) for i in range(BLOCKS)]
    there = np.array([[any(sees(t, s) for t in row for s in column) for column in spans] for row in spans])
    last = range(T - BLOCK, T)
    true = np.zeros((T, T))
    for t in last:
        true[t] = softmax([q[t] @ k[s] if sees(t, s) else -np.inf for s in range(T)])
    means = [k[span].mean(0) for span in map(list, spans)]
    seen = [any(sees(t, s) for t in last for s in span) for span in spans]
    by_means = softmax(
        [q[list(last)].mean(0) @ mean if ok else -np.inf for mean, ok in zip(means, seen, strict=True)]
    )
    by_tokens = np.array([true[:, list(span)].sum() / BLOCK for span in spans])
    middle = (by_means + by_tokens) / 2
    both = sum(x[x > 0] @ np.log(x[x > 0] / middle[x > 0]) / 2 for x in (by_means, by_tokens))
    aware = np.sqrt(max(both, 0)) < divergence

    kept = there & (np.eye(BLOCKS, dtype=bool) | (np.arange(BLOCKS) == 0))
    scores = np.full((BLOCKS, BLOCKS), -np.inf)
    for i, j in zip(*np.nonzero(there), strict=True):
        scores[i, j] = q[list(spans[i])].mean(0) @ means[j]
    by_map = fewest(np.concatenate([softmax(row) for row in scores]), threshold)
    columns = fewest(true.sum(0), threshold)
    diagonals = fewest([np.trace(true, -offset) for offset in range(T)], threshold)
    for i in range(BLOCKS):
        judged = ids[spans[i][-1]] in [ids[t] for t in last]
        for j in range(BLOCKS):
            if aware or not judged:
                kept[i, j] |= i * BLOCKS + j in by_map and there[i, j]
                continue
            crossed = any(s in columns for s in spans[j]) or any(
                t - s in diagonals for t in range(i * BLOCK, (i + 1) * BLOCK) for s in
                range(j * BLOCK, (j + 1) * BLOCK)
            )  # fmt: skip
            kept[i, j] |= crossed and there[i, j]
    return kept, aware


@pytest.mark.parametrize(("window", "segments"), [(None, None), (11, SEGMENTS), (None, SEGMENTS)])
def test_blocks_are_those_of_the_loops(window, segments):
    q, k = queries_and_keys()
    q[:, :, 0], k[:, :, 0] = q[:, :, 0] / 40, k[:, :, 0] / 4  # two heads near flat, whose means are right
    ids = np.ones((B, T), np.int32) if segments is None else segments
    for threshold, divergence in ((0.5, 0.3), (0.9, 0.3), (0.9, 0.0), (0.7, 1.0)):
        rule = FlexPrefill(threshold, BLOCK, divergence)
        chosen, aware = jax.jit(functools.partial(rule, window=window))(q, k, segments), []
        for b in range(B):
            for n in range(4):
                want, own = oracle(q[b, :, n], k[b, :, n // 2], ids[b], window, threshold, divergence)
                np.testing.assert_array_equal(chosen[b, n], want, err_msg=f"{threshold} {divergence} {b} {n}")
                aware.append(own)
        few = {0.0: (0, 0), 1.0: (B * 4, B * 4)}.get(divergence, (1, B * 4 - 1))  # both kinds are met
        assert few[0] <= sum(aware) <= few[1]


@pytest.mark.parametrize("window", [None, 11])
def test_a_threshold_of_one_is_attention(window):
    shape = {"d_model": 32, "layers": 1, "heads": 4, "kv_heads": 2, "head_dim": 8, "ffn_dim": 24, "vocab": 31}
    cfg = validate_section("model", {**shape, "local_window": window})
    x = np.random.default_rng(0).standard_normal((B, T, 32)).astype(np.float32)
    rope = rope_table(jnp.broadcast_to(jnp.arange(T), (B, T)), 8, 1e4)
    dense = jax.jit(Attention(cfg, nnx.Rngs(0), window))(x, rope, SEGMENTS)

    def run(*values):
        layer = Attention({**cfg, "blocks": FlexPrefill(*values)}, nnx.Rngs(0), window)
        return jax.jit(layer)(x, rope, SEGMENTS)

    # every block is computed, whatever the pattern would be; float32 sums in another order
    behind = np.subtract.outer(np.arange(T), np.arange(T))
    pairs = (behind >= 0) & (behind < (window or T)) & (SEGMENTS[0][:, None] == SEGMENTS[0])
    square = np.pad(pairs, (0, -T % BLOCK)).reshape(BLOCKS, BLOCK, BLOCKS, BLOCK).any((1, 3))
    q, k = queries_and_keys()
    for divergence in (0.0, 1.0):
        chosen = FlexPrefill(1.0, BLOCK, divergence)(q, k, SEGMENTS, window=window)
        np.testing.assert_array_equal(chosen, np.broadcast_to(square, chosen.shape))
        np.testing.assert_allclose(run(1.0, BLOCK, divergence), dense, rtol=1e-5, atol=1e-6)
    assert np.abs(run(0.3, BLOCK, 0.0) - dense).max() > 0.01


def test_each_head_has_its_own_pattern():
    """One head attends to one token and to the one before; one looks for passages of whole blocks."""
    rows = 48
    q, k = np.zeros((1, rows, 2, 64), np.float32), np.zeros((1, rows, 2, 64), np.float32)
    at = np.arange(rows)
    # head 0: to token 19 (channel 63) and to its predecessor (a channel each)
    q[0, at, 0, at], k[0, at[:-1], 0, at[1:]] = 60.0, 1.0
    q[0, :, 0, 63], k[0, 19, 0, 63] = 60.0, 1.0
    # head 1: block 5 looks for block 2, block 4 for block 1, all of it
    for row, column in ((5, 2), (4, 1)):
        q[0, row * 8 : row * 8 + 8, 1, row], k[0, column * 8 : column * 8 + 8, 1, row] = 40.0, 1.0
    kept = np.asarray(jax.jit(FlexPrefill(0.45, 8, 0.1))(q, k))[0]
    own = np.eye(6, dtype=bool) | (np.arange(6) == 0)
    line = np.tri(6, dtype=bool) & ((np.arange(6) == 2) | (np.subtract.outer(at[:6], at[:6]) < 2))
    np.testing.assert_array_equal(kept[0], np.tri(6, dtype=bool) & own | line)
    assert kept[1, 5].tolist() == [True, False, True, False, False, True]
    assert kept[1, 4].tolist() == [True, True, False, False, True, False]


def test_a_record_has_the_loss_by_the_choice_that_its_cell_names(corpus, tmp_path):
    settings = {"block_threshold": 0.3, "block": 8, "block_choice": "flexprefill"}
    cell = tiny_cell(corpus, eval=settings)
    assert block_choice(cell["eval"]) == FlexPrefill(0.3, 8, 0.1)
    assert block_choice({**cell["eval"], "block_choice": "xattention"}) == XAttention(0.3, 8)
    score = train(cell, CellFolder(tmp_path, "c"))["evals"][-1]
    assert abs(score["block_loss"] - score["loss"]) > 1e-5


def test_a_compiled_model_and_bad_values():
    cfg = validate_section("model", {"d_model": 32, "layers": 2, "heads": 4, "kv_heads": 2, "head_dim": 8,
                                     "ffn_dim": 24, "vocab": 31})  # fmt: skip
    params, tokens = init_params(cfg, 0), np.random.default_rng(0).integers(0, 31, (B, T))
    dense, whole, half = (
        np.asarray(jax.jit(make_apply(cfg, blocks=blocks))(params, tokens, SEGMENTS))
        for blocks in (None, FlexPrefill(1.0, 8), FlexPrefill(0.5, 8))
    )
    np.testing.assert_allclose(whole, dense, rtol=1e-4, atol=1e-5)
    assert 0.01 < np.sqrt(np.mean((half - dense) ** 2)) < dense.std()
    for values, words in (
        ((0.0,), "threshold is 0.0"),
        ((0.5, 0), "block is 0"),
        ((0.5, 8, 1.5), "divergence is 1.5"),
    ):
        with pytest.raises(ConfigError, match=words):
            FlexPrefill(*values)
