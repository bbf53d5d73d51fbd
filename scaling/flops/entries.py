"""The ledger's entries: parameters and FLOPs of each mixer and each feed-forward, ``count`` layers of it."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping

from pallas_kernels.cost import attention, gated_delta_rule, ssd
from scaling import layers


@dataclasses.dataclass(frozen=True)
class Entry:
    """One group of the ledger, all layers together.

    Attributes:
      params: parameters.
      active: those that one token uses; a vocabulary matrix counts whole.
      matmul: forward FLOPs per token of products with weights.
      mixing: forward FLOPs per token of products between tokens, over the pairs kept.
      mixing_full: the same over all pairs, or in chunks as XLA computes them; of experts, their empty places.
      mixing_full_backward: backward FLOPs per token of those; None: twice ``mixing_full``.
      cache_values: values kept per token of context when decoding (keys and values).
      cache_window: tokens of context that are kept at most; None: all.
      cache_share: of the context, what comes here at all.
      stopped: of ``matmul`` and ``mixing``, the products one of whose factors gets no gradient, or a vector
        times a number, so that their backward is once the forward, not twice.
      state_values: values kept when decoding, whatever the context.
      embedding: whether the parameters are vocabulary matrices.
    """

    name: str
    params: int
    active: int
    matmul: int = 0
    mixing: float = 0.0
    mixing_full: float = 0.0
    mixing_full_backward: float | None = None
    cache_values: int = 0
    cache_window: int | None = None
    cache_share: float = 1.0
    stopped: int = 0
    state_values: int = 0
    embedding: bool = False

    @property
    def backward_full(self) -> float:
        """Backward FLOPs per token of products between tokens as XLA computes them."""
        return 2 * self.mixing_full if self.mixing_full_backward is None else self.mixing_full_backward

    @property
    def train_exact(self) -> float:
        """Forward and backward FLOPs per token, over the pairs kept."""
        return 3 * (self.matmul + self.mixing) - self.stopped

    @property
    def train_full(self) -> float:
        """The same as XLA computes them."""
        return 3 * self.matmul - self.stopped + self.mixing_full + self.backward_full

    def for_share(self, share: float) -> Entry:
        """Of layers that take this share of the tokens: costs and active parameters are means over all."""
        backward = self.mixing_full_backward
        return dataclasses.replace(
            self,
            name=f"routed {self.name}",
            active=round(share * self.active),
            matmul=share * self.matmul,
            stopped=share * self.stopped,
            mixing=share * self.mixing,
            mixing_full=share * self.mixing_full,
            mixing_full_backward=None if backward is None else share * backward,
            cache_share=share * self.cache_share,
        )

    def kept_tokens(self, context: int) -> int:
        """Tokens whose keys and values decoding keeps, of ``context`` before."""
        tokens = math.ceil(round(self.cache_share * context, 9))
        return tokens if self.cache_window is None else min(tokens, self.cache_window)


def pairs_per_token(seq: int, window: int | None, causal: bool = True) -> float:
    """Mean number of keys that a query attends to, itself included.

    Args:
      seq: row length T.
      window: keys a query sees, itself included; None for all before it.
      causal: False where it sees as many after it too.
    """
    window_pair = None if window is None else (window - 1, 0 if causal else window - 1)
    return attention.pairs(seq, seq, is_causal=causal, window=window_pair) / seq


def attention_entries(model: Mapping, seq: int, count: int, *, full: bool = False) -> list[Entry]:
    """Grouped-query attention: projections, then scores and values, then the per-head norms.

    Nothing is kept for decoding where attention sees both ways: every step sees the whole row anew.
    """
    D, N, K, H = (model[k] for k in ("d_model", "heads", "kv_heads", "head_dim"))
    window, name = (None, "full attention") if full else (model["local_window"], "attention")
    weights = count * (D * N * H + 2 * D * K * H + N * H * D)
    entries = [
        Entry(f"{name} projections", weights, weights, matmul=2 * weights),
        Entry(
            f"{name} scores and values",
            0,
            0,
            mixing=count * 4 * N * H * pairs_per_token(seq, window, layers.causal(model)),
            mixing_full=count * 4 * N * H * seq,
            cache_values=count * 2 * K * H * layers.causal(model),
            cache_window=window,
        ),
    ]
    if model["qk_norm"]:
        own = "query and key norms" + (", full attention" if full else "")
        entries.append(Entry(own, 2 * count * H, 2 * count * H))
    return entries


def differential_attention_entries(model: Mapping, seq: int, count: int) -> list[Entry]:
    """Attention whose values are two heads wide; four vectors and a norm over a pair of heads.

    XLA computes the scores once and reads the values in two halves; the gradient of the scores is taken for
    each half.
    """
    H = model["head_dim"]
    entries = []
    for entry in attention_entries(model, seq, count):
        if entry.mixing:
            scores, full = entry.mixing / 2, entry.mixing_full / 2
            entry = dataclasses.replace(
                entry, mixing=3 * scores, mixing_full=3 * full, mixing_full_backward=8 * full
            )
        entries.append(dataclasses.replace(entry, name=f"differential {entry.name}"))
    return [*entries, vectors("differential vectors and norm", count * (4 * H + 2 * H), 0)]


def selective_attention_entries(model: Mapping, seq: int, count: int) -> list[Entry]:
    """A gate, and attention of the tokens that the budget pays for; "full" has every place kept for them."""
    tokens, places = layers.budget_tokens(model, seq), layers.budget_places(model, seq)
    entries = []
    for paid, kept in zip(
        attention_entries(model, tokens, count), attention_entries(model, places, count), strict=True
    ):
        entry = paid.for_share(tokens / seq)
        full = kept.mixing_full * places / seq + paid.matmul * (places - tokens) / seq
        entries.append(dataclasses.replace(entry, name=f"selective {paid.name}", mixing_full=full))
    gate = count * model["d_model"]
    return [*entries, Entry("selective gates", gate + count, gate + count, matmul=2 * gate, stopped=2 * gate)]


def mosa_entries(model: Mapping, seq: int, count: int) -> list[Entry]:
    """Attention of each head over its own share of a row, with its own keys and values; who takes whom."""
    taken, heads = layers.depth_places(model["head_capacity"], seq), layers.sparse_heads(model)
    sparse = {**model, "heads": heads, "kv_heads": heads}
    inside = [
        dataclasses.replace(
            e.for_share(taken / seq), name=e.name.replace("full attention", "sparse attention")
        )
        for e in attention_entries(sparse, taken, count, full=True)
    ]
    once, biases = count * model["d_model"] * heads, count * heads
    return [
        *inside,
        weights("sparse attention routers", once),
        Entry("sparse attention predictors", once + biases, once + biases, matmul=2 * once, stopped=2 * once),
    ]


def checkpoint_attention_entries(model: Mapping, seq: int, count: int) -> list[Entry]:
    """Attention to itself and to the checkpoints before; "full" has every place of a checkpoint in a row."""
    s, per_pair = model["segment_length"], count * 4 * model["heads"] * model["head_dim"]
    whole, rest = divmod(seq, s)
    # of the tokens of each segment as many as segments are before it
    pairs = s * whole * (whole - 1) / 2 + rest * whole + seq
    entries = []
    for entry in attention_entries(model, seq, count, full=True):
        name = entry.name.replace("full attention", "checkpoint attention")
        if entry.mixing:
            full = per_pair * layers.checkpoints(s, seq)
            entry = dataclasses.replace(
                entry, mixing=per_pair * pairs / seq, mixing_full=full, cache_share=1 / s
            )
        entries.append(dataclasses.replace(entry, name=name))
    return entries


def rglru_entries(model: Mapping, seq: int, count: int) -> list[Entry]:
    """Griffin's block: two projections in and one out, a convolution, block-diagonal gates, vectors."""
    D, N, H, W = (model[k] for k in ("d_model", "heads", "head_dim", "conv_width"))
    R = N * H
    return [
        weights("RG-LRU projections", count * 3 * D * R),
        weights("RG-LRU gates", count * 2 * N * H * H),
        vectors("RG-LRU convolution and vectors", count * (W * R + R + 3 * R), count * R * W),
    ]


