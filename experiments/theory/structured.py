"""SGD on structured features: the best batch at fixed compute, where it is known.

Three budgets of samples, seven batches a factor of sqrt 2 apart in each; by the exact mean and by SGD itself.
`scaling fit STUDY --by family --map params=batch_tokens` reads the exponents of the best batch and of its
excess loss, and holds them against the truth: both 1/2 in the limit (docs/theory.md).
"""

from ml_collections import ConfigDict

SAMPLES = (3_000, 10_000, 30_000)
CENTRES = (7, 13, 23)
"""About the best batch of each, as a pilot study finds it."""


def get_config(draws=32):
    cells = []
    for dynamics in ("moments", "sgd"):
        for samples, centre in zip(SAMPLES, CENTRES, strict=True):
            for k in range(-3, 4):
                batch = round(centre * 2 ** (k / 2))
                fixed = {"trainer.dynamics": dynamics, "train.batch": batch}
                fixed["trainer.draws"] = draws if dynamics == "sgd" else 1
                cells.append({"params": 96, "tokens": samples, "set": fixed})
    return ConfigDict(
        dict(
            name="structured",
            grid=dict(kind="list", cells=cells, min_steps=24),
            trainer=dict(name="structured", decay=2.0, target=3.0, rate=0.1, noise=0.5),
        )
    )
