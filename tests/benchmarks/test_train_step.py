"""The benchmark of the training step compares like with like."""

import pathlib

import jax
import numpy as np
import pytest

from scaling.models.lm import abstract_params

HERE = pathlib.Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def train_step(monkeypatch):
    monkeypatch.syspath_prepend(str(HERE))
    import train_step

    return train_step


def drawn(cell):
    """Random parameters: to compile the rule of initialisation takes longest."""
    rng = np.random.default_rng(0)
    draw = lambda x: (rng.standard_normal(x.shape) / x.shape[-1] ** 0.5).astype(np.float32)  # noqa: E731
    return jax.tree.map(draw, abstract_params(cell["model"]))


def test_plain_jax_takes_the_same_steps(train_step):
    """Losses of six AdamW steps: clipping, strong decay, two documents a row and shared heads in force."""
    cell = train_step.make_cell(32, 2, 61, 4, 24, "float32", kv_heads=1, tied=False)
    cell["optim"] |= {"weight_decay": 3.0, "grad_clip": 0.3, "lr": 3e-3}
    batch = train_step.make_batch(61, 4, 24)
    assert (batch["positions"] == 0).sum() == 8 and set(np.unique(batch["segment_ids"])) == {1, 2}
    sides = train_step.sides(cell, drawn(cell), plain=("loop",))  # the benchmark itself checks both
    seen = {name: train_step.losses(side, batch, 6) for name, side in sides.items()}
    assert seen["ours"][0] - seen["ours"][-1] > 0.1
    # both in float32, sums in other orders
    np.testing.assert_allclose(seen["loop"], seen["ours"], rtol=1e-5)


@pytest.mark.parametrize("size,params", [("124M", 124e6), ("1.3B", 1.3e9)])
def test_sizes_of_the_gpu_section(train_step, size, params):
    cell = train_step.gpu_cell(size)
    built = sum(x.size for x in jax.tree.leaves(abstract_params(cell["model"])))
    assert built == pytest.approx(params, rel=0.08) and cell["model"]["cross_document"]


def test_gpu_section_says_what_is_missing(train_step, monkeypatch):
    monkeypatch.setattr(train_step.shutil, "which", lambda name: None)
    with pytest.raises(SystemExit, match="no NVIDIA GPU"):
        train_step.gpu_section("python", 5, 1)
