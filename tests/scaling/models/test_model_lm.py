"""The language model: its function against NumPy, its parameters, and what must not change its numbers."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import dispatch
from scaling.config import ConfigError, validate_section
from scaling.models.attention import rope_table, rotate
from scaling.models.lm import REMAT, abstract_params, build, init_params

pytestmark = pytest.mark.usefixtures("quick_compiles")
BASE = {"d_model": 32, "layers": 3, "heads": 4, "kv_heads": 2, "head_dim": 8, "ffn_dim": 48, "vocab": 61}
CONFIGS = {
    "tied": {},
    "untied": {"tied": False},
    "no qk-norm": {"qk_norm": False},
    "multi-head": {"kv_heads": 4},
    "window and caps": {"local_window": 5, "logits_soft_cap": 4.0, "attention_soft_cap": 2.0},
    "other theta and eps": {"rope_theta": 500.0, "norm_eps": 1e-3},
}
B, T = 2, 12


def model(**changes):
    return validate_section("model", {**BASE, **changes})


def built(cfg, seed=0, **options):
    """``build`` with a jitted ``apply``."""
    apply, params = build(cfg, seed=seed, **options)
    return jax.jit(apply), params


def rows(seed=0, vocab=61):
    """Tokens, segments (two documents, then padding in row 1) and positions."""
    tokens = np.random.default_rng(seed).integers(0, vocab, (B, T)).astype(np.int32)
    segments = np.array([[1] * 7 + [2] * 5, [1] * 4 + [2] * 5 + [0] * 3], np.int32)
    positions = np.array([[*range(7), *range(5)], [*range(4), *range(5), *range(3)]], np.int32)
    return tokens, segments, positions


def shaken(params, seed=1):
    """The parameters with noise, so that norm scales are not all one."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: x + 0.1 * rng.standard_normal(x.shape).astype(np.float32), params)


def in_numpy(params, cfg, tokens, segments, positions):
    """The whole model in NumPy float64, one document row at a time, one head at a time."""
    p = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    N, K, H, eps = cfg["heads"], cfg["kv_heads"], cfg["head_dim"], cfg["norm_eps"]

    def norm(x, scale):
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * scale

    def turn(x, positions):
        """Pair i, as a complex number, times exp(i position theta^(-2i/H))."""
        pairs = x[:, : H // 2] + 1j * x[:, H // 2 :]
        rates = cfg["rope_theta"] ** (-2.0 * np.arange(H // 2) / H)
        pairs = pairs * np.exp(1j * positions[:, None] * rates)
        return np.concatenate([pairs.real, pairs.imag], axis=1)

    logits = np.zeros((*tokens.shape, cfg["vocab"]))
    for b in range(len(tokens)):
        allowed = np.tril(np.ones((T, T), bool)) & (segments[b][:, None] == segments[b][None])
        if cfg["local_window"]:
            allowed &= np.arange(T)[:, None] - np.arange(T)[None] < cfg["local_window"]
        x = p["embed"]["table"][tokens[b]]
        for i in range(cfg["layers"]):
            block = jax.tree.map(lambda a, i=i: a[i], p["blocks"])
            mixer, y = block["mixer"], norm(x, block["mixer_norm"]["scale"])
            heads = []
            for n in range(N):
                g = n // (N // K)
                q = y @ mixer["q"][:, n * H : (n + 1) * H]
                k = y @ mixer["k"][:, g * H : (g + 1) * H]
                v = y @ mixer["v"][:, g * H : (g + 1) * H]
                if cfg["qk_norm"]:
                    q, k = norm(q, mixer["q_norm"]["scale"]), norm(k, mixer["k_norm"]["scale"])
                s = turn(q, positions[b]) @ turn(k, positions[b]).T / math.sqrt(H)
                if cfg["attention_soft_cap"]:
                    s = cfg["attention_soft_cap"] * np.tanh(s / cfg["attention_soft_cap"])
                s = np.where(allowed, s, -np.inf)
                s = np.exp(s - s.max(-1, keepdims=True))
                heads.append(s / s.sum(-1, keepdims=True) @ v)
            x = x + np.concatenate(heads, axis=1) @ mixer["out"]
            y = norm(x, block["ffn_norm"]["scale"])
            gate = y @ block["ffn"]["gate"]
            x = x + (gate / (1 + np.exp(-gate)) * (y @ block["ffn"]["up"])) @ block["ffn"]["down"]
        head = p["embed"]["table"].T if cfg["tied"] else p["head"]
        logits[b] = norm(x, p["final_norm"]["scale"]) @ head
    cap = cfg["logits_soft_cap"]
    return logits if cap is None else cap * np.tanh(logits / cap)


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_equal_the_model_written_out_in_numpy(name):
    cfg = model(**CONFIGS[name])
    apply, params = built(cfg, seed=3)
    params = shaken(params)
    logits = apply(params, *rows())
    assert logits.shape == (B, T, 61) and logits.dtype == jnp.float32
    # Three layers of sums of 48 terms at float32's 1.2e-7, on logits of size about one.
    np.testing.assert_allclose(np.asarray(logits), in_numpy(params, cfg, *rows()), rtol=1e-4, atol=2e-5)


def test_bfloat16_compute_is_near_float32_and_its_parameters_are_float32():
    apply, params = built(model())
    apply16, params16 = built(model(dtype="bfloat16"))
    for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(params16), strict=True):
        assert b.dtype == jnp.float32
        np.testing.assert_array_equal(a, b)
    exact, rounded = (np.asarray(f(params, *rows())) for f in (apply, apply16))
    assert rounded.dtype == np.float32
    error = np.sqrt(np.mean((exact - rounded) ** 2)) / np.sqrt(np.mean(exact**2))
    # Some ten roundings to 2^-9 in a row, relative to unit logits: about 1 %; and not none at all.
    assert 1e-4 < error < 0.03


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_scan_and_loop_have_one_parameter_tree_and_one_function(dtype):
    cfg = model(dtype=dtype)
    scanned, params = built(cfg)
    looped, same = built(cfg, unroll=True)
    assert jax.tree.structure(params) == jax.tree.structure(same)
    for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(same), strict=True):
        np.testing.assert_array_equal(a, b)
    a, b = (np.asarray(f(params, *rows())) for f in (scanned, looped))
    # The same operations; a compiler may fuse a loop's body differently, and so round differently.
    tolerance = {"float32": 1e-5, "bfloat16": 0.05}[dtype]
    np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)


