"""Cross-entropy of a linear head against gradients written out in NumPy float64 and the reference."""

import functools
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels import dispatch, linear_cross_entropy
from pallas_kernels.reference import linear_cross_entropy as reference

NAMES = ("xla", "xla_chunked", "pallas_tpu")
# Logits are sums of at most 40 products near 1, gradients of at most 300 terms below 1: 1e-6 to 4e-6 of
# rounding in float32 (epsilon 1.2e-7), whatever the order of the sums.
FLOAT32 = {"rtol": 2e-5, "atol": 5e-6}
# The same sums at epsilon 2.2e-16.
FLOAT64 = {"rtol": 1e-11, "atol": 1e-12}
# Oracle in float64 of the same bf16 numbers: dlogits and dx are rounded to 8 bits (2^-9 each), and dw's
# terms too before they are summed in float32.
BFLOAT16 = {"rtol": 2e-2, "atol": 1e-2}


def make(lead=(3, 50), D=16, V=300, dtype=np.float32, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((*lead, D)).astype(dtype)
    w = (rng.standard_normal((D, V)) / D**0.5).astype(dtype)
    return x, w, rng.integers(0, V, lead), rng.standard_normal(lead), rng.standard_normal(lead)


def in_numpy(x, w, labels, dloss, dlse, *, z_loss=0.0, soft_cap=None, ignore_index=None, reduction="mean"):
    """Loss, lse, dx and dw by hand: of dloss . loss + dlse . lse."""
    x, w = np.asarray(x, np.float64), np.asarray(w, np.float64)
    X, flat = x.reshape(-1, x.shape[-1]), labels.reshape(-1)
    raw = X @ w
    logits = raw if soft_cap is None else soft_cap * np.tanh(raw / soft_cap)
    high = logits.max(1, keepdims=True)
    lse = np.log(np.exp(logits - high).sum(1)) + high[:, 0]
    counted = np.ones(flat.shape) if ignore_index is None else flat != ignore_index
    rows = np.arange(len(flat))
    safe = np.where(counted, flat, 0)
    loss = counted * (lse - logits[rows, safe] + z_loss * lse**2)
    factor = dloss.reshape(-1) if reduction == "none" else np.full(flat.shape, float(dloss))
    n = max(counted.sum(), 1) if reduction == "mean" else 1
    each = counted * factor / n
    grad = np.exp(logits - lse[:, None]) * (each * (1 + 2 * z_loss * lse) + dlse.reshape(-1))[:, None]
    grad[rows, safe] -= each
    if soft_cap is not None:
        grad = grad * (1 - np.tanh(raw / soft_cap) ** 2)
    out = loss.reshape(labels.shape) if reduction == "none" else loss.sum() / n
    return out, lse.reshape(labels.shape), (grad @ w.T).reshape(x.shape), X.T @ grad


@functools.cache
def jitted(options):
    def run(x, w, labels, dloss, dlse):
        def f(x, w):
            kwargs = dict(options)
            kwargs["block_sizes"] = dict(kwargs["block_sizes"])
            return linear_cross_entropy(x, w, labels, return_lse=True, **kwargs)

        (loss, lse), pull = jax.vjp(f, x, w)
        return loss, lse, *pull((dloss.astype(loss.dtype), dlse.astype(lse.dtype)))

    return jax.jit(run)


def ours(*args, **options):
    """The same four of the kernel."""
    options["block_sizes"] = tuple((options.get("block_sizes") or {}).items())
    with dispatch.interpret():
        return [np.asarray(a, np.float64) for a in jitted(tuple(sorted(options.items())))(*args)]


def check(args, tolerance, implementation, block_sizes=None, **options):
    got = ours(*args, implementation=implementation, block_sizes=block_sizes, **options)
    for a, b in zip(got, in_numpy(*args, **options), strict=True):
        np.testing.assert_allclose(a, b, **tolerance)


SHAPES = {  # lead, D, V and the blocks of each implementation: several, ragged in both axes, or one
    "ragged": (
        (3, 50),
        16,
        300,
        {"xla_chunked": {"tokens": 32}, "pallas_tpu": {"tokens": 128, "vocab": 128}},
    ),
    "one token": ((1,), 8, 5, {}),
    "no axis": ((), 40, 130, {}),
}


@settings(max_examples=6, deadline=None)  # nearly each compiles anew
@given(data=st.data())
@pytest.mark.parametrize("implementation", NAMES)
def test_value_and_gradients_against_numpy(implementation, data):
    lead, D, V, blocks = SHAPES[data.draw(st.sampled_from(list(SHAPES)))]
    options = {
        "z_loss": data.draw(st.sampled_from([0.0, 0.1])),
        "soft_cap": data.draw(st.sampled_from([None, 2.0])),
        "ignore_index": data.draw(st.sampled_from([None, 3])),
        "reduction": data.draw(st.sampled_from(["mean", "sum", "none"])),
    }
    x, w, labels, dloss, dlse = make(lead, D, V, seed=data.draw(st.integers(0, 2**31)))
    if options["ignore_index"] is not None:
        ignored = np.random.default_rng(1).random(lead) < data.draw(st.sampled_from([0.3, 1.0]))
        labels = np.where(ignored, 3, labels)
    if options["reduction"] != "none":
        dloss = np.asarray(1.7)
    check((x, w, labels, dloss, dlse), FLOAT32, implementation, blocks.get(implementation), **options)


@pytest.mark.parametrize("implementation", ["xla", "xla_chunked"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_float64_is_kept(implementation, reduction):
    with jax.enable_x64(True):
        x, w, labels, dloss, dlse = make(dtype=np.float64)
        dloss = dloss if reduction == "none" else np.asarray(0.3)
        options = {"z_loss": 0.1, "soft_cap": 3.0, "ignore_index": 2, "reduction": reduction}
        check((x, w, labels, dloss, dlse), FLOAT64, implementation, **options)


@pytest.mark.parametrize("implementation", NAMES)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_weights_are_factors_of_the_tokens_losses(implementation, reduction):
    """As cotangents of the losses one by one are; a token of weight 0 counts in the mean's divisor alone."""
    x, w, labels, factors, _ = make()
    factors = np.where(factors > 1, 0, factors)
    options = {"z_loss": 0.1, "implementation": implementation}

    def total(x, w):
        return linear_cross_entropy(x, w, labels, weights=np.float32(factors), reduction=reduction, **options)

    with dispatch.interpret():
        loss, gradients = jax.value_and_grad(total, (0, 1))(x, w)
    n = labels.size if reduction == "mean" else 1
    each, _, *want = in_numpy(x, w, labels, factors / n, np.zeros(labels.shape), z_loss=0.1, reduction="none")
    # 150 terms of both signs
    np.testing.assert_allclose(loss, np.sum(each * factors) / n, rtol=1e-5, atol=1e-4)
    for a, b in zip(gradients, want, strict=True):
        np.testing.assert_allclose(a, b, **FLOAT32)
    with pytest.raises(ValueError, match="weights has shape"):
        linear_cross_entropy(x, w, labels, weights=np.ones(3, np.float32))


def test_the_reference_against_numpy():
    with jax.enable_x64(True):
        x, w, labels, dloss, dlse = make(dtype=np.float64)
        options = {"z_loss": 0.1, "soft_cap": 3.0, "ignore_index": 2, "reduction": "none"}

        def f(x, w):
            return reference.linear_cross_entropy(x, w, jnp.asarray(labels), **options)

        out, pull = jax.vjp(f, jnp.asarray(x), jnp.asarray(w))
        got = (*out, *pull((jnp.asarray(dloss), jnp.asarray(dlse))))
        for a, b in zip(got, in_numpy(x, w, labels, dloss, dlse, **options), strict=True):
            np.testing.assert_allclose(a, b, **FLOAT64)


@pytest.mark.parametrize("implementation", NAMES)
@pytest.mark.parametrize("w_dtype", [jnp.bfloat16, np.float32])
def test_bfloat16_and_a_head_in_float32(implementation, w_dtype):
    x, w, labels, dloss, dlse = make()
    # the oracle sees what the matmul sees: both operands in bfloat16
    x, w = np.asarray(x, jnp.bfloat16), np.asarray(np.asarray(w, jnp.bfloat16), w_dtype)
    check((x, w, labels, dloss, dlse), BFLOAT16, implementation, reduction="none", z_loss=0.01)
    with dispatch.interpret():
        got = jax.grad(linear_cross_entropy, (0, 1))(
            jnp.asarray(x), jnp.asarray(w), labels, implementation=implementation
        )
    assert (got[0].dtype, got[1].dtype) == (jnp.bfloat16, w_dtype)


@pytest.mark.parametrize("implementation", NAMES)
def test_extreme_logits(implementation):
    x, w, labels, dloss, dlse = make()
    for scale in (1e4, 1e-4):
        # logits of 1e4 carry 1e-3 of absolute rounding in float32, which exp makes relative
        tolerance = {"rtol": 1e-2, "atol": 1e-2} if scale > 1 else FLOAT32
        check((x * np.float32(scale), w, labels, dloss, dlse), tolerance, implementation, reduction="none")


@pytest.mark.parametrize("implementation", NAMES)
def test_all_ignored_gives_zero_and_no_gradient(implementation):
    x, w, labels, *_ = make()
    with dispatch.interpret():
        loss, (dx, dw) = jax.value_and_grad(
            lambda x, w: linear_cross_entropy(
                x, w, np.full_like(labels, -100), ignore_index=-100, z_loss=0.1, implementation=implementation
            ),
            (0, 1),
        )(x, w)
    assert loss == 0 and not np.any(dx) and not np.any(dw)


@pytest.mark.parametrize("implementation", NAMES)
@pytest.mark.parametrize("wrong", [-1, 300])
def test_a_label_out_of_range_gives_nan_where_it_stands(implementation, wrong):
    x, w, labels, *_ = make()
    labels = labels.copy()
    labels[1, 7] = wrong

    def loss(x, w, reduction):
        return linear_cross_entropy(x, w, labels, reduction=reduction, implementation=implementation)

    with dispatch.interpret():
        each = np.asarray(loss(x, w, "none"))
        for reduction in ("none", "mean"):
            dx, dw = jax.grad(lambda x, w, r=reduction: jnp.sum(loss(x, w, r)), (0, 1))(x, w)
            bad = np.isnan(np.asarray(dx)).any(-1)
            assert np.argwhere(bad).tolist() == [[1, 7]] and np.isnan(np.asarray(dw)).all()
        assert np.isnan(loss(x, w, "mean"))
    assert np.argwhere(np.isnan(each)).tolist() == [[1, 7]]


def test_logits_are_computed_once_unless_a_gradient_flows_through_lse():
    x, w, labels, *_ = make()

    def loss(x, w, through_lse):
        total, lse = linear_cross_entropy(x, w, labels, return_lse=True, implementation="xla_chunked")
        return total + jnp.mean(lse) if through_lse else (total, jnp.mean(lse))

    def matmuls(f):
        return str(jax.make_jaxpr(f)(x, w)).count("dot_general")

    assert matmuls(jax.grad(lambda x, w: loss(x, w, False), (0, 1), has_aux=True)) == 3
    assert matmuls(jax.grad(lambda x, w: loss(x, w, True), (0, 1))) == 6
    assert matmuls(lambda x, w: loss(x, w, False)) == 1


@pytest.mark.parametrize("implementation", NAMES)
def test_under_vmap_remat_scan_and_jit(implementation):
    x, w, labels, *_ = make((4, 9), 8, 40)

    def f(x, w, labels):
        return linear_cross_entropy(x, w, labels, implementation=implementation, z_loss=0.1)

    def grads(g):
        with dispatch.interpret():
            return jax.jit(jax.value_and_grad(g, (0, 1)))(x, w)

    def scanned(x, w):
        step = jax.checkpoint(lambda total, row: (total + f(row[0], w, row[1]), None))
        return jax.lax.scan(step, 0.0, (x, jnp.asarray(labels)))[0] / 4

    want = grads(lambda x, w: f(x, w, labels))
    mapped = grads(lambda x, w: jnp.mean(jax.vmap(f, (0, None, 0))(x, w, labels)))
    heads = grads(
        lambda x, w: jnp.mean(jax.vmap(f, (None, 0, None))(x, jnp.stack([w, w]), labels))  # w alone is mapped
    )
    for got in (mapped, heads, grads(scanned)):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **FLOAT32), got, want)


def test_memory_is_a_fraction_of_full_logits():
    M, D, V = 1024, 32, 20000
    shapes = (
        jax.ShapeDtypeStruct((M, D), jnp.float32),
        jax.ShapeDtypeStruct((D, V), jnp.float32),
        jax.ShapeDtypeStruct((M,), jnp.int32),
    )

    def temporary(implementation, **options):
        f = jax.value_and_grad(
            lambda *a: linear_cross_entropy(*a, implementation=implementation, **options).mean(), (0, 1)
        )
        return jax.jit(f).lower(*shapes).compile().memory_analysis().temp_size_in_bytes

    full = temporary("xla")
    assert full >= 4 * M * V
    for reduction in ("mean", "none"):
        # a chunk's logits and dlogits, and one D V for its share of dw
        chunked = temporary("xla_chunked", block_sizes={"tokens": 64}, reduction=reduction)
        assert chunked < 0.13 * full


SHARDED = """
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from pallas_kernels import dispatch, linear_cross_entropy

rng = np.random.default_rng(0)
x = rng.standard_normal((8, 6, 16)).astype(np.float32)
w = rng.standard_normal((16, 136)).astype(np.float32)
labels = rng.integers(-1, 130, (8, 6))
for implementation, reduction in (("xla", "mean"), ("xla_chunked", "none"), ("pallas_tpu", "mean")):
    def f(x, w, labels):
        loss = linear_cross_entropy(
            x, w, labels, ignore_index=-1, z_loss=0.1, implementation=implementation, reduction=reduction
        )
        return jnp.mean(loss)

    with dispatch.interpret():
        want = jax.jit(jax.value_and_grad(f, (0, 1)))(x, w, labels)
        for kind in (AxisType.Auto, AxisType.Explicit):
            mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(kind,) * 2)
            with jax.set_mesh(mesh):
                for wspec in (P(), P("data")):
                    put = lambda a, s: jax.device_put(a, NamedSharding(mesh, s))
                    args = put(x, P("data")), put(w, wspec), put(labels, P("data"))
                    step = jax.jit(jax.value_and_grad(f, (0, 1)))
                    got = step(*args)
                    jax.tree.map(
                        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), got, want
                    )
print("sharded losses agree")
"""


def test_sharded_tokens_and_weights():
    env = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
    root = Path(__file__).parents[2]
    out = subprocess.run([sys.executable, "-c", SHARDED], capture_output=True, text=True, env=env, cwd=root)
    assert out.returncode == 0, out.stderr[-3000:]
    assert "sharded losses agree" in out.stdout


@pytest.mark.parametrize("implementation", ["xla", "xla_chunked"])
@pytest.mark.parametrize("reduction", ["sum", "mean", "none"])
def test_z_loss_may_be_traced_and_differentiated(implementation, reduction):
    x, w, labels, *_ = make()

    def loss(z_loss):
        options = {"implementation": implementation, "reduction": reduction, "ignore_index": 2}
        return jnp.sum(linear_cross_entropy(x, w, labels, z_loss=z_loss, **options))

    at_number = loss(0.1)
    np.testing.assert_array_equal(np.asarray(loss(jnp.float32(0.1))), np.asarray(at_number))
    value, slope = jax.jit(jax.value_and_grad(loss))(0.1)
    # another compilation's order of sums; the loss is linear in the coefficient, so the secant is exact
    np.testing.assert_allclose(float(value), float(at_number), rtol=1e-6)
    np.testing.assert_allclose(float(slope), float(loss(2.1) - at_number) / 2, rtol=1e-5)


WRONG = {
    "x has dtype int32": lambda a: {"x": a["x"].astype(np.int32)},
    "w has dtype int32": lambda a: {"w": a["w"].astype(np.int32)},
    "labels has dtype float32; it must be an integer": lambda a: {"labels": a["labels"].astype(np.float32)},
    r"x has shape \(0, 16\)": lambda a: {"x": a["x"][0, :0], "labels": a["labels"][0, :0]},
    r"w has shape \(300, 16\); it must be \(16, vocabulary\) \(it looks like": lambda a: {"w": a["w"].T},
    r"labels has shape \(3, 49\); .*\(3, 50\)": lambda a: {"labels": a["labels"][:, 1:]},
    "z_loss is -1": lambda a: {"z_loss": -1},
    "z_loss is 'no'": lambda a: {"z_loss": "no"},
    "soft_cap is 0": lambda a: {"soft_cap": 0},
    "ignore_index is 0.5": lambda a: {"ignore_index": 0.5},
    "reduction is 'max'; it must be one of mean, sum, none": lambda a: {"reduction": "max"},
    "block_sizes has 'rows'; it takes tokens here": lambda a: {
        "block_sizes": {"rows": 3}, "implementation": "xla_chunked",
    },
    "block_sizes has 'tokens'; it takes none here": lambda a: {
        "block_sizes": {"tokens": 3}, "implementation": "xla",
    },
    "block_sizes has tokens 0": lambda a: {"block_sizes": {"tokens": 0}, "implementation": "xla_chunked"},
    "vocab 100; it must be a multiple of 128": lambda a: {
        "block_sizes": {"vocab": 100}, "implementation": "pallas_tpu",
    },
    "x has dtype float16; it must be bfloat16 or float32": lambda a: {
        "x": a["x"].astype(np.float16), "implementation": "pallas_tpu",
    },
    "linear_cross_entropy does not have": lambda a: {"implementation": "cudnn"},
}  # fmt: skip


@pytest.mark.parametrize("message", WRONG)
def test_errors_name_the_argument(message):
    x, w, labels, *_ = make()
    args = {"x": x, "w": w, "labels": labels}
    args |= WRONG[message](args)
    with pytest.raises(ValueError, match=message):
        linear_cross_entropy(args.pop("x"), args.pop("w"), args.pop("labels"), **args)
