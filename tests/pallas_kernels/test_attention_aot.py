"""Attention compiled for TPUs that are not here, sharded over simulated devices, and its account of pairs."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels import aot, dot_product_attention
from pallas_kernels.cost import attention as cost

B, T, N, K, H = 1, 4096, 8, 2, 128
Q = jax.ShapeDtypeStruct((B, T, N, H), jnp.bfloat16)
KV = jax.ShapeDtypeStruct((B, T, K, H), jnp.bfloat16)
# Copies of q, k, v, the output and its gradient with heads side by side, and float32 statistics; logits
# in full would be 8 x 4096 x 4096 x 4 bytes, 537 MB.
BUDGET = 48e6


def attend(q, k, v):
    return dot_product_attention(q, k, v, is_causal=True, local_window_size=(2047, 0))


def gradients(q, k, v, dout):
    return jax.vjp(attend, q, k, v)[1](dout)


@pytest.mark.slow
@pytest.mark.aot
@pytest.mark.skipif(not importlib.util.find_spec("libtpu"), reason="libtpu is not installed")
@pytest.mark.parametrize("generation", ["v4", "v5e", "v5p", "v6e", "tpu7x"])
def test_compiles_for_tpu_in_linear_memory(generation):
    compiled = aot.compile_tpu(gradients, Q, KV, KV, Q, generation=generation)
    assert compiled.as_text().count('custom_call_target="tpu_custom_call"') == 3
    assert compiled.memory_analysis().temp_size_in_bytes < BUDGET


def test_chunks_take_linear_memory_on_a_cpu():
    def temp(T, implementation):
        x = jax.ShapeDtypeStruct((1, T, 2, 32), jnp.float32)
        f = jax.grad(lambda q, k, v: dot_product_attention(q, k, v, implementation=implementation).sum())
        return jax.jit(f).lower(x, x, x).compile().memory_analysis().temp_size_in_bytes

    # Four times the tokens, at most four times the memory; logits in full would be 134 MB.
    assert temp(4096, "xla_chunked") < 4.2 * temp(1024, "xla_chunked")
    assert temp(4096, "xla_chunked") < 16e6


lengths = st.integers(1, 40)
windows = st.none() | st.tuples(st.integers(0, 45), st.integers(0, 45))


@settings(max_examples=300, deadline=None, derandomize=True)
@given(lengths, lengths, st.integers(1, 9), st.integers(1, 9), st.booleans(), windows)
def test_pairs_and_blocks_are_those_of_the_mask(T, S, block_q, block_kv, is_causal, window):
    def kept(t, s):
        inside = window is None or t - window[0] <= s <= t + window[1]
        return inside and (s <= t or not is_causal)

    masks = {"is_causal": is_causal, "window": window}
    pairs = [(t, s) for t in range(T) for s in range(S) if kept(t, s)]
    assert cost.pairs(T, S, **masks) == len(pairs)
    blocks = {(t // block_q, s // block_kv) for t, s in pairs}
    ranges = cost.key_blocks(T, S, block_q, block_kv, **masks)
    assert blocks == {(i, j) for i, (low, high) in enumerate(ranges) for j in range(low, high)}


SHARDED = """
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from pallas_kernels import block_sparse_attention, dispatch, dot_product_attention

rng = np.random.default_rng(0)
q, k, v, dout = (jnp.array(rng.standard_normal((2, 130, n, 16)), jnp.float32) for n in (4, 2, 2, 4))
ids = jnp.array(np.sort(rng.integers(0, 3, (2, 130)), axis=1), jnp.int32)
bias = jnp.array(rng.standard_normal((1, 4, 130, 130)), jnp.float32)

def run(q, k, v, bias, ids, dout):
    f = lambda q, k, v, bias: dot_product_attention(
        q, k, v, bias=bias, is_causal=True, q_segment_ids=ids, implementation="pallas_tpu", block_sizes=128)
    out, pull = jax.vjp(f, q, k, v, bias)
    return out, pull(dout)

with dispatch.interpret():
    want = jax.jit(run)(q, k, v, bias, ids, dout)
    for kind in (AxisType.Auto, AxisType.Explicit):
        mesh = jax.make_mesh((2, 2), ("data", "model"), axis_types=(kind,) * 2)
        with jax.set_mesh(mesh):
            heads, rows = P("data", None, "model"), P("data")
            put = lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec))
            got = jax.jit(run)(put(q, heads), put(k, heads), put(v, heads), put(bias, P(None, "model")),
                               put(ids, rows), put(dout, heads))
            for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want)):
                np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)  # float32, sums in another order
print("shards agree")
"""


@pytest.mark.slow
def test_sharded_over_batch_and_heads():
    env = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=4"}
    root = Path(__file__).parents[2]
    out = subprocess.run([sys.executable, "-c", SHARDED], capture_output=True, text=True, env=env, cwd=root)
    assert out.returncode == 0, out.stderr[-3000:]
    assert "shards agree" in out.stdout
