"""Parametrizations: each rule against its closed form, and the coordinate check on real training steps."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from all_but import slow_but
from flax import nnx

from scaling.config import SCHEMA, ConfigError, validate_cell, validate_section
from scaling.coordinates import activations, random_batch, sizes, slope
from scaling.flops import ledger
from scaling.grid import plan
from scaling.models.lm import abstract_params, build, init_params
from scaling.optim import hyper_parameters, make_optimizer
from scaling.parametrization import Ratios, attention_scale, fold, update_scales
from scaling.program import Static, first_state, step_function
from scaling.recipe import Recipe, for_parametrization, shape
from scaling.study import validate_study

pytestmark = pytest.mark.usefixtures("quick_compiles")
BASE = {"base_d_model": 32, "base_layers": 2}


def model(name="completep", d_model=32, layers=2, **changes):
    """A model with heads of 16 channels; the base is width 32, 2 layers."""
    heads = d_model // changes.get("head_dim", 16)
    base = {"standard": {}, "mup": {"base_d_model": 32}, "completep": BASE}[name]
    fields = {"heads": heads, "kv_heads": heads, "head_dim": 16, "ffn_dim": d_model * 5 // 2, "vocab": 64}
    sizes = {"d_model": d_model, "layers": layers, "parametrization": name}
    return validate_section("model", {**fields, **sizes, **base, **changes})


def cell(cfg, **optim):
    return validate_cell(
        {
            "model": cfg,
            "optim": {"lr": 0.01, **optim},
            "schedule": {"name": "constant", "warmup_steps": 0},
            "train": {"batch": 2, "steps": 4},
        }
    )


def named(tree):
    """The leaves of a tree by dotted path."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {".".join(k.key for k in path): leaf for path, leaf in leaves}


def test_at_the_base_shape_every_parametrization_is_the_standard_one_bit_for_bit():
    """The same initial bits, and the same program: its text as handed to the compiler."""
    texts, params = [], []
    for name in ("standard", "mup", "completep"):
        c = cell(model(name, tied=False))
        static, hp = Static.of(c), hyper_parameters(c)
        params.append(init_params(c["model"], 3))
        state = jax.eval_shape(lambda hp, static=static: first_state(static, 0, hp), hp)
        batch = random_batch(64, 2, 8, 0)
        texts.append(jax.jit(step_function(static)).lower(state, batch, hp).as_text())
        assert update_scales(c["model"], params[-1]) is None
    assert texts[0] == texts[1] == texts[2]
    for other in params[1:]:
        jax.tree.map(np.testing.assert_array_equal, params[0], other)


def test_scales_of_every_parameter():
    """Width 4 x, depth 3 x, feed-forward 5 x the base, all different so that none can stand for another."""
    cfg = model(d_model=128, layers=6, ffn_dim=400, base_ffn_dim=80, kv_heads=2, tied=False)
    scales = {k: named(v) for k, v in update_scales(cfg, abstract_params(cfg)).items()}
    by_width = [f"blocks.mixer.{k}" for k in ("q", "k", "v", "out")] + ["blocks.ffn.gate", "blocks.ffn.up"]
    lr = dict.fromkeys(by_width, 1 / 4) | {"blocks.ffn.down": 1 / 5}
    assert set(lr) < set(scales["lr"]) and {"embed.table", "head", "final_norm.scale"} < set(scales["lr"])
    for path, value in scales["lr"].items():
        assert value == lr.get(path, 1.0), path
        # decay times rate, the inverse of the timescale, is that of the base
        assert value * scales["weight_decay"][path] == pytest.approx(1, rel=1e-15)
        assert scales["eps"][path] == pytest.approx(1 / 12 if path.startswith("blocks") else 1 / 4)
    # muP knows no depth; a feed-forward whose base is not given keeps its ratio to the width
    wide = model("mup", d_model=128, layers=6, ffn_dim=400)
    scales = {k: named(v) for k, v in update_scales(wide, abstract_params(wide)).items()}
    assert scales["lr"]["blocks.ffn.down"] == scales["eps"]["blocks.ffn.down"] == 1 / 4
    with pytest.raises(ValueError, match=r"no rule .* blocks\.mixer\.gamma"):
        update_scales(cfg, {"blocks": {"mixer": {"gamma": np.ones(3)}}})


