"""Depthwise causal convolution over few taps for XLA: shifted products, which it fuses into one pass."""

import jax
import jax.numpy as jnp


def forward(x_BTC, w_WC, bias_C, state_BKC, reach_BT, *, activation, block_sizes=None):
    """y [B, T, C]; K = W - 1 tokens before the first are in the state."""
    del block_sizes  # of the Pallas kernel
    z_BTC = _linear(x_BTC, w_WC, bias_C, state_BKC, reach_BT)
    return (jax.nn.silu(z_BTC) if activation == "silu" else z_BTC).astype(x_BTC.dtype)


def backward(x_BTC, w_WC, bias_C, state_BKC, reach_BT, dy_BTC, *, activation, block_sizes=None):
    """dx, dw, dbias, dstate; the sum before the activation is computed again, not kept."""
    del block_sizes
    dz_BTC = dy_BTC.astype(_wide(x_BTC))
    if activation == "silu":
        z_BTC = _linear(x_BTC, w_WC, bias_C, state_BKC, reach_BT)
        gate = jax.nn.sigmoid(z_BTC)
        dz_BTC = dz_BTC * gate * (1 + z_BTC * (1 - gate))
    W, T = w_WC.shape[0], x_BTC.shape[1]
    full = jnp.concatenate([state_BKC.astype(x_BTC.dtype), x_BTC], axis=1)
    dfull, dw = jnp.zeros(full.shape, dz_BTC.dtype), []
    for i in range(W):
        dz = _masked(dz_BTC, reach_BT, W - 1 - i)
        dw.append(jnp.sum(dz * full[:, i : i + T].astype(dz.dtype), axis=(0, 1)))
        dfull += jnp.pad(dz * w_WC[i].astype(dz.dtype), ((0, 0), (i, W - 1 - i), (0, 0)))
    dbias = jnp.sum(dz_BTC, axis=(0, 1)).astype(bias_C.dtype)
    dx, dstate = dfull[:, W - 1 :].astype(x_BTC.dtype), dfull[:, : W - 1].astype(state_BKC.dtype)
    return dx, jnp.stack(dw).astype(w_WC.dtype), dbias, dstate


def _linear(x_BTC, w_WC, bias_C, state_BKC, reach_BT):
    W, T, dtype = w_WC.shape[0], x_BTC.shape[1], _wide(x_BTC)
    full = jnp.concatenate([state_BKC.astype(x_BTC.dtype), x_BTC], axis=1)
    z = bias_C.astype(dtype)
    for i in range(W):
        z = z + _masked(full[:, i : i + T].astype(dtype) * w_WC[i].astype(dtype), reach_BT, W - 1 - i)
    return z


def _masked(x_BTC, reach_BT, back):
    """Zero where the token ``back`` tokens ago is of another segment."""
    if reach_BT is None or back == 0:
        return x_BTC
    return jnp.where((reach_BT >= back)[..., None], x_BTC, 0)


def _wide(x):
    return jnp.promote_types(x.dtype, jnp.float32)
