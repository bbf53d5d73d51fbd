"""Monarch matrices against the dense matrices that they stand for."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from scaling.config import validate_section
from scaling.models.monarch import Monarch, monarch_product
from scaling.models.swiglu import SwiGLU

SHAPE = {"d_model": 32, "layers": 2, "heads": 2, "kv_heads": 2, "head_dim": 16, "ffn_dim": 48}


def block_diagonal(blocks):
    b, K, N = blocks.shape
    out = np.zeros((b * K, b * N))
    for i, block in enumerate(blocks):
        out[i * K : (i + 1) * K, i * N : (i + 1) * N] = block
    return out


def transposition(rows, columns):
    """The permutation matrix that takes entry (i, j) of rows x columns, flat, to (j, i)."""
    out = np.zeros((rows * columns, rows * columns))
    for i in range(rows):
        for j in range(columns):
            out[i * columns + j, j * rows + i] = 1
    return out


@pytest.mark.parametrize(("b", "K", "s", "N"), [(4, 8, 8, 12), (4, 12, 8, 8), (3, 5, 7, 2), (1, 6, 5, 9)])
def test_a_monarch_product_is_a_dense_product(b, K, s, N):
    """x R P L P', every factor a dense matrix of its own; square (Dao et al. 2022) and rectangular."""
    rng = np.random.default_rng(0)
    first, second = rng.standard_normal((b, K, s)), rng.standard_normal((b, s, N))
    x = rng.standard_normal((2, 3, b * K))
    dense = (
        block_diagonal(first) @ transposition(b, s) @ block_diagonal(second) @ transposition(b, N)
    )  # [b K, b N]
    got = monarch_product(*map(jnp.float32, (x, first, second)))
    # float32 sums of at most 12 terms, twice
    np.testing.assert_allclose(got, x @ dense, rtol=1e-5, atol=1e-5 * dense.std())
    # every output sees every input, through b factors of lower rank
    assert (dense != 0).all()
    if b == 4:
        assert np.linalg.matrix_rank(dense[:K, ::b][:, : N // 1]) == s // b


def test_one_block_with_an_identity_is_the_dense_feed_forward():
    cfg = validate_section("model", {**SHAPE, "family": "monarch", "monarch_blocks": 1})
    dense, monarch = SwiGLU(cfg, nnx.Rngs(0)), Monarch(cfg, nnx.Rngs(1))
    same = jnp.eye(SHAPE["d_model"])[None]
    for name in ("gate", "up"):
        getattr(monarch, f"{name}_first")[...] = same
        getattr(monarch, f"{name}_second")[...] = getattr(dense, name)[...][None]
    monarch.down_first[...], monarch.down_second[...] = dense.down[...][None], same
    x = jax.random.normal(jax.random.key(2), (2, 5, SHAPE["d_model"]))
    # the same sums, and products with ones and zeros
    np.testing.assert_allclose(monarch(x), dense(x), rtol=1e-5, atol=1e-6)


def test_what_is_initialised_keeps_its_size():
    cfg = validate_section(
        "model", {**SHAPE, "d_model": 256, "heads": 16, "ffn_dim": 512, "family": "monarch"}
    )
    layer = Monarch(cfg, nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(1), (4096, 256))
    wide = monarch_product(x, layer.gate_first[...], layer.gate_second[...])
    # 2 x 64 x 64 random weights a path: a few per cent
    assert float(jnp.std(wide)) == pytest.approx(1, rel=0.05)