@pytest.mark.parametrize("name", ["mup", "completep"])
def test_initial_standard_deviations(name):
    cfg = model(name, d_model=128, layers=6, ffn_dim=400, kv_heads=4, tied=False, vocab=512)
    params = named(init_params(cfg, 0))
    depth, table = {"mup": (6, 32), "completep": (2, 32)}[name]
    wanted = {k: 1 / math.sqrt(128) for k in params if k.split(".")[-1] in ("q", "k", "v", "gate", "up")}
    wanted |= {"embed.table": 1 / math.sqrt(table), "head": 1 / math.sqrt(table)}
    wanted |= {"blocks.mixer.out": 1 / math.sqrt(128 * 2 * depth)}
    wanted |= {"blocks.ffn.down": 1 / math.sqrt(400 * 2 * depth)}
    for path, std in wanted.items():
        # n draws give their deviation to 1/sqrt(2 n), less for a truncated normal; five of those
        np.testing.assert_allclose(np.std(params[path]), std, rtol=5 / math.sqrt(2 * params[path].size))
    assert all("norm" in path for path in params.keys() - wanted)


def test_one_update_is_adam_with_each_parameter_s_own_numbers():
    """AdamW's first two steps, written out in float64, with an eps as large as the gradients."""
    cfg = model(d_model=128, layers=6, ffn_dim=400, base_ffn_dim=80)
    c = cell(cfg, eps=0.5, weight_decay=0.3, grad_clip=None)
    rng = np.random.default_rng(0)
    shapes = {"embed": {"table": (3, 2)}, "final_norm": {"scale": (2,)}}
    shapes["blocks"] = {"mixer": {"out": (6, 2, 2)}, "ffn": {"down": (6, 2, 3)}}

    def draw():
        return jax.tree.map(
            lambda s: rng.standard_normal(s).astype(np.float32),
            shapes,
            is_leaf=lambda x: isinstance(x, tuple),
        )

    params, grads = draw(), [draw(), draw()]
    static, hp = Static.of(c), hyper_parameters(c)
    optimizer = make_optimizer(static, hp, params)
    state, got = optimizer.init(params), params
    for g in grads:
        updates, state = optimizer.update(g, state, got)
        got = jax.tree.map(lambda p, u: p + u, got, updates)
    own = {
        "embed.table": (1, 1 / 4, 1),
        "final_norm.scale": (1, 1 / 4, 0),
        "blocks.mixer.out": (1 / 4, 1 / 12, 4),
        "blocks.ffn.down": (1 / 5, 1 / 12, 5),
    }
    first, second, got = named(grads[0]), named(grads[1]), named(got)
    for path, (lr, eps, decay) in own.items():
        p = np.float64(named(params)[path])
        mean, square = np.zeros_like(p), np.zeros_like(p)
        for t, g in enumerate((np.float64(first[path]), np.float64(second[path])), 1):
            mean, square = 0.9 * mean + 0.1 * g, 0.95 * square + 0.05 * g * g
            u = mean / (1 - 0.9**t) / (np.sqrt(square / (1 - 0.95**t)) + 0.5 * eps)
            p = p - 0.01 * lr * (u + 0.3 * decay * p)
        # float32 arithmetic, bias corrections near 1e-2: a few 1e-7 relative to entries of 1
        np.testing.assert_allclose(got[path], p, rtol=2e-6, atol=2e-6, err_msg=path)


