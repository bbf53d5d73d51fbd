"""Experts or dense, at equal memory, compute and data: the quickstart's bytes, small models, three seeds.

`scaling families experiments/experts.py`. At each N and C of the dense grid the mixtures have as many
parameters in all, as many training FLOPs and the same unique tokens, over which they pass more often.
"""

from ml_collections import ConfigDict

from experiments.quickstart import get_config as quickstart


def get_config():
    study = quickstart()
    study.grid = dict(
        kind="isoflop", budgets=[2e10, 5e10], params=[[20e3, 40e3], [40e3, 68e3]], tolerance=0.02
    )
    study.seeds = [0, 1, 2]
    study.recipe.ffn_multiple = 4
    experts = dict(family="moe", experts=8, expert_fraction=0.25)
    return ConfigDict(
        dict(
            name="experts",
            study=study,
            equal="total",
            reference="dense",
            tune=dict(params=40e3, tokens=4e5, lr=[1.0, 2.0, 4.0]),
            families=dict(
                dense={},
                one_of_eight=dict(model=dict(active_experts=1, **experts)),
                two_of_eight=dict(model=dict(active_experts=2, **experts)),
            ),
        )
    )
