"""Learning rate and weight decay of a small model by iterative-deepening Hyperband, for 2.1e12 FLOPs.

`scaling search experiments/tune.py`; then append 2e6 to ``tokens``, raise ``budget`` and run it again: what
was trained is kept.
"""

from experiments.quickstart import get_config as quickstart


def get_config():
    config = quickstart()
    config.name = "tune"
    del config["grid"]
    config.search = dict(
        kind="deepening",
        budget=2.2e12,
        params=20e3,
        tokens=[0.5e6, 1e6],
        least_tokens=0.125e6,
        eta=2,
        space=dict(optim=dict(lr=dict(low=1e-3, high=3e-2), weight_decay=dict(low=0.01, high=1.0))),
    )
    return config
