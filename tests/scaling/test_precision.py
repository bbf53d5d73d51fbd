"""Simulated precision against NumPy with ml_dtypes; bfloat16 parameters with stochastic rounding."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from scaling.config import ConfigError, validate_cell
from scaling.flops import ledger
from scaling.formats import FORMATS, OPERANDS, SCALINGS, bits
from scaling.models.lm import build
from scaling.optim import hyper_parameters
from scaling.precision import (
    Matmul,
    Rule,
    dequantized,
    matmul_of,
    quantize,
    random_bits,
    rounding_key,
    stochastic_round,
    store,
)
from scaling.program import Static, first_state, step_function

pytestmark = pytest.mark.usefixtures("quick_compiles")
M, K, N, BLOCK = 12, 40, 20, 16  # no axis is a multiple of the block


def cell_of(precision, dtype="float32", **optim):
    return validate_cell(
        {
            "model": {"d_model": 16, "layers": 1, "heads": 2, "kv_heads": 1, "head_dim": 8, "ffn_dim": 24}
            | {"vocab": 64, "dtype": dtype},
            "optim": {"lr": 2e-2, "weight_decay": 0.0, **optim},
            "schedule": {"warmup_steps": 3, "name": "constant"},
            "train": {"batch": 2, "steps": 40},
            "precision": precision,
        }
    )


def operands(seed=0):
    """x [M, K], w [K, N], dy [M, N] over several orders of magnitude, with zeros."""
    rng = np.random.default_rng(seed)
    shapes = ((M, K), (K, N), (M, N))
    x, w, dy = (rng.normal(size=s) * np.exp(3 * rng.normal(size=s)) for s in shapes)
    x[3], w[:, 2] = 0.0, 0.0
    return tuple(a.astype(np.float32) for a in (x, w, dy))


def cast_like_ml_dtypes(x, name):
    if name.startswith("int"):
        largest = 2 ** (int(name[3:]) - 1) - 1
        return np.clip(np.rint(x), -largest, largest)
    kind = {"fp8_e4m3": "float8_e4m3fn", "fp8_e5m2": "float8_e5m2", "fp4_e2m1": "float4_e2m1fn"}[name]
    info = ml_dtypes.finfo(kind)
    return np.clip(x, float(info.min), float(info.max)).astype(kind).astype(np.float32)


def emulate(x, rule, axis):
    """What ``dequantized`` should give, group by group in plain NumPy."""
    out = np.empty_like(x)
    kind = FORMATS[rule.format]
    rows = x if axis == 1 else x.T
    result = out if axis == 1 else out.T
    if rule.scaling == "tensor":
        groups = [(slice(None), slice(None))]
    elif rule.scaling == "channel":
        groups = [(i, slice(None)) for i in range(len(rows))]
    else:
        starts = range(0, rows.shape[1], rule.block)
        groups = [(i, slice(s, s + rule.block)) for i in range(len(rows)) for s in starts]
    for where in groups:
        amax = np.max(np.abs(rows[where]))
        if amax == 0:
            scale = np.float32(1)
        elif rule.scaling == "block":
            scale = np.float32(2.0 ** (np.floor(np.log2(np.float64(amax))) - kind.exponent))
        else:
            scale = amax * np.float32(1 / kind.largest)
        result[where] = cast_like_ml_dtypes(rows[where] / scale, rule.format) * scale
    return out


@pytest.mark.parametrize("name", ["fp8_e4m3", "fp8_e5m2", "fp4_e2m1"])
def test_formats_are_those_of_ml_dtypes(name):
    info, kind = ml_dtypes.finfo(FORMATS[name].dtype), FORMATS[name]
    assert (info.bits, float(info.max)) == (kind.bits, kind.largest)
    assert kind.exponent == np.floor(np.log2(kind.largest))


@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("name", ["fp8_e4m3", "fp8_e5m2", "fp4_e2m1", "int8", "int3"])
def test_rounding_equals_numpy_bit_for_bit(name, scaling):
    rule = Rule(name, scaling, BLOCK)
    for x in operands()[:2]:
        for axis in (0, 1):
            got = jax.jit(lambda x, axis=axis: dequantized(x, rule, axis))(x)
            np.testing.assert_array_equal(got, emulate(x, rule, axis))


def test_every_code_is_exact_in_bfloat16():
    """So that simulated products of a bfloat16 model are not rounded a second time."""
    x = operands()[0]
    for name in FORMATS:
        for scaling in SCALINGS:
            values = np.asarray(quantize(x, Rule(name, scaling, BLOCK), 1)[0])
            np.testing.assert_array_equal(values.astype(ml_dtypes.bfloat16).astype(np.float32), values)


@pytest.mark.parametrize("scaling", ["tensor", "channel"])
def test_ternary_weights_are_their_mean_size_or_nothing(scaling):
    """BitNet b1.58's three equations, and the limit: weights of one size lose nothing."""
    rng = np.random.default_rng(0)
    x, w = (rng.standard_normal(s).astype(np.float32) for s in ((12, 40), (40, 24)))
    size = np.abs(w).mean(0 if scaling == "channel" else None, keepdims=True)
    want = np.clip(np.rint(w / size), -1, 1) * size
    assert 0.2 < (want == 0).mean() < 0.5
    matmul = Matmul(Rule("ternary", scaling))
    # the scale is applied after the sum: another order of float32 roundings
    np.testing.assert_allclose(matmul(x, w), x @ want, rtol=1e-4, atol=1e-4)
    signs = np.float32(0.37) * np.sign(w)
    np.testing.assert_allclose(matmul(x, signs), x @ signs, rtol=1e-4, atol=1e-4)
    # the gradient goes straight through the rounding
    dw = jax.grad(lambda w: matmul(x, w).sum())(w)
    np.testing.assert_allclose(dw, x.T @ np.ones((len(x), w.shape[1]), np.float32), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("scaling", SCALINGS)
def test_three_products_equal_numpy(scaling):
    x, w, dy = operands()
    names = {"weights": "fp8_e4m3", "activations": "int8", "gradients": "fp8_e5m2"}
    rules = {k: Rule(v, scaling, BLOCK) for k, v in names.items()}
    y, back = jax.vjp(Matmul(**rules), x, w)
    dx, dw = back(jnp.asarray(dy))
    a, b, g = rules["activations"], rules["weights"], rules["gradients"]
    pairs = {
        "y": (y, emulate(x, a, 1), emulate(w, b, 0)),
        "dx": (dx, emulate(dy, g, 1), emulate(w, b, 1).T),
        "dw": (dw, emulate(x, a, 0).T, emulate(dy, g, 0)),
    }
    for name, (got, left, right) in pairs.items():
        left, right = left.astype(np.float64), right.astype(np.float64)
        # float32 sums of up to 40 terms, and scales applied before the sum or after it
        bound = 50 * 2.0**-24 * (np.abs(left) @ np.abs(right)) + 1e-30
        assert np.all(np.abs(np.asarray(got) - left @ right) <= bound), name


def test_without_gradient_format_the_rounding_is_straight_through():
    x, w, dy = operands()
    rules = {"weights": Rule("int4", "channel"), "activations": Rule("fp8_e4m3")}
    _, back = jax.vjp(Matmul(**rules), x, w)

    def straight(x, w):
        def through(v, rule, axis):
            return v + jax.lax.stop_gradient(dequantized(v, rule, axis) - v)

        return through(x, rules["activations"], 1) @ through(w, rules["weights"], 0)

    _, want = jax.vjp(straight, x, w)
    for a, b in zip(back(jnp.asarray(dy)), want(jnp.asarray(dy)), strict=True):
        # v + (q - v) is not q to the last place
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * np.abs(b).max())