def gradients(cfg, **options):
    apply, params = build(cfg, seed=0, **options)
    return jax.jit(jax.grad(lambda p: jnp.mean(jax.nn.logsumexp(apply(p, *rows()), axis=-1) ** 2)))(params)


@pytest.mark.parametrize("unroll", [False, True])
@pytest.mark.parametrize("remat", ["full", "dots"])
def test_remat_changes_no_gradient(remat, unroll):
    plain, other = gradients(model()), gradients(model(), remat=remat, unroll=unroll)
    for a, b in zip(*map(jax.tree.leaves, (plain, other)), strict=True):
        # Recomputed values are the same to float32 rounding.
        np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=1e-4, atol=1e-6)


def count_products(jaxpr):
    """Matrix products in a jaxpr and in every jaxpr inside it."""
    total = 0
    for equation in jaxpr.eqns:
        total += equation.primitive.name == "dot_general"
        for value in equation.params.values():
            inner = getattr(value, "jaxpr", value)
            total += count_products(inner) if hasattr(inner, "eqns") else 0
    return total


def test_remat_policies_recompute_the_products_they_say():
    def products(remat):
        apply, params = build(model(), seed=0, remat=remat, unroll=True)
        with dispatch.target("cpu"):  # one implementation of attention, not one a platform
            traced = jax.make_jaxpr(jax.grad(lambda p: apply(p, *rows()).sum()))(params)
        return count_products(traced.jaxpr)

    with_weights, between_tokens = 4 + 3, 2
    none, dots, full = (products(r) for r in ("none", "dots", "full"))
    assert none == 3 * (3 * (with_weights + between_tokens) + 1)
    # "dots" recomputes a layer's scores and values, "full" every product but the last, whose value
    # no gradient needs.
    assert dots == none + 3 * between_tokens
    assert full == none + 3 * (with_weights + between_tokens - 1)


def test_an_unknown_remat_policy_is_refused():
    with pytest.raises(ConfigError, match="remat is 'some'; it must be one of 'none', 'full', 'dots'"):
        build(model(), seed=0, remat="some")
    assert set(REMAT) == {"none", "full", "dots"}


def test_no_token_sees_the_future_or_another_document():
    apply, params = built(model())
    tokens, segments, positions = rows()
    base = np.asarray(apply(params, tokens, segments, positions))
    for t in range(T):
        changed = tokens.copy()
        changed[0, t] = (changed[0, t] + 1) % 61
        out = np.asarray(apply(params, changed, segments, positions))
        moved = np.any(out[0] != base[0], axis=-1)
        expected = (np.arange(T) >= t) & (segments[0] == segments[0, t])
        np.testing.assert_array_equal(moved, expected)
        np.testing.assert_array_equal(out[1], base[1])