def test_a_wider_matrix_s_update_moves_its_output_by_the_same_amount():
    """Adam's first step on x W moves the output by lr s sum |x|; s = 1/m keeps it, 1 would let it double."""
    moved, unscaled = [], []
    for d_model in (32, 64, 128):
        cfg = model("mup", d_model=d_model)
        x = np.random.default_rng(1).standard_normal(128)[:d_model].astype(np.float32)
        grad = {"blocks": {"ffn": {"gate": np.outer(x, [1.0, -2.0, 0.5]).astype(np.float32)}}}
        params = jax.tree.map(np.zeros_like, grad)
        c = cell(cfg, grad_clip=None)
        optimizer = make_optimizer(Static.of(c), hyper_parameters(c), params)
        updates, _ = optimizer.update(grad, optimizer.init(params), params)
        out = x @ np.asarray(updates["blocks"]["ffn"]["gate"])
        # eps of 1e-8 against gradients of 1e-2 and more: 1e-6
        np.testing.assert_allclose(
            out, -0.01 * 32 / d_model * np.abs(x).sum() * np.array([1, -1, 1]), rtol=1e-5
        )
        moved.append(abs(out[0]) / np.abs(x).mean())
        unscaled.append(moved[-1] * d_model / 32)
    np.testing.assert_allclose(moved, moved[0], rtol=1e-5)
    np.testing.assert_allclose(unscaled, moved[0] * np.array([1, 2, 4]), rtol=1e-5)


def test_attention_scale():
    """Twice the base's head size: half of 1/sqrt(base), not 1/sqrt of the double."""
    cfg = model("mup", d_model=64, head_dim=32, base_head_dim=16)
    assert attention_scale(cfg) == pytest.approx(1 / math.sqrt(16) / 2, rel=1e-15)
    assert attention_scale(model("mup", d_model=64)) is None and Ratios.of(model("mup", d_model=64)).head == 1


@pytest.mark.parametrize(
    "changes",
    [{}, {"tied": False, "qk_norm": False, "kv_heads": 1, "logits_soft_cap": 5.0}],
    ids=["tied", "no"],
)
def test_folded_into_the_standard_parametrization(changes):
    """The same logits from standard code; and the multipliers are really there: unfolded, they differ."""
    cfg = model(d_model=64, layers=5, head_dim=32, base_head_dim=16, **changes)
    apply, params = build(cfg, seed=0)
    usual, folded = fold(cfg, params)
    assert {usual[k] for k in usual if k.startswith("base_")} == {None} and usual[
        "parametrization"
    ] == "standard"
    inputs = np.random.default_rng(0).integers(0, 64, (2, 9)).astype(np.int32)
    standard = jax.jit(build(validate_section("model", usual), seed=0)[0])
    wanted = jax.jit(apply)(params, inputs)
    # the same products in another order of rounding
    np.testing.assert_allclose(standard(folded, inputs), wanted, atol=2e-6, rtol=2e-5)
    assert float(jnp.max(jnp.abs(standard(params, inputs) - wanted))) > 0.05


PATTERNS = {
    "every feed-forward": {
        "pattern": ["attention", "mlstm+moe", "full_attention+memory", "rglru+monarch", "mamba2+geglu"],
        **{"shared_experts": 1, "memory_keys": 6, "memory_top": 4, "experts": 3, "capacity_factor": 1.5},
    },
    "a norm after": {"pattern": ["attention+moe", "min_gru"], "post_norm": True, "qk_norm": False},
    "choosing": {"pattern": ["mosa", "routed:differential_attention", "selective_attention"]},
    "one kind": {"pattern": ["mlstm+monarch"]},
}


