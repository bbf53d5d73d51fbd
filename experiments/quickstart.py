"""A whole compute-optimal study in minutes on two CPU cores: bytes of Python's standard library.

Four budgets, four to six sizes each around where the optimum was found to lie. The reference cell's
learning rate, weight-decay timescale and batch were tuned on cells of 7k to 68k parameters.
"""

from ml_collections import ConfigDict


def get_config():
    return ConfigDict(
        dict(
            name="quickstart",
            grid=dict(
                kind="isoflop",
                budgets=[3e10, 9e10, 2.6e11, 7.5e11],
                params=[
                    [6.5e3, 20e3, 40e3, 68e3],
                    [6.5e3, 20e3, 40e3, 68e3, 102e3],
                    [6.5e3, 20e3, 40e3, 68e3, 102e3, 143e3],
                    [20e3, 40e3, 68e3, 102e3, 143e3],
                ],
            ),
            model=dict(head_dim=12, tied=True, qk_norm=True),
            data=dict(source="stdlib", seq=128),
            recipe=dict(
                params=33e3,
                tokens=2.0e6,
                lr=4.5e-3,
                tau=3.0,
                batch_tokens=1024,
                beta2=0.99,
                width_per_layer=28.0,
                width_multiple=12,
                ffn_multiple=8,
            ),
            optim=dict(grad_clip=1.0),
            schedule=dict(name="wsd", decay_fraction=0.3),
            eval=dict(sequences=512),
        )
    )