def test_a_forward_format_alone_leaves_other_operands_plain():
    x, w, _ = operands()
    rule = Rule("fp4_e2m1", "block", BLOCK)
    # float32 products against float64 ones
    got = Matmul(weights=rule)(x, w)
    want = x.astype(np.float64) @ emulate(w, rule, 0)
    np.testing.assert_allclose(got, want, atol=1e-6 * np.abs(want).max())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_without_rules_it_is_the_plain_matmul(dtype):
    x, w, dy = (jnp.asarray(a, dtype) for a in operands())
    x = x.reshape(3, 4, K)
    assert matmul_of(cell_of({})["precision"]) is jnp.matmul
    y, back = jax.vjp(Matmul(), x, w)
    plain, plain_back = jax.vjp(jnp.matmul, x, w)
    assert y.dtype == plain.dtype
    for a, b in zip((y, *back(dy.reshape(3, 4, N))), (plain, *plain_back(dy.reshape(3, 4, N))), strict=True):
        a, b = (np.asarray(v, np.float64) for v in (a, b))
        # the same products; the gradient of w sums [12] there and [3, 4] here, in the dtype's own precision
        np.testing.assert_allclose(a, b, rtol=0, atol=float(jnp.finfo(dtype).eps) * np.abs(b).max())


def test_more_bits_are_nearer_the_plain_matmul():
    x, w, _ = operands()
    errors = []
    for name in ("int3", "int4", "int5", "int6", "int7", "int8"):
        rule = Rule(name, "channel")
        errors.append(np.linalg.norm(Matmul(weights=rule, activations=rule)(x, w) - x @ w))
    ratios = np.array(errors[:-1]) / errors[1:]
    # a bit halves the step; few values a row make the ratio uneven
    assert np.all(ratios > 1.3) and 1.7 < np.exp(np.mean(np.log(ratios))) < 2.5