@pytest.mark.parametrize("name", slow_but(("one kind",), PATTERNS))
def test_patterns_are_folded_too(name):
    """Each kind of layer, whatever its last matrix is called; a layer more than whole patterns have."""
    pattern = PATTERNS[name]["pattern"]
    changes = {"family": "hybrid", "head_dim": 32, "base_head_dim": 16, "layers": len(pattern) + 1}
    cfg = model(d_model=64, **changes, **PATTERNS[name])
    apply, params = build(cfg, seed=0)
    # gains are one at first, whoever multiplies them
    shaken = jax.tree.map(lambda a: a + 0.05 * jnp.sin(jnp.arange(a.size)).reshape(a.shape), params)
    usual, folded = fold(cfg, shaken)
    inputs = np.random.default_rng(0).integers(0, 64, (2, 9)).astype(np.int32)
    standard = jax.jit(build(validate_section("model", usual), seed=0)[0])
    wanted = jax.jit(apply)(shaken, inputs)
    # the same products in another order of rounding, through more layers
    np.testing.assert_allclose(standard(folded, inputs), wanted, atol=2e-5, rtol=1e-4)
    assert float(jnp.max(jnp.abs(standard(shaken, inputs) - wanted))) > 0.02


def test_queries_of_length_one_are_not_folded():
    cfg = model(family="gated_deltanet", d_model=64, head_dim=32, base_head_dim=16)
    with pytest.raises(ValueError, match="model.base_head_dim is 16 with head_dim 32 beside .gated_delta"):
        fold(cfg, init_params(cfg, 0))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"parametrization": "mup"}, "model.base_d_model is None; .*'mup' needs a positive integer"),
        ({"parametrization": "completep", "base_d_model": 8}, "model.base_layers is None"),
        ({"base_d_model": 8}, "model.base_d_model is 8; .*'standard' does not read it"),
        ({"parametrization": "mup", "base_d_model": 8, "base_layers": 2}, "model.base_layers is 2; .*'mup'"),
        ({"parametrization": "ntk"}, "one of 'standard', 'mup', 'completep'"),
    ],
)
def test_config_errors(fields, message):
    plain = {k: v for k, v in model("standard").items() if not k.startswith("base_")}
    with pytest.raises(ConfigError, match=message):
        validate_section("model", {**plain, **fields})


def test_multipliers_cost_no_flops_and_no_parameters():
    wide = model("completep", d_model=64, layers=6)
    usual = {k: v for k, v in wide.items() if k in SCHEMA["model"] and not SCHEMA["model"][k].later}
    a, b = ledger(wide, 32), ledger(usual, 32)
    assert a.entries == b.entries


def test_recipe_under_a_parametrization():
    """No power of N in the rate; the base is the reference cell's shape, so the reference stays itself."""
    rules = {"params": 33e3, "tokens": 1e6, "lr": 4e-3, "batch_tokens": 1024}
    rules |= {"width_multiple": 12, "ffn_multiple": 8, "width_per_layer": 28.0}
    study = {
        "name": "s",
        "grid": {"kind": "product", "params": [33e3, 143e3], "tokens": [1e6], "tolerance": 0.1},
        "model": {"head_dim": 12, "parametrization": "completep"},
        "recipe": rules,
        "eval": {"sequences": 16},
    }
    known = {"fingerprint": "f", "vocab": 256, "unique_tokens": 1e7, "heldout_tokens": 1e6}
    small, large = (
        c["config"] for c in plan(validate_study(study), known | {"bytes_per_token": 1.0})["cells"]
    )
    reference = shape(Recipe(**rules), {"head_dim": 12, "vocab": 256}, 33e3, 128)
    for c in (small, large):
        got = [c["model"][k] for k in ("base_d_model", "base_layers", "base_ffn_dim")]
        assert got == [reference[k] for k in ("d_model", "layers", "ffn_dim")]
    assert Ratios.of(small["model"]) == Ratios() and Ratios.of(large["model"]).width > 1
    # D and B are rounded to whole steps; lr follows nothing else
    assert small["optim"]["lr"] == large["optim"]["lr"] == pytest.approx(4e-3, rel=2e-2)
    usual = plan(validate_study({**study, "model": {"head_dim": 12}}), known | {"bytes_per_token": 1.0})
    assert usual["cells"][1]["config"]["optim"]["lr"] < 0.7 * large["optim"]["lr"]
    assert for_parametrization(rules, "standard") == rules
    with pytest.raises(ConfigError, match="recipe.lr_params_exponent is -0.36; it must be 0 .*'mup'"):
        for_parametrization(rules | {"lr_params_exponent": -0.36}, "mup")


