"""The scalar memory of xLSTM, whose gates see the state: token by token, with no parallel form."""

import jax
import jax.numpy as jnp
from flax import nnx

from scaling import parametrization
from scaling.models import init
from scaling.models.recurrence import Convolution, HeadNorm, starts

GATES = ("z", "i_gate", "f_gate", "o_gate")
RECURRENT = ("z_recurrent", "i_recurrent", "f_recurrent", "o_recurrent")
BIASES = ("z_bias", None, "f_bias", "o_bias")
NOTHING = -1e30  # the stabiliser before a document: finite, so that no difference is NaN


def cell(raw_NBG, c_NBH, n_NBH, m_NBH):
    """One token: (h, c, n, m) from what the gates see, float32 [N, B, 4 H] (z, i, f, o), and c, n, m before.

    m is a constant to the gradient: h does not depend on it but for rounding.
    """
    z, i, f, o = jnp.split(raw_NBG, 4, axis=-1)
    log_f = jax.nn.log_sigmoid(f)
    m = jax.lax.stop_gradient(jnp.maximum(log_f + m_NBH, i))
    keep, write = jnp.exp(log_f + m_NBH - m), jnp.exp(i - m)
    c = keep * c_NBH + write * jnp.tanh(z)
    n = keep * n_NBH + write
    return jax.nn.sigmoid(o) * c / n, c, n, m


@jax.custom_vjp
def scan_tokens(inputs_TNBG, recurrent_NHG, fresh_TB):
    """h of all tokens, float32 [T, N, B, H].

    The gradient of the recurrent matrices is one product after the backward scan, not a sum in its carry.

    Args:
      inputs_TNBG: what the gates see of the input, float32 [T, N, B, 4 H], in the order of ``cell``.
      recurrent_NHG: one matrix a head, [N, H, 4 H]; h is multiplied in its dtype.
      fresh_TB: bool, the tokens before which the state is new.
    """
    return _forward(inputs_TNBG, recurrent_NHG, fresh_TB)[0]


def _forward(inputs_TNBG, recurrent_NHG, fresh_TB):
    _, N, B, G = inputs_TNBG.shape

    def step(state, token):
        h, c, n, m = state
        x, fresh = token
        fresh = fresh[None, :, None]
        h, m = jnp.where(fresh, 0, h), jnp.where(fresh, NOTHING, m)  # c and n are then kept by exp(NOTHING)
        before = h.astype(recurrent_NHG.dtype)
        raw = x + jnp.einsum("nbh,nhg->nbg", before, recurrent_NHG).astype(jnp.float32)
        state = cell(raw, c, n, m)
        return state, (state[0], (raw, before, c, n, m))

    zero = jnp.zeros((N, B, G // 4), jnp.float32)
    _, (h, saved) = jax.lax.scan(step, (zero, zero, zero, zero + NOTHING), (inputs_TNBG, fresh_TB))
    return h, (saved, recurrent_NHG, fresh_TB)


def _backward(residuals, dout_TNBH):
    saved, recurrent_NHG, fresh_TB = residuals

    def step(later, token):
        dh, dc, dn = later
        dout, (raw, _, c, n, m), fresh = token
        _, pull = jax.vjp(lambda *x: cell(*x, m)[:3], raw, c, n)
        draw, dc, dn = pull((dh + dout, dc, dn))
        dh = jnp.einsum("nbg,nhg->nbh", draw.astype(recurrent_NHG.dtype), recurrent_NHG).astype(jnp.float32)
        return (jnp.where(fresh[None, :, None], 0, dh), dc, dn), draw

    zero = jnp.zeros(dout_TNBH.shape[1:], jnp.float32)
    _, draw = jax.lax.scan(step, (zero,) * 3, (dout_TNBH, saved, fresh_TB), reverse=True)
    drecurrent = jnp.einsum("tnbh,tnbg->nhg", saved[1], draw.astype(saved[1].dtype))
    return draw, drecurrent, None


scan_tokens.defvjp(_forward, _backward)


class SLSTM(nnx.Module):
    """out(norm(h)) with h of the sLSTM (Beck et al. 2024, eqs. 8-17, their stabiliser eqs. 15-17).

        c_t = f_t c_{t-1} + i_t tanh(z_t),  n_t = f_t n_{t-1} + i_t,  h_t = sigmoid(o_t) c_t / n_t
        i_t = exp(i~_t),  f_t = sigmoid(f~_t)

    z, i~, f~ and o are each W x_t + R h_{t-1} + b, R block-diagonal with one block a head; i~ and f~ see x
    through a short convolution and silu (figure 10); i~ has no b, which would cancel in c / n. The state is
    as wide as the stream; h is normed head by head, mean taken away. Forget gates start at time scales of 1
    to 128 tokens (``init.time_scales``).
    """

    def __init__(self, cfg, rngs: nnx.Rngs):
        D, N, H = cfg["d_model"], cfg["heads"], cfg["head_dim"]
        gain = init.residual_gain(parametrization.residual_branches(cfg))
        self.conv = Convolution(rngs, cfg["conv_width"], D, "d_model")
        for name in GATES:
            setattr(self, name, init.matrix(rngs, D, N * H, axes=("d_model", "heads")))
        for name in RECURRENT:
            setattr(self, name, init.block_diagonal(rngs, N, H, "heads"))
        self.z_bias, self.o_bias = init.zeros(N * H, "heads"), init.zeros(N * H, "heads")
        self.f_bias = init.time_scales(rngs, N * H, "heads")
        self.norm = HeadNorm(N, H, cfg["norm_eps"], centred=True)
        self.out = init.matrix(rngs, N * H, D, gain, axes=("heads", "d_model"))
        self.heads = N
        self.dtype = jnp.dtype(cfg["dtype"])
        self.matmul = cfg.get("matmul", jnp.matmul)

    def __call__(self, x_BTD, rope, segment_ids_BT):
        """[B, T, D] to [B, T, D], in the compute dtype; segments None: one document a row."""
        B, T, _ = x_BTD.shape
        u_BTD = self.conv(x_BTD, segment_ids_BT)

        def seen(name, bias, source_BTD):
            raw = self.matmul(source_BTD, getattr(self, name)[...].astype(self.dtype)).astype(jnp.float32)
            biased = raw if bias is None else raw + getattr(self, bias)[...]
            return biased.reshape(B, T, self.heads, -1)

        sources = (x_BTD, u_BTD, u_BTD, x_BTD)
        inputs_BTNG = jnp.concatenate(list(map(seen, GATES, BIASES, sources)), axis=-1)
        recurrent_NHG = jnp.concatenate([getattr(self, name)[...] for name in RECURRENT], axis=-1)
        h_TNBH = scan_tokens(
            inputs_BTNG.transpose(1, 2, 0, 3),
            recurrent_NHG.astype(self.dtype),
            starts(segment_ids_BT, (B, T)).T,
        )
        h_BTNH = h_TNBH.transpose(2, 0, 1, 3).astype(self.dtype)
        return self.matmul(self.norm(h_BTNH).reshape(B, T, -1), self.out[...].astype(self.dtype))