def test_nan_and_infinity_are_not_hidden():
    for bad in (np.nan, np.inf):
        x = operands()[0]
        x[5, 7] = bad
        for name in FORMATS:
            for scaling in SCALINGS:
                out = np.asarray(dequantized(x, Rule(name, scaling, BLOCK), 1))
                assert np.isnan(out[5, 7]), (bad, name, scaling)


def batch_of(step):
    tokens = np.random.default_rng(step).integers(0, 8, (2, 17))  # eight of 64 tokens: soon learned
    positions = np.tile(np.arange(16, dtype=np.int32), (2, 1))
    ids = {"inputs": tokens[:, :-1].astype(np.int32), "targets": tokens[:, 1:].astype(np.int32)}
    return {**ids, "segment_ids": 0 * positions, "positions": positions, "loss_mask": np.ones((2, 16), "f4")}


MX = {operand: "fp4_e2m1" for operand in OPERANDS} | {f"{operand}_scaling": "block" for operand in OPERANDS}


def test_only_the_layers_products_are_simulated():
    """Seven of a layer's weights pass through the rule; the head, the table and the norms do not."""
    seen = []

    def spy(x, w):
        seen.append(w.shape)
        return jnp.matmul(x, w)

    model = cell_of({})["model"]
    apply, params = build(model, seed=0, unroll=True, matmul=spy)
    jax.eval_shape(apply, params, batch_of(0)["inputs"])
    d, f = model["d_model"], model["ffn_dim"]
    assert sorted(seen) == sorted([(d, d), (d, 8), (d, 8), (d, d), (d, f), (d, f), (f, d)])


def test_the_ledger_and_bits():
    plain, simulated = cell_of({}), cell_of(MX)
    assert ledger(plain["model"], 16) == ledger(simulated["model"], 16)
    assert bits(plain) == {"weights": 32, "activations": 32, "gradients": 32}
    assert bits(simulated) == {"weights": 4, "activations": 4, "gradients": 4}
    mixed = cell_of({"weights": "int3", "gradients": "fp8_e5m2"}, dtype="bfloat16")
    ternary = {"weights": "ternary", "activations": "int8", "activations_scaling": "channel"}
    assert bits(cell_of(ternary))["weights"] == pytest.approx(1.585, abs=1e-3)
    assert bits(mixed) == {"weights": 3, "activations": 16, "gradients": 8}


def trained(cell, steps=25):
    static, hp = Static.of(cell), hyper_parameters(cell)
    step = jax.jit(step_function(static))
    state, losses = first_state(static, 0, hp), []
    for i in range(steps):
        state, metrics = step(state, batch_of(i), hp)
        losses.append(float(metrics["loss"]))
    return state, losses


@pytest.mark.parametrize("scaling", ["block", "channel"])
def test_a_simulated_cell_trains(scaling):
    precision = MX | {f"{operand}_scaling": scaling for operand in OPERANDS}
    _, losses = trained(cell_of(precision))
    assert losses[-1] < losses[0] - 1.0
    assert losses[0] != trained(cell_of({}), steps=1)[1][0]


