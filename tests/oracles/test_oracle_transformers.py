"""The model against Hugging Face transformers, weights copied over: logits, loss and gradients.

Needs the ``oracles`` extra; ``make oracles`` sets up an environment with it.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

REASON = "the 'oracles' extra (torch, transformers) is not installed; `make oracles` runs these tests"
torch = pytest.importorskip("torch", reason=REASON)
transformers = pytest.importorskip("transformers", reason=REASON)

from scaling.config import validate_section  # noqa: E402
from scaling.models.lm import build  # noqa: E402
from scaling.models.loss import loss_fn  # noqa: E402

pytestmark = pytest.mark.oracle

BASE = {"d_model": 64, "layers": 3, "heads": 4, "kv_heads": 2, "head_dim": 16, "ffn_dim": 112, "vocab": 97}
B, T = 2, 33
# Both sides compute in float32, in different orders: three layers of sums of about 100 terms.
LOGITS = {"rtol": 1e-4, "atol": 1e-4}

CASES = {
    "Llama, tied": ("Llama", {"qk_norm": False}, {}),
    "Llama, untied": ("Llama", {"qk_norm": False, "tied": False}, {}),
    "Llama, multi-head": ("Llama", {"qk_norm": False, "kv_heads": 4}, {}),
    "Llama, other theta and eps": ("Llama", {"qk_norm": False, "rope_theta": 300.0, "norm_eps": 1e-3}, {}),
    "Mistral, window": ("Mistral", {"qk_norm": False, "local_window": 7}, {"sliding_window": 7}),
    "Qwen3": ("Qwen3", {}, {}),
    "Qwen3, one key-value head, untied": ("Qwen3", {"kv_heads": 1, "tied": False}, {}),
    "Llama with Gemma 2's attention soft-cap": (
        "Llama",
        {"qk_norm": False, "attention_soft_cap": 0.7},
        {"attn_implementation": "gemma2_soft_capped"},
    ),
}


def register_soft_cap(cap):
    """Gemma 2's own attention function, with its soft-cap, for use in another model."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
    from transformers.models.gemma2.modeling_gemma2 import eager_attention_forward

    def forward(module, query, key, value, attention_mask, **options):
        # Without a mask in the call, the causal one: Gemma 2's function applies what it is given.
        size = query.shape[2]
        causal = torch.full((size, size), torch.finfo(query.dtype).min).triu(1)[None, None]
        options["softcap"] = cap
        return eager_attention_forward(module, query, key, value, causal, **options)

    ALL_ATTENTION_FUNCTIONS.register("gemma2_soft_capped", forward)


def shaken(params, seed=1):
    """The parameters with noise, so that no scale is one and attention is far from uniform."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: 1.5 * x + 0.1 * rng.standard_normal(x.shape).astype(np.float32), params)


def weights_by_hf_name(params, cfg):
    """Our parameters under the names and in the layout ([out, in]) of transformers' state dicts."""
    p = jax.tree.map(np.asarray, params)
    out = {
        "model.embed_tokens.weight": p["embed"]["table"],
        "model.norm.weight": p["final_norm"]["scale"],
        "lm_head.weight": p["embed"]["table"] if cfg["tied"] else p["head"].T,
    }
    for i in range(cfg["layers"]):
        block = jax.tree.map(lambda x, i=i: x[i], p["blocks"])
        mixer, ffn, prefix = block["mixer"], block["ffn"], f"model.layers.{i}."
        for ours, theirs in (("q", "q_proj"), ("k", "k_proj"), ("v", "v_proj"), ("out", "o_proj")):
            out[f"{prefix}self_attn.{theirs}.weight"] = mixer[ours].T
        for ours in ("gate", "up", "down"):
            out[f"{prefix}mlp.{ours}_proj.weight"] = ffn[ours].T
        out[prefix + "input_layernorm.weight"] = block["mixer_norm"]["scale"]
        out[prefix + "post_attention_layernorm.weight"] = block["ffn_norm"]["scale"]
        if cfg["qk_norm"]:
            out[prefix + "self_attn.q_norm.weight"] = mixer["q_norm"]["scale"]
            out[prefix + "self_attn.k_norm.weight"] = mixer["k_norm"]["scale"]
    return out


