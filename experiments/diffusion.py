"""Autoregressive or masked diffusion at this data budget? One transformer, two objectives, few bytes often.

Everything but `model.objective` is shared, the bracket of learning rates too. The corpus is cut to
`unique_tokens`, so that the larger budgets go over it many times: one token at a time a model then starts to
learn its bytes by heart, while masked diffusion sees every pass hidden anew (Prabhudesai et al. 2025; Ni et
al. 2025 found it ahead after some hundreds of passes). Its loss is a bound, the other's is exact.

`scaling families experiments/diffusion.py` trains, fits and compares them.
"""

from ml_collections import ConfigDict

from experiments.quickstart import get_config as quickstart


def get_config():
    study = quickstart()
    study.data.unique_tokens = 100_000
    study.grid = dict(
        kind="isoflop",
        budgets=[2e10, 6e10, 1.8e11],
        params=[[9e3, 14e3, 20e3, 40e3], [9e3, 20e3, 40e3, 68e3], [14e3, 20e3, 40e3, 68e3]],
        tolerance=0.03,
        max_epochs=100.0,
    )
    return ConfigDict(
        dict(
            name="diffusion",
            study=study,
            reference="next_token",
            tune=dict(params=20e3, tokens=4e5, lr=[1.0, 2.0, 4.0, 8.0]),
            families=dict(next_token={}, masked_diffusion=dict(model=dict(objective="masked_diffusion"))),
        )
    )