def test_a_model_without_products_of_weights_trains():
    """minGRU in ternary weights and 8-bit activations: sums and differences but for the head."""
    ternary = {"weights": "ternary", "activations": "int8", "activations_scaling": "channel"}
    cell = cell_of(ternary)
    cell = validate_cell({**cell, "model": {**cell["model"], "family": "min_gru"}})
    _, losses = trained(cell)
    assert losses[-1] < losses[0] - 0.5


def words(seed):
    return jnp.asarray(np.random.default_rng(seed).integers(0, 2**32, 2, np.uint32))


def test_random_bits_are_even_and_independent():
    """Of neighbours along either axis, of two leaves, of two steps: no correlation beyond chance."""
    shape = (256, 512)
    n = shape[0] * shape[1]
    draws = jax.jit(lambda w: random_bits(w, shape))
    a, b = (np.asarray(draws(words(seed))) for seed in range(2))
    counted = np.bincount((a >> 16).ravel() >> 6, minlength=1024)  # of the bits that round, the upper ten
    square = np.sum((counted - n / 1024) ** 2) / (n / 1024)
    assert abs(square - 1023) < 5 * np.sqrt(2 * 1023)  # chi-square, five standard deviations
    ones = np.unpackbits(a.view(np.uint8)).reshape(n, 32).mean(0)
    assert np.all(np.abs(ones - 0.5) < 5 * 0.5 / np.sqrt(n))
    # words that differ in one bit, or that are exchanged, are as good as any others
    w = words(0)
    others = [b, *(np.asarray(draws(v)) for v in (w ^ jnp.uint32([1, 0]), w ^ jnp.uint32([0, 1]), w[::-1]))]
    unit = lambda x: ((x >> 16) - 32767.5) / (2**16 / np.sqrt(12))  # noqa: E731
    pairs = [(a, other) for other in others] + [(a[1:], a[:-1]), (a[:, 1:], a[:, :-1])]
    for left, right in pairs:
        assert abs(np.mean(unit(left) * unit(right))) < 5 / np.sqrt(left.size)
    # an element's bits are by its place, as rows counted one after another
    np.testing.assert_array_equal(a.ravel(), random_bits(w, (n,)))


def test_leaves_of_one_shape_round_apart_and_alike_when_done_again():
    """As parameters and their two moments: independent bits a leaf, a step and a seed."""
    value = jnp.full((64, 64), 1 + 2.0**-8, jnp.float32)  # halfway between two of bfloat16
    like = jax.tree.map(lambda x: x.astype(jnp.bfloat16), {"p": value, "m": value, "v": {"p": value}})
    tree = jax.tree.map(lambda _: value, like)
    up = {}
    for seed, step in ((0, 5), (0, 6), (1, 5)):
        rounded = jax.jit(store)(tree, like, rounding_key(seed, step))
        up |= {(seed, step, i): np.asarray(x) > 1 for i, x in enumerate(jax.tree.leaves(rounded))}
    again = jax.tree.leaves(jax.jit(store)(tree, like, rounding_key(0, 5)))
    for i, x in enumerate(again):
        np.testing.assert_array_equal(np.asarray(x) > 1, up[0, 5, i])
    ways = list(up.values())
    for i, a in enumerate(ways):
        for b in ways[:i]:
            # two coins agree half of the time, to five standard errors of 4,096
            assert abs(np.mean(a == b) - 0.5) < 5 * 0.5 / 64


def test_stochastic_rounding_is_unbiased():
    x = np.array([1.0, -1.0, 1 + 2.0**-10, -1 - 2.0**-10, 3e-5, 1.0117, 7e-40, 0.0], np.float32)
    draws = 20_000
    rounded = np.asarray(jax.jit(stochastic_round)(np.tile(x, (draws, 1)), words(0)), np.float64)
    low = np.asarray(x.view(np.uint32) & 0xFFFF0000, np.uint32).view(np.float32).astype(np.float64)
    high = np.asarray((x.view(np.uint32) & 0xFFFF0000) + 0x10000, np.uint32).view(np.float32)
    high = high.astype(np.float64)
    assert np.all((rounded == low) | (rounded == high))
    share = (x - low) / (high - low)
    deviation = np.abs(high - low) * np.sqrt(share * (1 - share) / draws)
    # five standard errors of a mean of that many draws
    assert np.all(np.abs(rounded.mean(0) - x) <= 5 * deviation)
    assert set(np.abs(rounded[:, 2])) == {1.0, 1 + 2.0**-7}


