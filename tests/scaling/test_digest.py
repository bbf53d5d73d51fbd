"""The checksum of a train state."""

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from scaling import digest as module
from scaling.digest import digest


def tree(rng):
    return {
        "a": rng.standard_normal((3, 4, 5)).astype(np.float32),
        "b": rng.standard_normal(7).astype(ml_dtypes.bfloat16),
        "step": np.int32(5),
        "empty": np.zeros((0, 2), np.float32),
    }


def test_it_sees_every_change_and_nothing_else():
    rng = np.random.default_rng(0)
    one = tree(rng)
    want = digest(one)
    assert len(want) == 16 and digest(one) == want
    assert digest({k: jnp.asarray(v) for k, v in one.items()}) == want  # device arrays or NumPy's
    seen = {want}
    for name in ("a", "b"):
        for place in range(one[name].size):
            other = {k: np.array(v) for k, v in one.items()}
            bits = other[name].reshape(-1).view(f"u{other[name].itemsize}")
            bits[place] ^= 1
            seen.add(digest(other))
    swapped = {**one, "a": np.ascontiguousarray(one["a"][::-1])}
    seen |= {
        digest(swapped),
        digest({**one, "step": np.int32(6)}),
        digest({**one, "a": one["a"].reshape(4, 3, 5)}),
    }
    renamed = {("c" if k == "a" else k): v for k, v in one.items()}
    seen |= {digest(renamed), digest({**one, "a": -one["a"]})}
    assert len(seen) == 1 + 60 + 7 + 5


@pytest.mark.parametrize("block", [1, 7, 20, 10**6])
def test_how_much_is_summed_at_a_time_does_not_matter(block, monkeypatch):
    one = tree(np.random.default_rng(1))
    want = digest(one)
    monkeypatch.setattr(module, "BLOCK", block)
    assert digest(one) == want


def test_parts_of_an_array_add_up_to_the_whole():
    """What shards on devices give: each part with its own first index."""
    x = np.random.default_rng(2).standard_normal((6, 4)).astype(np.float32)
    seed = np.uint64(9)
    whole = module._weighted_sum(x, (0, 0), x.shape, seed)
    parts = [(i, j) for i in (0, 2, 4) for j in (0, 2)]
    total = sum(module._weighted_sum(x[i : i + 2, j : j + 2], (i, j), x.shape, seed) for i, j in parts)
    assert (total - whole) % 2**64 == 0
