"""An isoFLOP study for a TPU pod: seven budgets from 1e18 to 1e21 FLOPs, 50M to 7B parameters.

Sizes lie a factor of 10^(1/4) apart around N = sqrt(C / 120), where Hoffmann et al. 2022 have the optimum.
The data is a folder of token shards, made by ``scaling tokenize`` with a tokenizer of 128,256 ids;
``scaling preflight`` plans and compiles the cells without it.
"""

from ml_collections import ConfigDict


def get_config():
    return ConfigDict(
        dict(
            name="isoflop",
            grid=dict(
                kind="isoflop",
                budgets=[1e18, 3.2e18, 1e19, 3.2e19, 1e20, 3.2e20, 1e21],
                params=[
                    [50e6, 90e6, 160e6, 280e6],
                    [50e6, 90e6, 160e6, 280e6, 500e6],
                    [90e6, 160e6, 280e6, 500e6, 900e6],
                    [160e6, 280e6, 500e6, 900e6, 1.6e9],
                    [280e6, 500e6, 900e6, 1.6e9, 2.8e9],
                    [500e6, 900e6, 1.6e9, 2.8e9, 5e9],
                    [900e6, 1.6e9, 2.8e9, 5e9, 7e9],
                ],
            ),
            model=dict(vocab=128_256, head_dim=128, dtype="bfloat16"),
            data=dict(source="tokens", path="data/tokens_128k", seq=4096),
            recipe=dict(
                params=200e6,
                tokens=4e9,
                lr=4e-3,
                batch_tokens=2**19,
                width_multiple=256,
                ffn_multiple=256,
                width_per_layer=128.0,
            ),
            optim=dict(grad_clip=1.0),
            schedule=dict(name="wsd", decay_fraction=0.2),
            train=dict(z_loss=1e-4),
            eval=dict(sequences=2048),
        )
    )
