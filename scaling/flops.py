"""The ledger: parameters and training FLOPs of a model config, by group, under every convention.

What is counted: the multiply-adds of matrix products, 2 FLOPs each (weights, attention scores,
attention values, the head), and their backward, which is twice the forward (one product for the
input's gradient, one for the other operand's). What is not: norms, rotations, softmax, gating,
the loss, the optimizer, and the embedding lookup, which is a gather; together a few per cent at
d_model 64 and far under one at a thousand. Recomputation under remat is not training work and
never counts.

Conventions, FLOPs per training token:
  exact            matrix products; attention over the pairs that the causal mask (and the local
                   window) keeps, T (T + 1) / 2 pairs in a row of T tokens. Document boundaries are
                   not subtracted, so that the cost of a cell does not depend on the data.
  full             the same with attention over the whole T x T square, as XLA computes it (and as
                   in Hoffmann et al. 2022, appendix F, and PaLM, appendix B).
  6N_total         6 N, every parameter counted.
  6N_nonembedding  6 N without the token table and the head's matrix.
  kaplan           3 (2 N_nonembedding + 2 layers T d_attn): Kaplan et al. 2020, table 1.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

CONVENTIONS = ("exact", "full", "6N_total", "6N_nonembedding", "kaplan")


@dataclasses.dataclass(frozen=True)
class Entry:
    """One group of the ledger, all layers together.

    Attributes:
      params: parameters. active: those that one token uses.
      matmul: forward FLOPs per token of products with weights.
      mixing: forward FLOPs per token of products between tokens, over the pairs kept.
      mixing_full: the same over all pairs.
      cache_values: values kept per token of context when decoding (keys and values).
      embedding: whether the parameters are vocabulary matrices.
    """

    name: str
    params: int
    active: int
    matmul: int = 0
    mixing: float = 0.0
    mixing_full: float = 0.0
    cache_values: int = 0
    embedding: bool = False


def pairs_per_token(seq: int, window: int | None) -> float:
    """Mean number of keys that a query attends to, itself included, under the causal mask.

    Args:
      seq: row length T.
      window: keys a query sees, itself included; None for all before it.
    """
    w = seq if window is None else min(window, seq)
    return (w * (w + 1) / 2 + (seq - w) * w) / seq


def attention_entries(model: Mapping, seq: int) -> list[Entry]:
    """Grouped-query attention: projections, then scores and values, then the per-head norms."""
    D, N, K, H = (model[k] for k in ("d_model", "heads", "kv_heads", "head_dim"))
    L = model["layers"]
    weights = L * (D * N * H + 2 * D * K * H + N * H * D)
    pairs = pairs_per_token(seq, model["local_window"])
    entries = [
        Entry("attention projections", weights, weights, matmul=2 * weights),
        Entry(
            "attention scores and values",
            0,
            0,
            mixing=L * 4 * N * H * pairs,
            mixing_full=L * 4 * N * H * seq,
            cache_values=L * 2 * K * H,
        ),
    ]
    if model["qk_norm"]:
        entries.append(Entry("query and key norms", 2 * L * H, 2 * L * H))
    return entries


def swiglu_entries(model: Mapping, seq: int) -> list[Entry]:
    """SwiGLU: gate, up and down projections."""
    weights = model["layers"] * 3 * model["d_model"] * model["ffn_dim"]
    return [Entry("feed-forward", weights, weights, matmul=2 * weights)]


MIXERS: dict[str, Callable] = {"transformer": attention_entries}
FEED_FORWARDS: dict[str, Callable] = {"transformer": swiglu_entries}


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
        if convention in ("exact", "full"):
            return 3 * self.forward_flops_per_token(convention)
        if convention == "6N_total":
            return 6 * self.params_active
        nonembedding = sum(e.active for e in self.entries if not e.embedding)
        if convention == "6N_nonembedding":
            return 6 * nonembedding
        if convention == "kaplan":
            d_attn = self.model["heads"] * self.model["head_dim"]
            return 3 * (2 * nonembedding + 2 * self.model["layers"] * self.seq * d_attn)
        raise ValueError(f"convention is {convention!r}; it must be one of {', '.join(CONVENTIONS)}")

    def train_flops(self, tokens: float, convention: str = "exact") -> float:
        """Training FLOPs of ``tokens`` tokens."""
        return self.train_flops_per_token(convention) * tokens

    def cache_bytes_per_token(self, bytes_per_value: int = 2) -> int:
        """Bytes of keys and values kept per token of context when decoding (bfloat16: 2 a value)."""
        return self._sum("cache_values") * bytes_per_value

    def table(self) -> list[dict]:
        """One row a group: params, share of params, training FLOPs per token and their share."""
        total = self.train_flops_per_token("exact")
        return [
            {
                "group": e.name,
                "params": e.params,
                "params_share": e.params / self.params_total,
                "train_flops_per_token": 3 * (e.matmul + e.mixing),
                "flops_share": 3 * (e.matmul + e.mixing) / total,
            }
            for e in self.entries
        ]


def ledger(model: Mapping, seq: int) -> Ledger:
    """The ledger of a model config.

    Args:
      model: a whole ``model`` section of a cell config (defaults may be left out).
      seq: sequence length T in tokens.
    """
    model = {"qk_norm": True, "tied": True, "local_window": None, "family": "transformer", **model}
    V, D, L = model["vocab"], model["d_model"], model["layers"]
    family = model["family"]
    head = 0 if model["tied"] else V * D
    entries = (
        Entry("token embedding", V * D, V * D, embedding=True),
        *MIXERS[family](model, seq),
        *FEED_FORWARDS[family](model, seq),
        Entry("block and final norms", (2 * L + 1) * D, (2 * L + 1) * D),
        Entry("head", head, head, matmul=2 * V * D, embedding=True),
    )
    return Ledger(model, seq, entries)


@dataclasses.dataclass(frozen=True)
class Memory:
    """An estimate of training memory, bytes, by part; the compiler alone knows the true peak."""

    params: int
    gradients: int
    optimizer: int
    activations: int
    logits: int

    @property
    def total(self) -> int:
        return self.params + self.gradients + self.optimizer + self.activations + self.logits


def memory_bytes(model: Mapping, batch: int, seq: int, optimizer_slots: int = 2) -> Memory:
    """Estimated memory of one training step on one device, no remat, attention scores materialised.

    Args:
      model: a whole ``model`` section.
      batch: sequences in the (micro-)batch.
      seq: sequence length.
      optimizer_slots: float32 values kept per parameter (2 for AdamW).

    Returns:
      Parts in bytes. Activations: what the backward pass keeps of every layer, in the compute
      dtype: residual, norms and projections about 6 d_model + 4 heads head_dim + 4 ffn_dim values
      a token, and three copies of the heads x seq scores; logits: two float32 copies.
    """
    n = ledger(model, seq).params_total
    width = 2 if model.get("dtype", "float32") == "bfloat16" else 4
    attn = model["heads"] * model["head_dim"]
    values = 6 * model["d_model"] + 4 * attn + 4 * model["ffn_dim"] + 3 * model["heads"] * seq
    tokens = batch * seq
    return Memory(
        params=4 * n,
        gradients=4 * n,
        optimizer=4 * optimizer_slots * n,
        activations=model["layers"] * tokens * values * width,
        logits=2 * tokens * model["vocab"] * 4,
    )
