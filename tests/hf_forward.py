"""Llama, Mistral and Qwen3 in plain NumPy, float64, from an exported folder alone."""

import json

import numpy as np


def read_safetensors(path) -> dict:
    """Tensors of a file by its format: a length, a JSON header, then the bytes. bfloat16 comes as float32."""
    raw = path.read_bytes()
    size = int.from_bytes(raw[:8], "little")
    header, data = json.loads(raw[8 : 8 + size]), raw[8 + size :]
    assert header.pop("__metadata__") == {"format": "pt"}
    out = {}
    for name, entry in header.items():
        begin, end = entry["data_offsets"]
        if entry["dtype"] == "BF16":  # the upper half of a float32
            values = (np.frombuffer(data[begin:end], "<u2").astype(np.uint32) << 16).view(np.float32)
        else:
            values = np.frombuffer(data[begin:end], {"F32": "<f4"}[entry["dtype"]])
        out[name] = values.reshape(entry["shape"])
    return out


def read_weights(folder) -> dict:
    """All tensors of a folder, from one file or through the index of several."""
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        return read_safetensors(folder / "model.safetensors")
    weight_map = json.loads(index.read_text())["weight_map"]
    files = {name: read_safetensors(folder / name) for name in set(weight_map.values())}
    assert {n: f for f, tensors in files.items() for n in tensors} == weight_map
    return {name: files[file][name] for name, file in weight_map.items()}


def norm(x, weight, eps):
    return x / np.sqrt(np.mean(x * x, -1, keepdims=True) + eps) * weight


def rotary(x, theta):
    """x [B, T, N, H]: channel i and i + H/2 turn by t theta^(-2i/H)."""
    half = x.shape[-1] // 2
    angle = np.arange(x.shape[1])[:, None] * theta ** (-np.arange(half) / half)
    z = (x[..., :half] + 1j * x[..., half:]) * np.exp(1j * angle)[None, :, None]
    return np.concatenate([z.real, z.imag], -1)


def forward(folder, tokens):
    """int [B, T] to logits [B, T, V] of an exported folder."""
    c = json.loads((folder / "config.json").read_text())
    w = {name: array.astype(np.float64) for name, array in read_weights(folder).items()}
    B, T = tokens.shape
    H, eps = c["head_dim"], c["rms_norm_eps"]
    window = {
        "llama": lambda: None,
        "mistral": lambda: c["sliding_window"],
        "qwen3": lambda: c["sliding_window"] if c["use_sliding_window"] else None,
    }[c["model_type"]]()
    back = np.arange(T)[:, None] - np.arange(T)
    kept = (back >= 0) & (back < (window or T))
    table = w.pop("model.embed_tokens.weight")
    x = table[tokens]
    for i in range(c["num_hidden_layers"]):
        prefix = f"model.layers.{i}."
        layer = {
            n.removeprefix(prefix).removesuffix(".weight"): w.pop(n) for n in list(w) if n.startswith(prefix)
        }
        h = norm(x, layer["input_layernorm"], eps)
        q, k, v = ((h @ layer[f"self_attn.{n}_proj"].T).reshape(B, T, -1, H) for n in "qkv")
        if c["model_type"] == "qwen3":
            q, k = norm(q, layer["self_attn.q_norm"], eps), norm(k, layer["self_attn.k_norm"], eps)
        q, k = rotary(q, c["rope_theta"]), rotary(k, c["rope_theta"])
        groups = c["num_attention_heads"] // c["num_key_value_heads"]
        k, v = np.repeat(k, groups, 2), np.repeat(v, groups, 2)
        scores = np.where(kept, np.einsum("btnh,bsnh->bnts", q, k) / np.sqrt(H), -np.inf)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        x = x + np.einsum("bnts,bsnh->btnh", weights, v).reshape(B, T, -1) @ layer["self_attn.o_proj"].T
        h = norm(x, layer["post_attention_layernorm"], eps)
        gate, up = h @ layer["mlp.gate_proj"].T, h @ layer["mlp.up_proj"].T
        x = x + (gate / (1 + np.exp(-gate)) * up) @ layer["mlp.down_proj"].T
    x = norm(x, w.pop("model.norm.weight"), eps)
    head = table if c["tie_word_embeddings"] else w.pop("lm_head.weight")
    assert table.shape[0] == c["vocab_size"] and not w  # every tensor has a place
    return x @ head.T
