"""Masked diffusion: its masks, its bound on sources whose entropy is known, and training on it."""

import itertools
import math

import jax.numpy as jnp
import numpy as np
import pytest
from tiny_study import tiny_cell

from launch.planning import data_facts
from launch.preflight.cells import unseen_facts
from scaling.config import ConfigError, validate_section
from scaling.data import MaskedStream, Stream, heldout_batches, masked_draws, open_data
from scaling.data.masking import masked
from scaling.data.synthetic import make_source
from scaling.evaluate import held_out_loss
from scaling.files import CellFolder
from scaling.grid import plan
from scaling.models.lm import build
from scaling.models.loss import eval_sums
from scaling.study import validate_study
from scaling.train import train

V, MASK = 6, 6
pytestmark = pytest.mark.usefixtures("quick_compiles")
DATA = {"source": "markov", "vocab": V, "tokens": 40_000, "document": 100, "concentration": 0.3, "seq": 24}


@pytest.fixture(scope="module")
def source():
    """(the data section, its data set, the chain's transition matrix)."""
    cfg = validate_section("data", DATA)
    return cfg, open_data(cfg), make_source(cfg).rows.prob_E.reshape(V, V)


class Exact:
    """The true chance of every token given those in sight, in place of a model: a chain's, both ways."""

    soft_cap = None

    def __init__(self, transition_VV):
        powers = [np.eye(V)]
        for _ in range(40):
            powers.append(powers[-1] @ transition_VV)
        self.powers = np.array(powers)

    def features(self, params, inputs_BT, segments_BT, positions_BT, *, training):
        log = np.full((*inputs_BT.shape, V + 1), -100.0)
        for b, i in np.ndindex(inputs_BT.shape):
            left = next((j for j in range(i - 1, -1, -1) if inputs_BT[b, j] != MASK), None)
            if positions_BT[b, i] == 0 or left is None:
                continue  # in sight, and before it nothing is hidden
            chance = self.powers[i - left][inputs_BT[b, left]]
            for j in range(i + 1, inputs_BT.shape[1]):
                if segments_BT[b, j] != segments_BT[b, i]:
                    break
                if inputs_BT[b, j] != MASK:
                    chance = chance * self.powers[j - i][:, inputs_BT[b, j]]
                    break
            log[b, i, :V] = np.log(chance / chance.sum())
        return jnp.asarray(log, jnp.float32), jnp.eye(V + 1), None


def surprise(batch, transition_VV):
    """Nats of all counted tokens of a batch, each after the one before it: what the chain itself gives."""
    before, now = batch["inputs"][:, :-1], batch["inputs"][:, 1:]
    counted = batch["positions"][:, 1:] > 0
    return -np.sum(np.log(transition_VV[before, now]), where=counted), counted.sum()


def test_over_all_masks_the_true_denoiser_attains_the_rows_own_surprise(source):
    """Every k and every order of four tokens: the chain rule in every order, weighed n/k, nothing drawn."""
    _, _, transition = source
    row = np.array([[2, 0, 5, 5, 1]], np.int32)
    orders = list(itertools.permutations(range(4)))
    B = 4 * len(orders)
    noise = 2 * np.array([[9, *order] for _ in range(4) for order in orders], np.uint64)
    times = np.repeat([0.1, 0.3, 0.6, 0.9], len(orders))  # k from 1 to 4
    batch = {
        "inputs": np.repeat(row, B, 0),
        "segment_ids": np.ones((B, 5), np.int32),
        "positions": np.repeat(np.arange(5, dtype=np.int32)[None], B, 0),
    }
    hidden = masked(batch, times, noise, MASK)
    assert sorted(set((hidden["inputs"] == MASK).sum(1))) == [1, 2, 3, 4]
    nats, tokens = eval_sums(Exact(transition), None, hidden)
    want, count = surprise({k: v[:1] for k, v in batch.items()}, transition)
    # float32 logarithms, 96 rows
    assert np.mean(nats) == pytest.approx(want, rel=1e-5) and (np.asarray(tokens) == count).all()


def test_on_a_markov_source_the_true_denoiser_attains_the_entropy_and_a_worse_one_lies_above(source):
    _, dataset, transition = source
    batches = heldout_batches(dataset.heldout, 24, 20, 60)
    nats, tokens = np.sum([surprise(b, transition) for b in batches], axis=0)
    draws = masked_draws(batches, 8, MASK)
    exact = Exact(transition)
    score = held_out_loss(lambda p, b: eval_sums(exact, p, b), None, draws, 1.0, 8)
    assert score["eval_tokens"] == tokens and score["eval_sequences"] == 60
    # 480 masks of 60 rows: the draws' own error is below that of the rows, which both share
    assert abs(score["loss"] - nats / tokens) < 2 * score["loss_stderr"]
    assert abs(score["loss"] - dataset.entropy_rate) < 4 * score["loss_stderr"]
    # one that takes the chain to be half as certain as it is: the bound rises by its divergence
    blurred = Exact(0.5 * transition + 0.5 / V)
    worse = held_out_loss(lambda p, b: eval_sums(blurred, p, b), None, draws, 1.0, 8)["loss"]
    assert worse > score["loss"] + 3 * score["loss_stderr"]


