"""A study and a cell that train in seconds: for the tests of planner, command line and training loop."""

from scaling.config import validate_cell

FACTS = {"fingerprint": "f" * 16, "vocab": 256, "unique_tokens": 10**9, "heldout_tokens": 10**6}
"""Of a study's data, for plans of which nothing is trained."""


def tiny_study(corpus, budgets=(4e8, 1.6e9), params=(3e3, 6e3, 12e3), batch_tokens=128, **changes) -> dict:
    """An isoFLOP study on a folder of text files.

    Args:
      corpus: the folder.
      budgets: training FLOPs. params: target N. batch_tokens: the reference cell's batch.
      changes: whole sections to replace.
    """
    return {
        "name": "tiny",
        "grid": {"kind": "isoflop", "budgets": list(budgets), "params": list(params), "min_steps": 10},
        "model": {"head_dim": 8},
        "data": {"source": "text", "path": str(corpus), "seq": 32},
        "recipe": {
            "params": 6e3,
            "tokens": 3e4,
            "lr": 1e-2,
            "batch_tokens": batch_tokens,
            "width_per_layer": 16.0,
            "width_multiple": 8,
            "ffn_multiple": 8,
            "min_warmup_steps": 2,
        },
        "eval": {"sequences": 16},
        **changes,
    }


def tiny_cell(corpus, **changes) -> dict:
    """A validated cell of 40 steps on a folder of text files; ``changes``: fields by section, on top."""
    cell = {
        "model": {"d_model": 16, "layers": 2, "heads": 2, "kv_heads": 1, "head_dim": 8, "ffn_dim": 24},
        "data": {"source": "text", "path": str(corpus), "seq": 32},
        "optim": {"lr": 1e-2},
        "schedule": {"warmup_steps": 3},
        "train": {"batch": 4, "steps": 40},
        "eval": {"sequences": 16, "points": 2},
    }
    for section, fields in changes.items():
        cell[section] = cell.get(section, {}) | fields
    return validate_cell(cell)
