"""Which layers a model has: a pattern of mixers and feed-forwards, repeated down the stack.

Light on purpose (no flax, no jax): the ledger, the recipe and the config read it too.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Mapping

MIXERS = {
    "attention": "causal attention, local where model.local_window is given",
    "full_attention": "causal attention over all tokens before, whatever model.local_window is",
    "differential_attention": "the difference of two softmaxes, windowed as attention is",
    "selective_attention": "attention of tokens that a gate picks under a budget, windowed as attention is",
    "mosa": "mixture of sparse attention: heads that each choose their tokens",
    "checkpoint_attention": "attention to the last token of every segment, and to oneself",
    "rglru": "Griffin's recurrent block: convolution and RG-LRU, a gated linear recurrence",
    "mamba": "Mamba: a selective scan, a small state a channel",
    "mamba2": "Mamba-2: state-space duality, one decay a head",
    "gated_deltanet": "gated delta rule with short convolutions",
    "longhorn": "Mamba's block around the implicit step of an online regression",
    "mlstm": "xLSTM's matrix memory with exponential gates",
    "slstm": "xLSTM's scalar memory, whose exponential gates see the state: token by token",
    "min_gru": "minGRU: a gated recurrence whose gates do not see the state",
    "qlstm": "the quasi-recurrent LSTM",
    "monarch_mixer": "a gated convolution as long as the row, by Monarch matrices",
}
"""Mixers of tokens, and what each is."""

FEED_FORWARDS = {
    "swiglu": "gated by silu",
    "geglu": "gated by gelu",
    "moe": "a mixture of experts, each gated by silu",
    "memory": "a memory of values found by product keys, gated by silu",
    "monarch": "gated by silu, of Monarch matrices: products of two block-diagonal ones",
    "none": "the layer is its mixer alone",
}
"""Feed-forwards, and what each is."""

FAMILIES = {
    "transformer": ("attention+swiglu",),
    "differential": ("differential_attention+swiglu",),
    "moe": ("attention+moe",),
    "monarch": ("attention+monarch",),
    "monarch_mixer": ("monarch_mixer+monarch",),
    "griffin": ("rglru+geglu", "rglru+geglu", "attention+geglu"),
    "mamba": ("mamba+none",),
    "mamba2": ("mamba2+none",),
    "gated_deltanet": ("gated_deltanet+swiglu",),
    "longhorn": ("longhorn+none",),
    "xlstm": ("mlstm+swiglu",),
    "min_gru": ("min_gru+swiglu",),
    "qlstm": ("qlstm+swiglu",),
    "scout": ("mamba+swiglu", "checkpoint_attention+swiglu"),
    "mixture_of_depths": ("attention+swiglu", "routed:attention+swiglu"),
    "hybrid": None,
}
"""``model.family`` to its layers, again and again from the first on; 'hybrid' has those of ``pattern``."""

ATTENTION = ("attention", "full_attention", "differential_attention", "selective_attention", "mosa",
             "checkpoint_attention")  # fmt: skip
WHOLE = ("mamba", "mamba2", "longhorn")
"""Mixers that are a layer by themselves: no feed-forward where none is named."""

ROUTED = "routed"
"""Before a colon, marks a layer of a pattern as one that takes a share of a row's tokens alone."""

BY_DEPTH = ("differential_attention",)
"""Mixers that are told their layer's number."""

CHOOSING = ("selective_attention", "mosa")
"""Mixers that choose among tokens: they are told whether it is training, and add to its loss."""

NOT_IN_BLOCKS = (*CHOOSING, "checkpoint_attention")
"""Mixers with attention that is not of rows in order, so that blocks of it cannot be chosen at evaluation."""

BIDIRECTIONAL = ("attention", "full_attention", "differential_attention")
"""Mixers that can see both ways, as masked diffusion needs them."""

ACROSS_DOCUMENTS = ("monarch_mixer",)
"""Mixers that cannot stop at a document's border: they need ``cross_document``."""

OBJECTIVES = {
    "next_token": "each token from those before it",
    "masked_diffusion": "hidden tokens from all that are in sight, before them and after",
}
"""What a model is trained on, and how it is judged."""