def selective_entries(model: Mapping, seq: int, count: int, *, rates: bool, name: str) -> list[Entry]:
    """Mamba (with ``rates``) and Longhorn: projections, a step of low rank, a state a channel, vectors."""
    D, R, S, W = model["d_model"], layers.inner_width(model), model["channel_state"], model["conv_width"]
    rank = layers.dt_rank(model)
    own = R * (S + 2) if rates else 2 * R  # decay rates, bias of the step, skip
    return [
        weights(f"{name} projections", count * (3 * D * R + R * (2 * S + rank) + rank * R)),
        # a decay for each entry of the state: sums and products that no matrix product holds
        Entry(f"{name} state", 0, 0, mixing=count * 4 * R * S, state_values=count * R * S),
        vectors(f"{name} convolution and vectors", count * (R * (W + 1) + own), count * R * (W - 1)),
    ]


def gated_vector_entries(
    model: Mapping, seq: int, count: int, *, gates: int, biases: int, name: str
) -> list[Entry]:
    """minGRU and the quasi-recurrent LSTM: a convolution, a candidate, ``gates`` gates, a projection out."""
    D, R, W = model["d_model"], layers.inner_width(model), model["conv_width"]
    return [
        weights(f"{name} projections", count * (2 + gates) * D * R),
        vectors(
            f"{name} convolution and vectors", count * (D * (W + 1) + biases * R), count * (R + D * (W - 1))
        ),
    ]


