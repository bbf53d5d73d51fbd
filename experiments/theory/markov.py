"""A known floor: transformers on a Markov chain of order 1, whose entropy rate is exact.

256 states; each row of the chain is a Dirichlet draw of concentration 0.03. One layer is enough; width limits
a model, as on random walks (experiments/random_walk.py).

Measured (21 cells, 3,311 worker-seconds on 2 CPU cores at a load of 20): entropy rate 2.64636 nats a token,
fitted E 2.5581, 95 % interval 2.4534 to 2.6628, from losses of 2.82 to 3.86.
"""

from experiments.random_walk import get_config as random_walk


def get_config():
    config = random_walk()
    config.name = "markov"
    config.grid = dict(
        kind="product",
        params=[8.0e3, 11.3e3, 15.3e3, 19.2e3, 23.6e3, 29e3, 39.5e3],
        tokens=[2.5e5, 6e5, 1.5e6],
    )
    config.data = dict(source="markov", vocab=256, order=1, concentration=0.03, tokens=3_000_000, seq=32)
    return config
