"""Which architecture? Seven families on the quickstart's grid of small models, at equal tuning budget.

`make families` trains, fits and compares them on a CPU; the real thing is this file with larger budgets.
Every family has one bracket of learning rates at one (N, D), the same grid of N and budgets, data and recipe.
"""

from ml_collections import ConfigDict

from experiments.quickstart import get_config as quickstart


def get_config():
    study = quickstart()
    study.grid = dict(
        kind="isoflop",
        budgets=[2e10, 5e10, 1.25e11],
        params=[[10e3, 14e3, 20e3, 40e3], [10e3, 20e3, 40e3, 68e3], [14e3, 20e3, 40e3, 68e3]],
        tolerance=0.03,
    )
    # one batch for every D: the cells of a size share a compiled program, and compiling is most of the time
    study.recipe.update(batch_tokens=512, batch_tokens_exponent=0.0, lr=3.2e-3, beta2=0.995)
    # finer widths than the quickstart's: else some families reach a small N by depth alone (14 layers of 12)
    study.model.head_dim = study.recipe.width_multiple = 6
    return ConfigDict(
        dict(
            name="families",
            study=study,
            reference="transformer",
            tune=dict(params=20e3, tokens=4e5, lr=[1.0, 2.0, 4.0, 8.0]),
            families=dict(
                transformer={},
                local_attention=dict(model=dict(local_window=32)),
                griffin=dict(model=dict(family="griffin", local_window=32)),
                mamba2=dict(model=dict(family="mamba2", state_dim=16)),
                gated_deltanet=dict(model=dict(family="gated_deltanet")),
                xlstm=dict(model=dict(family="xlstm")),
                hybrid=dict(
                    model=dict(family="hybrid", pattern=["gated_deltanet", "attention"]),
                ),
            ),
        )
    )