def test_stochastic_rounding_keeps_what_is_not_finite_and_what_is_exact():
    x = np.array([np.inf, -np.inf, np.nan, 1.5, -0.0], np.float32)
    x = np.append(x, np.uint32(0x7FFFFFFF).view(np.float32))  # a NaN of all ones
    out = np.asarray(stochastic_round(x, words(1)), np.float32)
    np.testing.assert_array_equal(out, x)


def test_small_updates_vanish_to_the_nearest_and_survive_on_average():
    """A step of 1e-4 on parameters of size 1, whose spacing is 2^-8 to 2^-7 in bfloat16."""
    params = jnp.ones(4000, jnp.bfloat16)
    nearest, stochastic = params, params
    for i in range(100):
        nearest = (nearest.astype(jnp.float32) - 1e-4).astype(jnp.bfloat16)
        stochastic = stochastic_round(stochastic.astype(jnp.float32) - 1e-4, words(i))
    assert np.all(np.asarray(nearest, np.float32) == 1)
    # a walk of 100 steps of variance at most 1e-4 x 2^-8 each, averaged over 4,000
    error = 5 * np.sqrt(100 * 1e-4 * 2.0**-8 / 4000)
    assert abs(np.asarray(stochastic, np.float64).mean() - 0.99) < error


def test_pure_bfloat16_trains_and_stores_bfloat16():
    base = {"params": "bfloat16"}
    state, losses = trained(cell_of(base, dtype="bfloat16"))
    kinds = {x.dtype for x in jax.tree.leaves((state.params, state.opt_state)) if x.ndim}
    assert kinds == {jnp.dtype("bfloat16")}
    assert losses[-1] < losses[0] - 1.0
    again, _ = trained(cell_of(base, dtype="bfloat16"))
    nearest, _ = trained(cell_of(base | {"rounding": "nearest"}, dtype="bfloat16"))
    tables = [np.asarray(s.params["embed"]["table"], np.float32) for s in (state, again, nearest)]
    np.testing.assert_array_equal(tables[0], tables[1])
    assert np.any(tables[0] != tables[2])


def test_rounding_bits_follow_seed_and_step():
    """A step taken again, as after a resume, rounds alike; another step or seed does not."""
    cell = cell_of({"params": "bfloat16"}, dtype="bfloat16", lr=1e-4)
    static, hp = Static.of(cell), hyper_parameters(cell)
    step, state = jax.jit(step_function(static)), first_state(static, 0, hp)

    def table(state, hp=hp):
        return np.asarray(step(state, batch_of(0), hp)[0].params["embed"]["table"], np.float32)

    np.testing.assert_array_equal(table(state), table(state))
    # steps 10 and 11 have the same learning rate: only their bits differ
    later = [table(state._replace(step=jnp.int32(s))) for s in (10, 11)]
    assert np.any(later[0] != later[1])
    assert np.any(table(state) != table(state, {**hp, "seed": jnp.uint32(1)}))


@pytest.mark.parametrize(
    ("precision", "dtype", "words"),
    [
        (
            {"weights": "fp16"},
            "float32",
            "precision.weights is 'fp16' .* one of 'fp8_e4m3'",
        ),
        ({"activations": "ternary"}, "float32", "precision.activations is 'ternary'"),
        (
            {"weights": "ternary", "weights_scaling": "block"},
            "float32",
            "precision.weights_scaling is 'block' with precision.weights = 'ternary', whose scale is a mean",
        ),
        ({"gradients_scaling": "row"}, "float32", "precision.gradients_scaling is 'row'"),
        ({"params": "bfloat16"}, "float32", "model.dtype is 'float32'; precision.params = 'bfloat16' needs"),
    ],
)
def test_errors_name_the_field(precision, dtype, words):
    with pytest.raises(ConfigError, match=words):
        cell_of(precision, dtype)