def test_packed_documents_score_as_they_do_alone():
    apply, params = built(model())
    tokens, segments, positions = rows()
    packed = np.asarray(apply(params, tokens, segments, positions))
    for part in (slice(0, 7), slice(7, 12)):
        alone = np.asarray(apply(params, tokens[:1, part]))
        # Sums over fewer masked terms round differently in float32.
        np.testing.assert_allclose(packed[:1, part], alone, rtol=1e-4, atol=1e-5)


def test_cross_document_reads_the_row_as_one_stream():
    apply, params = built(model(cross_document=True))
    within, _ = built(model())
    tokens, segments, positions = rows()
    np.testing.assert_array_equal(apply(params, tokens, segments, positions), apply(params, tokens))
    np.testing.assert_array_equal(apply(params, tokens), within(params, tokens))
    assert not np.array_equal(apply(params, tokens), within(params, tokens, segments, positions))


def test_rotation_depends_on_distance_alone_and_keeps_length():
    rng = np.random.default_rng(0)
    q, k = rng.standard_normal((2, 1, 1, 1, 8)).astype(np.float32)

    def turned(x, position):
        return np.asarray(rotate(x, rope_table(jnp.full((1, 1), position), 8, 1e4)), np.float64)

    scores = [float(np.sum(turned(q, p + 3) * turned(k, p))) for p in (0, 5, 1000)]
    # An angle of 1000 radians is rounded to 6e-5 in float32.
    np.testing.assert_allclose(scores, scores[0], atol=1e-3)
    assert abs(scores[0] - float(np.sum(turned(q, 0) * turned(k, 0)))) > 1e-2
    np.testing.assert_allclose(np.linalg.norm(turned(q, 77)), np.linalg.norm(q), rtol=1e-5)


def test_parameters_are_a_plain_dict_decided_by_the_seed():
    cfg = model(tied=False)
    _, params = build(cfg, seed=5)
    assert type(params) is dict and type(params["blocks"]["mixer"]) is dict
    abstract = abstract_params(cfg)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), params) == jax.tree.map(
        lambda x: (x.shape, x.dtype), abstract
    )
    same, other = init_params(cfg, 5), init_params(cfg, 6)
    for a, b, c in zip(*map(jax.tree.leaves, (params, same, other)), strict=True):
        np.testing.assert_array_equal(a, b)
        assert np.array_equal(a, c) == bool(np.all(np.asarray(a) == 1))  # norm scales start at one
    traced = jax.vmap(lambda seed: init_params(cfg, seed))(jnp.array([5, 6]))
    # another program, optimised at another level: the same draws to float32 rounding
    np.testing.assert_allclose(traced["head"][1], other["head"], rtol=1e-5, atol=1e-7)


def test_initial_standard_deviations_follow_the_rule():
    cfg = model(d_model=128, heads=8, kv_heads=4, head_dim=16, ffn_dim=344, vocab=1024, layers=8, tied=False)
    params = init_params(cfg, 0)
    blocks = params["blocks"]
    expected = {
        "embedding": (params["embed"]["table"], 128**-0.5),
        "head": (params["head"], 128**-0.5),
        "q": (blocks["mixer"]["q"], 128**-0.5),
        "k": (blocks["mixer"]["k"], 128**-0.5),
        "v": (blocks["mixer"]["v"], 128**-0.5),
        "out": (blocks["mixer"]["out"], 128**-0.5 / 4),
        "gate": (blocks["ffn"]["gate"], 128**-0.5),
        "up": (blocks["ffn"]["up"], 128**-0.5),
        "down": (blocks["ffn"]["down"], 344**-0.5 / 4),
    }
    for name, (value, std) in expected.items():
        value = np.asarray(value, np.float64)
        # At least 65 thousand draws: the sample deviation errs by 1/sqrt(2 n), 0.3 %, seen at 4 sigma.
        assert abs(value.std() / std - 1) < 0.012, name
        assert np.abs(value).max() <= 2 / 0.8796 * std * 1.0001, name
    layers = np.asarray(blocks["mixer"]["q"])
    assert not np.array_equal(layers[0], layers[1])


def test_initial_loss_is_that_of_a_uniform_guess():
    """Logits near unit variance at most: log V to log V + 1/2 (the mean of exp of a unit normal)."""
    for changes in ({}, {"tied": False}):
        cfg = model(d_model=128, heads=8, kv_heads=8, head_dim=16, ffn_dim=344, vocab=256, **changes)
        apply, params = built(cfg)
        tokens = np.random.default_rng(0).integers(0, 256, (8, 65))
        log_p = np.asarray(jax.nn.log_softmax(apply(params, tokens[:, :-1])))
        loss = -np.take_along_axis(log_p, tokens[:, 1:, None], axis=-1).mean()
        assert math.log(256) - 0.1 < loss < math.log(256) + 0.6
