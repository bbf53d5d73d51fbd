"""cuDNN through jax.nn: what is refused and what is asked of it; the numbers themselves need a GPU."""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.gpu import cudnn

ON_GPU = jax.default_backend() == "gpu"


def options(**more):
    defaults = {"scale": 0.1, "is_causal": True, "window": None, "logits_soft_cap": None, "block_sizes": None}
    return types.SimpleNamespace(**(defaults | more))


@pytest.fixture
def jax_nn(monkeypatch):
    """Off a GPU jax.nn computes by XLA what it is asked to by cuDNN."""
    original = jax.nn.dot_product_attention

    def by_xla(*args, implementation, **kwargs):
        assert implementation == "cudnn"
        return original(*args, implementation="xla", **kwargs)

    if not ON_GPU:
        monkeypatch.setattr(jax.nn, "dot_product_attention", by_xla)


def arrays(T=16, N=4, K=2, H=16, dtype=jnp.bfloat16):
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.standard_normal((2, T, n, H)), dtype) for n in (N, K, K)]


@pytest.mark.parametrize(("window", "is_causal"), [(None, True), ((5, 0), False), ((5, 9), True)])
def test_means_what_the_options_say(jax_nn, window, is_causal):
    q, k, v = arrays()
    o = options(is_causal=is_causal, window=window)
    assert cudnn.refuses(q, k, v, *[None] * 5, options=o) is None
    out, lse = cudnn.forward(q, k, v, *[None] * 5, options=o)
    logits = (
        np.einsum("btkgh,bskh->bkgts", np.asarray(q, np.float64).reshape(2, 16, 2, 2, 16), np.asarray(k))
        * 0.1
    )
    ahead = np.arange(16) - np.arange(16)[:, None]
    allowed = ahead <= 0
    if window:
        allowed &= (ahead >= -window[0]) & (ahead <= window[1])
    weights = np.where(allowed, np.exp(logits), 0)
    total = weights.sum(-1)
    want = np.einsum("bkgts,bskh->btkgh", weights / total[..., None], np.asarray(v, np.float64))
    # bfloat16 has 8 bits, and jax.nn rounds the log-sum-exp to it too
    np.testing.assert_allclose(np.asarray(out, np.float64), want.reshape(2, 16, 4, 16), atol=2**-6)
    assert lse.dtype == jnp.float32
    np.testing.assert_allclose(np.asarray(lse), np.log(total).reshape(2, 4, 16).swapaxes(1, 2), atol=2**-6)


def test_the_gradient_of_the_log_sum_exp_is_an_error_and_others_are_not(jax_nn):
    forward = functools.partial(cudnn.forward, options=options())
    q, *rest = arrays()
    rest += [None] * 5
    only_out = jax.grad(lambda q: forward(q, *rest)[0].astype(jnp.float32).sum())(q)
    alone = jax.grad(lambda q: forward(q, *rest, with_lse=False)[0].astype(jnp.float32).sum())(q)
    np.testing.assert_array_equal(np.asarray(only_out, np.float32), np.asarray(alone, np.float32))
    with pytest.raises(NotImplementedError, match="'cudnn' has no gradient of the log-sum-exp"):
        jax.grad(lambda q: forward(q, *rest)[1].sum())(q)


def test_refuses_in_words_that_name_the_argument():
    def reason(q=None, k=None, *, bias=None, mask=None, segments=None, **more):
        q = jax.ShapeDtypeStruct((1, 8, 2, 64), jnp.bfloat16) if q is None else q
        k = q if k is None else k
        return cudnn.refuses(q, k, k, bias, mask, segments, segments, None, options=options(**more))

    q = jax.ShapeDtypeStruct((1, 8, 2, 64), jnp.bfloat16)
    logits = jnp.zeros((1, 2, 8, 8))
    assert reason() is None and reason(bias=logits) is None
    assert "q has dtype float32" in reason(q.update(dtype=jnp.float32))
    assert "q has head size 60" in reason(q.update(shape=(1, 8, 2, 60)))
    assert "q has head size 512" in reason(q.update(shape=(1, 8, 2, 512)))
    assert "bias has shape (1, 2, 1, 8)" in reason(bias=logits[:, :, :1])
    odd = q.update(shape=(1, 7, 2, 64))
    assert "both must be even" in reason(odd, bias=logits[:, :, :7, :7])
    assert reason(mask=logits > 0).startswith("mask is given")
    assert reason(segments=jnp.zeros((1, 8), jnp.int32)).startswith("q_segment_ids is given")
    assert "logits_soft_cap is 30.0" in reason(logits_soft_cap=30.0)
    assert "block_sizes is (128, 128)" in reason(block_sizes=(128, 128))
    assert "to the right it must be 0" in reason(window=(4, 4), is_causal=False)
    assert "8 queries and 7 keys" in reason(q, odd, window=(4, 0))


@pytest.mark.skipif(ON_GPU, reason="a GPU is here")
def test_without_a_gpu_jax_says_so():
    with pytest.raises((RuntimeError, ValueError), match=r"(?i)cudnn|gpu|cuda"):
        jax.block_until_ready(cudnn.forward(*arrays(), *[None] * 5, options=options()))
