"""A known floor: transformers on a Markov chain of order 1, whose entropy rate is exact.

256 states; each row of the chain is a Dirichlet draw of concentration 0.03. One layer is enough; width limits
a model, as on random walks (experiments/random_walk.py).

Measured (21 cells, 3,311 worker-seconds on 2 CPU cores at a load of 20): entropy rate 2.64636 nats a token,
fitted E 2.5581, 95 % interval 2.4534 to 2.6628, from losses of 2.82 to 3.86.
"""

from ml_collections import ConfigDict


def get_config():
    return ConfigDict(
        dict(
            name="markov",
            grid=dict(
                kind="product",
                params=[8.0e3, 11.3e3, 15.3e3, 19.2e3, 23.6e3, 29e3, 39.5e3],
                tokens=[2.5e5, 6e5, 1.5e6],
            ),
            model=dict(head_dim=4, tied=False, qk_norm=True),
            data=dict(source="markov", vocab=256, order=1, concentration=0.03, tokens=3_000_000, seq=32),
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
