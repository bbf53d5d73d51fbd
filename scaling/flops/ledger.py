"""The ledger: parameters and training FLOPs of a model config, by group, under every convention.

What is counted: the multiply-adds of matrix products, 2 FLOPs each (weights, attention scores,
attention values, a recurrent state that is a matrix, the head), and their backward, which is twice the
forward: one product for each operand's gradient, the first layer's input included, since the embedding
learns from it. What is not: norms, rotations, softmax, gating, short convolutions, recurrences whose state
is a vector, the loss, the optimizer, and the embedding, a gather whose gradient is a scatter; XLA counts
them at 4 % of a training step at d_model 64 and under 1 % from 256 on. Recomputation under remat is not
training work and never counts.

Conventions, FLOPs per training token:
  exact            matrix products; attention over the pairs that the causal mask (and the local
                   window) keeps, T (T + 1) / 2 pairs in a row of T tokens, all T^2 under masked
                   diffusion. Document boundaries are
                   not subtracted, so that the cost of a cell does not depend on the data. A state
                   [key, value] token by token: one product to write it and one to read it (the
                   delta rule reads it twice), whatever chunks an implementation computes it in.
  full             the same with attention over the whole T x T square, window or not: what XLA
                   computes, to the last product, and PaLM's count (Chowdhery et al. 2022, appendix
                   B). Hoffmann et al. 2022, appendix F, also use the square, and add the softmax
                   and the embedding taken as a product. Of a recurrence the products of its chunks
                   as XLA computes them, those that the backward pass computes again included; a
                   state with a decay for every entry (Mamba) has none. Of experts and of selective
                   attention, every place that a row keeps for them.
  (both)           A routed layer costs what its share of a row's tokens costs it: attention of the
                   tokens taken over the tokens taken. Training is counted, not evaluation.
  6N_total         6 N, every parameter counted (of experts and routed layers, those that a token
                   uses, a mean over tokens).
  6N_nonembedding  6 N without the token table and the head's matrix.
  kaplan           3 (2 N_nonembedding + 2 layers T d_attn), of layers with attention: Kaplan et al.
                   2020, table 1 and section 2.1. Their attention term is half of what scores and
                   values take over the square.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

from scaling import layers
from scaling.flops.entries import FEED_FORWARDS, MIXERS, Entry, depth_router_entries

CONVENTIONS = ("exact", "full", "6N_total", "6N_nonembedding", "kaplan")


DEFAULTS = {
    "objective": "next_token",
    "family": "transformer", "qk_norm": True, "tied": True, "local_window": None, "post_norm": False,
    "expand": 2, "state_dim": 128, "conv_width": 4, "key_fraction": 0.5, "channel_state": 16,
    "experts": 8, "active_experts": 2, "shared_experts": 0, "expert_fraction": 1.0, "capacity_factor": 1.5,
    "router": "chosen",
    "filter_dim": 64, "segment_length": 16,
    "memory_keys": 32, "memory_heads": 4, "memory_top": 16, "monarch_blocks": 4,
    "depth_capacity": 0.125, "attention_budget": 0.15, "sparse_heads": 2, "head_capacity": 0.125,
}  # fmt: skip
"""Of the fields of ``model`` that the ledger reads and that may be left out."""


@dataclasses.dataclass(frozen=True)
class Ledger:
    """The account of one model at one sequence length; a pure function of the config."""

    model: Mapping
    seq: int
    entries: tuple[Entry, ...]

    def _sum(self, field: str) -> float:
        return sum(getattr(e, field) for e in self.entries)

    @property
    def params_total(self) -> int:
        return self._sum("params")

    @property
    def params_active(self) -> int:
        return self._sum("active")

    @property
    def params_embedding(self) -> int:
        """Vocabulary matrices: the token table, and the head's where it is untied."""
        return sum(e.params for e in self.entries if e.embedding)

    @property
    def params_nonembedding(self) -> int:
        return self.params_total - self.params_embedding

    def forward_flops_per_token(self, convention: str = "exact") -> float:
        """Forward FLOPs per token under ``exact`` or ``full``."""
        mixing = {"exact": "mixing", "full": "mixing_full"}[convention]
        return self._sum("matmul") + self._sum(mixing)

    def train_flops_per_token(self, convention: str = "exact") -> float:
        """Forward and backward FLOPs per token.

        Raises:
          ValueError: an unknown convention.
        """
        if convention == "exact":
            return self._sum("train_exact")
        if convention == "full":
            return self._sum("train_full")
        if convention == "6N_total":
            return 6 * self.params_active
        nonembedding = sum(e.active for e in self.entries if not e.embedding)
        if convention == "6N_nonembedding":
            return 6 * nonembedding
        if convention == "kaplan":
            d_attn = self.model["heads"] * self.model["head_dim"]
            taken = routed_tokens(self.model, self.seq)
            keys = _keys(self.model, self.seq) + taken / self.seq * _keys(self.model, taken, routed=True)
            return 3 * (2 * nonembedding + 2 * keys * d_attn)
        raise ValueError(f"convention is {convention!r}; it must be one of {', '.join(CONVENTIONS)}")

    def train_flops(self, tokens: float, convention: str = "exact") -> float:
        """Training FLOPs of ``tokens`` tokens."""
        return self.train_flops_per_token(convention) * tokens

    def cache_bytes_per_token(self, bytes_per_value: int = 2) -> int:
        """Bytes of keys and values kept per token of context when decoding (bfloat16: 2 a value)."""
        return sum(math.ceil(e.cache_share * e.cache_values) for e in self.entries) * bytes_per_value

    def state_bytes(self, bytes_per_value: int = 4) -> int:
        """Bytes of recurrent state kept when decoding, whatever the context (float32: 4 a value)."""
        return self._sum("state_values") * bytes_per_value

    def decode_bytes(self, context: int, bytes_per_value: int = 2) -> int:
        """Bytes kept for a sequence of ``context`` tokens when decoding: cache of keys and values, and state.

        A local window keeps its own tokens alone, a routed layer its share of the context.
        """
        kept = sum(e.cache_values * e.kept_tokens(context) for e in self.entries)
        return kept * bytes_per_value + self.state_bytes()

    def __str__(self) -> str:
        """The groups and the conventions as aligned text, FLOPs per training token."""
        lines = [f"{'group':<28} {'params':>15} {'share':>6} {'train FLOPs/token':>19} {'share':>6}"]
        for row in self.table():
            lines.append(
                f"{row['group']:<28} {row['params']:>15,d} {row['params_share']:>6.1%} "
                f"{row['train_flops_per_token']:>19,.0f} {row['flops_share']:>6.1%}"
            )
        flops = self.train_flops_per_token("exact")
        lines.append(f"{'total':<28} {self.params_total:>15,d} {1:>6.1%} {flops:>19,.0f} {1:>6.1%}")
        lines.append("")
        for convention in CONVENTIONS:
            per_token = self.train_flops_per_token(convention)
            lines.append(
                f"{convention:<16} {per_token:>19,.0f} FLOPs/token {per_token / flops:>8.3f} x exact"
            )
        return "\n".join(lines)

    def table(self) -> list[dict]:
        """One row a group: params, share of params, training FLOPs per token and their share."""
        total = self.train_flops_per_token("exact")
        return [
            {
                "group": e.name,
                "params": e.params,
                "params_share": e.params / self.params_total,
                "train_flops_per_token": e.train_exact,
                "flops_share": e.train_exact / total,
            }
            for e in self.entries
        ]


