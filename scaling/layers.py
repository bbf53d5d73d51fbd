"""Which layers a model has: a pattern of mixers and feed-forwards, repeated down the stack.

Light on purpose (no flax, no jax): the ledger, the recipe and the config read it too.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping

MIXERS = {
    "attention": "causal attention, local where model.local_window is given",
    "full_attention": "causal attention over all tokens before, whatever model.local_window is",
    "rglru": "Griffin's recurrent block: convolution and RG-LRU, a gated linear recurrence",
    "mamba2": "Mamba-2: state-space duality, one decay a head",
    "gated_deltanet": "gated delta rule with short convolutions",
    "mlstm": "xLSTM's matrix memory with exponential gates",
}
"""Mixers of tokens, and what each is."""

FEED_FORWARDS = {
    "swiglu": "gated by silu",
    "geglu": "gated by gelu",
    "none": "the layer is its mixer alone",
}
"""Feed-forwards, and what each is."""

FAMILIES = {
    "transformer": ("attention+swiglu",),
    "griffin": ("rglru+geglu", "rglru+geglu", "attention+geglu"),
    "mamba2": ("mamba2+none",),
    "gated_deltanet": ("gated_deltanet+swiglu",),
    "xlstm": ("mlstm+swiglu",),
    "hybrid": None,
}
"""``model.family`` to its layers, again and again from the first on; 'hybrid' has those of ``pattern``."""

ATTENTION = ("attention", "full_attention")

READ = {
    "expand": ("mamba2", "gated_deltanet"),
    "state_dim": ("mamba2",),
    "conv_width": ("rglru", "mamba2", "gated_deltanet"),
    "key_fraction": ("mlstm",),
    "rope_fraction": ATTENTION,
}
"""Fields of ``model`` that some mixers alone read."""


@dataclasses.dataclass(frozen=True)
class Layer:
    """One layer: the names of its mixer and its feed-forward."""

    mixer: str
    ffn: str

    @classmethod
    def parse(cls, text: str) -> Layer:
        """From "mixer+feed-forward"; a mixer alone has 'swiglu', and Mamba-2, which is whole by itself, none.

        Raises:
          ValueError: an unknown name.
        """
        mixer, plus, ffn = text.partition("+")
        ffn = ffn if plus else "none" if mixer == "mamba2" else "swiglu"
        if mixer not in MIXERS or ffn not in FEED_FORWARDS:
            raise ValueError(
                f"{text!r}; it must be one of {', '.join(map(repr, MIXERS))}, and after a plus sign "
                f"{', '.join(map(repr, FEED_FORWARDS))}"
            )
        return cls(mixer, ffn)

    def __str__(self) -> str:
        return f"{self.mixer}+{self.ffn}"


def pattern(model: Mapping) -> tuple[Layer, ...]:
    """The layers that repeat, of a ``model`` section (defaults may be left out)."""
    own = FAMILIES[model.get("family", "transformer")]
    return tuple(map(Layer.parse, model["pattern"] if own is None else own))


def layers(model: Mapping) -> tuple[Layer, ...]:
    """All layers of a model, first to last."""
    period = pattern(model)
    return tuple(period[i % len(period)] for i in range(model["layers"]))


def counts(model: Mapping) -> tuple[Counter, Counter]:
    """How often each mixer and each feed-forward occurs, in the order of their first layer."""
    found = layers(model)
    return Counter(x.mixer for x in found), Counter(x.ffn for x in found)


def has(model: Mapping, *mixers: str) -> bool:
    """Whether any layer of the pattern has one of these mixers."""
    return any(x.mixer in mixers for x in pattern(model))


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
