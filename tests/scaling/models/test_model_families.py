"""The families: each mixer against its recurrence token by token, and what must hold for all of them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from all_but import long_but, slow_but
from flax import nnx
from recurrences import RECURRENCES, slstm

from scaling.config import ConfigError, validate_section
from scaling.coordinates import sizes
from scaling.layers import FAMILIES, Layer, layers, pattern
from scaling.models.lm import MIXERS, abstract_params, build, init_params, make_apply
from scaling.optim import decays, is_hidden_matrix
from scaling.parametrization import update_scales

pytestmark = pytest.mark.usefixtures("quick_compiles")
BASE = {"d_model": 32, "layers": 4, "heads": 4, "kv_heads": 2, "head_dim": 8, "ffn_dim": 48, "vocab": 61}
CASES = {
    "griffin": {"family": "griffin", "local_window": 6},
    "mamba2": {"family": "mamba2", "state_dim": 12},
    "gated_deltanet": {"family": "gated_deltanet"},
    "xlstm": {"family": "xlstm"},
    "hybrid": {
        "family": "hybrid",
        "pattern": ["mamba2", "attention+geglu", "mlstm"],
        "state_dim": 12,
        "local_window": 6,
        "rope_fraction": 0.5,
        "post_norm": True,
    },
    "no positions": {"rope_fraction": 0.0},
    "differential": {"family": "differential", "local_window": 20},
    "both ways": {"objective": "masked_diffusion", "local_window": 6},
    "mamba": {"family": "mamba", "channel_state": 5},
    "longhorn": {"family": "longhorn", "channel_state": 5},
    "slstm": {"family": "hybrid", "pattern": ["mlstm", "slstm"]},
    "min_gru": {"family": "min_gru"},
    "qlstm": {"family": "qlstm", "expand": 1},
    "moe": {
        "family": "moe",
        "experts": 5,
        "shared_experts": 1,
        "expert_fraction": 0.5,
        "capacity_factor": 9.0,
    },
    "relu": {"family": "moe", "experts": 5, "router": "relu", "capacity_factor": 9.0},
    "monarch": {"family": "monarch"},
    "monarch_mixer": {"family": "monarch_mixer", "filter_dim": 12, "cross_document": True},
    "memory": {
        "family": "hybrid",
        "pattern": ["attention", "min_gru+memory"],
        **{"memory_keys": 6, "memory_heads": 3, "memory_top": 4},
    },
    "experts in a hybrid": {
        "family": "hybrid",
        "pattern": ["mamba", "differential_attention+moe"],
        "channel_state": 5,
        "experts": 3,
        "capacity_factor": 1.5,
    },
}
CASES["mixture_of_depths"] = {"family": "mixture_of_depths", "depth_capacity": 0.3}
CASES["routed recurrence"] = {
    "family": "hybrid",
    "pattern": ["attention", "routed:mamba2+moe", "routed:differential_attention"],
    **{"depth_capacity": 0.6, "state_dim": 12, "experts": 3, "post_norm": True},
}
CASES["selective"] = {
    "family": "hybrid",
    "pattern": ["mamba2", "selective_attention"],
    **{"state_dim": 12, "attention_budget": 0.4, "local_window": 6, "layers": 2},
}
CASES["scout"] = {"family": "scout", "channel_state": 5, "segment_length": 5}
CASES["mosa"] = {
    "family": "hybrid",
    "pattern": ["attention", "mosa"],
    **{"head_capacity": 0.3, "layers": 2},
}
B, T = 2, 40


def model(**changes):
    return validate_section("model", {**BASE, **changes})


def shaken(tree, seed=1, size=0.1):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: x + size * rng.standard_normal(x.shape).astype(np.float32), tree)


def mixer(kind, **changes):
    """(config, a mixer's function of x and segments, its parameters in float64)."""
    family = {"rglru": "griffin", "mlstm": "xlstm", "slstm": "hybrid"}.get(kind, kind)
    cfg = model(family=family, **changes)
    graph, state = nnx.split(MIXERS[kind](cfg, nnx.Rngs(0)))
    params = shaken(nnx.to_pure_dict(state))

    def apply(x, segments):
        return nnx.merge(graph, params)(x, None, segments)

    return cfg, jax.jit(apply), jax.tree.map(lambda a: np.asarray(a, np.float64), params)


@pytest.mark.parametrize("kind", RECURRENCES)
def test_mixer_is_its_recurrence_token_by_token_inside_documents(kind):
    """Two documents in a row: each is the recurrence of its own tokens alone, in float64."""
    own = {"mamba2": {"state_dim": 12}, "mamba": {"channel_state": 5}, "slstm": {"pattern": ["slstm"]}}
    changes = own.get(kind, {})
    cfg, apply, params = mixer(kind, **changes)
    x = np.random.default_rng(0).standard_normal((1, T, cfg["d_model"])).astype(np.float32)
    cut = 23
    segments = np.array([[1] * cut + [2] * (T - cut)], np.int32)
    want = np.concatenate([RECURRENCES[kind](part.astype(np.float64), params, cfg) for part in
                           (x[0, :cut], x[0, cut:])])  # fmt: skip
    # float32 throughout: sums of some tens of terms; mlstm's outputs are divided by sums that may be small
    np.testing.assert_allclose(apply(x, segments)[0], want, rtol=2e-4, atol=2e-4 * want.std())
    whole = RECURRENCES[kind](x[0].astype(np.float64), params, cfg)
    np.testing.assert_allclose(apply(x, None)[0], whole, rtol=2e-4, atol=2e-4 * whole.std())
    assert np.abs(whole[cut:] - want[cut:]).max() > 0.01 * want.std()


def test_the_backward_scan_of_slstm_is_the_slope_of_its_recurrence():
    """Along one direction of x and all parameters at once, two documents; differences in float64."""
    cfg, _, params = mixer("slstm", pattern=["slstm"])
    rng = np.random.default_rng(2)
    x, weigh = rng.standard_normal((2, 1, T, cfg["d_model"]))
    cut, segments = 23, np.repeat([[1, 2]], [23, T - 23], axis=1)
    graph, _ = nnx.split(MIXERS["slstm"](cfg, nnx.Rngs(0)))
    way_x, way = rng.standard_normal(x.shape), jax.tree.map(lambda a: rng.standard_normal(a.shape), params)

    def ours(params, x):
        return jnp.sum(nnx.merge(graph, params)(x, None, segments) * weigh)

    def theirs(step):
        at = jax.tree.map(lambda a, b: a + step * b, params, way)
        parts = np.split((x + step * way_x)[0], [cut])
        return np.sum(np.concatenate([slstm(part, at, cfg) for part in parts]) * weigh[0])

    single = jax.tree.map(jnp.float32, (params, x))
    gradient = jax.grad(ours, argnums=(0, 1))(*single)
    terms = jax.tree.map(lambda g, w: np.sum(np.float64(g) * w), gradient, (way, way_x))
    slope = sum(jax.tree.leaves(terms))
    # differences of fourth order; the gradient is float32, a sum of terms of both signs
    h = 1e-4
    want = (8 * (theirs(h) - theirs(-h)) - (theirs(2 * h) - theirs(-2 * h))) / (12 * h)
    assert slope == pytest.approx(want, rel=1e-4)


ONE_STREAM = ("monarch_mixer",)  # documents are not told apart


@pytest.mark.parametrize(
    "name",
    slow_but(
        ("griffin", "mamba2", "gated_deltanet", "xlstm", "moe"), [n for n in CASES if n not in ONE_STREAM]
    ),
)
def test_causal_documents_apart_and_the_same_however_it_runs(name):
    cfg = model(**CASES[name])
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 61, (B, T)).astype(np.int32)
    cut = 17
    segments = np.broadcast_to(np.where(np.arange(T) < cut, 1, 2), (B, T)).astype(np.int32)
    positions = np.broadcast_to(np.r_[:cut, : T - cut], (B, T)).astype(np.int32)
    params = shaken(init_params(cfg, 0))
    apply = jax.jit(make_apply(cfg))
    logits = np.asarray(apply(params, tokens, segments, positions))
    assert logits.shape == (B, T, 61) and logits.std() > 0.1 and np.isfinite(logits).all()
    # a document is what it is alone; padding after it changes nothing before
    other = np.r_[tokens[:, :cut].T, rng.integers(0, 61, (T - cut, B))].T.astype(np.int32)
    np.testing.assert_allclose(apply(params, other, segments, positions)[:, :cut], logits[:, :cut],
                               rtol=1e-5, atol=1e-5)  # fmt: skip
    second = np.concatenate([tokens[:, cut:], other[:, :cut]], 1)
    ends = np.broadcast_to(np.where(np.arange(T) < T - cut, 1, 2), (B, T)).astype(np.int32)
    alone = apply(params, second, ends, np.broadcast_to(np.arange(T, dtype=np.int32), (B, T)))
    # the same numbers in other places of other chunks: float32 sums in another order
    np.testing.assert_allclose(alone[:, : T - cut], logits[:, cut:], rtol=1e-4, atol=1e-4)
    # layers in a loop, and recomputed: other orders of the same sums
    for options in ({"remat": "full"}, {"remat": "dots", "unroll": True}):
        again = jax.jit(make_apply(cfg, **options))(params, tokens, segments, positions)
        np.testing.assert_allclose(again, logits, rtol=1e-4, atol=1e-4)


