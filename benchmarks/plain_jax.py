"""The transformer and AdamW in plain ``jax.numpy``: no framework, nothing of this project's.

What a careful person writes in an afternoon: full attention with a mask, full logits, ``jax.grad``,
layers in a Python loop or (``scan``) stacked and scanned, parameters donated.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp


def from_ours(params: dict, scan: bool) -> dict:
    """The same weights as a dict of arrays, ``layers`` a list of dicts, or one dict of stacks for a scan."""
    b = params["blocks"]
    stacked = {"norm1": b["mixer_norm"]["scale"], "norm2": b["ffn_norm"]["scale"]}
    stacked |= {k: b["mixer"][k] for k in ("q", "k", "v", "out")}
    stacked |= {k: b["ffn"][k] for k in ("gate", "up", "down")}
    if "q_norm" in b["mixer"]:
        stacked |= {k: b["mixer"][k]["scale"] for k in ("q_norm", "k_norm")}
    count = stacked["q"].shape[0]
    layers = stacked if scan else [jax.tree.map(lambda x, i=i: x[i], stacked) for i in range(count)]
    out = {"table": params["embed"]["table"], "norm": params["final_norm"]["scale"], "layers": layers}
    return jax.tree.map(jnp.array, out | ({"head": params["head"]} if "head" in params else {}))


def norm(x, scale, eps):
    x32 = x.astype(jnp.float32)
    return (x32 * jax.lax.rsqrt(jnp.mean(x32**2, -1, keepdims=True) + eps) * scale).astype(x.dtype)


def rotate(x, cos, sin):
    a, b = jnp.split(x.astype(jnp.float32), 2, -1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1).astype(x.dtype)


def attention(x, w, cos, sin, mask, cfg):
    B, T, _ = x.shape
    H, K = cfg["head_dim"], cfg["kv_heads"]
    cast = lambda name: w[name].astype(x.dtype)  # noqa: E731
    q, k, v = ((x @ cast(n)).reshape(B, T, -1, H) for n in "qkv")
    if cfg["qk_norm"]:
        q, k = norm(q, w["q_norm"], cfg["norm_eps"]), norm(k, w["k_norm"], cfg["norm_eps"])
    q, k = rotate(q, cos, sin).reshape(B, T, K, -1, H), rotate(k, cos, sin)
    scores = jnp.einsum("btkgh,bskh->bkgts", q, k, preferred_element_type=jnp.float32) / H**0.5
    scores = jnp.where(mask[:, None, None], scores, -1e30)
    mixed = jnp.einsum("bkgts,bskh->btkgh", jax.nn.softmax(scores, -1).astype(x.dtype), v)
    return mixed.reshape(B, T, -1) @ cast("out")


def loss(params, batch, cfg):
    """Mean cross-entropy of a batch, float32; batch and cfg as in this project."""
    dtype, eps = jnp.dtype(cfg["dtype"]), cfg["norm_eps"]
    T = batch["inputs"].shape[1]
    half = cfg["head_dim"] // 2
    angle = batch["positions"][..., None, None] * cfg["rope_theta"] ** (-jnp.arange(half) / half)
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    mask = jnp.tril(jnp.ones((T, T), bool))[None]
    if not cfg["cross_document"]:
        mask &= batch["segment_ids"][:, :, None] == batch["segment_ids"][:, None]

    def block(x, w):
        x = x + attention(norm(x, w["norm1"], eps), w, cos, sin, mask, cfg)
        h = norm(x, w["norm2"], eps)
        gate, up, down = (w[n].astype(dtype) for n in ("gate", "up", "down"))
        return x + (jax.nn.silu(h @ gate) * (h @ up)) @ down

    x = params["table"].astype(dtype)[batch["inputs"]]
    if isinstance(params["layers"], list):
        for w in params["layers"]:
            x = block(x, w)
    else:
        x = jax.lax.scan(lambda x, w: (block(x, w), None), x, params["layers"])[0]
    head = params["head"] if "head" in params else params["table"].T
    logits = jnp.matmul(norm(x, params["norm"], eps), head.astype(dtype), preferred_element_type=jnp.float32)
    hit = jnp.take_along_axis(logits, batch["targets"][..., None], -1)[..., 0]
    nats = jax.nn.logsumexp(logits, -1) - hit
    return jnp.sum(nats * batch["loss_mask"]) / jnp.sum(batch["loss_mask"])


def init(params):
    """(params, first moments, second moments, updates done)."""
    return params, jax.tree.map(jnp.zeros_like, params), jax.tree.map(jnp.zeros_like, params), jnp.int32(0)


def step_function(cfg, optim):
    """The jitted step, (state, batch) to (state, loss): AdamW at a constant rate, clipped by global norm."""
    lr, b1, b2, eps = (optim[k] for k in ("lr", "beta1", "beta2", "eps"))

    @functools.partial(jax.jit, donate_argnums=0)
    def step(state, batch):
        params, mu, nu, count = state
        value, grads = jax.value_and_grad(loss)(params, batch, cfg)
        size = jnp.sqrt(sum(jnp.sum(g * g) for g in jax.tree.leaves(grads)))
        grads = jax.tree.map(lambda g: g * jnp.minimum(1.0, optim["grad_clip"] / size), grads)
        count = count + 1
        mu = jax.tree.map(lambda m, g: b1 * m + (1 - b1) * g, mu, grads)
        nu = jax.tree.map(lambda n, g: b2 * n + (1 - b2) * g * g, nu, grads)

        def update(path, p, m, n):
            decay = 0.0 if "norm" in str(path[-1]) else optim["weight_decay"]
            ratio = (m / (1 - b1**count)) / (jnp.sqrt(n / (1 - b2**count)) + eps)
            return p - lr * (ratio + decay * p)

        return (jax.tree_util.tree_map_with_path(update, params, mu, nu), mu, nu, count), value

    return step