def hf_model(kind, cfg, params, options):
    """A transformers model of the same shape with our weights; every weight named must match."""
    config = getattr(transformers, kind + "Config")(
        vocab_size=cfg["vocab"],
        hidden_size=cfg["d_model"],
        intermediate_size=cfg["ffn_dim"],
        num_hidden_layers=cfg["layers"],
        num_attention_heads=cfg["heads"],
        num_key_value_heads=cfg["kv_heads"],
        head_dim=cfg["head_dim"],
        rms_norm_eps=cfg["norm_eps"],
        rope_theta=cfg["rope_theta"],
        tie_word_embeddings=cfg["tied"],
        max_position_embeddings=256,
        **{"attn_implementation": "eager", **options},
    )
    model = getattr(transformers, kind + "ForCausalLM")(config).eval()
    weights = {k: torch.tensor(np.array(v)) for k, v in weights_by_hf_name(params, cfg).items()}
    model.load_state_dict(weights, strict=True)
    return model


def both(case):
    """(cfg, apply, params, transformers model) of a case."""
    kind, changes, options = CASES[case]
    cfg = validate_section("model", {**BASE, **changes})
    if cfg["attention_soft_cap"]:
        register_soft_cap(cfg["attention_soft_cap"])
    apply, params = build(cfg, seed=0)
    params = shaken(params)
    return cfg, apply, params, hf_model(kind, cfg, params, options)


def tokens(seed=0, size=T):
    return np.random.default_rng(seed).integers(0, BASE["vocab"], (B, size))


@pytest.mark.parametrize("case", CASES)
def test_logits(case):
    _, apply, params, oracle = both(case)
    with torch.no_grad():
        theirs = oracle(torch.tensor(tokens())).logits.numpy()
    ours = np.asarray(jax.jit(apply)(params, tokens()))
    assert theirs.std() > 0.5 and np.all(np.isfinite(theirs))
    np.testing.assert_allclose(ours, theirs, **LOGITS)


@pytest.mark.parametrize("case", ["Mistral, window", "Llama with Gemma 2's attention soft-cap"])
def test_window_and_soft_cap_matter_at_these_sizes(case):
    """The comparison would fail without them."""
    cfg, apply, params, _ = both(case)
    plain, _ = build({**cfg, "local_window": None, "attention_soft_cap": None}, seed=0)
    difference = np.abs(np.asarray(apply(params, tokens())) - np.asarray(plain(params, tokens())))
    assert difference.max() > 100 * LOGITS["atol"]


@pytest.mark.parametrize("case", ["Llama, tied", "Qwen3, one key-value head, untied", "Mistral, window"])
def test_loss_and_every_gradient(case):
    cfg, apply, params, oracle = both(case)
    ids = tokens(size=T + 1)
    logits = oracle(torch.tensor(ids[:, :-1])).logits
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), torch.tensor(ids[:, 1:]).flatten())
    loss.backward()
    batch = {
        "inputs": ids[:, :-1],
        "targets": ids[:, 1:],
        "segment_ids": np.ones((B, T), np.int32),
        "positions": np.arange(T)[None].repeat(B, 0),
        "loss_mask": np.ones((B, T), np.float32),
    }
    (ours, _), gradient = jax.value_and_grad(lambda p: loss_fn(apply, p, batch, 0.0), has_aux=True)(params)
    np.testing.assert_allclose(float(ours), float(loss.detach()), rtol=1e-5)
    by_name = weights_by_hf_name(gradient, cfg)
    for name, parameter in oracle.named_parameters():
        theirs = parameter.grad.numpy()
        # Relative to the largest entry: small entries are differences of large terms.
        np.testing.assert_allclose(
            by_name[name], theirs, rtol=0, atol=1e-4 * np.abs(theirs).max(), err_msg=name
        )


def test_packed_documents_equal_the_oracle_on_each_alone():
    _, apply, params, oracle = both("Qwen3")
    ids, lengths = tokens(), (9, 1, 23)
    segments = np.repeat([1, 2, 3], lengths)[None].repeat(B, 0)
    positions = np.concatenate([np.arange(n) for n in lengths])[None].repeat(B, 0)
    ours = np.asarray(apply(params, ids, segments, positions))
    start = 0
    for n in lengths:
        with torch.no_grad():
            theirs = oracle(torch.tensor(ids[:, start : start + n])).logits.numpy()
        np.testing.assert_allclose(ours[:, start : start + n], theirs, **LOGITS)
        start += n


def test_final_soft_cap_is_that_of_gemma_2():
    cfg, _, params, oracle = both("Qwen3")
    cap = 3.0
    apply, _ = build({**cfg, "logits_soft_cap": cap}, seed=0)
    with torch.no_grad():
        logits = oracle(torch.tensor(tokens())).logits
        # Gemma 2's forward: logits / cap, tanh, times cap.
        theirs = (torch.tanh(logits / cap) * cap).numpy()
    np.testing.assert_allclose(np.asarray(apply(params, jnp.asarray(tokens()))), theirs, **LOGITS)