def mamba2_entries(model: Mapping, seq: int, count: int) -> list[Entry]:
    """Mamba-2: projections in and out, a convolution, a state [state_dim, head_dim] a head, vectors."""
    D, H, S, W = (model[k] for k in ("d_model", "head_dim", "state_dim", "conv_width"))
    N = model["expand"] * model["heads"]
    R = N * H
    convolved = R + 2 * S
    return [
        weights("Mamba-2 projections", count * D * (3 * R + 2 * S + N)),
        state("Mamba-2 state", count, N, S, H, ssd.xla_chunked(T=seq, K=1, N=N, D=S, E=H), seq),
        vectors("Mamba-2 convolution and vectors", count * (convolved * (W + 1) + 3 * N + R),
                count * convolved * (W - 1)),
    ]  # fmt: skip


def gated_deltanet_entries(model: Mapping, seq: int, count: int) -> list[Entry]:
    """Gated DeltaNet: projections in and out, a convolution, a state [head_dim, head_dim] a value head."""
    D, K, H, W = (model[k] for k in ("d_model", "heads", "head_dim", "conv_width"))
    N = model["expand"] * K
    convolved = (2 * K + N) * H
    cost = gated_delta_rule.xla_chunked(T=seq, N=N, D=H, E=H)
    return [
        weights("DeltaNet projections", count * D * (2 * K * H + 3 * N * H + 2 * N)),
        # what the state holds under the key is read before it is written
        state("DeltaNet state", count, N, H, H, cost, seq, products=3),
        vectors("DeltaNet convolution and vectors", count * (convolved * W + 2 * N + H),
                count * convolved * (W - 1)),
    ]  # fmt: skip


def mlstm_entries(model: Mapping, seq: int, count: int) -> list[Entry]:
    """mLSTM: projections in and out, gates, a state [key, value + 1] a head, its normaliser beside it."""
    D, N, H, K = model["d_model"], model["heads"], model["head_dim"], layers.key_dim(model)
    cost = ssd.xla_chunked(T=seq, K=N, N=N, D=K, E=H + 1)
    return [
        weights("mLSTM projections", count * D * (2 * N * K + 3 * N * H + 2 * N)),
        state("mLSTM state", count, N, K, H + 1, cost, seq),
        vectors("mLSTM biases and norm", count * (2 * N + N * H), count * N),
    ]


def depth_router_entries(model: Mapping, count: int) -> list[Entry]:
    """Of ``count`` routed layers: the router's number a token, and what foresees the choice by it."""
    once = count * model["d_model"]
    return [
        Entry(name, once + biases, once + biases, matmul=2 * once, stopped=2 * once)
        for name, biases in (("depth routers", 0), ("depth predictors", count))
    ]


def slstm_entries(model: Mapping, seq: int, count: int) -> list[Entry]:
    """sLSTM: projections to four gates and out, block-diagonal recurrent matrices, a convolution, vectors."""
    D, N, H, W = (model[k] for k in ("d_model", "heads", "head_dim", "conv_width"))
    R = N * H
    return [
        weights("sLSTM projections", count * 5 * D * R),
        weights("sLSTM recurrent matrices", count * 4 * N * H * H),
        # c, n, m and h
        vectors(
            "sLSTM convolution and vectors", count * (D * (W + 1) + 4 * R), count * (4 * R + D * (W - 1))
        ),
    ]


def monarch_mixer_entries(model: Mapping, seq: int, count: int) -> list[Entry]:
    """The Monarch mixer: projections, transforms of a row and back by constant matrices, the filter.

    What makes the filter and transforms it is done once a step, whatever the batch, and is not counted: of
    the transforms 1 / (2 rows) of what the rows take.
    """
    D, F, W = (model[k] for k in ("d_model", "filter_dim", "conv_width"))
    p, q = layers.monarch_lengths(seq)
    # there and back: real rows by pairs, then pairs by pairs
    transforms = count * D * 2 * (p * q * (p + 2) + 4 * q * q * (p + 2)) / seq
    made = count * (2 * layers.MONARCH_OCTAVES * F + F + F * D)
    return [
        weights("Monarch mixer projections", count * 4 * D * D),
        Entry("Monarch mixer transforms", 0, 0, mixing=transforms, mixing_full=transforms, stopped=transforms,
              cache_values=count * D),
        Entry("Monarch mixer filter", made, made),
        vectors("Monarch mixer convolution and skip", count * (3 * D * (W + 1) + D), count * 3 * D * (W - 1)),
    ]  # fmt: skip


