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
    K, before = W - 1, jnp.concatenate([state_BKC.astype(x_BTC.dtype), x_BTC], axis=1)
    # by distance: dz of the tokens that see so far back
    taps = [_masked(dz_BTC, reach_BT, back) for back in range(W)]
    dw = [jnp.sum(taps[K - i] * before[:, i : i + T].astype(dz_BTC.dtype), axis=(0, 1)) for i in range(W)]
    dbias = jnp.sum(dz_BTC, axis=(0, 1)).astype(bias_C.dtype)
    dx = _transposed(taps, w_WC).astype(x_BTC.dtype)
    # the state by itself: with x in one array it would cost two passes more
    first = [jnp.pad(tap[:, :K], ((0, 0), (K, 0), (0, 0))) for tap in taps]
    dstate = _transposed(first, w_WC)[:, :K].astype(state_BKC.dtype)
    return dx, jnp.stack(dw).astype(w_WC.dtype), dbias, dstate


def _transposed(taps, w_WC):
    """sum_j w_{W-1-j} dz_{t+j}, the j-th of ``taps`` being dz at the tokens that see j back."""
    total = 0
    for back, dz in enumerate(taps):
        # cut and padded in one operation, which XLA fuses: on TPU half the traffic of a slice and a pad
        later = jax.lax.pad(dz, jnp.zeros((), dz.dtype), ((0, 0, 0), (-back, back, 0), (0, 0, 0)))
        total += later * w_WC[-1 - back].astype(dz.dtype)
    return total


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