READ = {
    "expand": ("mamba", "mamba2", "longhorn", "gated_deltanet", "min_gru", "qlstm"),
    "state_dim": ("mamba2",),
    "channel_state": ("mamba", "longhorn"),
    "conv_width": (
        "rglru",
        "mamba",
        "mamba2",
        "longhorn",
        "gated_deltanet",
        "slstm",
        "min_gru",
        "qlstm",
        "monarch_mixer",
    ),
    "filter_dim": ("monarch_mixer",),
    "key_fraction": ("mlstm",),
    "rope_fraction": ATTENTION,
    **dict.fromkeys(("experts", "active_experts", "shared_experts", "expert_fraction"), ("moe",)),
    **dict.fromkeys(("router", "balance_loss", "router_z_loss"), ("moe",)),
    **dict.fromkeys(("router_l1", "router_l1_factor"), ("moe",)),
    "capacity_factor": ("moe", "selective_attention"),
    **dict.fromkeys(("attention_budget", "budget_loss"), ("selective_attention",)),
    **dict.fromkeys(("memory_keys", "memory_heads", "memory_top"), ("memory",)),
    "monarch_blocks": ("monarch",),
    **dict.fromkeys(("sparse_heads", "head_capacity"), ("mosa",)),
    "segment_length": ("checkpoint_attention",),
    "depth_capacity": (ROUTED,),
}
"""Fields of ``model`` that some mixers or feed-forwards alone read, or routed layers."""


@dataclasses.dataclass(frozen=True)
class Layer:
    """One layer: the names of its mixer and its feed-forward, and whether it takes a share of the tokens."""

    mixer: str
    ffn: str
    routed: bool = False

    @classmethod
    def parse(cls, text: str) -> Layer:
        """From "mixer+feed-forward"; a mixer alone has 'swiglu', and those that are ``WHOLE`` none.

        Before it may stand "routed:".

        Raises:
          ValueError: an unknown name.
        """
        bare = text.removeprefix(f"{ROUTED}:")
        mixer, plus, ffn = bare.partition("+")
        ffn = ffn if plus else "none" if mixer in WHOLE else "swiglu"
        if mixer not in MIXERS or ffn not in FEED_FORWARDS:
            raise ValueError(
                f"{text!r}; it must be one of {', '.join(map(repr, MIXERS))}, and after a plus sign "
                f"{', '.join(map(repr, FEED_FORWARDS))}; before it may stand '{ROUTED}:'"
            )
        return cls(mixer, ffn, routed=bare != text)

    def __str__(self) -> str:
        return f"{ROUTED}:" * self.routed + f"{self.mixer}+{self.ffn}"


def pattern(model: Mapping) -> tuple[Layer, ...]:
    """The layers that repeat, of a ``model`` section (defaults may be left out)."""
    own = FAMILIES[model.get("family", "transformer")]
    return tuple(map(Layer.parse, model["pattern"] if own is None else own))


def layers(model: Mapping) -> tuple[Layer, ...]:
    """All layers of a model, first to last."""
    period = pattern(model)
    return tuple(period[i % len(period)] for i in range(model["layers"]))


def counts(model: Mapping, *, routed: bool = False) -> tuple[Counter, Counter]:
    """How often each mixer and each feed-forward occurs, in the order of their first layer; in layers that
    take every token, or in ``routed`` ones."""
    found = [x for x in layers(model) if x.routed == routed]
    return Counter(x.mixer for x in found), Counter(x.ffn for x in found)


def has(model: Mapping, *names: str) -> bool:
    """Whether any layer of the pattern has one of these mixers or feed-forwards, or is 'routed'."""
    return any({x.mixer, x.ffn, ROUTED * x.routed} & {*names} for x in pattern(model))


def causal(model: Mapping) -> bool:
    """Whether a token sees those before it alone."""
    return model.get("objective", "next_token") == "next_token"


def least_vocab(model: Mapping, data_vocab: int) -> int:
    """Token ids that a model needs: the data's, and the one that masked diffusion puts for a hidden token."""
    return data_vocab + (not causal(model))


def with_vocab(model: Mapping, data_vocab: int) -> dict:
    """Fields of ``model`` with the least vocabulary for the data where they name none."""
    return {"vocab": least_vocab(model, data_vocab), **model}


def mask_token(model: Mapping) -> int:
    """The id of a hidden token, the last."""
    return model["vocab"] - 1


