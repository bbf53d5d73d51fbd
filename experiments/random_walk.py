"""A check of the whole path against a known answer: random walks, whose entropy rate is exact.

The tokens are the nodes of a random graph: 512 nodes, about 6 neighbours each, more for some. No model does
better than the walk's entropy rate, so the fitted E has a true value, and `scaling fit` prints both. The next
node depends on the last one alone: one layer is enough, and width is what limits a model. The batch is the
same everywhere, since its rounding to powers of two would show in so clean a law.

Measured (2 CPU cores, 4 minutes of CPU time): entropy rate 1.59624 nats per token, fitted E 1.5923 with a
95 % interval of 1.5686 to 1.6160; beta 1.005 (0.78 to 1.23); 1 is what estimating transition counts gives.
"""

from ml_collections import ConfigDict


def get_config():
    return ConfigDict(
        dict(
            name="random_walk",
            grid=dict(
                kind="product",
                params=[19.4e3, 25.5e3, 31.6e3, 45.4e3, 60e3, 77e3],
                tokens=[2.5e5, 6e5, 1.5e6],
            ),
            model=dict(head_dim=4, tied=False, qk_norm=True),
            data=dict(source="random_walk", vocab=512, degree=6.0, zipf=0.5, tokens=3_000_000, seq=32),
            recipe=dict(
                params=20e3,
                tokens=5e5,
                lr=5e-2,
                tau=3.0,
                batch_tokens=1024,
                batch_tokens_exponent=0.0,
                beta2=0.99,
                width_per_layer=64.0,
                width_multiple=4,
                ffn_multiple=8,
            ),
            optim=dict(grad_clip=1.0),
            schedule=dict(name="wsd", decay_fraction=0.3),
            eval=dict(sequences=4096),
        )
    )
