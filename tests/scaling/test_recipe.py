"""The rules: each exponent is the one that is cited, and every shape can be built."""

import dataclasses
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scaling.config import ConfigError, check_model
from scaling.flops import ledger
from scaling.recipe import (
    FlopsOfSize,
    Recipe,
    batch_sequences,
    hparams,
    make_shape,
    recipe_from_config,
    shape,
)

RECIPE = Recipe(params=1e6, tokens=2e7, lr=3e-3, batch_tokens=4096, width_multiple=16, ffn_multiple=8)
MODEL = {"vocab": 256, "head_dim": 16}


def test_reference_cell_gets_its_own_values():
    hp = hparams(RECIPE, 1e6, 2e7, 4096)
    assert hp["lr"] == 3e-3 and hp["beta2"] == 0.95


@pytest.mark.parametrize(("change", "exponent"), [((4, 1, 1), -0.36), ((1, 4, 1), -0.32), ((1, 1, 4), 0.5)])
def test_learning_rate_exponents(change, exponent):
    n, d, b = change
    hp = hparams(RECIPE, 1e6 * n, 2e7 * d, 4096 * b)
    # 4 significant digits are kept
    np.testing.assert_allclose(hp["lr"] / 3e-3, 4**exponent, rtol=1e-3)


def test_timescale_of_weight_decay():
    """tau = 1 / (lr weight_decay steps), Power Lines' law in tokens per parameter."""
    for d in (2e7, 3.2e8):
        hp = hparams(RECIPE, 1e6, d, 4096)
        tau = 1 / (hp["lr"] * hp["weight_decay"] * d / 4096)
        np.testing.assert_allclose(tau, 0.224 * (d / 1e6 / 20) ** -0.527, rtol=2e-3)


def test_beta2_keeps_its_half_life_in_tokens():
    half_life = [
        b * math.log(0.5) / math.log(hparams(RECIPE, 1e6, 2e7, b)["beta2"]) for b in (1024, 4096, 16384)
    ]
    np.testing.assert_allclose(half_life, half_life[0], rtol=1e-2)


def test_warmup_bounds():
    assert hparams(RECIPE, 1e6, 2e7, 4096)["warmup_steps"] == math.ceil(1e6 / 4096)
    short = hparams(RECIPE, 1e6, 1e6, 4096)
    assert short["warmup_steps"] == math.ceil(0.1 * 1e6 / 4096)
    assert hparams(RECIPE, 1e6, 4096 * 5, 4096)["warmup_steps"] == 4


def test_batch_rule():
    assert batch_sequences(RECIPE, 2e7, 128) == 32
    wide = batch_sequences(RECIPE, 2e7 * 2 ** (2 / 0.383), 128)
    assert wide == 128
    assert batch_sequences(RECIPE, 1.0, 128) == 1
    tokens = np.geomspace(2e6, 2e12, 300)
    got = np.array([batch_sequences(RECIPE, d, 128) for d in tokens])
    rule = 32 * (tokens / 2e7) ** 0.383
    assert np.all(np.diff(got) >= 0)
    # half the gap from 2 to 3 in ratio, the widest of the ladder
    assert np.max(np.abs(np.log(got / rule))) <= np.log(1.5) / 2 + 1e-9


@settings(max_examples=60, deadline=None)
@given(st.floats(6e3, 1e9))
def test_shape_is_buildable_and_near(params):
    built = shape(RECIPE, MODEL, params, 128)
    check_model(built)
    n = ledger(built, 128).params_total
    # the coarsest place is the smallest shape: one layer more is nearly twice the parameters
    assert abs(math.log(n / params)) < math.log(1.1) or params < 2e5
    assert abs(math.log(n / params)) < math.log(1.5)


def test_shape_keeps_its_aspect():
    for params in (1e7, 1e8, 1e9):
        built = shape(RECIPE, MODEL, params, 128)
        assert 32 < built["d_model"] / built["layers"] < 128


def test_shape_refuses_what_cannot_be_built():
    with pytest.raises(ConfigError, match="params is 100; this recipe's smallest shape"):
        shape(RECIPE, MODEL, 100.0, 128)
    with pytest.raises(ConfigError, match="params is -5"):
        shape(RECIPE, MODEL, -5.0, 128)


def test_widths_that_a_layer_refuses_are_left_out():
    """Monarch matrices of four blocks: of multiples of six every other width divides, from 24 on."""
    recipe = dataclasses.replace(RECIPE, width_multiple=6, width_per_layer=12.0)
    monarch = {"vocab": 256, "family": "monarch", "monarch_blocks": 4, "head_dim": 6}
    for params in (1e4, 3e4, 1e5):
        model = shape(recipe, monarch, params, 128)
        assert model["d_model"] % 12 == 0 and model["d_model"] >= 24
        assert ledger(model, 128).params_total == pytest.approx(params, rel=0.25)  # few shapes so small
    cost, largest = FlopsOfSize(recipe, monarch, 128), ledger(model, 128)  # between shapes it interpolates
    assert cost(largest.params_total, 1.0) == pytest.approx(largest.train_flops_per_token(), rel=0.05)
    with pytest.raises(ConfigError, match="smallest shape .d_model 24, 1 layer. has"):
        shape(recipe, monarch, 100, 128)
    with pytest.raises(ConfigError, match="monarch_blocks is 1000"):
        shape(recipe, {**monarch, "monarch_blocks": 1000}, 1e4, 128)


def test_kv_group():
    grouped = Recipe(params=1e6, tokens=2e7, lr=3e-3, batch_tokens=4096, width_multiple=64, kv_group=4)
    built = make_shape(grouped, MODEL, 128, 2)
    assert built["heads"] == 8 and built["kv_heads"] == 2
    check_model(built)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({}, "recipe.params is missing"),
        ({"params": 1, "tokens": 1, "lr": -1, "batch_tokens": 1}, "recipe.lr is -1"),
        ({"params": 1, "tokens": 1, "lr": 1, "batch_tokens": 1, "lrr": 1}, "did you mean 'lr'"),
        ({"params": 1, "tokens": 1, "lr": 1, "batch_tokens": 1, "min_batch": 1.5}, "min_batch is 1.5"),
    ],
)
def test_bad_recipes(config, words):
    with pytest.raises(ConfigError, match=words):
        recipe_from_config(config)


def test_flops_of_size_meets_the_ledger_at_its_shapes():
    flops = FlopsOfSize(RECIPE, MODEL, 128)
    for width in (16, 64, 256, 1024):
        account = ledger(make_shape(RECIPE, MODEL, width, max(1, round(width / 64))), 128)
        got = flops(account.params_total, 1e6) / account.train_flops(1e6)
        # between neighbouring widths the aspect changes: a few per cent
        np.testing.assert_allclose(got, 1, atol=0.05)
    n = np.geomspace(1e3, 1e12, 200)
    assert np.all(np.diff(flops(n, 1.0)) > 0)
    # far above, attention and vocabulary vanish: C/D tends to 6 N from above
    assert 1 < flops(1e12, 1.0) / 6e12 < 1.02