def branches(model: Mapping, depth: int | None = None) -> int:
    """What is added to the residual stream: mixers and feed-forwards of the first ``depth`` layers (all)."""
    found = layers(model if depth is None else {**model, "layers": depth})
    return sum(1 + (x.ffn != "none") for x in found)


def key_dim(model: Mapping) -> int:
    """Channels of a key of the matrix memory of xLSTM, ``key_fraction`` of the head's.

    Raises:
      ValueError: not a whole number of channels.
    """
    channels = model["head_dim"] * model.get("key_fraction", 0.5)
    if channels != int(channels) or channels < 1:
        raise ValueError(
            f"model.key_fraction is {model['key_fraction']!r} with head_dim {model['head_dim']}; their "
            "product must be a whole number of channels"
        )
    return int(channels)


def heads_multiple(model: Mapping) -> int:
    """What heads and key-value heads must be multiples of: 2 where they go in pairs."""
    return 2 if has(model, "differential_attention") else 1


def sparse_heads(model: Mapping) -> int:
    """Heads of a mixture of sparse attention."""
    return model["sparse_heads"] * model["heads"]


def inner_width(model: Mapping) -> int:
    """Channels of a recurrence that is ``expand`` times as wide as the stream."""
    return model["expand"] * model["d_model"]


def dt_rank(model: Mapping) -> int:
    """Rank of the projection to Mamba's step (Gu and Dao 2023, section 3.6)."""
    return math.ceil(model["d_model"] / 16)


def expert_dim(model: Mapping) -> int:
    """Width of one expert.

    Raises:
      ValueError: not a whole number of channels.
    """
    width = model["ffn_dim"] * model["expert_fraction"]
    if abs(width - round(width)) > 1e-6 or round(width) < 1:
        raise ValueError(
            f"model.expert_fraction is {model['expert_fraction']!r} with ffn_dim {model['ffn_dim']}; their "
            "product must be a whole number of channels"
        )
    return round(width)


def monarch_dim(model: Mapping) -> int:
    """Channels of a block between both factors of a Monarch product, which is as wide as the stream there.

    Raises:
      ValueError: blocks that do not divide the widths, or so many that some outputs never see some inputs.
    """
    blocks, width = model["monarch_blocks"], model["d_model"]
    if width % blocks or model["ffn_dim"] % blocks or blocks * blocks > width:
        raise ValueError(
            f"model.monarch_blocks is {blocks} with d_model {width} and ffn_dim {model['ffn_dim']}; it must "
            "divide both, its square at most d_model"
        )
    return width // blocks


MONARCH_OCTAVES = 12
"""Periods of the waves that a long convolution's filter is made of: 2, 4, ..., 2^12 tokens."""


def monarch_lengths(seq: int) -> tuple[int, int]:
    """p and q of the Monarch matrices that transform rows of ``seq`` tokens and as many zeros, p even.

    p q >= 2 ``seq``, and of the powers of two q is that of the fewest FLOPs (``flops.entries``).
    """
    pairs = [(2 * math.ceil(seq / 2**i), 2**i) for i in range(seq.bit_length())]
    return min(pairs, key=lambda pair: (pair[0] + 2) * (8 * pair[1] ** 2 + 2 * pair[0] * pair[1]))


def capacity(experts: int, active: float, factor: float, seq: int) -> int:
    """Places of one expert for the tokens of a row; never more than the row has tokens."""
    return min(seq, math.ceil(factor * active * seq / experts))


def depth_places(share: float, seq: int) -> int:
    """Tokens of a row of ``seq`` that a routed layer takes: its share, rounded up."""
    return max(1, math.ceil(round(share * seq, 9)))


def checkpoints(segment: int, seq: int) -> int:
    """Places for the checkpoints of a row of ``seq`` tokens; one at least, which may be empty."""
    return max(1, seq // segment)


def budget_tokens(model: Mapping, seq: int) -> int:
    """Tokens of a row of ``seq`` that the budget of selective attention pays for."""
    return depth_places(model["attention_budget"], seq)


def budget_places(model: Mapping, seq: int) -> int:
    """Places that a row keeps for them while it trains."""
    return capacity(1, model["attention_budget"], model["capacity_factor"], seq)
