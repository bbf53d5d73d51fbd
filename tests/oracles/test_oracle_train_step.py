"""The PyTorch side of benchmarks/train_step.py takes our steps; on a CPU, before a GPU is had.

Needs the ``oracles`` extra; ``make oracles`` sets up an environment with it.
"""

import json
import pathlib

import jax
import numpy as np
import pytest

REASON = "the 'oracles' extra (torch, transformers) is not installed; `make oracles` runs these tests"
torch = pytest.importorskip("torch", reason=REASON)

pytestmark = pytest.mark.oracle

HERE = pathlib.Path(__file__).resolve().parents[2] / "benchmarks"
CASES = {
    "float32": ("float32", {}),
    "shared heads, untied, no qk-norm": ("float32", {"kv_heads": 1, "tied": False, "qk_norm": False}),
    "bfloat16": ("bfloat16", {}),
}


@pytest.mark.parametrize("case", CASES)
def test_plain_torch_takes_the_same_steps(case, monkeypatch):
    monkeypatch.syspath_prepend(str(HERE))
    import plain_torch
    import train_step

    dtype, changes = CASES[case]
    cell = train_step.make_cell(32, 2, 61, 4, 24, dtype, cross_document=True, **changes)
    cell["optim"] |= {"weight_decay": 3.0, "grad_clip": 0.3, "lr": 3e-3}
    batch = train_step.make_batch(61, 4, 24)
    ours = list(train_step.our_step(cell))
    model = plain_torch.LM(json.loads(json.dumps(cell["model"])), 24)
    plain_torch.load_ours(model, jax.tree.map(np.asarray, ours[1].params))
    step = plain_torch.step_function(model, cell["optim"], "cpu")
    inputs, targets = (torch.tensor(batch[k]).long() for k in ("inputs", "targets"))
    theirs = [float(step(inputs, targets)) for _ in range(6)]
    expected = train_step.losses(ours, batch, 6)
    assert expected[0] - expected[-1] > 0.3
    # float32: sums in other orders. bfloat16: half a unit in the last of 8 bits, at other places of the graph
    np.testing.assert_allclose(theirs, expected, rtol={"float32": 1e-5, "bfloat16": 2**-9}[dtype])