def test_activations_are_the_model_s_own():
    """The traced stream, normalised and multiplied by the head, gives the logits of the whole model."""
    cfg = model("completep", d_model=64, layers=5)
    apply, params = build(cfg, seed=0)
    inputs = random_batch(64, 2, 8, 0)["inputs"]
    found = jax.jit(lambda p: activations(apply, p, inputs))(params)
    assert found["stream"].shape == found["attention"].shape == (5, 2, 8, 64)
    whole = nnx.merge(apply.graphdef, params)
    logits = whole.final_norm(found["stream"][-1]) * 0.5 @ params["embed"]["table"].T
    np.testing.assert_allclose(logits, found["logits"], atol=1e-5)
    np.testing.assert_allclose(logits, whole(inputs), atol=1e-5)
    stream = found["embedding"] + found["attention"].sum(0) + found["feed-forward"].sum(0)
    np.testing.assert_allclose(stream, found["stream"][-1], atol=1e-5)


LR = 2**-7


@pytest.fixture(scope="module")
def base():
    return sizes(model("standard"), lr=LR)


def exponents(small, large, factor, what):
    """Power of the shape's factor with which each kind of activation goes."""
    return {kind: slope([1, factor], [small[kind][what], large[kind][what]]) for kind in small}


@pytest.mark.slow
def test_coordinate_check_in_width(base):
    """8 x the width, fixed head size, four steps.

    Theory: under muP all changes go with width^0; under standard a hidden matrix's with width^1 (fan-in
    terms of size lr). Two widths and four steps leave exponents 0.1 off; 0.2 and 0.5 lie well apart.
    """
    wide = {name: sizes(model(name, d_model=256), lr=LR) for name in ("standard", "mup")}
    changed = {name: exponents(base, w, 8, "change") for name, w in wide.items()}
    assert all(abs(changed["mup"][k]) < 0.2 for k in ("embedding", "attention", "feed-forward", "stream"))
    assert all(changed["standard"][k] > 0.5 for k in ("attention", "feed-forward", "stream"))
    # logits: a part through the initial head would go with width^-1/2, the learned one with width^0
    assert -0.35 < changed["mup"]["logits"] < 0.1 < changed["standard"]["logits"]
    start = exponents(base, wide["mup"], 8, "start")
    assert all(abs(start[k]) < 0.1 for k in ("embedding", "attention", "feed-forward", "stream"))
    assert start["logits"] == pytest.approx(-0.5, abs=0.1)  # Yang et al. 2022: the output at start vanishes
    assert exponents(base, wide["standard"], 8, "start")["embedding"] == pytest.approx(-0.5, abs=0.05)


@pytest.mark.slow
def test_coordinate_check_in_depth(base):
    """8 x the depth: 2 L coherent branches add up to depth^1 under standard, to depth^0 under CompleteP.

    At the start the branches are independent: their sum goes with sqrt(L)/l, depth^-1/2, and the table stays.
    """
    deep = {name: sizes(model(name, layers=16), lr=LR) for name in ("standard", "completep")}
    changed = {name: exponents(base, d, 8, "change") for name, d in deep.items()}
    assert all(abs(changed["completep"][k]) < 0.3 for k in changed["completep"])
    assert abs(changed["completep"]["stream"]) < 0.2 and abs(changed["completep"]["logits"]) < 0.2
    assert all(changed["standard"][k] > 0.5 for k in ("attention", "feed-forward", "stream"))
    start = exponents(base, deep["completep"], 8, "start")
    assert abs(start["embedding"]) < 0.01 and abs(start["logits"]) < 0.1
    assert start["attention"] == pytest.approx(-0.5, abs=0.1)
