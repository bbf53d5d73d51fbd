"""Differential attention, Mamba and mixtures of experts against Hugging Face transformers."""

import jax
import numpy as np
import pytest

REASON = "the 'oracles' extra (torch, transformers) is not installed; `make oracles` runs these tests"
torch = pytest.importorskip("torch", reason=REASON)
transformers = pytest.importorskip("transformers", reason=REASON)

from flax import nnx  # noqa: E402
from oracle_weights import (  # noqa: E402
    B,
    T,
    attention_of,
    block,
    compare,
    feed_forward,
    loaded,
    model_of,
    outside,
    projections,
    shape_of,
    taps,
)

from scaling.config import validate_section  # noqa: E402
from scaling.layers import dt_rank, expert_dim  # noqa: E402
from scaling.models.moe import MoE  # noqa: E402

pytestmark = pytest.mark.oracle


def pre_norms(own, prefix):
    return {
        prefix + "input_layernorm.weight": own["mixer_norm"]["scale"],
        prefix + "post_attention_layernorm.weight": own["ffn_norm"]["scale"],
    }


@pytest.mark.parametrize("kv_heads", [2, 4, 8])
def test_differential_is_diff_llama(kv_heads):
    cfg, apply, params = model_of(family="differential", heads=8, head_dim=8, kv_heads=kv_heads)
    config = transformers.DiffLlamaConfig(
        **shape_of(cfg),
        **attention_of(cfg),
        intermediate_size=cfg["ffn_dim"],
    )
    # theirs pair head i with i + heads / 2, ours those beside each other in a pair of key-value heads
    K, H, D = kv_heads, cfg["head_dim"], cfg["d_model"]

    def theirs(matrix, groups):
        by_pair = matrix.reshape(D, K // 2, 2, groups, H)
        return by_pair.transpose(0, 2, 1, 3, 4).reshape(D, -1).T

    gain = params["blocks"]["mixer"]["norm"]
    gain["scale"] = np.ones_like(gain["scale"])  # theirs has none
    weights = outside(params)
    for i in range(cfg["layers"]):
        own, prefix = block(cfg, params, i), f"model.layers.{i}."
        m, attention = own["mixer"], prefix + "self_attn."
        weights |= pre_norms(own, prefix)
        weights |= feed_forward(own["ffn"], prefix + "mlp.")
        weights |= {attention + name: m[name] for name in m if name.startswith("lambda")}
        weights |= {
            attention + "q_proj.weight": theirs(m["q"], cfg["heads"] // K),
            attention + "k_proj.weight": theirs(m["k"], 1),
            attention + "v_proj.weight": theirs(m["v"], 1),
            attention + "o_proj.weight": m["out"].T,
        }
    compare(apply, params, loaded(transformers.DiffLlamaForCausalLM(config), weights))


def test_mamba():
    cfg, apply, params = model_of(family="mamba", channel_state=6, conv_width=3)
    config = transformers.MambaConfig(
        **shape_of(cfg),
        state_size=cfg["channel_state"],
        layer_norm_epsilon=cfg["norm_eps"],
        expand=cfg["expand"],
        conv_kernel=cfg["conv_width"],
        time_step_rank=dt_rank(cfg),
    )
    weights = outside(params, "backbone.embeddings", "backbone.norm_f")
    for i in range(cfg["layers"]):
        own, prefix = block(cfg, params, i), f"backbone.layers.{i}."
        m, mixer = own["mixer"], prefix + "mixer."
        weights |= {
            prefix + "norm.weight": own["mixer_norm"]["scale"],
            mixer + "in_proj.weight": np.concatenate([m["x"], m["z"]], 1).T,
            mixer + "conv1d.weight": taps(m["conv"]["conv"]),
            mixer + "conv1d.bias": m["conv"]["conv_bias"],
            mixer + "x_proj.weight": np.concatenate([m[k] for k in ("dt_down", "b", "c")], 1).T,
            mixer + "dt_proj.weight": m["dt_up"].T,
            mixer + "dt_proj.bias": m["dt_bias"],
            mixer + "A_log": m["a_log"],
            mixer + "D": m["skip"],
            mixer + "out_proj.weight": m["out"].T,
        }
    compare(apply, params, loaded(transformers.MambaForCausalLM(config), weights))


def expert_weights(ffn, prefix, router):
    """A layer of experts by their names: gate and up in one."""
    return {
        f"{prefix}{router}.weight": ffn["router"].T,
        f"{prefix}experts.gate_up_proj": np.concatenate([ffn["gate"], ffn["up"]], 2).swapaxes(1, 2),
        f"{prefix}experts.down_proj": ffn["down"].swapaxes(1, 2),
    }


def test_mixtral():
    cfg, apply, params = model_of(
        family="moe", experts=5, active_experts=2, expert_fraction=0.5, capacity_factor=2.5
    )
    config = transformers.MixtralConfig(
        **shape_of(cfg),
        **attention_of(cfg),
        intermediate_size=expert_dim(cfg),
        head_dim=cfg["head_dim"],
        num_local_experts=cfg["experts"],
        num_experts_per_tok=cfg["active_experts"],
        rope_parameters={"rope_type": "default", "rope_theta": cfg["rope_theta"]},
    )
    weights = outside(params)
    for i in range(cfg["layers"]):
        own, prefix = block(cfg, params, i), f"model.layers.{i}."
        weights |= projections(own["mixer"], prefix + "self_attn.")
        weights |= pre_norms(own, prefix) | expert_weights(own["ffn"], prefix + "mlp.", "gate")
    compare(apply, params, loaded(transformers.MixtralForCausalLM(config), weights))


def test_experts_weighed_over_all_are_the_layer_of_olmoe():
    from transformers.models.olmoe.modeling_olmoe import OlmoeSparseMoeBlock

    shape = {"d_model": 64, "layers": 1, "heads": 4, "kv_heads": 4, "head_dim": 16, "ffn_dim": 128}
    cfg = validate_section(
        "model",
        {**shape, "family": "moe", "experts": 16, "active_experts": 4, "expert_fraction": 0.25,
         "capacity_factor": 4.0, "router": "all"},
    )  # fmt: skip
    graph, state = nnx.split(MoE(cfg, nnx.Rngs(0)))
    params = jax.tree.map(lambda x: np.asarray(2 * x), nnx.to_pure_dict(state))
    config = transformers.OlmoeConfig(
        hidden_size=64, intermediate_size=expert_dim(cfg), num_experts=16, num_experts_per_tok=4,
        norm_topk_prob=False,
    )  # fmt: skip
    layer = loaded(OlmoeSparseMoeBlock(config), expert_weights(params, "", "gate"))
    x = np.random.default_rng(0).standard_normal((B, T, 64)).astype(np.float32)
    with torch.no_grad():
        theirs = layer(torch.tensor(x)).numpy()
    ours, _ = nnx.merge(graph, params)(x)
    assert theirs.std() > 0.1
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4 * theirs.std())