def test_masks_are_a_function_of_seed_step_and_row(source):
    _, dataset, _ = source
    stream = MaskedStream(dataset.train, 24, 8, 3, mask_token=MASK)
    again, other = (MaskedStream(dataset.train, 24, 8, s, mask_token=MASK) for s in (3, 4))
    plain = Stream(dataset.train, 24, 8, 3)
    whole = stream.batch_at(5)
    for part in (slice(0, 3), slice(3, 8), slice(8, 8)):
        for key, value in again.batch_at(5, part).items():
            np.testing.assert_array_equal(value, whole[key][part])
    assert (other.batch_at(5)["weights"] != whole["weights"]).any()
    assert (stream.batch_at(6)["weights"] != whole["weights"]).any()
    np.testing.assert_array_equal(whole["targets"], plain.batch_at(5)["inputs"])
    hidden = whole["inputs"] == MASK
    np.testing.assert_array_equal(whole["inputs"][~hidden], whole["targets"][~hidden])
    np.testing.assert_array_equal(hidden, whole["weights"] > 0)
    assert (
        not hidden[whole["positions"] == 0].any() and (whole["loss_mask"] == (whole["positions"] > 0)).all()
    )
    # every row weighs as many tokens as it counts
    np.testing.assert_allclose(whole["weights"].sum(1), whole["loss_mask"].sum(1), rtol=1e-6)


def test_times_are_even_over_a_batch_and_every_token_is_hidden_as_often(source):
    _, dataset, _ = source
    stream = MaskedStream(dataset.train, 24, 8, 0, mask_token=MASK)
    shares, often, seen = [], np.zeros(24), np.zeros(24)
    for step in range(300):
        batch = stream.batch_at(step)
        hidden, counted = batch["inputs"] == MASK, batch["loss_mask"] > 0
        share = np.sort(hidden.sum(1) / counted.sum(1))
        # one time in each eighth, moved by at most 1/n, n >= 22, and turned round as a whole
        assert np.diff(share).max() < 1 / 8 + 2 / 21
        shares.append(share)
        often, seen = often + hidden.sum(0), seen + counted.sum(0)
    # k is uniform in 1 .. n: its share has the mean (n + 1) / 2n
    assert np.mean(shares) == pytest.approx(0.522, abs=0.005)
    # about 2,400 times each at a chance of 0.52: a standard error of 0.01
    np.testing.assert_allclose(often[1:] / seen[1:], 0.522, atol=0.05)


def test_a_model_sees_both_ways():
    cell = tiny_cell("/nowhere", model={"objective": "masked_diffusion", "vocab": 257})
    apply, params = build(cell["model"], seed=0)
    tokens = np.arange(12)[None] % 7
    moved = np.where(np.arange(12) == 11, 9, tokens)
    assert np.abs(apply(params, moved) - apply(params, tokens))[0, 0].max() > 1e-3
    causal, params = build({**cell["model"], "objective": "next_token"}, seed=0)
    assert np.abs(causal(params, moved) - causal(params, tokens))[0, :11].max() == 0


def test_a_trained_model_lies_between_the_entropy_and_what_single_tokens_give(source, tmp_path):
    cfg, dataset, _ = source
    cell = {
        "model": {"d_model": 32, "layers": 2, "heads": 2, "kv_heads": 2, "head_dim": 16, "ffn_dim": 64,
                  "vocab": V + 1, "objective": "masked_diffusion"},
        "data": {k: v for k, v in cfg.items() if v is not None}, "optim": {"lr": 1e-2},
        "schedule": {"warmup_steps": 10}, "train": {"batch": 16, "steps": 250},
        "eval": {"sequences": 60, "draws": 4},
    }  # fmt: skip
    result = train(cell, CellFolder(tmp_path, "c"))
    counts = np.bincount(dataset.train.rows(np.array([0]), 20_000)[0][0], minlength=V) / 20_000
    alone = -np.sum(counts * np.log(counts))
    assert result["status"] == "finished"
    assert result["loss"] > dataset.entropy_rate - 2 * result["loss_stderr"]
    # most of what neighbours tell is learnt in 250 steps
    assert result["loss"] < dataset.entropy_rate + 0.35 * (alone - dataset.entropy_rate), (
        alone,
        result["loss"],
    )


def test_a_plan_has_one_id_more_than_the_data_with_its_data_at_hand_or_not(study_config):
    study_config["model"]["objective"] = "masked_diffusion"
    config = validate_study(study_config)
    planned = plan(config, data_facts(open_data(config["data"]), 32))["cells"]
    assert {c["config"]["model"]["vocab"] for c in planned if "config" in c} == {257}
    config["model"]["vocab"] = 257
    assert plan(config, unseen_facts(config))["cells"]


def test_what_does_not_go_together(corpus, tmp_path):
    diffusion = {"objective": "masked_diffusion", "vocab": 257}
    with pytest.raises(ConfigError, match="eval.probes is True with model.objective = 'masked_diffusion'"):
        tiny_cell(corpus, model=diffusion, eval={"probes": True})
    with pytest.raises(ConfigError, match="eval.block_threshold is 0.9 with model.objective = 'masked_diff"):
        tiny_cell(corpus, model=diffusion, eval={"block_threshold": 0.9})
    with pytest.raises(ConfigError, match="eval.draws is 4 with model.objective = 'next_token'"):
        tiny_cell(corpus, eval={"draws": 4})
    short = tiny_cell(corpus, model={**diffusion, "vocab": 256})
    with pytest.raises(ConfigError, match="must be at least 257"):
        train(short, CellFolder(tmp_path, "c"))
    assert math.isfinite(train(tiny_cell(corpus, model=diffusion, train={"steps": 4}),
                               CellFolder(tmp_path, "d"))["loss"])  # fmt: skip