def glu_entries(model: Mapping, seq: int, count: int) -> list[Entry]:
    """Gate, up and down projections."""
    return [weights("feed-forward", count * 3 * model["d_model"] * model["ffn_dim"])]


def monarch_entries(model: Mapping, seq: int, count: int) -> list[Entry]:
    """Gate, up and down, each of two factors with as many blocks."""
    D, F = model["d_model"], model["ffn_dim"]
    return [weights("Monarch feed-forward", count * 3 * layers.monarch_dim(model) * (D + F))]


def moe_entries(model: Mapping, seq: int, count: int) -> list[Entry]:
    """A router, experts of which a token takes some, shared ones; "full" has every place of every expert.

    ReLU routers count by ``active_experts``, which is what training aims at, so that a cell's cost is known
    before it is trained; the places are computed whoever holds them, so that "full" bounds it from above.
    """
    D, E, k, shared = (model[name] for name in ("d_model", "experts", "active_experts", "shared_experts"))
    expert = count * 3 * D * layers.expert_dim(model)
    places = E * layers.capacity(E, k, model["capacity_factor"], seq) / seq
    entries = [
        weights("router", count * D * E),
        Entry(
            "experts", E * expert, k * expert, matmul=2 * k * expert, mixing_full=2 * (places - k) * expert
        ),
    ]
    return [*entries, weights("shared experts", shared * expert)] if shared else entries


def memory_entries(model: Mapping, seq: int, count: int) -> list[Entry]:
    """Queries, gate and output; all sub-keys; a table of values, of which a token sums some rows."""
    D, n, N, k = model["d_model"], model["memory_keys"], model["memory_heads"], model["memory_top"]
    K = model["head_dim"]
    return [
        weights("memory projections", count * (D * N * K + 2 * D * D)),
        weights("memory keys", count * n * N * K),
        # rows that are looked up and summed: no matrix product holds them
        Entry("memory values", count * n * n * D, count * N * k * D, mixing=count * 2 * N * k * D),
        vectors("memory norm", count * (K // 2), 0),
    ]


def weights(name: str, params: int) -> Entry:
    """Matrices that every token is multiplied by."""
    return Entry(name, params, params, matmul=2 * params)


def vectors(name: str, params: int, state_values: int) -> Entry:
    """What acts channel by channel, and the values of it that decoding keeps (inputs of a convolution)."""
    return Entry(name, params, params, state_values=state_values)


def state(name, count, heads, key, value, chunked, seq, products: int = 2) -> Entry:
    """States [key, value], one a head: ``products`` of that size a token, or XLA's in chunks."""
    forward, backward = chunked
    return Entry(
        name,
        0,
        0,
        mixing=count * products * 2 * heads * key * value,
        mixing_full=count * forward / seq,
        mixing_full_backward=count * backward / seq,
        state_values=count * heads * key * value,
    )


MIXERS: dict[str, Callable] = {
    "attention": attention_entries,
    "full_attention": lambda *args: attention_entries(*args, full=True),
    "differential_attention": differential_attention_entries,
    "selective_attention": selective_attention_entries,
    "mosa": mosa_entries,
    "checkpoint_attention": checkpoint_attention_entries,
    "rglru": rglru_entries,
    "mamba": functools.partial(selective_entries, rates=True, name="Mamba"),
    "mamba2": mamba2_entries,
    "gated_deltanet": gated_deltanet_entries,
    "longhorn": functools.partial(selective_entries, rates=False, name="Longhorn"),
    "mlstm": mlstm_entries,
    "slstm": slstm_entries,
    "min_gru": functools.partial(gated_vector_entries, gates=1, biases=1, name="minGRU"),
    "qlstm": functools.partial(gated_vector_entries, gates=3, biases=2, name="quasi-LSTM"),
    "monarch_mixer": monarch_mixer_entries,
}
FEED_FORWARDS: dict[str, Callable] = {
    "swiglu": glu_entries,
    "geglu": glu_entries,
    "moe": moe_entries,
    "memory": memory_entries,
    "monarch": monarch_entries,
}
