"""The families against Hugging Face transformers, weights copied over: logits of whole models, or a layer.

Needs the ``oracles`` extra; ``make oracles`` sets up an environment with it.
"""

import jax
import numpy as np
import pytest

REASON = "the 'oracles' extra (torch, transformers) is not installed; `make oracles` runs these tests"
torch = pytest.importorskip("torch", reason=REASON)
transformers = pytest.importorskip("transformers", reason=REASON)

from flax import nnx  # noqa: E402
from oracle_weights import (  # noqa: E402
    BASE,
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
from scaling.models.gated_deltanet import GatedDeltaNet  # noqa: E402

pytestmark = pytest.mark.oracle


def gemma_norm(scale):
    """Gemma's norms multiply by 1 + weight."""
    return scale - 1


def test_griffin_is_recurrent_gemma():
    cfg, apply, params = model_of(family="griffin", local_window=9, rope_fraction=0.5, logits_soft_cap=30.0)
    config = transformers.RecurrentGemmaConfig(
        **shape_of(cfg),
        **attention_of(cfg),
        intermediate_size=2 * cfg["ffn_dim"],
        attention_window_size=cfg["local_window"],
        logits_soft_cap=30.0,
    )
    weights = {
        "model.embed_tokens.weight": params["embed"]["table"] / cfg["d_model"] ** 0.5,
        "model.final_norm.weight": gemma_norm(params["final_norm"]["scale"]),
        "lm_head.weight": params["head"].T,
    }
    for i in range(cfg["layers"]):
        own, prefix = block(cfg, params, i), f"model.layers.{i}."
        mixer, temporal = own["mixer"], f"model.layers.{i}.temporal_block."
        weights |= {
            prefix + "temporal_pre_norm.weight": gemma_norm(own["mixer_norm"]["scale"]),
            prefix + "channel_pre_norm.weight": gemma_norm(own["ffn_norm"]["scale"]),
        }
        weights |= feed_forward(own["ffn"], prefix + "mlp_block.")
        if i % 3 == 2:
            weights |= projections(mixer, temporal)
            continue
        heads = (cfg["heads"], cfg["head_dim"])
        weights |= {
            temporal + "linear_y.weight": mixer["z"].T,
            temporal + "linear_x.weight": mixer["x"].T,
            temporal + "linear_out.weight": mixer["out"].T,
            temporal + "conv_1d.weight": taps(mixer["conv"]),
            temporal + "conv_1d.bias": mixer["conv_bias"],
            temporal + "rg_lru.recurrent_param": mixer["decay"],
            temporal + "rg_lru.input_gate_weight": mixer["input_gate"],
            temporal + "rg_lru.input_gate_bias": mixer["input_bias"].reshape(heads),
            temporal + "rg_lru.recurrent_gate_weight": mixer["recurrence_gate"],
            temporal + "rg_lru.recurrent_gate_bias": mixer["recurrence_bias"].reshape(heads),
        }
    # what we have no biases for: projections, which add nothing that a norm does not undo
    biases = [f"{x}.bias" for x in ("o_proj", "gate_proj", "up_proj", "down_proj", "linear_y", "linear_x",
                                    "linear_out")]  # fmt: skip
    model = loaded(transformers.RecurrentGemmaForCausalLM(config), weights, zeros=biases)
    compare(apply, params, model)


def test_mamba2():
    cfg, apply, params = model_of(family="mamba2", state_dim=24, conv_width=3)
    heads = cfg["expand"] * cfg["heads"]
    config = transformers.Mamba2Config(
        **shape_of(cfg),
        num_heads=heads,
        head_dim=cfg["head_dim"],
        state_size=cfg["state_dim"],
        layer_norm_epsilon=cfg["norm_eps"],
        expand=cfg["expand"],
        conv_kernel=cfg["conv_width"],
        n_groups=1,
        chunk_size=32,
    )
    weights = outside(params, "backbone.embeddings", "backbone.norm_f")
    for i in range(cfg["layers"]):
        own = block(cfg, params, i)
        m, prefix = own["mixer"], f"backbone.layers.{i}."
        convolved = [m["conv"][k] for k in "xbc"]
        weights |= {
            prefix + "norm.weight": own["mixer_norm"]["scale"],
            prefix + "mixer.in_proj.weight": np.concatenate([m[k] for k in ("z", *"xbc", "dt")], 1).T,
            prefix + "mixer.conv1d.weight": taps(np.concatenate([c["conv"] for c in convolved], 1)),
            prefix + "mixer.conv1d.bias": np.concatenate([c["conv_bias"] for c in convolved]),
            prefix + "mixer.dt_bias": m["dt_bias"],
            prefix + "mixer.A_log": m["a_log"],
            prefix + "mixer.D": m["skip"],
            prefix + "mixer.norm.weight": m["norm"]["scale"],
            prefix + "mixer.out_proj.weight": m["out"].T,
        }
    compare(apply, params, loaded(transformers.Mamba2ForCausalLM(config), weights))


def test_xlstm():
    cfg, apply, params = model_of(family="xlstm", logits_soft_cap=30.0)
    config = transformers.xLSTMConfig(
        **shape_of(cfg),
        num_heads=cfg["heads"],
        norm_eps=cfg["norm_eps"],
        qk_dim_factor=cfg["key_fraction"],
        ffn_proj_factor=cfg["ffn_dim"] / cfg["d_model"],
        ffn_round_up_to_multiple_of=16,
        output_logit_soft_cap=30.0,
        autocast_kernel_dtype="float32",
    )
    weights = outside(params, "backbone.embeddings", "backbone.out_norm")
    for i in range(cfg["layers"]):
        own = block(cfg, params, i)
        m, ffn, layer = own["mixer"], own["ffn"], f"backbone.blocks.{i}.mlstm_layer."
        ours = ("o_gate", "ogate_preact"), ("i_gate", "igate_preact"), ("f_gate", "fgate_preact")
        weights |= {f"{layer}{k}.weight": m[k].T for k in "qkv"}
        weights |= {f"{layer}{theirs}.weight": m[k].T for k, theirs in (*ours, ("out", "out_proj"))}
        weights |= {f"{layer}{k}gate_preact.bias": m[f"{k}_bias"] for k in "if"}
        weights[layer + "multihead_norm.weight"] = m["norm"]["scale"].reshape(-1)
        block_ = f"backbone.blocks.{i}."
        weights |= {
            block_ + "norm_mlstm.weight": own["mixer_norm"]["scale"],
            block_ + "norm_ffn.weight": own["ffn_norm"]["scale"],
            block_ + "ffn.proj_up_gate.weight": ffn["gate"].T,
            block_ + "ffn.proj_up.weight": ffn["up"].T,
            block_ + "ffn.proj_down.weight": ffn["down"].T,
        }
    compare(apply, params, loaded(transformers.xLSTMForCausalLM(config), weights))


def test_gemma2():
    layers = ["attention+geglu", "full_attention+geglu"]
    caps = {"logits_soft_cap": 30.0, "attention_soft_cap": 2.0}
    cfg, apply, params = model_of(
        family="hybrid", pattern=layers, local_window=9, post_norm=True, layers=5, **caps
    )
    config = transformers.Gemma2Config(
        **shape_of(cfg),
        **attention_of(cfg),
        intermediate_size=cfg["ffn_dim"],
        head_dim=cfg["head_dim"],
        query_pre_attn_scalar=cfg["head_dim"],
        sliding_window=cfg["local_window"],
        layer_types=["sliding_attention", "full_attention"] * 2 + ["sliding_attention"],
        final_logit_softcapping=30.0,
        attn_logit_softcapping=2.0,
    )
    weights = {
        "model.embed_tokens.weight": params["embed"]["table"] / cfg["d_model"] ** 0.5,
        "model.norm.weight": gemma_norm(params["final_norm"]["scale"]),
        "lm_head.weight": params["head"].T,
    }
    norms = (
        ("mixer_norm", "input_layernorm"),
        ("mixer_post_norm", "post_attention_layernorm"),
        ("ffn_norm", "pre_feedforward_layernorm"),
        ("ffn_post_norm", "post_feedforward_layernorm"),
    )
    for i in range(cfg["layers"]):
        own, prefix = block(cfg, params, i), f"model.layers.{i}."
        weights |= projections(own["mixer"], prefix + "self_attn.")
        weights |= feed_forward(own["ffn"], prefix + "mlp.")
        weights |= {f"{prefix}{theirs}.weight": gemma_norm(own[k]["scale"]) for k, theirs in norms}
    compare(apply, params, loaded(transformers.Gemma2ForCausalLM(config), weights))


@pytest.mark.parametrize("expand", [1, 2])
def test_gated_deltanet_is_the_layer_of_qwen3_next(expand):
    from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextGatedDeltaNet

    cfg = validate_section("model", {**BASE, "family": "gated_deltanet", "expand": expand})
    K, H, D = cfg["heads"], cfg["head_dim"], cfg["d_model"]
    N = expand * K
    graph, state = nnx.split(GatedDeltaNet(cfg, nnx.Rngs(0)))
    rng = np.random.default_rng(1)
    m = jax.tree.map(
        lambda x: np.asarray(1.3 * x + 0.1 * rng.standard_normal(x.shape), np.float32),
        nnx.to_pure_dict(state),
    )
    config = transformers.Qwen3NextConfig(
        hidden_size=D,
        linear_num_value_heads=N,
        linear_num_key_heads=K,
        linear_key_head_dim=H,
        linear_value_head_dim=H,
        linear_conv_kernel_dim=cfg["conv_width"],
        rms_norm_eps=cfg["norm_eps"],
        num_hidden_layers=1,
        layer_types=["linear_attention"],
    )
    per_key = lambda x: x.reshape(D, K, -1)  # noqa: E731
    qkvz = np.concatenate([per_key(m[k]) for k in "qkvz"], 2).reshape(D, -1)
    ba = np.concatenate([per_key(m[k]) for k in ("beta", "dt")], 2).reshape(D, -1)
    weights = {
        "in_proj_qkvz.weight": qkvz.T,
        "in_proj_ba.weight": ba.T,
        "conv1d.weight": taps(np.concatenate([m["conv"][k]["conv"] for k in "qkv"], 1)),
        "dt_bias": m["dt_bias"],
        "A_log": m["a_log"],
        "norm.weight": m["norm"]["scale"],
        "out_proj.weight": m["out"].T,
    }
    layer = loaded(Qwen3NextGatedDeltaNet(config, 0), weights)
    x = rng.standard_normal((B, T, D)).astype(np.float32)
    with torch.no_grad():
        theirs = layer(torch.tensor(x)).numpy()
    ours = nnx.merge(graph, m)(x, None, None)
    assert theirs.std() > 0.3
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4)
