"""Mamba: a short convolution and a selective state space, whole by itself."""

import jax
import jax.numpy as jnp
from flax import nnx

from pallas_kernels import selective_scan
from scaling import layers, parametrization
from scaling.models import init
from scaling.models.recurrence import Convolution


class Mamba(nnx.Module):
    """out(y * silu(x W_z)) with y of the selective scan (Gu and Dao 2023, algorithm 2 and section 3.4).

        h_t = exp(-exp(a_log) dt_t) h_{t-1} + (dt_t u_t) b_t^T,  y_t = h_t c_t + skip u_t

    u = silu of a convolution of x W_x; b and c, of ``channel_state``, and dt are projections of u, dt through
    a rank of d_model / 16: dt = softplus(u W_down W_up + dt_bias). The inner width is ``expand`` x d_model.
    At the start exp(a_log) is 1, 2, ... over the state, dt as in ``init.time_steps``.
    """

    def __init__(self, cfg, rngs: nnx.Rngs):
        D, R, S, rank = cfg["d_model"], layers.inner_width(cfg), cfg["channel_state"], layers.dt_rank(cfg)
        gain = init.residual_gain(parametrization.residual_branches(cfg))
        self.z = init.matrix(rngs, D, R, axes=("d_model", "heads"))
        self.x = init.matrix(rngs, D, R, axes=("d_model", "heads"))
        self.b = init.matrix(rngs, R, S, axes=("heads", None))
        self.c = init.matrix(rngs, R, S, axes=("heads", None))
        self.dt_down = init.matrix(rngs, R, rank, axes=("heads", None))
        self.dt_up = init.matrix(rngs, rank, R, axes=(None, "heads"))
        self.conv = Convolution(rngs, cfg["conv_width"], R, "heads")
        self.skip = nnx.Param(jnp.ones(R, jnp.float32), axes=("heads",))
        self.out = init.matrix(rngs, R, D, gain, axes=("heads", "d_model"))
        self.start(rngs, R, S)
        self.dtype = jnp.dtype(cfg["dtype"])
        self.matmul = cfg.get("matmul", jnp.matmul)

    def start(self, rngs: nnx.Rngs, channels: int, state: int) -> None:
        """The step's bias and the decay rates."""
        _, self.dt_bias = init.time_steps(rngs, channels, "heads")
        rates = jnp.arange(1, state + 1, dtype=jnp.float32)
        self.a_log = nnx.Param(jnp.log(jnp.broadcast_to(rates, (channels, state))), axes=("heads", None))

    def __call__(self, x_BTD, rope, segment_ids_BT):
        """[B, T, D] to [B, T, D], in the compute dtype; segments None: one document a row."""
        u_BTR = self.conv(self.product(x_BTD, "x"), segment_ids_BT)
        b_BTS, c_BTS, low_BTK = (self.product(u_BTR, name) for name in ("b", "c", "dt_down"))
        raw_BTR = self.product(low_BTK, "dt_up").astype(jnp.float32) + self.dt_bias[...]
        y_BTR = self.scan(u_BTR, raw_BTR, b_BTS, c_BTS, segment_ids_BT)
        y_BTR = y_BTR + self.skip[...].astype(self.dtype) * u_BTR
        return self.product(y_BTR * jax.nn.silu(self.product(x_BTD, "z")), "out")

    def product(self, x, name: str):
        return self.matmul(x, getattr(self, name)[...].astype(self.dtype))

    def scan(self, u_BTR, raw_BTR, b_BTS, c_BTS, segment_ids_BT):
        """The recurrence; ``raw`` is the step before its non-linearity."""
        rate_RS = -jnp.exp(self.a_log[...])
        dt_BTR = jax.nn.softplus(raw_BTR)
        return selective_scan(u_BTR, dt_BTR, b_BTS, c_BTS, rate_RS, segment_ids=segment_ids_BT)[0]
