"""An estimate of what a training step holds in memory."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from pallas_kernels.cost import attention, gated_delta_rule, selective_scan, ssd
from pallas_kernels.cost import linear_cross_entropy as cross_entropy
from scaling import layers
from scaling.flops.ledger import ledger, routed_tokens


@dataclasses.dataclass(frozen=True)
class Kept:
    """Bytes a token that one layer's mixer or feed-forward keeps for the backward pass.

    Attributes:
      whole: without remat. products: outputs of products with weights alone, its input among them.
      more: beyond ``whole`` while it is at work.
    """

    whole: float
    products: float
    more: float = 0.0

    def for_share(self, share: float) -> Kept:
        """A token of all, of a layer that takes this share of them."""
        return Kept(share * self.whole, share * self.products, share * self.more)


def attention_kept(model: Mapping, seq: int, width: int) -> Kept:
    """Queries and keys twice in float32 and once as they are, through their norm and rotation; values.

    The probabilities are float32, and once more in the compute dtype where that is another. In chunks,
    attention keeps its output and log-sum-exp instead, and is at work on four arrays of one chunk.
    """
    D, N, H = model["d_model"], model["heads"], model["head_dim"]
    q, kv = N * H, model["kv_heads"] * H
    in_full = seq * seq <= attention.FULL_LOGITS_ON_CPU
    scores = N * seq if in_full else 0
    chunk = 0 if in_full else 4 * 4 * N * attention.CHUNKS[0] * attention.CHUNKS[1] / seq
    mixed = (4 if width == 4 else 6) * scores if in_full else width * q + 4 * N
    whole = (8 + width) * D + (8 + 2 * width) * (q + kv) + mixed
    return Kept(whole, width * (D + q + 2 * kv), 8 * scores + chunk)


def rglru_kept(model: Mapping, seq: int, width: int) -> Kept:
    """Two projections, the convolution, gates, decay, input and state in float32, the gated output."""
    D, R = model["d_model"], model["heads"] * model["head_dim"]
    return Kept((8 + width) * D + (6 * width + 36) * R, width * (D + 2 * R))


def mamba2_kept(model: Mapping, seq: int, width: int) -> Kept:
    """Projections, convolutions, what is fed and read, in float32 too, the gate and the norm; states."""
    D, S, H = model["d_model"], model["state_dim"], model["head_dim"]
    N = model["expand"] * model["heads"]
    R = N * H
    chunk = ssd.chunk_for(seq, ssd.XLA_CHUNK)
    whole = (8 + width) * D + (12 + 8 * width) * R + 4 * width * S + 16 * N
    at_work = 16 * R + _state(S, R, seq) + 12 * N * chunk * chunk / seq
    return Kept(whole, width * (D + 2 * R + 2 * S + N), at_work)


def gated_deltanet_kept(model: Mapping, seq: int, width: int) -> Kept:
    """Projections, convolutions, keys of length one, the output through norm and gate; states of chunks."""
    D, K, H = model["d_model"], model["heads"], model["head_dim"]
    N = model["expand"] * K
    q, v = K * H, N * H
    chunk = gated_delta_rule.chunk_for(seq, H, H)
    states = _state(H, v, chunk)
    whole = (8 + width) * D + 2 * (8 + 3 * width) * q + (8 + 7 * width) * v + 16 * N + states
    # queries and keys are repeated for each value head
    return Kept(
        whole, width * (D + 2 * q + 2 * v + 2 * N) + states, 4 * width * v + 24 * N * chunk * chunk / seq
    )


def mlstm_kept(model: Mapping, seq: int, width: int) -> Kept:
    """Projections, values with their weight, the output in float32 through its norm and gate; states."""
    D, N, H, K = model["d_model"], model["heads"], model["head_dim"], layers.key_dim(model)
    q, v = N * K, N * H
    chunk = ssd.chunk_for(seq, ssd.XLA_CHUNK)
    whole = (8 + width) * D + 2 * width * q + (12 + 7 * width) * v + 48 * N
    return Kept(whole, width * (D + 2 * q + 2 * v), _state(K, v, seq) + 12 * N * chunk * chunk / seq)


def slstm_kept(model: Mapping, seq: int, width: int) -> Kept:
    """What the gates see twice over, c, n, m and h, all in float32; the convolution and the norm."""
    D, R = model["d_model"], model["heads"] * model["head_dim"]
    return Kept((8 + 3 * width) * D + (64 + 3 * width) * R, width * (2 * D + 5 * R), 32 * R)


def differential_kept(model: Mapping, seq: int, width: int) -> Kept:
    """Attention twice over, and the difference of both in float32 through its norm."""
    one, q = attention_kept(model, seq, width), model["heads"] * model["head_dim"]
    scores = model["heads"] * seq if seq * seq <= attention.FULL_LOGITS_ON_CPU else 0
    return Kept(one.whole + 40 * q + (10 if width == 4 else 5) * scores, one.products, one.more)


def selective_attention_kept(model: Mapping, seq: int, width: int) -> Kept:
    """Attention over the places of a row, its input and output taken out and put back, the gate's input."""
    places = layers.budget_places(model, seq)
    inside, D = attention_kept(model, places, width).for_share(places / seq), model["d_model"]
    moved = depth_router_kept(model, places / seq, width)
    return Kept(inside.whole + (8 + width) * D + moved.whole, inside.products + moved.products, inside.more)


