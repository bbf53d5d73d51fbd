"""The ledger: parameters and training FLOPs of a model config, by group, under every convention.

What is counted: the multiply-adds of matrix products, 2 FLOPs each (weights, attention scores,
attention values, the head), and their backward, which is twice the forward: one product for each
operand's gradient, the first layer's input included, since the embedding learns from it. What is
not: norms, rotations, softmax, gating, the loss, the optimizer, and the embedding, a gather whose
gradient is a scatter; XLA counts them at 4 % of a training step at d_model 64 and under 1 % from
256 on. Recomputation under remat is not training work and never counts.

Conventions, FLOPs per training token:
  exact            matrix products; attention over the pairs that the causal mask (and the local
                   window) keeps, T (T + 1) / 2 pairs in a row of T tokens. Document boundaries are
                   not subtracted, so that the cost of a cell does not depend on the data.
  full             the same with attention over the whole T x T square, window or not: what XLA
                   computes, to the last product, and PaLM's count (Chowdhery et al. 2022, appendix
                   B). Hoffmann et al. 2022, appendix F, also use the square, and add the softmax
                   and the embedding taken as a product.
  6N_total         6 N, every parameter counted (of experts, those that a token uses).
  6N_nonembedding  6 N without the token table and the head's matrix.
  kaplan           3 (2 N_nonembedding + 2 layers T d_attn): Kaplan et al. 2020, table 1 and section
                   2.1. Their attention term is half of what scores and values take over the square.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

from pallas_kernels.cost import attention
from pallas_kernels.cost import linear_cross_entropy as cross_entropy

CONVENTIONS = ("exact", "full", "6N_total", "6N_nonembedding", "kaplan")


@dataclasses.dataclass(frozen=True)
class Entry:
    """One group of the ledger, all layers together.

    Attributes:
      params: parameters.
      active: those that one token uses; a vocabulary matrix counts whole.
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
    window_pair = None if window is None else (window - 1, 0)
    return attention.pairs(seq, seq, is_causal=True, window=window_pair) / seq


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

    Raises:
      ValueError: a family with no entries here, or a length below one.
    """
    model = {"qk_norm": True, "tied": True, "local_window": None, "family": "transformer", **model}
    V, D, L = model["vocab"], model["d_model"], model["layers"]
    family = model["family"]
    if family not in MIXERS:
        raise ValueError(f"model.family is {family!r}; the ledger has {', '.join(map(repr, MIXERS))}")
    if seq < 1:
        raise ValueError(f"seq is {seq!r}; it must be at least 1")
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


def memory_bytes(
    model: Mapping, batch: int, seq: int, optimizer_slots: int = 2, remat: str = "none"
) -> Memory:
    """An estimate of the memory of one training step on one device, scanned layers.

    Seen 21 % below (bfloat16, jax 0.10.2) to 14 % above what XLA:CPU sets aside for an AdamW step, over
    widths 64 to 128, 2 to 6 layers, vocabularies to 50,304, both dtypes and all remat policies. The
    probabilities count in full where attention keeps them on a CPU (rows of up to 256 tokens), else a
    chunk of them.

    Args:
      model: a whole ``model`` section of a cell config (defaults may be left out).
      batch: sequences in the (micro-)batch.
      seq: sequence length T.
      optimizer_slots: float32 values kept per parameter (2 for AdamW).
      remat: what the backward pass recomputes: "none", "dots" or "full", as in
        ``scaling.models.lm.build``.

    Returns:
      Parts in bytes. ``activations``: what every layer keeps for the backward pass, and one layer's
      worth at work; ``logits``: those of one chunk of tokens, float32; their gradient takes their place.

    Raises:
      ValueError: an unknown remat policy, or what ``ledger`` refuses.
    """
    n = ledger(model, seq).params_total
    tokens = batch * seq
    width = 2 if model.get("dtype", "float32") == "bfloat16" else 4
    D, F, L = model["d_model"], model["ffn_dim"], model["layers"]
    q, kv = model["heads"] * model["head_dim"], model["kv_heads"] * model["head_dim"]
    in_full = seq * seq <= attention.FULL_LOGITS_ON_CPU
    scores = model["heads"] * seq if in_full else 0
    chunk = 0 if in_full else 4 * 4 * model["heads"] * attention.CHUNKS[0] * attention.CHUNKS[1] / seq
    # Bytes a token and layer: norms keep their input twice in float32 and their output once; queries
    # and keys likewise through their norm and rotation; SwiGLU keeps six arrays; the probabilities
    # are float32, and once more in the compute dtype where that is another. In chunks, attention keeps
    # its output and log-sum-exp instead, and is at work on four arrays of one chunk.
    layer = (
        2 * (8 + width) * D
        + (8 + 2 * width) * q
        + (8 + 2 * width) * kv
        + 6 * width * F
        + ((4 if width == 4 else 6) * scores if in_full else width * q + 4 * model["heads"])
    )
    kept = {"none": layer, "dots": width * (2 * D + q + 2 * kv + 2 * F), "full": width * D}
    if remat not in kept:
        raise ValueError(f"remat is {remat!r}; it must be one of {', '.join(map(repr, kept))}")
    at_work = layer + 8 * scores + chunk
    return Memory(
        params=4 * n,
        gradients=4 * n,
        optimizer=4 * optimizer_slots * n,
        activations=round(tokens * (L * kept[remat] + at_work)),
        logits=4 * cross_entropy.chunk_tokens(tokens, model["vocab"]) * model["vocab"],
    )
