"""Walks on graphs of one size and several degrees: what a source's complexity does to the exponents.

One study a graph, `scaling plan experiments/theory/graphs.py --set data.degree=12`; the script
benchmarks/graph_complexity.py runs them all and puts the fitted exponents beside the entropy rates. Models
have one layer, so that width is what limits them, and one learning rate: of 0.02, 0.04 and 0.08 at degree 12
the largest was best for small and middle cells, and for the largest 0.04 was as good.
"""

from experiments.random_walk import get_config as random_walk


def get_config():
    config = random_walk()
    config.name = "graphs"
    config.grid = dict(
        kind="product",
        params=[4.7e3, 7.6e3, 11.2e3, 19.3e3, 33e3],
        tokens=[1.2e5, 3.5e5, 1e6, 1.75e6],
        tolerance=0.1,
    )
    config.data = dict(
        source="random_walk", vocab=256, degree=6.0, zipf=0.5, tokens=2_000_000, seq=32, heldout_fraction=0.1
    )
    config.recipe.update(lr=6e-2, lr_params_exponent=0.0, lr_tokens_exponent=0.0, width_per_layer=1e3)
    return config