def mosa_kept(model: Mapping, seq: int, width: int) -> Kept:
    """Attention of each head over its tokens, and of each its input and output; routers and predictors."""
    taken, heads, D = (
        layers.depth_places(model["head_capacity"], seq),
        layers.sparse_heads(model),
        model["d_model"],
    )
    share = taken / seq
    inside = attention_kept({**model, "heads": heads, "kv_heads": heads}, taken, width).for_share(share)
    moved = heads * share * D
    whole = inside.whole + (8 + width) * D + 2 * width * moved + 16 * heads
    return Kept(whole, inside.products + width * moved + 12 * heads, inside.more + 8 * moved)


def checkpoint_attention_kept(model: Mapping, seq: int, width: int) -> Kept:
    """As attention, of as many keys as there are checkpoints; the sum with what a token sees of itself."""
    D, N = model["d_model"], model["heads"]
    q, kv = N * model["head_dim"], model["kv_heads"] * model["head_dim"]
    places = layers.checkpoints(model["segment_length"], seq)
    in_full = seq * places <= attention.FULL_LOGITS_ON_CPU
    scores = N * places if in_full else 0
    chunk = 0 if in_full else 4 * 4 * N * attention.CHUNKS[0] * attention.CHUNKS[1] / seq
    mixed = (4 if width == 4 else 6) * scores + width * q + 4 * N
    whole = (8 + width) * D + (8 + 2 * width) * (q + kv) + mixed + 12 * N + 8 * q
    return Kept(whole, width * (D + q + 2 * kv), 8 * scores + chunk)


def selective_kept(model: Mapping, seq: int, width: int) -> Kept:
    """Projections, the convolution, the step in float32, output and gate; the states of chunks."""
    D, R, S = model["d_model"], layers.inner_width(model), model["channel_state"]
    whole = (8 + width) * D + (16 + 8 * width) * R + 3 * width * S + _state(S, R, selective_scan.CHUNK)
    return Kept(whole, width * (D + 3 * R + 2 * S), 6 * _state(S, R, seq / selective_scan.CHUNK))


def gated_vector_kept(gates: int):
    """Of minGRU and the quasi-recurrent LSTM: the convolution, gates and candidate in float32, the state."""

    def kept(model: Mapping, seq: int, width: int) -> Kept:
        D, R = model["d_model"], layers.inner_width(model)
        whole = (8 + 2 * width) * D + (20 + 8 * gates + width) * R
        return Kept(whole, width * (2 * D + (1 + gates) * R))

    return kept


def monarch_mixer_kept(model: Mapping, seq: int, width: int) -> Kept:
    """Projections and their convolutions, what is convolved and comes of it, and its transform in float32."""
    D, (p, q) = model["d_model"], layers.monarch_lengths(seq)
    transformed = 4 * 2 * q * (p / 2 + 1) * D / seq
    whole = (8 + width) * D + (8 + 8 * width) * D + transformed
    return Kept(whole, width * 5 * D, 3 * transformed)


def moe_kept(model: Mapping, seq: int, width: int) -> Kept:
    """Its input through the norm; of every place of an expert the input, five wide arrays and the output."""
    D, E, k = model["d_model"], model["experts"], model["active_experts"]
    F = layers.expert_dim(model)
    places = E * layers.capacity(E, k, model["capacity_factor"], seq) / seq
    shared = 5 * width * model["shared_experts"] * F
    if model["router"] == "relu":  # weighed place by place, not choice by choice
        whole = (8 + 2 * width) * D + places * (width * (2 * D + 5 * F) + 4 * D) + 17 * E + shared
        return Kept(whole, width * D, 8 * E)
    whole = (8 + 2 * width) * D + places * width * (2 * D + 5 * F) + 12 * E + k * (4 * D + 16) + shared
    return Kept(whole, width * D, 4 * E * k)


