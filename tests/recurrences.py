"""The recurrent mixers token by token in NumPy, each of one document: x [T, d_model], parameters, config."""

import numpy as np


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def silu(x):
    return x * sigmoid(x)


def softplus(x):
    return np.log1p(np.exp(x))


def rms(x, scale, eps):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * scale


def convolved(x_TC, p):
    """Taps over this token and those before it, one token at a time."""
    W, out = len(p["conv"]), np.zeros_like(x_TC)
    for t in range(len(x_TC)):
        for i in range(W):
            if t - (W - 1) + i >= 0:
                out[t] += p["conv"][i] * x_TC[t - (W - 1) + i]
    return out + p.get("conv_bias", 0)


def rglru(x, p, cfg):
    N, H = cfg["heads"], cfg["head_dim"]
    u = convolved(x @ p["x"], p)
    heads = u.reshape(-1, N, H)
    i, r = (
        sigmoid(np.einsum("tnh,nhk->tnk", heads, p[f"{g}_gate"]).reshape(u.shape) + p[f"{g}_bias"])
        for g in ("input", "recurrence")
    )
    a = np.exp(-8 * softplus(p["decay"]) * r)
    h, out = np.zeros(u.shape[1]), []
    for t in range(len(u)):
        h = a[t] * h + (1 if t == 0 else np.sqrt(1 - a[t] ** 2)) * i[t] * u[t]
        out.append(h)
    z = x @ p["z"]
    gelu = z / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (z + 0.044715 * z**3)))
    return (gelu * np.array(out)) @ p["out"]


def mamba2(x, p, cfg):
    N, H = cfg["expand"] * cfg["heads"], cfg["head_dim"]
    u, b, c = (silu(convolved(x @ p[k], p["conv"][k])) for k in "xbc")
    u = u.reshape(-1, N, H)
    dt = softplus(x @ p["dt"] + p["dt_bias"])
    S, out = np.zeros((N, cfg["state_dim"], H)), []
    for t in range(len(x)):
        S = np.exp(-np.exp(p["a_log"]) * dt[t])[:, None, None] * S
        S = S + b[t][None, :, None] * (dt[t][:, None] * u[t])[:, None]
        out.append(np.einsum("s,nsh->nh", c[t], S) + p["skip"][:, None] * u[t])
    y = np.array(out).reshape(len(x), -1) * silu(x @ p["z"])
    return rms(y, p["norm"]["scale"], cfg["norm_eps"]) @ p["out"]