def ledger(model: Mapping, seq: int) -> Ledger:
    """The ledger of a model config.

    Args:
      model: a whole ``model`` section of a cell config (defaults may be left out).
      seq: sequence length T in tokens.

    Raises:
      ValueError: an unknown family, or a length below one.
    """
    model = {**DEFAULTS, **model}
    V, D = model["vocab"], model["d_model"]
    family = model["family"]
    if family not in layers.FAMILIES:
        known = ", ".join(map(repr, layers.FAMILIES))
        raise ValueError(f"model.family is {family!r}; the ledger has {known}")
    if seq < 1:
        raise ValueError(f"seq is {seq!r}; it must be at least 1")
    head = 0 if model["tied"] else V * D
    norms = (layers.branches(model) * (2 if model["post_norm"] else 1) + 1) * D
    entries = (
        Entry("token embedding", V * D, V * D, embedding=True),
        *_layer_entries(model, seq),
        *_routed_entries(model, seq),
        Entry("block and final norms", norms, norms),
        Entry("head", head, head, matmul=2 * V * D, embedding=True),
    )
    return Ledger(model, seq, entries)


def _layer_entries(model: Mapping, seq: int, *, routed: bool = False) -> list[Entry]:
    mixers, feeds = layers.counts(model, routed=routed)
    parts = [(MIXERS[name], count) for name, count in mixers.items()]
    parts += [(FEED_FORWARDS[name], count) for name, count in feeds.items() if name != "none"]
    return [entry for entries, count in parts for entry in entries(model, seq, count)]


def _routed_entries(model: Mapping, seq: int) -> list[Entry]:
    """Of the layers that take a share of a row's tokens: the cost of a row of those alone, and the choice."""
    count = sum(x.routed for x in layers.layers(model))
    if not count:
        return []
    tokens = routed_tokens(model, seq)
    inside = [e.for_share(tokens / seq) for e in _layer_entries(model, tokens, routed=True)]
    return [*inside, *depth_router_entries(model, count)]


def routed_tokens(model: Mapping, seq: int) -> int:
    """Tokens of a row that a routed layer takes."""
    return layers.depth_places(model["depth_capacity"], seq)


def _keys(model: Mapping, seq: int, *, routed: bool = False) -> float:
    """Keys a token over the square, of all layers with attention."""
    mixers, _ = layers.counts(model, routed=routed)
    chosen = layers.budget_tokens(model, seq)
    taken = layers.depth_places(model["head_capacity"], seq)
    square = {
        "selective_attention": chosen * chosen / seq,
        "mosa": model["sparse_heads"] * taken * taken / seq,
        "checkpoint_attention": layers.checkpoints(model["segment_length"], seq),
    }
    return sum(mixers[m] * square.get(m, seq) for m in layers.ATTENTION)
