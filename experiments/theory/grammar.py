"""A known floor: transformers on a probabilistic grammar, whose entropy is exact.

32 symbols a level, two levels, documents of four tokens: a row holds eight, attention stays within each. A
document's first token is no target, so that the floor is its other tokens' entropy.

Measured (18 cells, 2,211 worker-seconds on 2 CPU cores at a load of 20): the true floor is 1.18692 nats a
token, fitted E 0.978, 95 % interval 0.677 to 1.280, from losses of 1.29 to 2.09. The interval holds the truth
and is wide: models this small are far from the floor.
"""

from experiments.random_walk import get_config as random_walk


def get_config():
    config = random_walk()
    config.name = "grammar"
    config.grid = dict(
        kind="product",
        params=[1.38e3, 2.5e3, 4.0e3, 6.2e3, 8.5e3, 14.6e3],
        tokens=[1.5e5, 3.5e5, 8e5],
        tolerance=0.02,
    )
    config.data = dict(source="grammar", vocab=32, depth=2, branching=2, rules=4, tokens=2_000_000, seq=32)
    config.recipe.update(params=5e3, tokens=3e5, lr=3e-2)
    config.eval.sequences = 2048
    return config