def gated_deltanet(x, p, cfg):
    K, H = cfg["heads"], cfg["head_dim"]
    q, k, v = (silu(convolved(x @ p[n], p["conv"][n])).reshape(len(x), -1, H) for n in "qkv")
    N = v.shape[1]
    q, k = (np.repeat(a / np.sqrt((a**2).sum(-1, keepdims=True) + 1e-6), N // K, axis=1) for a in (q, k))
    beta = sigmoid(x @ p["beta"])
    decay = np.exp(-np.exp(p["a_log"]) * softplus(x @ p["dt"] + p["dt_bias"]))
    out = np.zeros((len(x), N, H))
    for n in range(N):
        S = np.zeros((H, H))
        for t in range(len(x)):
            S = decay[t, n] * (S - beta[t, n] * np.outer(k[t, n], k[t, n] @ S))
            S = S + beta[t, n] * np.outer(k[t, n], v[t, n])
            out[t, n] = q[t, n] @ S / np.sqrt(H)
    normed = rms(out, p["norm"]["scale"], cfg["norm_eps"])
    return (normed.reshape(len(x), -1) * silu(x @ p["z"])) @ p["out"]


def mlstm(x, p, cfg):
    N, H = cfg["heads"], cfg["head_dim"]
    q, k, v = ((x @ p[n]).reshape(len(x), N, -1) for n in "qkv")
    i, f = (15 * np.tanh((x @ p[f"{g}_gate"] + p[f"{g}_bias"]) / 15) for g in "if")
    D, out = q.shape[-1], np.zeros((len(x), N, H))
    for n in range(N):
        C, total = np.zeros((D, H)), np.zeros(D)
        for t in range(len(x)):
            C = sigmoid(f[t, n]) * C + np.exp(i[t, n]) * np.outer(k[t, n], v[t, n]) / np.sqrt(D)
            total = sigmoid(f[t, n]) * total + np.exp(i[t, n]) * k[t, n] / np.sqrt(D)
            out[t, n] = q[t, n] @ C / max(abs(q[t, n] @ total), 1)
    centred = out - out.mean(-1, keepdims=True)
    normed = rms(centred, p["norm"]["scale"], cfg["norm_eps"]).reshape(len(x), -1)
    return (sigmoid(x @ p["o_gate"]) * normed) @ p["out"]


def slstm(x, p, cfg):
    """Without the stabiliser: exp of gates of order one is nothing to float64."""
    N, H = cfg["heads"], cfg["head_dim"]
    u = silu(convolved(x, p["conv"]))
    seen = {g: s @ p[w] + p.get(f"{g}_bias", 0) for g, w, s in
            (("z", "z", x), ("i", "i_gate", u), ("f", "f_gate", u), ("o", "o_gate", x))}  # fmt: skip
    c, n, h, out = np.zeros(N * H), np.zeros(N * H), np.zeros(N * H), []
    for t in range(len(x)):
        g = {
            k: seen[k][t] + np.einsum("nh,nhk->nk", h.reshape(N, H), p[f"{k}_recurrent"]).ravel()
            for k in seen
        }
        c = sigmoid(g["f"]) * c + np.exp(g["i"]) * np.tanh(g["z"])
        n = sigmoid(g["f"]) * n + np.exp(g["i"])
        h = sigmoid(g["o"]) * c / n
        out.append(h)
    out = np.array(out).reshape(-1, N, H)
    centred = out - out.mean(-1, keepdims=True)
    return rms(centred, p["norm"]["scale"], cfg["norm_eps"]).reshape(len(x), -1) @ p["out"]


def selective(x, p, cfg, decays):
    u = silu(convolved(x @ p["x"], p["conv"]))
    b, c = u @ p["b"], u @ p["c"]
    raw = u @ p["dt_down"] @ p["dt_up"] + p["dt_bias"]
    S, out = np.zeros((u.shape[1], b.shape[1])), []
    for t in range(len(x)):
        decay, step = decays(raw[t][:, None], b[t], p)
        S = decay * S + step * u[t][:, None] * b[t]
        out.append(S @ c[t] + p["skip"] * u[t])
    return (np.array(out) * silu(x @ p["z"])) @ p["out"]


def mamba(x, p, cfg):
    def decays(raw, key, p):
        step = softplus(raw)
        return np.exp(-np.exp(p["a_log"]) * step), step

    return selective(x, p, cfg, decays)


def longhorn(x, p, cfg):
    """The implicit step, solved: the gradient of |S - S0|^2 + beta (S k - u)^2 is zero; its diagonal form."""

    def decays(raw, key, p):
        step = sigmoid(raw) / (1 + sigmoid(raw) * (key @ key))
        return 1 - step * key**2, step

    return selective(x, p, cfg, decays)


def min_gru(x, p, cfg):
    u = convolved(x, p["conv"])
    f, raw = sigmoid(u @ p["f_gate"] + p["f_bias"]), u @ p["x"]
    candidate = np.where(raw > 0, raw + 0.5, sigmoid(raw))
    h, out = np.zeros(f.shape[1]), []
    for t in range(len(x)):
        h = f[t] * h + (1 - f[t]) * candidate[t]
        out.append(h)
    return np.array(out) @ p["out"]


def qlstm(x, p, cfg):
    u = convolved(x, p["conv"])
    i, f = (sigmoid(u @ p[f"{g}_gate"] + p[f"{g}_bias"]) for g in "if")
    c, out = np.zeros(f.shape[1]), []
    for t in range(len(x)):
        c = f[t] * c + i[t] * np.tanh(u[t] @ p["z"])
        out.append(sigmoid(u[t] @ p["o_gate"]) * np.tanh(c))
    return np.array(out) @ p["out"]


RECURRENCES = {
    "rglru": rglru,
    "mamba": mamba,
    "mamba2": mamba2,
    "longhorn": longhorn,
    "gated_deltanet": gated_deltanet,
    "mlstm": mlstm,
    "slstm": slstm,
    "min_gru": min_gru,
    "qlstm": qlstm,
}
