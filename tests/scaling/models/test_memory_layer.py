"""The memory layer against all its keys, scored one by one."""

import jax
import numpy as np
import pytest
from flax import nnx

from scaling.config import validate_section
from scaling.models.memory import Memory

pytestmark = pytest.mark.usefixtures("quick_compiles")


@pytest.mark.parametrize("top", [1, 3, 7])
def test_the_best_of_all_keys_by_brute_force(top):
    shape = {"d_model": 16, "layers": 1, "heads": 2, "kv_heads": 2, "head_dim": 8, "ffn_dim": 8}
    sizes = {"memory_keys": 7, "memory_heads": 3, "memory_top": top}
    cfg = validate_section("model", {**shape, "family": "hybrid", "pattern": ["attention+memory"], **sizes})
    graph, state = nnx.split(Memory(cfg, nnx.Rngs(0)))
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda a: np.asarray(a + 0.3 * rng.standard_normal(a.shape), np.float32), nnx.to_pure_dict(state)
    )
    x = rng.standard_normal((2, 5, 16)).astype(np.float32)
    got = jax.jit(lambda x: nnx.merge(graph, params)(x))(x)
    p = jax.tree.map(np.float64, params)
    n, N, half = 7, 3, 4
    want = np.zeros_like(x, np.float64)
    for b, t in np.ndindex(2, 5):
        q = (x[b, t].astype(np.float64) @ p["q"]).reshape(N, 2, half)
        q = q / np.sqrt((q**2).mean(-1, keepdims=True) + cfg["norm_eps"]) * p["q_norm"]["scale"]
        for head in range(N):
            scores = np.array(
                [p["keys"][0, head, i] @ q[head, 0] + p["keys"][1, head, j] @ q[head, 1]
                 for i in range(n) for j in range(n)]
            )  # fmt: skip
            best = np.argsort(-scores)[:top]
            weights = np.exp(scores[best] - scores[best].max())
            want[b, t] += weights / weights.sum() @ p["values"][best]
        gate = x[b, t] @ p["gate"]
        want[b, t] = (want[b, t] * gate / (1 + np.exp(-gate))) @ p["out"]
    # float32 sums of some tens of terms
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4 * want.std())


def test_every_row_that_is_read_learns_and_no_other():
    shape = {"d_model": 16, "layers": 1, "heads": 2, "kv_heads": 2, "head_dim": 8, "ffn_dim": 8}
    cfg = validate_section(
        "model",
        {**shape, "family": "hybrid", "pattern": ["attention+memory"], "memory_keys": 9, "memory_top": 2},
    )
    graph, state = nnx.split(Memory(cfg, nnx.Rngs(0)))
    params = nnx.to_pure_dict(state)
    x = np.random.default_rng(0).standard_normal((1, 3, 16)).astype(np.float32)
    gradient = jax.grad(lambda p: (nnx.merge(graph, p)(x) ** 2).sum())(params)
    moved = np.abs(np.asarray(gradient["values"])).max(1) > 0
    assert 2 <= moved.sum() <= 3 * 4 * 2
    assert all(np.abs(np.asarray(gradient[k])).max() > 0 for k in ("q", "keys", "gate", "out"))