def test_layers_of_a_pattern_that_does_not_divide():
    """Five layers of a pattern of three: as a model that lists all five is, weights moved over."""
    kinds = ["rglru", "mamba2", "attention+geglu"]
    cfg = model(family="hybrid", pattern=kinds, layers=5, state_dim=12)
    listed = model(family="hybrid", pattern=[*kinds, *kinds[:2]], layers=5, state_dim=12)
    assert [str(x) for x in layers(cfg)] == [str(x) for x in pattern(listed)]
    params = shaken(init_params(cfg, 0))
    names = ["0_rglru", "1_mamba2", "2_attention"]
    assert list(params["blocks"]) == names
    moved = {**params, "blocks": {}}
    for i in range(5):
        stack = params["blocks"][names[i % 3]]
        moved["blocks"][f"{i}_{names[i % 3][2:]}"] = jax.tree.map(
            lambda a, i=i: a[i // 3 : i // 3 + 1], stack
        )
    tokens = np.random.default_rng(0).integers(0, 61, (B, T))
    ours, theirs = make_apply(cfg), make_apply(listed)
    np.testing.assert_allclose(
        jax.jit(ours)(params, tokens), jax.jit(theirs)(moved, tokens), rtol=1e-4, atol=1e-4
    )


def test_a_window_of_the_whole_row_is_the_dense_model():
    """Local layers among full ones, the window no shorter than the row: the same weights, the same logits."""
    kinds = ["attention", "attention", "full_attention"]
    hybrid = model(family="hybrid", pattern=kinds, local_window=T)
    dense = model(family="transformer")
    params = shaken(init_params(dense, 0))
    moved = {**params, "blocks": {}}
    for i, kind in enumerate(kinds):  # four layers: the first kind has two
        moved["blocks"][f"{i}_{kind}"] = jax.tree.map(lambda a, i=i: a[i::3], params["blocks"])
    tokens = np.random.default_rng(0).integers(0, 61, (B, T))
    ours, theirs = make_apply(hybrid), make_apply(dense)
    want = jax.jit(theirs)(params, tokens)
    np.testing.assert_allclose(jax.jit(ours)(moved, tokens), want, rtol=1e-5, atol=1e-5)
    shorter = make_apply({**hybrid, "local_window": T - 1})
    assert np.abs(jax.jit(shorter)(moved, tokens) - want)[:, -1].max() > 1e-3


@pytest.mark.parametrize("name", CASES)
def test_every_parameter_has_a_rule(name):
    """Decay, Muon and muP by names: no bias, gain or decay rate is decayed, or given to Muon."""
    cfg = model(**CASES[name], parametrization="completep", base_d_model=16, base_layers=2)
    params = abstract_params(cfg)
    scales = update_scales(cfg, params)
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        inside = path[0].key == "blocks"
        matrix = leaf.ndim - inside >= 2 and path[-1].key != "a_log"  # decay rates, a channel and state
        taps = path[-1].key in ("conv", "values", "keys", "filter_in", "filter_out")
        gain = path[-2].key.endswith("norm") if len(path) > 1 else False
        assert decays(path, leaf) == (matrix and not gain), path
        assert is_hidden_matrix(path, leaf) == (inside and matrix and not taps and not gain), path
    lr = {p[-1].key: v for p, v in jax.tree_util.tree_leaves_with_path(scales["lr"])}
    expected = {"out": 0.5, "conv": 1.0, "a_log": 1.0, "input_gate": 1.0, "dt": 0.5, "i_bias": 1.0}
    expected |= {"gate_second": 0.5, "down_first": 0.5, "down_second": 0.5}
    expected |= {"z_recurrent": 1.0, "o_bias": 1.0, "dt_up": 0.5, "router": 0.5, "lambda_q1": 1.0}
    expected |= {"filter_in": 1.0, "filter_out": 1.0, "filter_bias": 1.0, "skip": 1.0}
    assert all(lr[k] == v for k, v in expected.items() if k in lr)


UNDER_MUP = (
    *("min_gru", "moe", "mosa", "griffin", "mamba2", "gated_deltanet", "xlstm", "differential", "mamba"),
    *("longhorn", "slstm", "qlstm", "mixture_of_depths", "selective", "monarch", "scout", "relu"),
    "monarch_mixer",
)


@pytest.mark.slow
@pytest.mark.parametrize("name", long_but(("min_gru", "moe", "mosa"), UNDER_MUP))
def test_coordinates_keep_their_size_in_width_under_mup(name):
    """Four times the width: what three steps change of the stream, against the base (Yang et al. 2022, D.1).

    Standard was seen to change it 1.7 (gated DeltaNet) to 5.4 times as much, 6.9 with ReLU routers; one
    family shows it here.
    """
    changes = {}
    for rule in ("mup", "standard") if name == "min_gru" else ("mup",):
        found = []
        for width in (16, 64):
            heads = width // 8
            base = {"parametrization": "mup", "base_d_model": 16} if rule == "mup" else {}
            shape = {"d_model": width, "heads": heads, "kv_heads": heads, "ffn_dim": 2 * width, "layers": 6}
            cfg = model(**{**CASES[name], **shape, **base})
            # at 0.02 three steps change Longhorn's stream to ten times its size, where no rule speaks
            lr = 0.005 if name == "longhorn" else 0.02
            found.append(sizes(cfg, lr=lr, steps=3, seeds=(0,))["stream"]["change"])
        changes[rule] = found[1] / found[0]
    # a factor of 4 in width: standard grows with it (Adam's updates align), muP stays
    assert 0.5 < changes["mup"] < 1.5
    assert changes.get("standard", 9) > 1.8 * changes["mup"]


def test_decay_and_gates_start_where_the_papers_say():
    cfg = model(family="griffin", local_window=6, d_model=64, heads=8)
    decay = init_params(cfg, 0)["blocks"]["0_rglru"]["mixer"]["decay"]
    radius = np.exp(-8 * np.logaddexp(0, np.asarray(decay, np.float64)))
    assert radius.min() > 0.899 and radius.max() < 0.9991 and radius.std() > 0.02
    params = init_params(model(family="mamba2", d_model=64, heads=8), 0)["blocks"]["mixer"]
    a, dt = np.exp(np.asarray(params["a_log"])), np.logaddexp(0, np.asarray(params["dt_bias"]))
    assert 1 <= a.min() < 3 and 14 < a.max() <= 16
    assert 0.00099 < dt.min() < 0.003 and 0.04 < dt.max() < 0.101
    mlstm = init_params(model(family="xlstm"), 0)["blocks"]["mixer"]
    np.testing.assert_allclose(mlstm["f_bias"][0], [3, 4, 5, 6], rtol=1e-6)
    assert (np.asarray(mlstm["i_bias"]) == -10).all()


@pytest.mark.slow
def test_bfloat16_is_near_float32():
    """Every family computes in bfloat16 what it computes in float32, to bfloat16's own error."""
    tokens = np.random.default_rng(0).integers(0, 61, (B, T))
    error = {}
    recurrent = ("griffin", "mamba", "mamba2", "longhorn", "gated_deltanet", "xlstm", "slstm", "min_gru",
                 "qlstm", "monarch_mixer")  # fmt: skip
    for name in (*recurrent, "differential"):
        cfg = model(**CASES[name])
        apply, params = build(cfg, seed=0)
        exact = np.asarray(jax.jit(apply)(params, tokens))
        low = np.asarray(jax.jit(make_apply({**cfg, "dtype": "bfloat16"}))(params, tokens))
        assert low.dtype == jnp.float32
        # 8 bits, 4 layers: some per cent of the logits' spread, most where a small state is normed
        error[name] = np.sqrt(np.mean((low - exact) ** 2)) / exact.std()
    assert max(error.values()) < 0.08, error


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"family": "griffin", "objective": "masked_diffusion"},
            r"model.objective is 'masked_diffusion' with a layer 'rglru\+geglu', which cannot see both ways",
        ),
        ({"family": "mixture_of_depths", "objective": "masked_diffusion"}, "a layer 'routed:attention"),
        ({"objective": "mlm"}, "model.objective is 'mlm'"),
        ({"family": "hybrid"}, "model.pattern is None with model.family = 'hybrid'"),
        ({"pattern": ["mamba2"]}, "'hybrid' needs a pattern, and every other family has its own"),
        ({"family": "hybrid", "pattern": ["mamba3"]}, r"model.pattern\[0\] is 'mamba3'; it must be one of"),
        ({"family": "hybrid", "pattern": ["rglru+relu"]}, r"model.pattern\[0\] is 'rglru\+relu'"),
        ({"family": "hybrid", "pattern": [3]}, r"model.pattern\[0\] is 3; it must be a string"),
        ({"family": "hybrid", "pattern": []}, "model.pattern is"),
        ({"state_dim": 64}, "model.state_dim is 64 with model.family = 'transformer', which does not read"),
        ({"family": "mamba2", "rope_fraction": 0.5}, "it is for 'attention' and 'full_attention'"),
        ({"family": "xlstm", "key_fraction": 0.3}, "model.key_fraction is 0.3 with head_dim 8"),
        ({"rope_fraction": 0.4}, "model.rope_fraction is 0.4; it must leave an even number of the 8"),
        ({"family": "perceptron"}, "model.family is 'perceptron'"),
        ({"experts": 4}, "model.experts is 4 with model.family = 'transformer', which does not read it"),
        ({"family": "moe", "active_experts": 9}, "model.active_experts is 9; it must be at most experts = 8"),
        ({"family": "moe", "expert_fraction": 0.3}, "model.expert_fraction is 0.3 with ffn_dim 48"),
        ({"family": "moe", "capacity_factor": 0.5}, "model.capacity_factor is 0.5"),
        (
            {"family": "hybrid", "pattern": ["attention+memory"], "memory_top": 40},
            "model.memory_top is 40; it must be at most memory_keys = 32",
        ),
        (
            {"family": "monarch", "monarch_blocks": 5},
            "model.monarch_blocks is 5 with d_model 32 and ffn_dim 48",
        ),
        ({"family": "monarch_mixer"}, "model.cross_document is False with a layer 'monarch_mixer"),
        ({"family": "monarch", "monarch_blocks": 8}, "it must divide both, its square at most d_model"),
        ({"memory_keys": 8}, "model.memory_keys is 8 with model.family = 'transformer'"),
        ({"family": "moe", "router": "best"}, "model.router is 'best'"),
        ({"family": "differential", "kv_heads": 1}, "model.kv_heads is 1; 'differential_attention' pairs"),
    ],
)
def test_bad_families(changes, words):
    with pytest.raises(ConfigError, match=words):
        model(**changes)


def test_default_feed_forwards_and_families():
    assert str(Layer.parse("mamba2")) == "mamba2+none" and str(Layer.parse("rglru")) == "rglru+swiglu"
    for family, kinds in FAMILIES.items():
        if kinds is not None:
            assert [str(x) for x in pattern({"family": family})] == list(kinds)
