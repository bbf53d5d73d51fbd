"""Kernels on sharded arrays: eight devices simulated on the CPU, in a process of their own."""

import os
import subprocess
import sys
from pathlib import Path

CODE = '''
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from pallas_kernels import sharding

seen = []

def local(q, k):
    """Grouped heads, as in attention; the second result is a sum over batch and heads."""
    seen.append((q.shape, k.shape))
    each = k.sum((1, 3)).repeat(q.shape[2] // k.shape[2], 1)[:, None, :, None]
    return q * each, jnp.sum(q, (0, 1, 2))

f = sharding.per_shard(
    local, "b t (k g) h, b s k h -> b t (k g) h, h", whole=("t", "s", "h"), sums=("b", "k", "g"), k=2, g=2
)
rng = np.random.default_rng(0)
q, k = rng.random((4, 6, 4, 8), np.float32), rng.random((4, 5, 2, 8), np.float32)
want = local(jnp.array(q), jnp.array(k))

def check(out, local_shapes):
    for x, y in zip(out, want):
        np.testing.assert_allclose(x, y, rtol=1e-5)  # sums of 96 float32 in another order
    assert seen[-1] == local_shapes, seen
    seen.clear()

WHOLE = (q.shape, k.shape)
LOCAL = ((1, 6, 2, 8), (1, 5, 1, 8))
check(jax.jit(f)(q, k), WHOLE)
for kind in (AxisType.Auto, AxisType.Explicit):
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(kind,) * 2)
    with jax.set_mesh(mesh):
        for spec, shapes in (
            (P("data", None, "model"), LOCAL),
            (P(None, None, "model"), ((4, 6, 2, 8), (4, 5, 1, 8))),
            (P("data", None, None, "model"), ((1, 6, 4, 8), (1, 5, 2, 8))),  # channels are gathered
        ):
            a, b = (jax.device_put(x, NamedSharding(mesh, spec)) for x in (q, k))
            check(jax.jit(f)(a, b), shapes)
            mapped = jax.jit(jax.vmap(f))(a[None], b[None])
            check([x[0] for x in mapped], shapes)
            check([x[0] for x in jax.jit(jax.vmap(f, (0, None)))(a[None], b)], shapes)

mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
spec = P("data", None, "model")
a, b = (jax.device_put(x, NamedSharding(mesh, spec)) for x in (q, k))
check(f(a, b), LOCAL)
check(jax.jit(f)(a, b), LOCAL)
text = jax.jit(f).lower(a, b).compile().as_text()
assert "all-gather" not in text and "all-reduce" in text
seen.clear()
one = lambda q, k: f(q, k)[:1]
check(jax.jit(jax.shard_map(one, mesh=mesh, in_specs=(spec,) * 2, out_specs=(spec,)))(a, b), LOCAL)
some = jax.shard_map(one, mesh=mesh, axis_names={"data"}, in_specs=(P("data"),) * 2, out_specs=(P("data"),))
check(jax.jit(some)(a, b), ((1, 6, 4, 8), (1, 5, 2, 8)))
# five heads cannot be split in two: gathered, not refused
odd = sharding.per_shard(lambda x: (x * 2,), "b n -> b n")
x = jax.device_put(rng.random((4, 5), np.float32), NamedSharding(mesh, P("data")))
np.testing.assert_array_equal(jax.jit(odd)(x)[0], 2 * np.asarray(x))
print("sharded kernels agree")
'''


def test_every_device_computes_its_part_under_every_kind_of_mesh():
    env = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
    root = Path(__file__).parents[2]
    out = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, env=env, cwd=root)
    assert out.returncode == 0, out.stderr[-3000:]
    assert "sharded kernels agree" in out.stdout
