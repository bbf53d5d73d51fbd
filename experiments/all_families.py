"""Every family, on the grid and at the tuning budget of experiments/families.py.

    scaling families experiments/all_families.py

Of the attention that sees less, of experts and of memories there is one member each; hours on two CPU cores.
"""

from ml_collections import ConfigDict

from experiments.families import get_config as seven

FAMILIES = dict(
    differential=dict(family="differential"),
    selective=dict(family="hybrid", pattern=["mamba2", "selective_attention"], state_dim=16),
    mosa=dict(family="hybrid", pattern=["attention", "mosa"]),
    masformer=dict(family="hybrid", pattern=["attention", "full_attention"], local_window=32),
    scout=dict(family="scout", channel_state=8),
    mamba=dict(family="mamba", channel_state=8),
    longhorn=dict(family="longhorn", channel_state=8),
    slstm=dict(family="hybrid", pattern=["mlstm", "slstm"]),
    min_gru=dict(family="min_gru"),
    qlstm=dict(family="qlstm"),
    moe=dict(family="moe", experts=4, expert_fraction=0.5),
    mixture_of_depths=dict(family="mixture_of_depths", depth_capacity=0.25),
    memory=dict(family="hybrid", pattern=["attention+memory", "attention"], memory_keys=24),
    monarch=dict(family="monarch"),
    monarch_mixer=dict(family="monarch_mixer", cross_document=True),
)
"""Name to its fields of ``model``, beside those of the seven."""


def get_config():
    config = seven().to_dict()
    config["name"] = "all_families"
    config["families"] |= {name: dict(model=model) for name, model in FAMILIES.items()}
    return ConfigDict(config)
