"""Cross-entropy, z-loss and evaluation sums against NumPy float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from scaling.models.loss import eval_sums, loss_fn

B, T, V = 3, 7, 11
RNG = np.random.default_rng(0)
LOGITS = (3 * RNG.standard_normal((B, T, V))).astype(np.float32)
MASK = np.ones((B, T), np.float32)
MASK[0, 4:] = 0
MASK[2] = 0
BATCH = {
    "inputs": np.zeros((B, T), np.int32),
    "targets": RNG.integers(0, V, (B, T)).astype(np.int32),
    "segment_ids": np.ones((B, T), np.int32),
    "positions": np.arange(T, dtype=np.int32)[None].repeat(B, 0),
    "loss_mask": MASK,
}


class apply:
    """A model whose parameters are its logits."""

    soft_cap = None

    @staticmethod
    def features(params, inputs, segment_ids, positions, training):
        return params, jnp.eye(V), None


def expected(logits=LOGITS, mask=MASK):
    """Cross-entropies and log Z in float64."""
    x = np.asarray(logits, np.float64)
    log_z = np.log(np.exp(x - x.max(-1, keepdims=True)).sum(-1)) + x.max(-1)
    return log_z - np.take_along_axis(x, BATCH["targets"][..., None], -1)[..., 0], log_z


def test_mean_over_the_mask_and_z_loss():
    nats, log_z = expected()
    loss, aux = loss_fn(apply, LOGITS, BATCH, 0.25)
    mean, z = (nats * MASK).sum() / MASK.sum(), 0.25 * (log_z**2 * MASK).sum() / MASK.sum()
    # Float32 sums of 11 positive terms.
    np.testing.assert_allclose(float(aux["nats"]), mean, rtol=1e-6)
    np.testing.assert_allclose(float(aux["z_loss"]), z, rtol=1e-6)
    np.testing.assert_allclose(float(loss), mean + z, rtol=1e-6)
    assert float(aux["tokens"]) == MASK.sum()


def test_gradient_is_probabilities_minus_target_and_zero_off_the_mask():
    _, log_z = expected()
    gradient = jax.grad(lambda x: loss_fn(apply, x, BATCH, 0.25)[0])(LOGITS)
    probs = np.exp(LOGITS - log_z[..., None])
    onehot = np.eye(V)[BATCH["targets"]]
    scale = (MASK / MASK.sum())[..., None]
    by_hand = scale * (probs - onehot + 0.25 * 2 * log_z[..., None] * probs)
    np.testing.assert_allclose(np.asarray(gradient), by_hand, rtol=1e-5, atol=1e-7)
    assert np.all(np.asarray(gradient)[MASK == 0] == 0)


def test_evaluation_sums_are_per_sequence_and_padding_drops_out():
    nats, _ = expected()
    sums, tokens = eval_sums(apply, LOGITS, BATCH)
    np.testing.assert_allclose(np.asarray(sums), (nats * MASK).sum(-1), rtol=1e-6)
    np.testing.assert_array_equal(np.asarray(tokens), MASK.sum(-1))
    assert sums[2] == 0 and tokens[2] == 0
    np.testing.assert_allclose(
        float(np.sum(sums) / np.sum(tokens)), float(loss_fn(apply, LOGITS, BATCH, 0.0)[0]), rtol=1e-6
    )


def test_huge_logits_do_not_overflow():
    logits = LOGITS * 1e15
    loss, _ = loss_fn(apply, logits, BATCH, 0.0)
    nats, _ = expected(logits)
    np.testing.assert_allclose(float(loss), (nats * MASK).sum() / MASK.sum(), rtol=1e-5)


@pytest.mark.parametrize("where", [(0, 0), (1, 6)])
def test_a_nan_logit_makes_the_loss_nan(where):
    logits = LOGITS.copy()
    logits[where][3] = np.nan
    assert np.isnan(float(loss_fn(apply, logits, BATCH, 0.0)[0]))


def test_a_batch_without_a_token_has_no_mean():
    empty = {**BATCH, "loss_mask": np.zeros((B, T), np.float32)}
    assert np.isnan(float(loss_fn(apply, jnp.asarray(LOGITS), empty, 0.0)[0]))
