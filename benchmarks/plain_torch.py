"""The transformer in plain PyTorch: ``torch.compile``, its own attention, fused AdamW, autocast.

Imports neither jax nor this project, so that it may run in an environment of its own:

    python benchmarks/plain_torch.py '{"model": {...}, "optim": {...}, "batch": 16, "seq": 1024, "steps": 20}'

prints one line of JSON: seconds a step, the peak of memory, the last loss, the device.
"""

from __future__ import annotations

import contextlib
import json
import statistics
import sys
import time

import torch
import torch.nn.functional as F
from torch import nn


class Norm(nn.Module):
    def __init__(self, width, eps):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(width)), eps

    def forward(self, x):
        x32 = x.float()
        return (x32 * torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + self.eps) * self.weight).to(x.dtype)


def rotate(x, cos, sin):
    a, b = x.float().chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1).to(x.dtype)


class Block(nn.Module):
    def __init__(self, c):
        super().__init__()
        D, F_, H, eps = c["d_model"], c["ffn_dim"], c["head_dim"], c["norm_eps"]
        linear = lambda a, b: nn.Linear(a, b, bias=False)  # noqa: E731
        self.norm1, self.norm2 = Norm(D, eps), Norm(D, eps)
        self.q, self.out = linear(D, c["heads"] * H), linear(c["heads"] * H, D)
        self.k, self.v = linear(D, c["kv_heads"] * H), linear(D, c["kv_heads"] * H)
        self.gate, self.up, self.down = linear(D, F_), linear(D, F_), linear(F_, D)
        if c["qk_norm"]:
            self.q_norm, self.k_norm = Norm(H, eps), Norm(H, eps)
        self.c = c

    def forward(self, x, cos, sin):
        c, (B, T, _) = self.c, x.shape
        h = self.norm1(x)
        q, k, v = (f(h).view(B, T, -1, c["head_dim"]).transpose(1, 2) for f in (self.q, self.k, self.v))
        if c["qk_norm"]:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        shared = c["kv_heads"] < c["heads"]
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=shared)
        x = x + self.out(mixed.transpose(1, 2).reshape(B, T, -1))
        h = self.norm2(x)
        return x + self.down(F.silu(self.gate(h)) * self.up(h))


class LM(nn.Module):
    """Causal over the whole row: a row is one stream."""

    def __init__(self, c, seq):
        super().__init__()
        self.table = nn.Embedding(c["vocab"], c["d_model"])
        nn.init.normal_(self.table.weight, std=c["d_model"] ** -0.5)
        self.layers = nn.ModuleList(Block(c) for _ in range(c["layers"]))
        self.norm = Norm(c["d_model"], c["norm_eps"])
        self.head = nn.Linear(c["d_model"], c["vocab"], bias=False)
        if c["tied"]:
            self.head.weight = self.table.weight
        half = c["head_dim"] // 2
        angle = torch.arange(seq)[:, None] * c["rope_theta"] ** (-torch.arange(half) / half)
        self.register_buffer("cos", angle.cos())
        self.register_buffer("sin", angle.sin())
        self.dtype = getattr(torch, c["dtype"])

    def forward(self, inputs, targets):
        """int64 [B, T] each to the mean cross-entropy, float32."""
        x = self.table(inputs).to(self.dtype)
        for layer in self.layers:
            x = layer(x, self.cos, self.sin)
        return F.cross_entropy(self.head(self.norm(x)).float().flatten(0, 1), targets.flatten())


def load_ours(model: LM, params: dict) -> None:
    """Copies this project's parameters, as NumPy arrays, into the model."""

    def put(parameter, array):
        assert parameter.shape == array.shape
        parameter.data.copy_(torch.tensor(array))

    put(model.table.weight, params["embed"]["table"])
    put(model.norm.weight, params["final_norm"]["scale"])
    if "head" in params:
        put(model.head.weight, params["head"].T)
    b = params["blocks"]
    for i, layer in enumerate(model.layers):
        put(layer.norm1.weight, b["mixer_norm"]["scale"][i])
        put(layer.norm2.weight, b["ffn_norm"]["scale"][i])
        for group, names in (("mixer", ("q", "k", "v", "out")), ("ffn", ("gate", "up", "down"))):
            for name in names:
                put(getattr(layer, name).weight, b[group][name][i].T)
        if layer.c["qk_norm"]:
            put(layer.q_norm.weight, b["mixer"]["q_norm"]["scale"][i])
            put(layer.k_norm.weight, b["mixer"]["k_norm"]["scale"][i])


def step_function(model: LM, optim: dict, device: str):
    """(inputs, targets) to the loss before the update, still on the device; compiled on a GPU."""
    named = list(model.named_parameters())
    groups = [
        {"params": [p for n, p in named if "norm" not in n], "weight_decay": optim["weight_decay"]},
        {"params": [p for n, p in named if "norm" in n], "weight_decay": 0.0},
    ]
    options = {"lr": optim["lr"], "betas": (optim["beta1"], optim["beta2"]), "eps": optim["eps"]}
    adamw = torch.optim.AdamW(groups, **options, fused=device == "cuda")
    forward = torch.compile(model) if device == "cuda" else model
    mixed = model.dtype == torch.bfloat16

    def step(inputs, targets):
        with torch.autocast(device, torch.bfloat16) if mixed else contextlib.nullcontext():
            loss = forward(inputs, targets)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), optim["grad_clip"])
        adamw.step()
        adamw.zero_grad(set_to_none=True)
        return loss.detach()

    return step


def measure(job: dict) -> dict:
    """Seconds a step of a job on the GPU, the median over blocks of 5 steps."""
    torch.set_float32_matmul_precision("high")
    model = LM(job["model"], job["seq"]).cuda()
    step = step_function(model, job["optim"], "cuda")
    tokens = torch.randint(job["model"]["vocab"], (job["batch"], job["seq"] + 1), device="cuda")
    for _ in range(5):
        loss = step(tokens[:, :-1], tokens[:, 1:])
    seconds = []
    for _ in range(max(1, job["steps"] // 5)):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        for _ in range(5):
            loss = step(tokens[:, :-1], tokens[:, 1:])
        torch.cuda.synchronize()
        seconds.append((time.perf_counter() - begin) / 5)
    return {
        "seconds": statistics.median(seconds),
        "peak_bytes": torch.cuda.max_memory_allocated(),
        "loss": float(loss),
        "device": torch.cuda.get_device_name(),
        "version": f"torch {torch.__version__}",
    }


if __name__ == "__main__":
    print(json.dumps(measure(json.loads(sys.argv[1]))))