def memory_kept(model: Mapping, seq: int, width: int) -> Kept:
    """Its input through the norm, queries and scores in float32, what was found, gate and sum."""
    D, n, N, k = model["d_model"], model["memory_keys"], model["memory_heads"], model["memory_top"]
    q = N * model["head_dim"]
    whole = (12 + 4 * width) * D + (8 + 2 * width) * q + N * (8 * n + 4 * k * k + 40 * k)
    return Kept(whole, width * (2 * D + q), 8 * k * D)


def monarch_kept(model: Mapping, seq: int, width: int) -> Kept:
    """As the dense one, and each product's own middle."""
    D, F = model["d_model"], model["ffn_dim"]
    return Kept((8 + 4 * width) * D + 6 * width * F, width * (5 * D + 2 * F))


def glu_kept(model: Mapping, seq: int, width: int) -> Kept:
    """Its input through the norm, and six arrays."""
    D, F = model["d_model"], model["ffn_dim"]
    return Kept((8 + width) * D + 6 * width * F, width * (D + 2 * F))


def depth_router_kept(model: Mapping, share: float, width: int) -> Kept:
    """The stream in float32; of the tokens taken their input, and what the layer made of them."""
    D = model["d_model"]
    return Kept(4 * D + share * 2 * width * D, share * 2 * width * D)


def _state(key: int, values: int, tokens: float) -> float:
    """A float32 state [key, values] once in ``tokens`` tokens."""
    return 4 * key * values / tokens


MIXERS = {
    "attention": attention_kept,
    "full_attention": attention_kept,
    "differential_attention": differential_kept,
    "selective_attention": selective_attention_kept,
    "mosa": mosa_kept,
    "checkpoint_attention": checkpoint_attention_kept,
    "rglru": rglru_kept,
    "mamba": selective_kept,
    "mamba2": mamba2_kept,
    "gated_deltanet": gated_deltanet_kept,
    "longhorn": selective_kept,
    "mlstm": mlstm_kept,
    "slstm": slstm_kept,
    "min_gru": gated_vector_kept(1),
    "qlstm": gated_vector_kept(3),
    "monarch_mixer": monarch_mixer_kept,
}
FEED_FORWARDS = {"swiglu": glu_kept, "geglu": glu_kept, "moe": moe_kept, "memory": memory_kept,
                 "monarch": monarch_kept}  # fmt: skip


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
    widths 64 to 128, 2 to 6 layers, vocabularies to 50,304, both dtypes and all remat policies; of Mamba
    layers among others in a short stack to 29 % above. The
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
    if remat not in ("none", "dots", "full"):
        raise ValueError(f"remat is {remat!r}; it must be one of 'none', 'dots', 'full'")
    account = ledger(model, seq)
    n, model = account.params_total, account.model
    tokens = batch * seq
    width = 2 if model.get("dtype", "float32") == "bfloat16" else 4

    def parts_of(layer):
        taken = routed_tokens(model, seq) if layer.routed else seq
        feed = [] if layer.ffn == "none" else [FEED_FORWARDS[layer.ffn](model, taken, width)]
        parts = [MIXERS[layer.mixer](model, taken, width), *feed]
        if not layer.routed:
            return parts
        share = taken / seq
        return [*(part.for_share(share) for part in parts), depth_router_kept(model, share, width)]

    parts = [part for layer in layers.layers(model) for part in parts_of(layer)]
    kept = {
        "none": sum(part.whole for part in parts),
        "dots": sum(part.products for part in parts),
        "full": width * model["d_model"] * model["layers"],
    }[remat]
    # one pattern of layers at a time: what a scan's body holds
    at_work = sum(part.whole + part.more for layer in layers.pattern(model) for part in parts_of(layer))
    return Memory(
        params=4 * n,
        gradients=4 * n,
        optimizer=4 * optimizer_slots * n,
        activations=round(tokens * (kept + at_work)),
        logits=4 * cross_entropy.chunk_tokens(tokens, model["vocab"]) * model["vocab"],
    )
