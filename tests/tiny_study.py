"""A study config that trains in seconds, for the tests of the planner and of the command line."""


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
