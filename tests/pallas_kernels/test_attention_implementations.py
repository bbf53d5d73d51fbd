"""Every implementation of attention against the reference in float64: output, log-sum-exp, gradients."""

import attention_cases as cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import block_sparse_attention, dispatch, dot_product_attention

CASES = cases.CASES
# Logits of some hundreds round at 3e-5, and a weight by as much of itself; gradients are scaled by 30.
LARGE = {"rtol": 3e-3, "atol": 3e-2}


def blocks(options, implementation):
    small = "block_size" not in options and implementation != "xla"
    return {"block_sizes": 128} if small else {}


@pytest.mark.slow
@pytest.mark.parametrize("implementation", ["xla", "xla_chunked", "pallas_tpu"])
@pytest.mark.parametrize("case", CASES)
def test_equals_the_reference(case, implementation):
    problem = cases.problem(hash(case) % 1000, **CASES[case])
    with dispatch.interpret():
        found = cases.solve(*problem, implementation, **blocks(problem[1], implementation))
    cases.assert_same(found, cases.oracle(*problem), LARGE if "large" in case else cases.FLOAT32)


@pytest.mark.parametrize("implementation", ["xla_chunked", "pallas_tpu"])
def test_two_blocks_of_everything_equal_the_reference(implementation):
    problem = cases.problem(3, **CASES["everything"] | {"T": 200, "bias": None, "mask": None})
    with dispatch.interpret():
        found = cases.solve(*problem, implementation, block_sizes=128)
    cases.assert_same(found, cases.oracle(*problem), cases.FLOAT32)


@pytest.mark.parametrize("implementation", ["xla_chunked", "pallas_tpu"])
def test_bfloat16_within_its_rounding(implementation):
    problem = cases.problem(5, T=200, N=2, K=1, dtype=jnp.bfloat16, is_causal=True)
    with dispatch.interpret():
        found = cases.solve(*problem, implementation, block_sizes=128)
    cases.assert_same(found, cases.oracle(*problem), cases.BFLOAT16)


@pytest.mark.parametrize("implementation", ["xla", "xla_chunked", "pallas_tpu"])
def test_a_query_without_keys_gives_zeros_minus_infinity_and_no_gradient(implementation):
    arrays, options, cotangents = cases.problem(7, T=130, S=130, local_window_size=(0, 0))
    q_ids = np.zeros((1, 130), np.int32)
    q_ids[:, 60:] = 1
    options |= {"q_segment_ids": q_ids, "kv_segment_ids": np.zeros_like(q_ids)}
    with dispatch.interpret():
        found = cases.solve(arrays, options, cotangents, implementation)
    assert np.all(found["out"][:, 60:] == 0) and np.all(found["lse"][:, 60:] == -np.inf)
    assert np.all(found["dq"][:, 60:] == 0) and np.all(found["dk"][:, 60:] == 0)
    assert all(np.all(np.isfinite(found[name])) for name in ("out", "dq", "dk", "dv"))


def test_block_mask_known_late_equals_known_early():
    arrays, options, _ = cases.problem(8, T=300, N=2, K=1, block_mask=(1, 2))
    mask, size = options["block_mask"], options["block_size"]

    def run(mask):
        return block_sparse_attention(**arrays, block_mask=mask, block_size=size, implementation="pallas_tpu")

    with dispatch.interpret():
        np.testing.assert_array_equal(jax.jit(run)(mask), run(mask))


@pytest.mark.parametrize("implementation", ["xla_chunked", "pallas_tpu"])
def test_under_vmap_remat_and_scan(implementation):
    arrays, _, (dout, _) = cases.problem(9, B=2, T=130, H=32)

    def attend(q, k, v):
        return dot_product_attention(
            q, k, v, is_causal=True, implementation=implementation, block_sizes=128
        )  # fmt: skip

    def loss(f):
        return lambda *x: jnp.sum(f(*x) * dout)

    def mapped(*x):
        return jax.vmap(lambda *row: attend(*(a[None] for a in row))[0])(*x)

    def scanned(*x):
        step = jax.checkpoint(lambda _, row: (None, attend(*(a[None] for a in row))[0]))
        return jax.lax.scan(step, None, x)[1]

    x = tuple(jnp.asarray(a) for a in arrays.values())
    with dispatch.interpret():
        plain = jax.grad(loss(attend), (0, 1, 2))(*x)
        for f in (mapped, scanned):
            for a, b in zip(jax.jit(jax.grad(loss(f), (0, 1, 2)))(*x), plain, strict=True):
                np.testing.assert_allclose(a, b, **cases.FLOAT32)


BAD = {
    "block_mask has dtype": ({"block_mask": np.ones((1, 2, 2))}, {}),
    "block_mask has shape": ({"block_mask": np.ones((1, 3, 2), bool)}, {}),
    "block_size is 0": ({"block_size": 0}, {}),
    "block_size is None": ({"block_size": None}, {}),
    "both must be multiples of 128": ({"block_size": 100}, {"implementation": "pallas_tpu"}),
}


@pytest.mark.parametrize("words", BAD)
def test_bad_block_masks_are_named(words):
    arrays, _, _ = cases.problem(1, T=200)
    change, more = BAD[words]
    options = {"block_mask": np.ones((1, 2, 2), bool), "block_size": 128} | change
    with pytest.raises(ValueError, match=words):
        block_sparse_attention(**arrays, **options, **more)


def test_bad_block_sizes_scale_and_dtype_are_named():
    arrays, _, _ = cases.problem(1, T=8)
    with pytest.raises(ValueError, match="block_sizes is \\(0, 8\\)"):
        dot_product_attention(**arrays, block_sizes=(0, 8))
    with pytest.raises(ValueError, match="scale is "):
        jax.jit(lambda s: dot_product_attention(**arrays, scale=s))(0.5)
    half = {name: x.astype(np.float16) for name, x in arrays.items()}
    with pytest.raises(ValueError, match="'pallas_tpu': q has dtype float16"):
        dot_product_attention(**half, implementation="pallas_tpu")
