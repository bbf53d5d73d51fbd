"""Our models with noisy weights, and transformers' models that take them: what comparisons share."""

import jax
import numpy as np
import torch

from scaling.config import validate_section
from scaling.layers import pattern
from scaling.models.lm import build

BASE = {"d_model": 64, "layers": 5, "heads": 4, "kv_heads": 2, "head_dim": 16, "ffn_dim": 128, "vocab": 97}
B, T = 2, 150  # more than two chunks of every recurrence
TOKENS = np.random.default_rng(0).integers(0, BASE["vocab"], (B, T))


def model_of(**changes):
    """(model section, apply, parameters with noise, so that no gain is one and no bias zero)."""
    cfg = validate_section("model", {**BASE, "tied": False, "qk_norm": False, **changes})
    apply, params = build(cfg, seed=0)
    rng = np.random.default_rng(1)
    noisy = lambda x: np.asarray(1.3 * x + 0.1 * rng.standard_normal(x.shape), np.float32)  # noqa: E731
    return cfg, apply, jax.tree.map(noisy, params)


def block(cfg, params, i):
    """The parameters of layer i."""
    period = len(pattern(cfg))
    blocks = params["blocks"]
    if period > 1:
        position = i % period
        (blocks,) = (v for k, v in blocks.items() if k.startswith(f"{position}_"))
    return jax.tree.map(lambda x: x[i // period], blocks)


def loaded(model, weights, *, zeros=()):
    """The model with these weights, every one in its place; biases ending in ``zeros`` are zero."""
    weights = {k: torch.tensor(np.array(v)) for k, v in weights.items()}
    state = model.state_dict()
    left = [k for k in state if k not in weights]
    assert all(k.endswith(tuple(zeros)) for k in left), left
    model.load_state_dict({**weights, **{k: torch.zeros_like(state[k]) for k in left}}, strict=True)
    return model.eval()


def compare(apply, params, model):
    with torch.no_grad():
        theirs = model(torch.tensor(TOKENS), use_cache=False).logits.numpy()
    ours = np.asarray(jax.jit(apply)(params, TOKENS))
    assert theirs.std() > 0.5 and np.all(np.isfinite(theirs))
    # both in float32, in different orders: five layers of sums of some hundred terms; of the logits' spread
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4 * max(1, theirs.std()))


def taps(conv):
    """[width, channels] to PyTorch's depthwise [channels, 1, width]."""
    return conv.T[:, None]


def shape_of(cfg):
    """What the configs of all models there take."""
    return {
        "vocab_size": cfg["vocab"],
        "hidden_size": cfg["d_model"],
        "num_hidden_layers": cfg["layers"],
        "tie_word_embeddings": False,
    }


def attention_of(cfg):
    """What the configs of models with attention take besides."""
    return {
        "num_attention_heads": cfg["heads"],
        "num_key_value_heads": cfg["kv_heads"],
        "rms_norm_eps": cfg["norm_eps"],
        "attn_implementation": "eager",
    }


def outside(params, embedding="model.embed_tokens", norm="model.norm"):
    """Embedding, final norm and head."""
    return {
        f"{embedding}.weight": params["embed"]["table"],
        f"{norm}.weight": params["final_norm"]["scale"],
        "lm_head.weight": params["head"].T,
    }


def projections(mixer, prefix):
    """Of attention."""
    names = ("q", "q_proj"), ("k", "k_proj"), ("v", "v_proj"), ("out", "o_proj")
    return {f"{prefix}{theirs}.weight": mixer[ours].T for ours, theirs in names}


def feed_forward(ffn, prefix):
    """Gate, up and down."""
    return {f"{prefix}{k}_proj.weight": ffn[k].T for k in ("gate", "up", "down")}
